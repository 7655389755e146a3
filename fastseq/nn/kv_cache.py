"""The keys and values of the tokens so far, for decoding step by step."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from fastseq.ops.lengths import integers, row_lengths
from fastseq.ops.recurrent import checks


class KVCache:
    """Room for the keys and values of B sequences that grow, each at its own length.

    The cache is for inference: it copies what is appended, and no gradient passes. Its memory doubles when it is full.
    It is contiguous per head, so that attention reads it in place.

    Args:
        batch: B.
        heads: Nk, the heads of keys and values.
        head_dim: E.
        value_dim: Ev; None: E.
        capacity: how many tokens there is room for at first.
        dtype, device: torch's defaults if None.

    Attributes:
        lengths: (B,) int64 on the CPU, how many tokens each sequence has.
        keys, values: (B, Nk, S, E) and (B, Nk, S, Ev), views; S is the length of the longest sequence. Beyond the
            length of a shorter one lies padding.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size that is not positive.

    Example:
        >>> import torch, fastseq
        >>> cache = fastseq.KVCache(batch=2, heads=2, head_dim=16)
        >>> prompts = torch.randn(2, 2, 7, 16)
        >>> cache.append(prompts, prompts, lengths=[7, 4])
        >>> for _ in range(3):
        ...     q, k, v = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
        ...     cache.append(k, v)
        ...     out = fastseq.scaled_dot_product_attention(
        ...         q, cache.keys, cache.values, lengths_k=cache.lengths, causal="lower_right", enable_gqa=True
        ...     )
        >>> out.shape, cache.lengths.tolist()
        (torch.Size([2, 8, 1, 16]), [10, 7])
    """

    @torch.inference_mode(False)  # a tensor that is made in inference mode can only be written to in it
    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        capacity: int = 256,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "value_dim": value_dim, "capacity": capacity}
        for name, size in sizes.items():
            _check_integer(name, size)
            if size <= 0:
                raise ValueError(f"{name} must be greater than 0, got {size}")
        self.lengths = torch.zeros(batch, dtype=torch.int64, device="cpu")
        self._keys = torch.empty(batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self._values = torch.empty(batch, heads, capacity, value_dim, dtype=dtype, device=device)

    def __repr__(self) -> str:
        batch, heads, capacity, head_dim = self._keys.shape
        return (
            f"KVCache(batch={batch}, heads={heads}, head_dim={head_dim}, value_dim={self._values.shape[3]}, "
            f"lengths={self.lengths.tolist()}, capacity={capacity}, dtype={self._keys.dtype})"
        )

    @property
    def capacity(self) -> int:
        """How many tokens there is room for without growing."""
        return self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """(B, Nk, S, E), a view; S is the length of the longest sequence."""
        return self._keys[:, :, : int(self.lengths.max())]

    @property
    def values(self) -> Tensor:
        """(B, Nk, S, Ev), a view."""
        return self._values[:, :, : int(self.lengths.max())]

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor, *, lengths: Tensor | Sequence[int] | None = None) -> None:
        """Adds tokens at the end of every sequence.

        Args:
            key, value: (B, Nk, L, E), (B, Nk, L, Ev), any strides.
            lengths: how many of the L tokens each sequence takes, its first ones; None: all.

        Raises:
            TypeError: not tensors; lengths that are not integers.
            ValueError: shapes that do not fit, lengths out of [0, L].
            RuntimeError: another dtype or device.
        """
        for name, tensor, room in (("key", key, self._keys), ("value", value, self._values)):
            checks.check_tensor(name, tensor)
            wanted = (*room.shape[:2], key.shape[-2] if key.dim() == 4 else "L", room.shape[3])
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, (B, Nk, L, E), got {tuple(tensor.shape)}")
            if tensor.dtype is not room.dtype or tensor.device != room.device:
                raise RuntimeError(
                    f"{name} and cache differ, expected {room.dtype} on {room.device}, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
        batch, _, count, _ = key.shape
        taken = None
        if lengths is not None:
            taken = row_lengths("lengths", lengths, count, "tokens appended", batch, self.lengths.device)
        ends = self.lengths + (count if taken is None else taken)
        if (longest := int(ends.max())) > self.capacity:
            self.grow(max(longest, 2 * self.capacity))
        begins = self.lengths.tolist()
        if taken is None and len(set(begins)) == 1:
            self._keys[:, :, begins[0] : begins[0] + count] = key
            self._values[:, :, begins[0] : begins[0] + count] = value
        else:
            for row, (begin, end) in enumerate(zip(begins, ends.tolist(), strict=True)):
                self._keys[row, :, begin:end] = key[row, :, : end - begin]
                self._values[row, :, begin:end] = value[row, :, : end - begin]
        self.lengths = ends

    @torch.inference_mode(False)
    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens; less than there is now changes nothing."""
        _check_integer("capacity", capacity)
        if capacity <= self.capacity:
            return
        used = int(self.lengths.max())
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
            setattr(self, name, new)

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Empties all sequences, or those with the indices `rows`; the memory stays.

        Raises:
            TypeError: rows that are not integers.
            IndexError: a row that is not there.
        """
        batch = len(self.lengths)
        rows = np.arange(batch) if rows is None else integers("rows", rows)
        if not ((-batch <= rows) & (rows < batch)).all():
            raise IndexError(f"rows must lie in [{-batch}, {batch - 1}], got {rows.tolist()}")
        self.lengths = self.lengths.clone()  # a caller may hold the old ones, which must not change
        self.lengths.numpy()[rows] = 0


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")

"""Variable length: from the caller's lengths, or a PackedSequence's batch sizes, to the rows that are active at each
step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastseq.ops import support


class Rows(NamedTuple):
    """Which rows of a sequence are active at which steps.

    Two forms of the same fact: kernels walk `batch_sizes`, rows numbered by falling length; torch ops mask with
        `lengths`.
    """

    lengths: Tensor | None  # (B,) int64, in the caller's order, on the input's device; None for packed sequences
    batch_sizes: Tensor | None  # (longest,) int64 on the CPU; None if `lengths` cannot be read
    order: Tensor | None  # (B,) int64: the batch index of row b; None: b
    longest: int  # steps to run
    packed: bool


def packed_rows(batch_sizes: Tensor) -> Rows:
    """The rows of a PackedSequence: already sorted by its maker."""
    return Rows(None, batch_sizes, None, batch_sizes.shape[0], True)


def padded_rows(lengths: Tensor | Sequence[int] | int, steps: int, batch: int, device: torch.device) -> Rows | None:
    """Checks `lengths` and sorts them. None where every sequence has full length.

    Args:
        lengths: `batch` integers in [0, steps], any order; a list, a NumPy array or a tensor on any device.

    Raises:
        TypeError: lengths that are not integers (floats, NaN, bools, None).
        ValueError: not `batch` of them, or one out of [0, steps].
    """
    if support.is_compiling() and not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, device="cpu")
    if isinstance(lengths, Tensor) and not _readable(lengths):
        inexact = lengths.is_floating_point() or lengths.is_complex()
        _check_integers(not inexact and lengths.dtype is not torch.bool, lengths)
        _check_count(tuple(lengths.shape), batch)
        return Rows(lengths.to(device=device, dtype=torch.int64).reshape(batch), None, None, steps, False)

    values, steps, batch = _integers(lengths), int(steps), int(batch)  # under torch.jit.trace sizes are tensors
    _check_count(values.shape, batch)
    values = values.reshape(batch)
    if batch and not (values.min() >= 0 and values.max() <= steps):
        wrong = values[(values < 0) | (values > steps)][0]
        raise ValueError(f"lengths must lie in [0, {steps}], the number of steps in the input, got {wrong}")
    values = np.ascontiguousarray(values, dtype=np.int64)
    if (values == steps).all():
        return None
    falling = bool((values[:-1] >= values[1:]).all())
    order = None if falling else torch.from_numpy(np.argsort(-values, kind="stable"))
    ended = np.cumsum(np.bincount(values, minlength=steps + 1))  # rows with a length of at most t
    longest = int(values.max())
    return Rows(
        torch.from_numpy(values.copy()).to(device),
        torch.from_numpy(batch - ended[:longest]),
        order,
        longest,
        False,
    )


def _readable(lengths: Tensor) -> bool:
    # A subclass with a dispatch of its own may have no memory; FakeTensor is one. A trace would keep them as constants.
    plain = type(lengths).__torch_dispatch__ is Tensor.__torch_dispatch__
    observed = support.is_compiling() or support.transformed() or support.tracing() is not None
    return plain and not (observed or lengths.is_meta)


def _integers(lengths: Tensor | Sequence[int] | int) -> np.ndarray:
    if isinstance(lengths, Tensor):
        values = lengths.detach().cpu().resolve_conj().resolve_neg()
        values = values.float().numpy() if values.dtype is torch.bfloat16 else values.numpy()
    else:
        try:
            values = np.asarray(lengths)
        except ValueError as error:
            raise TypeError(f"lengths must be integers, one per sequence, got {lengths!r}") from error
        if values.size == 0:
            values = values.astype(np.int64)
        if values.dtype == object and all(type(n) is int for n in values.flat):  # integers of more than 64 bits
            raise ValueError(f"lengths must be at most the number of steps in the input, got {lengths!r}")
    _check_integers(values.dtype.kind in "iu", lengths)
    return values


def _check_integers(integers: bool, lengths: object) -> None:
    if not integers:
        kind = lengths.dtype if isinstance(lengths, Tensor | np.ndarray) else repr(lengths)
        raise TypeError(f"lengths must be integers, got {kind}")


def _check_count(shape: tuple[int, ...], batch: int) -> None:
    if shape != (batch,) and not (shape == () and batch == 1):
        raise ValueError(f"lengths must have one entry per sequence, shape ({batch},), got shape {tuple(shape)}")

"""One call of attention: its options, checked, and its tensors, brought into four dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastseq.backends.contract import Attention
from fastseq.ops import routing
from fastseq.ops.lengths import check_unread_integers, integers, row_lengths
from fastseq.ops.limits import Limits, assured, in_graph, readable
from fastseq.ops.recurrent import checks

Integers = Tensor | Sequence[int]
ALIGNMENTS = ("upper_left", "lower_right")
_ENDLESS = 2**62  # keys, more than there can be


@lru_cache(256)
def usual(scale: float, is_causal: bool) -> Attention:
    """The options of most calls. The scale is not 0, as 0 and -0 are one key."""
    return Attention(scale, right=0 if is_causal else None)


class Operands(NamedTuple):
    """The tensors of a call in four dimensions: q (B, N, L, D), k (B, Nk, S, D), v (B, Nk, S, E), N a multiple of Nk;
    mask (B|1, N|1, L|1, S|1) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    lead: tuple[int, ...] | None  # the axes that the output has before L; None: B and N, as it is

    def restore(self, result: Tensor) -> Tensor:
        """The output (B, N, L, E), or the lse (B, N, L), as the caller's axes have it."""
        return result if self.lead is None else result.reshape(*self.lead, *result.shape[2:])


def fit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> Operands | None:
    """The operands in four dimensions; None where the shapes do not fit together."""
    if query.dim() == key.dim() == value.dim() == 4 and (mask is None or 2 <= mask.dim() <= 4):
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        batch, heads, queries, depth = query.shape
        key_batch, key_heads, keys, _ = key.shape
        if (
            key_batch == value.shape[0] == batch
            and (key_heads == heads or key_heads == 1 or (enable_gqa and key_heads and heads % key_heads == 0))
            and key_heads == value.shape[1]
            and key.shape[3] == depth
            and value.shape[2] == keys
            and (mask is None or _broadcasts(mask.shape, (batch, heads, queries, keys)))
        ):
            return Operands(query, key, value, mask, None)
    return _fit_any(query, key, value, mask, enable_gqa)


def _fit_any(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> Operands | None:
    """`fit` for any rank and with every broadcast, by views where views will do."""
    ranks = query.dim(), key.dim(), value.dim()
    rank = max(ranks)
    if min(ranks) < (max(rank, 3) if enable_gqa else 2):
        return None
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return None
    axes = max(rank, 3)
    shapes = [(1,) * (axes - t.dim()) + tuple(t.shape) for t in (query, key, value)]
    batch = _broadcast(*(shape[:-3] for shape in shapes))
    heads, key_heads, value_heads = (shape[-3] for shape in shapes)
    if enable_gqa:
        if key_heads != value_heads or key_heads == 0 or heads % key_heads:
            return None
    else:
        common = _broadcast((heads,), (key_heads,), (value_heads,))
        if common is None:
            return None
        (heads,) = common
        if not key_heads == value_heads == 1:
            key_heads = heads
    if batch is None:
        return None
    count = math.prod(batch)

    def four(tensor: Tensor, heads: int) -> Tensor:
        rows = tensor.shape[-2:]
        return tensor.expand(*batch, heads, *rows).reshape(count, heads, *rows)

    if mask is not None:
        # As torch's, it does not enlarge the scores of query and key, though a value may have more heads or rows.
        scored = _broadcast(shapes[0][:-2], (*shapes[1][:-3], 1 if enable_gqa else shapes[1][-3]))
        scores = (*scored, query.shape[-2], key.shape[-2])[-max(ranks[:2]) :]
        if mask.dim() < 2 or not _broadcasts(mask.shape, scores):
            return None
        shape = (1,) * (axes - mask.dim()) + tuple(mask.shape)
        along = (1,) * len(batch) if all(size == 1 for size in shape[:-3]) else batch
        mask = mask.expand(*along, *shape[-3:]).reshape(math.prod(along), *shape[-3:])
    lead = None if rank == 4 else (*batch, heads) if rank > 2 else ()
    return Operands(four(query, heads), four(key, key_heads), four(value, key_heads), mask, lead)


def _broadcasts(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """True where `shape` broadcasts to `wanted` and does not enlarge it."""
    if len(shape) > len(wanted):
        return False
    return all(s in (1, w) for s, w in zip(reversed(shape), reversed(wanted), strict=False))


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return None


def as_number(value: object) -> object:
    """A number for what torch takes for one, NumPy's and tensors of no axes among them; all else as it is."""
    if isinstance(value, Tensor):
        known = value.dim() == 0 and not (value.requires_grad or value.is_complex()) and readable(value)
        return value.item() if known else value
    return float(value) if isinstance(value, Real) else value


def check_band(causal: object, is_causal: bool, window: object) -> tuple[int | None, int | None, bool]:
    """left, right and lower_right of `Attention`, out of the caller's causal, is_causal and window."""
    if causal is not None and causal not in ALIGNMENTS:
        raise ValueError(f"causal must be None, 'upper_left' or 'lower_right', got {causal!r}")
    if is_causal and causal == "lower_right":
        raise ValueError("is_causal=True aligns the upper left corner, got causal='lower_right' beside it")
    left = right = None
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise TypeError(f"window must be a pair (left, right), got {window!r}")
        left, right = (_reach(side, reach) for side, reach in zip(("left", "right"), window, strict=True))
    if causal or is_causal:
        right = 0
    return left, right, causal == "lower_right"


def _reach(side: str, reach: object) -> int | None:
    if reach is None:
        return None
    if not isinstance(reach, int) or isinstance(reach, bool):
        raise TypeError(f"window must hold integers or None, got {reach!r} on the {side}")
    if reach < -1:
        raise ValueError(f"window must hold numbers of keys, or None or -1 for all, got {reach} on the {side}")
    return None if reach == -1 or reach >= _ENDLESS else reach


def check_softcap(softcap: object, dtype: torch.dtype) -> float:
    """softcap as a number, 0 for none, for a query of this dtype."""
    if softcap is None:
        return 0.0
    if not isinstance(softcap, float | int) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a number or None, got {type(softcap).__name__}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or 0 or None for none, got {softcap}")
    # As a number of the dtype that is computed in: inf * tanh(s / inf) is NaN. A gradient times the cap must fit, too.
    computed = torch.finfo(torch.promote_types(dtype, torch.float32))
    return min(max(float(softcap), computed.tiny), computed.max * computed.eps) if softcap else 0.0


def check_slopes(slopes: object, q: Tensor, batch: int) -> Tensor | None:
    """alibi_slopes as (B, N) float32."""
    if slopes is None:
        return None
    checks.check_tensor("alibi_slopes", slopes)
    heads = q.shape[1]
    if not slopes.is_floating_point():
        raise TypeError(f"alibi_slopes must be floats, got dtype {slopes.dtype}")
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), N or (B, N), got {tuple(slopes.shape)}"
        )
    if slopes.device != q.device:
        raise RuntimeError(f"query and alibi_slopes are not at the same device, found {q.device} and {slopes.device}")
    if torch.is_grad_enabled() and slopes.requires_grad:
        raise RuntimeError("alibi_slopes must not require grad: attention gives them none, pass alibi_slopes.detach()")
    return slopes.float().expand(batch, heads)


def check_lengths(
    operands: Operands, lengths_q: Integers | None, lengths_k: Integers | None
) -> tuple[Tensor | None, Tensor | None]:
    """The lengths of a padded batch, None for those that are full."""
    if lengths_q is None and lengths_k is None:
        return None, None
    if operands.lead is not None:
        axes = len(operands.lead) + 2
        raise ValueError(f"lengths_q and lengths_k need 4-D query, key and value, (B, N, L, E), got {axes}-D")
    batch, _, queries, _ = operands.q.shape
    device = operands.q.device
    rows = (("lengths_q", lengths_q, queries, "queries"), ("lengths_k", lengths_k, operands.k.shape[2], "keys"))
    return tuple(
        None if lengths is None else row_lengths(name, lengths, most, what, batch, device)
        for name, lengths, most, what in rows
    )


class Packed(NamedTuple):
    """One side of a packed batch."""

    starts: Tensor  # (B,) int64
    lengths: Tensor  # (B,) int64
    longest: int


def check_packed(
    operands: Operands, mask: Tensor | None, cu_seqlens_q: Integers | None, cu_seqlens_k: Integers | None
) -> tuple[Packed, Packed]:
    """Both sides of a packed batch."""
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if value is None:
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k must both be given or both be None, got {name}=None")
    if mask is not None:
        raise ValueError("attn_mask cannot be given with cu_seqlens: a packed batch has no (L, S) scores")
    if operands.q.shape[0] != 1 or (operands.lead is not None and len(operands.lead) != 1):
        raise ValueError(
            "cu_seqlens need query, key and value as (N, total length, E), or with a batch axis of 1, "
            f"got a query of shape {tuple(operands.restore(operands.q).shape)}"
        )
    q = _cumulative("cu_seqlens_q", cu_seqlens_q, operands.q.shape[2], operands.q.device)
    k = _cumulative("cu_seqlens_k", cu_seqlens_k, operands.k.shape[2], operands.q.device)
    if q.starts.shape != k.starts.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must describe the same number of sequences, "
            f"got {q.starts.shape[0]} and {k.starts.shape[0]}"
        )
    return q, k


@routing.inlined
def _cumulative(name: str, cu_seqlens: Integers, total: int, device: torch.device) -> Packed:
    if not readable(cu_seqlens):
        limits, checked = Limits(name, total, None), False
        if not isinstance(cu_seqlens, Tensor):
            cu_seqlens, checked = in_graph(limits, cu_seqlens)
        check_unread_integers(name, cu_seqlens)
        _check_bounds(name, tuple(cu_seqlens.shape))
        bounds = cu_seqlens.to(device=device, dtype=torch.int64)
        bounds = bounds if checked else assured(limits, bounds)
        return Packed(bounds[:-1], bounds.diff(), total)
    bounds = integers(name, cu_seqlens).astype(np.int64)
    _check_bounds(name, bounds.shape)
    Limits(name, int(total), None).check(bounds)  # under torch.jit.trace sizes are tensors
    lengths = np.diff(bounds)
    return Packed(torch.from_numpy(bounds[:-1].copy()), torch.from_numpy(lengths), int(lengths.max(initial=0)))


def _check_bounds(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{name} must have shape (B + 1,), got {shape}")

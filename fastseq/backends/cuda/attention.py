"""The attention functions of `fastseq.backends.native` on tensors of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastseq.backends.contract import Attention, Refused
from fastseq.backends.cuda.library import compute_dtype, library, stream_of, to_device

__all__ = ["attention_backward", "attention_forward"]


def attention_forward(
    call: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    *,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `native.attention_forward`: (out, lse). Lengths and starts are on the CPU."""
    _check_heads(q, k, v)
    gaps = _gaps(call.lengths_q, call.starts_q, q)
    if out is None:
        out = _empty_heads(q, v.shape[-1], gaps)
    lse = (q.new_zeros if gaps else q.new_empty)(q.shape[:3], dtype=torch.float64) if return_lse else None
    library().attention_forward(
        call, q, k, v, bias, allowed, out, lse, placed=_placed(call, q.device),
        new_parts=partial(q.new_empty, dtype=compute_dtype(q.dtype)), stream=stream_of(q.device),
    )  # fmt: skip
    return out, lse


def attention_backward(
    call: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As `native.attention_backward`, but for the tensors to write into: (dq, dk, dv, dbias), None where `needs` says
    so. `out` is not read.
    """
    _check_heads(q, k, v)
    needs_q, needs_k, needs_v, needs_bias = needs
    q_gaps, k_gaps = _gaps(call.lengths_q, call.starts_q, q), _gaps(call.lengths_k, call.starts_k, k)
    dq = _empty_heads(q, q.shape[-1], q_gaps) if needs_q else None
    dk = _empty_heads(k, k.shape[-1], k_gaps) if needs_k else None
    dv = _empty_heads(v, v.shape[-1], k_gaps) if needs_v else None
    dbias = None
    if needs_bias and bias is not None:
        dbias = q.new_empty(bias.shape, dtype=compute_dtype(q.dtype))
    delta = q.new_empty(q.shape[:3], dtype=torch.float64)
    library().attention_backward(
        call, q, k, v, bias, allowed, lse, dout, dlse, dq=dq, dk=dk, dv=dv, dbias=dbias, delta=delta,
        placed=_placed(call, q.device), stream=stream_of(q.device),
    )  # fmt: skip
    return dq, dk, dv, dbias if dbias is None else dbias.to(q.dtype)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What is asked of tensors before outputs can be made like them; the binding checks the rest."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise Refused(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise Refused(f"{name} must have 4 dimensions, got {tensor.dim()}")


def _empty_heads(like: Tensor, size: int, zeros: bool) -> Tensor:
    """A tensor like `like` but for its last size, in its layout where that is the same, else contiguous."""
    if like.shape[3] == size:
        return torch.zeros_like(like) if zeros else torch.empty_like(like)
    return (like.new_zeros if zeros else like.new_empty)(*like.shape[:3], size)


def _gaps(lengths: Tensor | None, starts: Tensor | None, rows: Tensor) -> bool:
    """True where a packed batch has rows that belong to no sequence."""
    return starts is not None and lengths is not None and int(lengths.sum()) < rows.shape[2]


def _placed(call: Attention, device: torch.device) -> tuple[Tensor | None, ...]:
    return tuple(to_device(n, device) for n in (call.lengths_q, call.lengths_k, call.starts_q, call.starts_k))

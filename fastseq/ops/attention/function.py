"""Attention on checked tensors: the kernels behind autograd, or the composite."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastseq.backends.contract import Refused
from fastseq.ops import routing
from fastseq.ops.attention import formula
from fastseq.ops.attention.spec import Attention
from fastseq.ops.autograd import c_apply, composite_backward, needs_grad, save, saved
from fastseq.ops.memory import unit_stride

_TENSORS = ("lengths_q", "lengths_k", "starts_q", "starts_k", "alibi_slopes")  # of an `Attention`


def attend(
    call: Attention,
    backend: ModuleType | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    *,
    keep_layout: bool = True,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output (B, N, L, E) and, if wanted, the lse (B, N, L), of checked tensors. From kernels the lse is float64.

    Args:
        backend: what `routing.route` answered for these tensors, none of them empty; None for torch ops.
        q, k, v: (B, N, L, D), (B, Nk, S, D), (B, Nk, S, E).
        bias: (B|1, N|1, L|1, S|1), added to the scores.
        allowed: (B|1, N|1, L|1, S|1) bool, True where a query may see a key.
        keep_layout: the output in the query's memory layout, where D = E; False: contiguous.
    """
    seed = None
    if call.dropout_p:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    if backend is not None and call.dropout_p != 1:
        number = 0 if seed is None else seed.item()
        try:
            if needs_grad(q, k, v, bias):
                return _apply(call, backend, number, keep_layout, q, k, v, bias, allowed)
            return _forward(call, backend, number, keep_layout, q, k, v, bias, allowed, want_lse)
        except Refused:
            pass
    return formula.attention(call, q, k, v, bias, allowed, seed)


def _forward(
    call: Attention,
    backend: ModuleType,
    seed: int,
    keep_layout: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    out = _output(q, v.shape[3], keep_layout)
    options = _options(call, seed, bias, allowed)
    return backend.attention_forward(
        unit_stride(q), unit_stride(k), unit_stride(v), return_lse=want_lse, out=out, **options
    )


def _options(call: Attention, seed: int, bias: Tensor | None, allowed: Tensor | None) -> dict[str, Any]:
    options = call.options()
    if bias is not None:
        options["bias"] = bias
    if allowed is not None:
        options["allowed"] = allowed
    if call.alibi_slopes is not None:
        options["alibi_slopes"] = call.alibi_slopes
    if call.dropout_p:
        options |= {"dropout_p": call.dropout_p, "seed": seed}
    return options


def _output(q: Tensor, size: int, keep_layout: bool) -> Tensor:
    """An empty (B, N, L, E) of its own, as autograd forbids changes of a view that a Function made."""
    if keep_layout and q.shape[3] == size:
        out = torch.empty_like(q)  # torch's rule where q is expanded or has gaps, and the fastest call
        if out.stride(3) == 1:
            return out
    return q.new_empty(*q.shape[:3], size)


class AttentionFunction(torch.autograd.Function):
    """Attention over the kernels.

    `AttentionFunction.apply(call, backend, seed, keep_layout, q, k, v, bias, allowed)` returns the output
    (B, N, L, E) and the lse (B, N, L), float64: `call` is an `Attention`, `backend` a module with `attention_forward`
    and `attention_backward`, the rest as in `attend`. q, k, v and bias get gradients.

    Kept for the backward are the tensors given, the output and the lse; the weights are computed again, tile by tile,
    and so is the dropout, from its seed. With `create_graph=True` the gradients come from torch ops.

    Source: Dao et al., "FlashAttention", 2022.

    Example:
        >>> import torch
        >>> from fastseq import backends
        >>> from fastseq.ops import Attention, AttentionFunction
        >>> q = torch.randn(2, 3, 5, 8, requires_grad=True)
        >>> if (backend := backends.select("attention")) is not None:
        ...     out, lse = AttentionFunction.apply(Attention(8**-0.5), backend, 0, True, q, q, q, None, None)
        ...     out.sum().backward()
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Attention,
        backend: ModuleType,
        seed: int,
        keep_layout: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        out, lse = _forward(call, backend, seed, keep_layout, q, k, v, bias, allowed, True)
        ctx.set_materialize_grads(False)
        # Those of the call too: a change in place is noticed, and checkpointing gives those of its second forward.
        plain = call.lengths_q is call.lengths_k is call.starts_q is call.alibi_slopes is None
        others = () if plain else tuple(getattr(call, name) for name in _TENSORS)
        save(ctx, q, k, v, bias, allowed, out, lse, *others)
        ctx.how = call, backend, seed
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        """Gradients of q, k, v and bias, None for those that need none."""
        if dout is None and dlse is None:
            return (None,) * 9
        q, k, v, bias, allowed, out, lse, *others = saved(ctx)
        call, backend, seed = ctx.how
        if others:
            call = call._replace(**dict(zip(_TENSORS, others, strict=True)))
        needs = ctx.needs_input_grad[4:8]
        if not routing.kernels_differentiate((dout, dlse)):
            grads = composite_backward(
                lambda q, k, v, bias: formula.attention(call, q, k, v, bias, allowed, seed),
                (q, k, v, bias),
                (dout, dlse),
                needs,
            )
        else:
            grads = backend.attention_backward(
                unit_stride(q),
                unit_stride(k),
                unit_stride(v),
                out,
                lse,
                torch.zeros_like(out) if dout is None else unit_stride(dout),
                dlse=dlse,
                needs=needs,
                **_options(call, seed, bias, allowed),
            )
        return None, None, None, None, *grads, None


class PlainAttentionFunction(torch.autograd.Function):
    """Attention over the kernels without masks, dropout and lse, where tiny calls are as long as what surrounds them.

    `PlainAttentionFunction.apply(backend, scale, right, q, k, v)` returns the output (B, N, L, D): q (B, N, L, D), k
    and v (B, Nk, S, D), unit strides along the last axis; `right` is how many keys after its own place a query sees,
    None for all. As `AttentionFunction` otherwise, and with its source.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: ModuleType, scale: float, right: int | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """See the class."""
        out, lse = backend.attention_forward(
            q, k, v, scale=scale, right=right, return_lse=True, out=torch.empty_like(q)
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = backend, scale, right
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        """Gradients of q, k and v, None for those that need none."""
        q, k, v, out, lse = ctx.saved_tensors
        backend, scale, right = ctx.how
        needs = ctx.needs_input_grad[3:]
        if not routing.kernels_differentiate((dout,)):
            call = Attention(scale, right=right)
            grads = composite_backward(
                lambda q, k, v: formula.attention(call, q, k, v, None, None, None),
                (q, k, v),
                (dout, None),
                needs,
            )
            return None, None, None, *grads
        *grads, _ = backend.attention_backward(
            q, k, v, out, lse, unit_stride(dout), scale=scale, right=right, needs=(*needs, False)
        )
        return None, None, None, *grads


def heads_of(x: Tensor, count: int, heads: int, batch_first: bool) -> tuple[Tensor, ...]:
    """`count` tensors (B, N, L, D) as views of (B, L, count * N * D), or (L, B, ...), that holds them side by side."""
    first, second, size = x.shape
    x = x.view(first, second, count, heads, size // (count * heads))
    return x.permute(2, 0, 3, 1, 4).unbind() if batch_first else x.permute(2, 1, 3, 0, 4).unbind()


class SelfAttentionFunction(torch.autograd.Function):
    """Attention over the kernels of queries, keys and values that lie side by side, as one projection gives them.

    `SelfAttentionFunction.apply(backend, heads, right, batch_first, qkv)` returns the output with its heads side by
    side, (B, L, E): qkv is (B, L, 3 * E), or (L, B, ...) where not `batch_first`; `right` as in
    `PlainAttentionFunction`. The gradient of qkv is written in place, where three tensors would have to be joined: 2 %
    of the training step of MultiheadAttention.
    """

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, heads: int, right: int | None, batch_first: bool, qkv: Tensor) -> Tensor:
        """See the class."""
        out, lse = self_attention(backend, heads, right, batch_first, qkv, True)
        ctx.save_for_backward(qkv, out, lse)
        ctx.how = backend, heads, right, batch_first
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        """The gradient of qkv."""
        qkv, out, lse = ctx.saved_tensors
        backend, heads, right, batch_first = ctx.how

        def outputs(x: Tensor) -> Tensor:
            return heads_of(x, 1, heads, batch_first)[0]

        scale = outputs(out).shape[3] ** -0.5
        if not routing.kernels_differentiate((dout,)):

            def composite(qkv: Tensor) -> tuple[Tensor]:
                call = Attention(scale, right=right)
                result, _ = formula.attention(call, *heads_of(qkv, 3, heads, batch_first), None, None, None)
                result = result.transpose(1, 2) if batch_first else result.permute(2, 0, 1, 3)
                return (result.flatten(2),)

            return None, None, None, None, *composite_backward(composite, (qkv,), (dout,), (True,))
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = heads_of(dqkv, 3, heads, batch_first)
        backend.attention_backward(
            *heads_of(qkv, 3, heads, batch_first), outputs(out), lse, outputs(dout.contiguous()), scale=scale,
            right=right, needs=(True, True, True, False), dq=dq, dk=dk, dv=dv,
        )  # fmt: skip
        return None, None, None, None, dqkv


def self_attention(
    backend: ModuleType, heads: int, right: int | None, batch_first: bool, qkv: Tensor, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The output, as that of `SelfAttentionFunction`, and the lse (B, N, L)."""
    first, second, size = qkv.shape
    out = qkv.new_empty(first, second, size // 3)
    q, k, v = heads_of(qkv, 3, heads, batch_first)
    _, lse = backend.attention_forward(
        q,
        k,
        v,
        scale=q.shape[3] ** -0.5,
        right=right,
        return_lse=return_lse,
        out=heads_of(out, 1, heads, batch_first)[0],
    )
    return out, lse


_apply = c_apply(AttentionFunction)
apply_plain = c_apply(PlainAttentionFunction)
apply_self_attention = c_apply(SelfAttentionFunction)

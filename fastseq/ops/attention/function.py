"""Attention on checked tensors: the kernels behind autograd, or the composite."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.backends.contract import Attention, Refused
from fastseq.ops import routing
from fastseq.ops.attention import formula
from fastseq.ops.autograd import c_apply, composite_backward, needs_grad, save, saved
from fastseq.ops.memory import unit_stride, unit_strides

_TENSORS = ("lengths_q", "lengths_k", "starts_q", "starts_k", "alibi_slopes")  # of an `Attention`


class Form(NamedTuple):
    """How the tensors of a call come and go."""

    keep_layout: bool = True  # see `attend`; D = E
    want_lse: bool = False
    heads: int = 0  # of queries, keys and values that lie side by side in one tensor; 0: they are three tensors
    batch_first: bool = True  # that tensor is (B, L, 3*N*D), as one projection gives it; False: (L, B, 3*N*D)

    def views(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """The `count` tensors (B, N, L, D) that lie side by side in x."""
        first, second, size = x.shape
        x = x.view(first, second, count, self.heads, size // (count * self.heads))
        return x.permute(2, 0, 3, 1, 4).unbind() if self.batch_first else x.permute(2, 1, 3, 0, 4).unbind()

    def join(self, x: Tensor) -> Tensor:
        """One tensor (B, N, L, D) with its heads side by side."""
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(2)


# Of a call without masks, dropout and tensors among its options, where tiny calls are as long as what surrounds them.
PLAIN = Form()


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
        keep_layout: q, k and v have unit strides along the last axis, and the output gets the query's memory layout
            where D = E. False: any strides, and a contiguous output.
    """
    if call.dropout_p:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
        call = call._replace(seed=seed if backend is None else seed.item())
    if backend is not None and call.dropout_p != 1:
        form = Form(keep_layout and q.shape[3] == v.shape[3], want_lse)
        try:
            if not needs_grad(q, k, v, bias):
                return _forward(call, backend, form, want_lse, q, k, v, bias, allowed)
            results = apply_attention(call, backend, form, q, k, v, bias, allowed)
            return results if want_lse else (results, None)
        except Refused:
            pass
    return formula.attention(call, q, k, v, bias, allowed)


def self_attend(call: Attention, backend: ModuleType, heads: int, batch_first: bool, qkv: Tensor) -> Tensor:
    """The output (B, L, N*D), or (L, B, N*D), of queries, keys and values that lie side by side, see `Form`."""
    form = Form(True, False, heads, batch_first)
    if needs_grad(qkv):
        return apply_attention(call, backend, form, qkv)
    return _forward(call, backend, form, False, qkv)[0]


def _forward(
    call: Attention,
    backend: ModuleType,
    form: Form,
    return_lse: bool,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    # The output is a tensor of its own: autograd forbids changes of a view that a Function made.
    if form.heads:
        first, second, size = q.shape
        out = q.new_empty(first, second, size // 3)
        (heads,) = form.views(out, 1)
        q, k, v = form.views(q, 3)
        return out, backend.attention_forward(call, q, k, v, return_lse=return_lse, out=heads)[1]
    if form.keep_layout:
        out = torch.empty_like(q)  # torch's rule where q is expanded or has gaps, and the fastest call
        if out.stride(3) != 1:
            out = q.new_empty(q.shape)
    else:
        q, k, v = unit_strides(q, k, v)
        out = q.new_empty(*q.shape[:3], v.shape[3])
    return backend.attention_forward(call, q, k, v, bias, allowed, return_lse=return_lse, out=out)


class AttentionFunction(torch.autograd.Function):
    """Attention over the kernels.

    `AttentionFunction.apply(call, backend, form, q, k, v)`, or with bias and allowed after v, returns the output
    (B, N, L, E), or with `form.want_lse` also the lse (B, N, L), float64: `call` is an `Attention`, `backend` a module
    with `attention_forward` and `attention_backward`, `form` a `Form`, the rest as in `attend`. q, k, v and bias get
    gradients.

    With `form.heads`, `apply(call, backend, form, qkv)` returns the output with its heads side by side. The gradient of
    qkv is written in place, where three tensors would have to be joined: 2 % of the training step of
    MultiheadAttention.

    Kept for the backward are the tensors given, the output and the lse; the weights are computed again, tile by tile,
    and so is the dropout, from its seed. With `create_graph=True` the gradients come from torch ops.

    Source: Dao et al., "FlashAttention", 2022.

    Example:
        >>> import torch
        >>> from fastseq import backends
        >>> from fastseq.ops import Attention, AttentionFunction
        >>> from fastseq.ops.attention.function import Form
        >>> q = torch.randn(2, 3, 5, 8, requires_grad=True)
        >>> if (backend := backends.select("attention")) is not None:
        ...     out = AttentionFunction.apply(Attention(8**-0.5), backend, Form(), q, q, q)
        ...     out.sum().backward()
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Attention,
        backend: ModuleType,
        form: Form,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        bias: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the class."""
        ctx.how = call, backend, form
        if form is PLAIN:
            out, lse = backend.attention_forward(call, q, k, v, return_lse=True, out=torch.empty_like(q))
            ctx.save_for_backward(q, k, v, out, lse)
            return out
        out, lse = _forward(call, backend, form, True, q, k, v, bias, allowed)
        if form.heads:
            ctx.save_for_backward(q, out, lse)
            return out
        # Those of the call too: a change in place is noticed, and checkpointing gives those of its second forward.
        none = call.lengths_q is call.lengths_k is call.starts_q is call.alibi_slopes is None
        tensors = () if none else tuple(getattr(call, name) for name in _TENSORS)
        save(ctx, q, k, v, out, lse, bias, allowed, *tensors)
        if not form.want_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple:
        """Gradients of q, k, v and bias, None for those that need none."""
        call, backend, form = ctx.how
        needs = ctx.needs_input_grad[3:]
        if dout is None and dlse is None:
            return (None,) * (3 + len(needs))
        if form.heads:
            return None, None, None, _self_backward(call, backend, form, *ctx.saved_tensors, dout)
        if form is PLAIN:
            q, k, v, out, lse = ctx.saved_tensors
            bias = allowed = None
        else:
            q, k, v, out, lse, bias, allowed, *tensors = saved(ctx)
            if tensors:
                call = call._replace(**dict(zip(_TENSORS, tensors, strict=True)))
        wanted = (*needs, False)[:4]  # of bias, where it is not given
        if not routing.kernels_differentiate((dout, dlse)):
            grads = composite_backward(
                lambda q, k, v, bias: formula.attention(call, q, k, v, bias, allowed),
                (q, k, v, bias),
                (dout, dlse),
                wanted,
            )
        else:
            if not form.keep_layout:
                q, k, v = unit_strides(q, k, v)
            dout = torch.zeros_like(out) if dout is None else unit_stride(dout)
            grads = backend.attention_backward(call, q, k, v, bias, allowed, out, lse, dout, dlse, wanted)
        return (None, None, None, *grads, None)[: 3 + len(needs)]


def _self_backward(
    call: Attention, backend: ModuleType, form: Form, qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> Tensor | None:
    if not routing.kernels_differentiate((dout,)):

        def composite(qkv: Tensor) -> tuple[Tensor]:
            return (form.join(formula.attention(call, *form.views(qkv, 3), None, None)[0]),)

        return composite_backward(composite, (qkv,), (dout,), (True,))[0]
    dqkv = torch.empty_like(qkv)
    dq, dk, dv = form.views(dqkv, 3)
    (out,), (dout,) = form.views(out, 1), form.views(dout.contiguous(), 1)
    backend.attention_backward(
        call, *form.views(qkv, 3), None, None, out, lse, dout, None, (True, True, True, False), dq=dq, dk=dk, dv=dv
    )
    return dqkv


apply_attention = c_apply(AttentionFunction)

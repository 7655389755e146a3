"""A layer as one opaque op in the graphs of torch.compile: no unrolled time loop to compile, and the kernels run
inside.

An op cannot hand the kernels' saved values from its forward to its backward without fixing their layout in the graph,
so the backward op runs the forward again.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastseq.ops import routing
from fastseq.ops.lengths import padded_rows
from fastseq.ops.recurrent import formula, kernels
from fastseq.ops.recurrent.spec import Cell, Layer, Results, Weights


def layer(call: Layer, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Weights) -> Results:
    """As `formula.layer`, for padded sequences."""
    y, h_n, c_n, c_all = recurrent_layer(
        x,
        h_0,
        c_0,
        [w for direction in weights for w in direction if w is not None],
        None if call.rows is None else call.rows.lengths,
        call.reset,
        call.cell.name,
        list(call.reverse),
        call.want_c,
        call.float_state,
    )
    return Results(y, h_n, c_n if call.cell.has_c else None, c_all if call.want_c else None)


def _cell(name: str) -> Cell:
    from fastseq.ops import CELLS  # their modules import this one

    return CELLS[name]


def _call(
    x: Tensor,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    *options: bool,
) -> tuple[Layer, ModuleType, list[Tensor | None]]:
    """The call, who computes it, and its weights with None for absent biases."""
    backend = routing.backend_of("recurrent", x)
    if backend is None:
        raise RuntimeError(
            "this graph was compiled for the kernels, which are switched off: call torch._dynamo.reset()"
        )
    rows = None if lengths is None else padded_rows(lengths, x.shape[0], x.shape[1], x.device)
    if len(weights) < 4 * len(reverse):
        weights = [w for d in range(len(reverse)) for w in (*weights[2 * d : 2 * d + 2], None, None)]
    return Layer(_cell(cell), tuple(reverse), rows, reset, *options), backend, list(weights)


# Lists hold no None: a list with one in it is no list of tensors to autograd, and what it holds gets no gradients.
@torch.library.custom_op("fastseq::recurrent_layer", mutates_args=())
def recurrent_layer(
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    want_c: bool,
    float_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and c_all of `spec.Results`; empty tensors where the cell has no c or c_all is not wanted.

    The weights are those of each direction in turn, two or with biases four.
    """
    call, backend, weights = _call(x, weights, lengths, reset, cell, reverse, want_c, float_state)
    if call.rows is not None and not call.rows.longest:
        directions = [tuple(weights[start : start + 4]) for start in range(0, len(weights), 4)]
        results = formula.layer(call, x, h_0, c_0, directions)
    else:
        results, _ = kernels.forward(call, backend, x, h_0, c_0, weights)
    y, h_n, c_n, c_all = (x.new_empty(0) if r is None else r.contiguous() for r in results)
    return y, h_n, c_n, c_all


@recurrent_layer.register_fake
def _(x, h_0, c_0, weights, lengths, reset, cell, reverse, want_c, float_state):
    steps, batch, _ = x.shape
    spec = _cell(cell)
    output, hidden = weights[1].shape[1], weights[1].shape[0] // spec.gates
    dtype = torch.float32 if float_state else x.dtype
    y = x.new_empty(steps, batch, output * len(reverse))
    h_n = x.new_empty(len(reverse), batch, output, dtype=dtype)
    c_n = x.new_empty(len(reverse), batch, hidden, dtype=dtype) if spec.has_c else x.new_empty(0)
    c_all = x.new_empty(steps, batch, hidden * len(reverse)) if want_c else x.new_empty(0)
    return y, h_n, c_n, c_all


@torch.library.custom_op("fastseq::recurrent_layer_backward", mutates_args=())
def recurrent_layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    needs: Sequence[bool],
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    want_c: bool,
    float_state: bool,
) -> list[Tensor]:
    """The gradients of those of x, h_0, c_0 and the weights that `needs` marks."""
    inputs = x, h_0, c_0, *weights
    call, backend, weights = _call(x, weights, lengths, reset, cell, reverse, want_c, float_state)
    if call.rows is not None and not call.rows.longest:  # the states passed through, and nothing else
        found = [None, *(None if g is None else g.clone() for g in (dh_n, dc_n)), *[None] * len(weights)]
    else:
        (y, *_), saved = kernels.forward(call, backend, x, h_0, c_0, weights, save=True)
        wanted = iter(needs[3:])
        all_needs = (*needs[:3], *(w is not None and next(wanted) for w in weights))
        grads, isa = (dy, dh_n, dc_n, dc_all), backend.active_isa()
        found = kernels.backward(call, backend, x, h_0, c_0, weights, y, saved, isa, grads, all_needs)
    found = [*found[:3], *(g for g, w in zip(found[3:], weights, strict=True) if w is not None)]
    return [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None else g.contiguous()
        for t, g, need in zip(inputs, found, needs, strict=True)
        if need
    ]


@recurrent_layer_backward.register_fake
def _(dy, dh_n, dc_n, dc_all, needs, x, h_0, c_0, weights, *others):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip((x, h_0, c_0, *weights), needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    x, h_0, c_0, weights, lengths, reset, *ctx.options = inputs
    ctx.weights = len(weights)
    ctx.save_for_backward(x, h_0, c_0, *weights, lengths, reset)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh_n, dc_n, dc_all):
    x, h_0, c_0, *others = ctx.saved_tensors
    weights, (lengths, reset) = others[: ctx.weights], others[ctx.weights :]
    needs_x, needs_h_0, needs_c_0, needs_weights, *_ = ctx.needs_input_grad
    needs = [needs_x, needs_h_0, needs_c_0, *needs_weights]
    cell, _, want_c, _ = ctx.options
    dc_n, dc_all = dc_n if _cell(cell).has_c else None, dc_all if want_c else None
    found = iter(
        recurrent_layer_backward(dy, dh_n, dc_n, dc_all, needs, x, h_0, c_0, weights, lengths, reset, *ctx.options)
    )
    dx, dh_0, dc_0, *dweights = (next(found) if need else None for need in needs)
    return dx, dh_0, dc_0, dweights, *[None] * 6


recurrent_layer.register_autograd(_backward, setup_context=_setup_context)

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

from fastseq import backends
from fastseq.ops.lengths import padded_rows
from fastseq.ops.recurrent import formula, kernels
from fastseq.ops.recurrent.spec import Direction, Layer, Results, States, Weights, known_cell


def layer(call: Layer, x: Tensor, states: States, weights: Weights) -> Results:
    """As `formula.layer`, for padded sequences."""
    given = [s for s in states if s is not None]
    if given:  # zeros for the others
        given = [_zeros(call, i, given[0], weights[0]) if s is None else s for i, s in enumerate(states)]
    flat = recurrent_layer(
        x,
        given,
        [w for direction in weights for w in direction if w is not None],
        None if call.rows is None else call.rows.lengths,
        call.reset,
        call.cell.name,
        list(call.reverse),
        call.every_state,
        call.float_state,
    )
    return Results.of(call, flat)


def _zeros(call: Layer, place: int, other: Tensor, weights: Direction) -> Tensor:
    w_hh = weights[1]
    return other.new_zeros(*other.shape[:2], w_hh.shape[0] // len(call.cell.gates) if place else w_hh.shape[1])


def _call(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    *options: bool,
) -> tuple[Layer, ModuleType, States, list[Tensor | None]]:
    """The call, who computes it, and its states and weights with None for absent ones."""
    backend = backends.select_for("recurrent", x)
    if backend is None:
        raise RuntimeError(
            "this graph was compiled for the kernels, which are switched off: call torch._dynamo.reset()"
        )
    rows = None if lengths is None else padded_rows(lengths, x.shape[0], x.shape[1], x.device)
    if len(weights) < 4 * len(reverse):
        weights = [w for d in range(len(reverse)) for w in (*weights[2 * d : 2 * d + 2], None, None)]
    call = Layer(known_cell(cell), tuple(reverse), rows, reset, *options)
    return call, backend, tuple(states) or (None,) * (1 + len(call.cell.states)), list(weights)


# Lists hold no None: a list with one in it is no list of tensors to autograd, and what it holds gets no gradients.
@torch.library.custom_op("fastseq::recurrent_layer", mutates_args=())
def recurrent_layer(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    every_state: bool,
    float_state: bool,
) -> list[Tensor]:
    """The tensors of `Results`, in a row.

    The states are all of the cell's, or none for zeros; the weights those of each direction in turn, two or with biases
    four.
    """
    call, backend, states, weights = _call(x, states, weights, lengths, reset, cell, reverse, every_state, float_state)
    if call.rows is not None and not call.rows.longest:
        directions = [tuple(weights[start : start + 4]) for start in range(0, len(weights), 4)]
        results = formula.layer(call, x, states, directions)
    else:
        results, _ = kernels.forward(call, backend, x, states, weights)
    return [t.contiguous() for t in (results.y, *results.last, *results.every)]


@recurrent_layer.register_fake
def _(x, states, weights, lengths, reset, cell, reverse, every_state, float_state):
    steps, batch, _ = x.shape
    spec, directions = known_cell(cell), len(reverse)
    output, hidden = weights[1].shape[1], weights[1].shape[0] // len(spec.gates)
    dtype = torch.float32 if float_state else x.dtype
    y = x.new_empty(steps, batch, output * directions)
    sizes = output, *[hidden] * len(spec.states)
    last = [x.new_empty(directions, batch, size, dtype=dtype) for size in sizes]
    every = [x.new_empty(steps, batch, hidden * directions) for _ in spec.states] if every_state else []
    return [y, *last, *every]


@torch.library.custom_op("fastseq::recurrent_layer_backward", mutates_args=())
def recurrent_layer_backward(
    grads: Sequence[Tensor],
    given: Sequence[bool],
    needs: Sequence[bool],
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    every_state: bool,
    float_state: bool,
) -> list[Tensor]:
    """The gradients of those of x, the states and the weights that `needs` marks.

    `grads` are those of the results that `given` marks; those of the others are zero.
    """
    inputs = x, *states, *weights
    call, backend, states, weights = _call(x, states, weights, lengths, reset, cell, reverse, every_state, float_state)
    found = iter(grads)
    grads = Results.of(call, [next(found) if there else None for there in given])
    wanted = iter(needs)
    all_needs = tuple(t is not None and next(wanted) for t in (x, *states, *weights))
    if call.rows is not None and not call.rows.longest:  # the states passed through, and nothing else
        dstates = [None if g is None else g.clone() for g in grads.last]
        found = [None, *dstates, *[None] * len(weights)]
    else:
        (y, *_), saved = kernels.forward(call, backend, x, states, weights, save=True)
        found = kernels.backward(call, backend, x, states, weights, y, saved, backend.active_isa(), grads, all_needs)
    found = [g for g, t in zip(found, (x, *states, *weights), strict=True) if t is not None]
    return [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None else g.contiguous()
        for t, g, need in zip(inputs, found, needs, strict=True)
        if need
    ]


@recurrent_layer_backward.register_fake
def _(grads, given, needs, x, states, weights, *others):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip((x, *states, *weights), needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    x, states, weights, lengths, reset, *ctx.options = inputs
    ctx.counts = len(states), len(weights)
    ctx.save_for_backward(x, *states, *weights, lengths, reset)
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    x, *others, lengths, reset = ctx.saved_tensors
    states, weights = others[: ctx.counts[0]], others[ctx.counts[0] :]
    needs_x, needs_states, needs_weights, *_ = ctx.needs_input_grad
    needs = [needs_x, *needs_states, *needs_weights]
    given = [g is not None for g in grads]
    grads = [g for g in grads if g is not None]
    found = iter(recurrent_layer_backward(grads, given, needs, x, states, weights, lengths, reset, *ctx.options))
    dx, *dothers = (next(found) if need else None for need in needs)
    return dx, dothers[: ctx.counts[0]], dothers[ctx.counts[0] :], *[None] * 6


recurrent_layer.register_autograd(_backward, setup_context=_setup_context)

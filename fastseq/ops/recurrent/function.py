"""One layer of any recurrent cell, in one or two directions, and one step of it: kernels behind autograd.

`run_layer` and `run_step` choose who computes (`routing.route`); `RecurrentFunction` and `StepFunction` are the
`torch.autograd.Function`s over the kernels of a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastseq import backends
from fastseq.backends.contract import Refused
from fastseq.ops import autograd, routing
from fastseq.ops.autograd import c_apply, composite_backward, needs_grad
from fastseq.ops.lengths import Rows, padded_rows
from fastseq.ops.memory import unit_strides
from fastseq.ops.recurrent import checks, formula, graph, kernels
from fastseq.ops.recurrent.spec import Cell, Direction, Layer, Output, OutputAndStates, Results, States, Weights
from fastseq.ops.routing import Route


def run_layer(
    call: Layer,
    x: Tensor,
    states: States,
    weights: Weights,
    route: Route,
    backend: ModuleType | None,
    records: bool,
    panels: Sequence[Any] | None = None,
) -> Results:
    """One layer on checked tensors.

    Args:
        x: (T, B, I), or (R, I) where `call.rows` is packed.
        states: of each state (D, B, H), or None for zeros.
        weights: per direction.
        route, backend: what `routing.route` answered for these tensors.
        records: whether autograd must record the call: `needs_grad` of all these tensors.
        panels: packed weights per direction; only where nothing is recorded.
    """
    rows, reset = call.rows, call.reset
    if route is Route.KERNELS and ((rows is None and reset is None) or _kernels_read(x, rows, reset)):
        flat = weights[0] if len(weights) == 1 else sum(weights, ())
        try:
            if records:
                return Results.of(call, _apply_layer(call, backend, x, *states, *flat))
            return kernels.forward(call, backend, x, states, flat, panels)[0]
        except Refused:
            pass
    results = (graph.layer if route is Route.GRAPH else formula.layer)(call, x, states, weights)
    return _laid_out(call, results)


def has_kernels(cell: str) -> bool:
    """True where there are kernels for a cell of this name. torch.compile takes the answer for a constant."""
    backend = backends.select("recurrent")
    return backend is not None and cell in backend.CELLS


has_kernels._dynamo_marked_constant = True


def _laid_out(call: Layer, results: Results) -> Results:
    return results._replace(y=results.y.transpose(0, 1)) if call.batch_first else results


def _kernels_read(x: Tensor, rows: Rows | None, reset: Tensor | None) -> bool:
    # What route() does not see. Lengths that only torch can read, such as those of a subclass, have no batch sizes.
    return (rows is None or (rows.batch_sizes is not None and rows.longest > 0)) and (
        reset is None or routing.plain(reset, torch.bool, x)
    )


def run_sequence(
    cell: Cell,
    input: Tensor,
    hx: object,
    weights: Direction,
    *,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    reverse: bool,
    return_states: bool,
) -> Output | OutputAndStates:
    """What fastseq.rnn, lstm and gru share: checks, then one layer in one direction."""
    states = checks.check_hx(cell, hx, cell.mode.lower(), or_none=True)
    checks.check_sequence(cell, input, states, weights)
    steps, batch = input.shape[:2]
    if reset is not None:
        checks.check_reset(reset, (steps, batch), input.device)
    route, backend = routing.route("recurrent", (input, *weights), states)
    if input.numel() == 0 and route in (Route.KERNELS, Route.GRAPH):
        route = Route.TORCH
    if routing.is_compiling() and route is Route.TORCH and not torch.compiler.is_exporting():
        # Outside the graph, as torch runs its own recurrent modules.
        options = {"lengths": lengths, "reset": reset, "reverse": reverse, "return_states": return_states}
        return torch.compiler.disable(run_sequence)(cell, input, hx, weights, **options)
    rows = None
    if lengths is not None:
        rows = padded_rows(lengths, steps, batch, input.device, route is Route.GRAPH)
    call = Layer(
        cell,
        (bool(reverse),),
        rows,
        reset,
        every_state=return_states and bool(cell.states),
        float_state=input.dtype is torch.bfloat16 and states[0] is not None and states[0].dtype is torch.float32,
    )
    records = needs_grad(input, *states, *weights)
    states = tuple(None if s is None else s.unsqueeze(0) for s in states)
    y, last, every = run_layer(call, input, states, [weights], route, backend, records)
    last = tuple(s.squeeze(0) for s in last)
    hx = last if cell.states else last[0]
    if not return_states:
        return Output(y, hx)
    h = y.clone()  # no two results share memory
    return OutputAndStates(y, hx, (h, *every) if cell.states else h)


def run_step(
    cell: Cell, x: Tensor, states: States, weights: Direction, panels: Any | None = None
) -> tuple[Tensor, ...] | None:
    """One step on x (B, I) and states (B, H) or None for zeros: the states after it.

    Returns None where the kernels do not serve the case or the arguments do not fit; torch's op then computes the step
    or names the mistake. The backend checks types, dtypes, devices, shapes and strides itself. Nothing is checked
    twice, because a step takes a few microseconds only.
    """
    if routing.observed():
        return None
    backend = backends.select_for("recurrent", x)
    if backend is None:
        return None
    try:
        w_ih, w_hh, b_ih, b_hh = weights
        h, c = states if len(states) == 2 else (states[0], None)
        if torch.is_grad_enabled() and (
            w_hh is None or w_hh.requires_grad or x.requires_grad or needs_grad(h, c, w_ih, b_ih, b_hh)
        ):
            return _apply_step(cell, backend, x, *states, w_ih, w_hh, b_ih, b_hh)
        threads = torch.get_num_threads()
        h_1, _, c_1, _ = backend.recurrent_step(cell.name, x, h, c, w_ih, w_hh, b_ih, b_hh, threads, False, panels)
        return (h_1,) if c_1 is None else (h_1, c_1)
    except Refused:
        return None


def pack_step(backend: ModuleType, cell: Cell, weights: Direction) -> Any | None:
    """The weights of a cell as `run_step` takes them packed; None of those that do not fit."""
    try:
        return backend.pack(cell.name, weights)
    except Refused:
        return None


def run_cell(cell: Cell, x: Tensor, hx: object, weights: Direction) -> tuple[Tensor, ...]:
    """What fastseq.rnn_cell, lstm_cell and gru_cell share."""
    states = checks.check_hx(cell, hx, f"{cell.mode.lower()}_cell")
    checks.check_step(x, weights)
    result = run_step(cell, x, states, weights)
    if result is not None:
        return result
    if not routing.is_compiling() and (misfit := checks.step_misfit(cell, x, states, weights)):
        raise RuntimeError(misfit)
    if cell.step_op is None or routing.transformed():
        return formula.step(cell, x, states, weights)
    result = cell.step_op(x, states if cell.states else states[0], *weights)
    return result if cell.states else (result,)


class RecurrentFunction(torch.autograd.Function):
    """A layer of any cell, in one or two directions, over the kernels.

    `RecurrentFunction.apply(call, backend, x, *states, *weights)` returns the tensors of `Results` in a row: y, the
    last of each state, and where `call.every_state` each state beside h at every step. `call` is a `Layer`, `backend` a
    module that serves recurrent layers (`fastseq.backends.contract`), the states h and those of `call.cell.states`, the
    weights four per direction (`None` for absent biases). Shapes are those of `run_layer`. The tensors must be what
    `routing.route` calls fit for the kernels; `fastseq.rnn`, `lstm` and `gru` see to that.

    The backward destroys the values that the forward saved. A second backward through the same graph first runs the
    forward again, and so does a backward that finds the output changed in place. Torch ops compute the gradients with
    `create_graph=True`, and where the incoming gradients are batched or no plain tensors.

    Sources:
        Elman, "Finding structure in time", 1990; Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers,
        Schmidhuber and Cummins, "Learning to forget", 2000; Cho et al., "Learning phrase representations using RNN
        encoder-decoder", 2014; Werbos, "Backpropagation through time", 1990.

    Example:
        >>> import torch
        >>> from fastseq import backends
        >>> from fastseq.ops import Layer, RecurrentFunction
        >>> from fastseq.ops.cells.gru import GRU
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(12, 3, requires_grad=True), torch.randn(12, 4)
        >>> if (backend := backends.select("recurrent")) is not None:
        ...     y, h_n = RecurrentFunction.apply(Layer(GRU), backend, x, None, w_ih, w_hh, None, None)
        ...     y.sum().backward()
    """

    @staticmethod
    def forward(ctx: Any, call: Layer, backend: ModuleType, x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        """See the class."""
        count = 1 + len(call.cell.states)
        results, saved = kernels.forward(call, backend, x, others[:count], others[count:], save=True)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.backend, ctx.isa = call, backend, backend.active_isa()
        _keep(ctx, (x, *others), results.y, saved)
        return (results.y, *results.last, *results.every)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, None for those that need none."""
        by_kernels = routing.kernels_differentiate(grads)
        call, inputs, y, saved = _kept(ctx, by_kernels)
        count, needs = 2 + len(call.cell.states), ctx.needs_input_grad[2:]
        if not by_kernels:
            return None, None, *composite_backward(lambda *t: _by_formula(call, *t), inputs, grads, needs)
        x, *others = inputs
        states, weights = others[: count - 1], others[count - 1 :]
        isa = ctx.isa
        if saved is None:
            (y, *_), saved = kernels.forward(call, ctx.backend, x, states, weights, save=True)
            isa = ctx.backend.active_isa()
        grads = Results.of(call, grads)
        return None, None, *kernels.backward(call, ctx.backend, x, states, weights, y, saved, isa, grads, needs)


def _by_formula(call: Layer, x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    count = 1 + len(call.cell.states)
    states, flat = others[:count], others[count:]
    weights = [flat[start : start + 4] for start in range(0, len(flat), 4)]
    results = _laid_out(call, formula.layer(call, x, states, weights))
    return (results.y, *results.last, *results.every)


class StepFunction(torch.autograd.Function):
    """One step of any cell over the kernels.

    `StepFunction.apply(cell, backend, x, *states, w_ih, w_hh, b_ih, b_hh)` returns the states after the step: x (B, I),
    states (B, H) or None for zeros, with unit strides along the last axes. All else, and the sources, are those of
    `RecurrentFunction`.
    """

    @staticmethod
    def forward(ctx: Any, cell: Cell, backend: ModuleType, x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        """See the class."""
        states, (w_ih, w_hh, b_ih, b_hh) = others[:-4], others[-4:]
        h, c = states if len(states) == 2 else (states[0], None)
        threads = torch.get_num_threads()
        h_1, _, c_1, saved = backend.recurrent_step(cell.name, x, h, c, w_ih, w_hh, b_ih, b_hh, threads, True)
        ctx.set_materialize_grads(False)
        if h is None or b_ih is None:
            autograd.save(ctx, x, *others, saved)
        else:  # the same, without a look at each: 4 % of a step with B = 1
            ctx.save_for_backward(x, *others, saved)
            ctx.given = None
        ctx.how = cell, backend, [backend.active_isa()]
        return (h_1,) if c_1 is None else (h_1, c_1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, None for those that need none."""
        cell, backend, isas = ctx.how
        *inputs, saved = autograd.saved(ctx)
        x, *states, w_ih, w_hh, b_ih, b_hh = inputs
        needs = ctx.needs_input_grad[2:]
        if not routing.kernels_differentiate(grads):

            def run(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
                return formula.step(cell, x, others[:-4], others[-4:])

            return None, None, *composite_backward(run, inputs, grads, needs)
        h, c = states if len(states) == 2 else (states[0], None)
        grads = unit_strides(*grads)
        dh, dc = grads if len(states) == 2 else (grads[0], None)
        grad = dc if dh is None else dh
        if grad is None:
            return (None,) * (2 + len(inputs))
        try:
            isa = isas.pop()  # atomic: `saved` serves one backward
        except IndexError:
            threads = torch.get_num_threads()
            *_, saved = backend.recurrent_step(cell.name, x, h, c, w_ih, w_hh, b_ih, b_hh, threads, True)
            isa = backend.active_isa()
        needs_x, needs_h, *needs_c = needs[:-4]
        dx, dh_0, dc_0, *dweights = backend.recurrent_backward(
            cell.name,
            x.unsqueeze(0),
            h,
            c,
            (w_ih, w_hh, b_ih, b_hh),
            grad.unsqueeze(0),  # y: only read as the state before a later step, so anything of its shape will do
            saved,
            isa,
            dy=None,
            dh_n=dh,
            dc_n=dc,
            dc_all=None,
            needs=(needs_x, needs_h, any(needs_c), *needs[-4:]),
        )
        dstates = (dh_0, dc_0)[: len(states)]
        return None, None, None if dx is None else dx.squeeze(0), *dstates, *dweights


_apply_layer = c_apply(RecurrentFunction)
_apply_step = c_apply(StepFunction)


# What a graph keeps.
#
# Inputs, weights and the tensors of the call go through save_for_backward: an in-place change before the backward
# raises torch's error, and checkpointing gives all of them as its second forward has them. The output does not: torch's
# own RNN and GRU allow it to be changed (`out *= mask`), so it is kept as an alias with its version, and a changed one
# is recomputed. Under saved-tensor hooks (checkpointing, offloading) everything goes through them, since they exist to
# let go of the memory.


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor, saved: tuple[Tensor, ...]) -> None:
    rows, ctx.inputs = ctx.call.rows, len(inputs)
    if rows is not None or ctx.call.reset is not None:
        lengths, batch_sizes, order = (None,) * 3 if rows is None else rows[:3]
        if rows is not None and rows.packed:
            batch_sizes = batch_sizes.clone()  # the caller's, who may change them as with torch
        inputs += (ctx.call.reset, lengths, batch_sizes, order)
    ctx.kept = len(inputs)
    if routing.saving_hooks(True) is not None:
        autograd.save(ctx, *inputs, output, *saved)
        ctx.once = [None]
    else:
        autograd.save(ctx, *inputs)
        ctx.once = [(output.detach(), output._version, saved)]


def _kept(
    ctx: Any, by_kernels: bool
) -> tuple[Layer, tuple[Tensor | None, ...], Tensor | None, tuple[Tensor, ...] | None]:
    """The call, its inputs; the output and the saved values, or None where they have been used up, changed or are not
    needed."""
    tensors, call = autograd.saved(ctx), ctx.call
    inputs = tensors[: ctx.inputs]
    if ctx.kept > ctx.inputs:
        reset, lengths, batch_sizes, order = tensors[ctx.inputs : ctx.kept]
        rows = call.rows
        if rows is not None:
            rows = Rows(lengths, batch_sizes, order, batch_sizes.shape[0], rows.packed)
        call = call._replace(reset=reset, rows=rows)
    if not by_kernels or not ctx.once:
        return call, inputs, None, None
    try:
        kept = ctx.once.pop()  # atomic: of two threads in the same backward one gets the buffers
    except IndexError:
        return call, inputs, None, None
    if kept is None:
        return call, inputs, tensors[ctx.kept], tensors[ctx.kept + 1 :]
    output, version, saved = kept
    return (call, inputs, output, saved) if output._version == version else (call, inputs, None, None)

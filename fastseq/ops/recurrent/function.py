"""One layer of any recurrent cell, in one or two directions, and one step of it: kernels behind autograd.

`run_layer` and `run_step` choose who computes (`routing.route`); `RecurrentFunction` and `StepFunction`
are the `torch.autograd.Function`s over the kernels of the active backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastseq.backends.contract import Refused
from fastseq.ops import autograd, routing
from fastseq.ops.autograd import c_apply, composite_backward, needs_grad
from fastseq.ops.lengths import Rows, padded_rows
from fastseq.ops.recurrent import checks, formula, graph, kernels
from fastseq.ops.recurrent.kernels import unit_stride
from fastseq.ops.recurrent.spec import Cell, Direction, Layer, Results, Weights
from fastseq.ops.routing import Route


def run_layer(
    call: Layer,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Weights,
    route: Route,
    backend: ModuleType | None,
    panels: Sequence[Any] | None = None,
) -> Results:
    """One layer on checked tensors.

    Args:
        x: (T, B, I), or (R, I) where `call.rows` is packed.
        h_0, c_0: (D, B, H) or None for zeros.
        weights: per direction.
        route, backend: what `routing.route` answered for these tensors.
        panels: packed weights per direction; only where nothing needs a gradient.
    """
    plain = call.rows is None and call.reset is None
    if route is Route.KERNELS and (plain or _kernels_read(x, call.rows, call.reset)):
        flat = weights[0] if len(weights) == 1 else sum(weights, ())
        try:
            if panels is None and needs_grad(x, h_0, c_0, *flat):
                return Results(*_apply_layer(call, backend, x, h_0, c_0, *flat))
            return kernels.forward(call, backend, x, h_0, c_0, flat, panels)[0]
        except Refused:
            pass
    layer = graph.layer if route is Route.GRAPH else formula.layer
    return _laid_out(call, layer(call, x, h_0, c_0, weights))


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
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Direction,
    *,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    reverse: bool,
    return_states: bool,
) -> Results:
    """What fastseq.rnn, lstm and gru share: checks, then one layer in one direction. The states come back as (B, H)."""
    checks.check_sequence(cell, input, h_0, c_0, weights)
    steps, batch = input.shape[:2]
    if reset is not None:
        checks.check_reset(reset, (steps, batch), input.device)
    route, backend = routing.route("recurrent", (input, *weights), (h_0, c_0))
    if input.numel() == 0 and route in (Route.KERNELS, Route.GRAPH):
        route = Route.TORCH
    if routing.is_compiling() and route is Route.TORCH and not torch.compiler.is_exporting():
        # Outside the graph, as torch runs its own recurrent modules.
        options = {"lengths": lengths, "reset": reset, "reverse": reverse, "return_states": return_states}
        return torch.compiler.disable(run_sequence)(cell, input, h_0, c_0, weights, **options)
    rows = None
    if lengths is not None:
        rows = padded_rows(lengths, steps, batch, input.device, route is Route.GRAPH)
    call = Layer(
        cell,
        (bool(reverse),),
        rows,
        reset,
        want_c=return_states and cell.has_c,
        float_state=input.dtype is torch.bfloat16 and h_0 is not None and h_0.dtype is torch.float32,
    )
    h_0 = None if h_0 is None else h_0.unsqueeze(0)
    c_0 = None if c_0 is None else c_0.unsqueeze(0)
    y, h_n, c_n, c_all = run_layer(call, input, h_0, c_0, [weights], route, backend)
    return Results(y, h_n.squeeze(0), None if c_n is None else c_n.squeeze(0), c_all)


def run_step(
    cell: Cell, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Direction, panels: Any | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """One step on x (B, I), h and c (B, H) or None for zeros: h' and c' (None but for LSTM).

    None where the kernels do not serve the case, or the arguments do not fit: torch's op computes it, or names the
        mistake. The backend
    checks types, dtypes, devices, shapes and strides itself, and here its time counts, so nothing is checked twice.
    """
    if routing.observed():
        return None
    backend = routing.backend_of("recurrent", x)
    if backend is None:
        return None
    w_ih, w_hh, b_ih, b_hh = weights
    try:
        if torch.is_grad_enabled() and (
            w_hh is None or w_hh.requires_grad or x.requires_grad or needs_grad(h, c, w_ih, b_ih, b_hh)
        ):
            return _apply_step(cell, backend, x, h, c, w_ih, w_hh, b_ih, b_hh)
        threads = torch.get_num_threads()
        h_1, _, c_1, _ = backend.recurrent_step(cell.name, x, h, c, w_ih, w_hh, b_ih, b_hh, threads, False, panels)
        return h_1, c_1
    except Refused:
        return None


def pack_step(backend: ModuleType, cell: Cell, weights: Direction) -> Any | None:
    """The weights of a cell as `run_step` takes them packed; None of those that do not fit."""
    try:
        return backend.pack(cell.name, weights)
    except Refused:
        return None


def run_cell(cell: Cell, x: Tensor, h: Tensor, c: Tensor | None, weights: Direction) -> tuple[Tensor, Tensor | None]:
    """What fastseq.rnn_cell, lstm_cell and gru_cell share."""
    result = run_step(cell, x, h, c, weights)
    if result is not None:
        return result
    if not routing.is_compiling() and (misfit := checks.step_misfit(cell, x, h, c, weights)):
        raise RuntimeError(misfit)
    if routing.transformed():
        return formula.step(cell, x, h, c, weights)
    result = cell.step_op(x, (h, c) if cell.has_c else h, *weights)
    return result if cell.has_c else (result, None)


class RecurrentFunction(torch.autograd.Function):
    """A layer of any cell, in one or two directions, over the kernels.

    `RecurrentFunction.apply(call, backend, x, h_0, c_0, *weights)` returns `(y, h_n, c_n, c_all)`; `call` is a `Layer`,
    `backend` a module with `recurrent_forward` and `recurrent_backward`, the weights four per direction (`None` for
    absent biases). Shapes are those of `run_layer`. The tensors must be what `routing.route` calls fit for the kernels;
    `fastseq.rnn`, `lstm` and `gru` see to that.

    The backward destroys the values that the forward saved. A second one through the same graph runs the forward again
    first, and so does a backward that finds the output changed in place. With `create_graph=True` the gradients come
    from torch ops, and so do those of incoming gradients that are batched or no plain tensors.

    Sources: Elman, "Finding structure in time", 1990; Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers,
        Schmidhuber and
    Cummins, "Learning to forget", 2000; Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014;
    Werbos, "Backpropagation through time", 1990.

    Example:
        >>> import torch
        >>> from fastseq import backends
        >>> from fastseq.ops import Layer, RecurrentFunction
        >>> from fastseq.ops.cells.gru import GRU
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(12, 3, requires_grad=True), torch.randn(12, 4)
        >>> if (backend := backends.select("recurrent")) is not None:
        ...     y, h_n, _, _ = RecurrentFunction.apply(Layer(GRU), backend, x, None, None, w_ih, w_hh, None, None)
        ...     y.sum().backward()
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Layer,
        backend: ModuleType,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor | None,
    ) -> Results:
        """See the class."""
        results, saved = kernels.forward(call, backend, x, h_0, c_0, weights, save=True)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.backend, ctx.isa = call, backend, backend.active_isa()
        _keep(ctx, (x, h_0, c_0, *weights), results.y, saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc_all: Tensor | None) -> tuple:
        """Gradients of the inputs, None for those that need none."""
        grads = (dy, dh_n, dc_n, dc_all)
        by_kernels = routing.kernels_differentiate(grads)
        call, (x, h_0, c_0, *weights), y, saved = _kept(ctx, by_kernels)
        if not by_kernels:
            directions = len(call.reverse)
            return (
                None,
                None,
                *composite_backward(
                    lambda x, h, c, *w: _laid_out(
                        call, formula.layer(call, x, h, c, [w[4 * d : 4 * d + 4] for d in range(directions)])
                    ),
                    (x, h_0, c_0, *weights),
                    grads,
                    ctx.needs_input_grad[2:],
                ),
            )
        isa = ctx.isa
        if saved is None:
            (y, *_), saved = kernels.forward(call, ctx.backend, x, h_0, c_0, weights, save=True)
            isa = ctx.backend.active_isa()
        needs = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *kernels.backward(call, ctx.backend, x, h_0, c_0, weights, y, saved, isa, grads, needs),
        )


class StepFunction(torch.autograd.Function):
    """One step of any cell over the kernels.

    `StepFunction.apply(cell, backend, x, h, c, w_ih, w_hh, b_ih, b_hh)` returns `h'` and, for LSTM, `c'` (else None): x
    (B, I), states (B, H) or None for zeros, unit strides along the last axes. As `RecurrentFunction` otherwise, and
    with its sources.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        backend: ModuleType,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See the class."""
        threads = torch.get_num_threads()
        h_1, _, c_1, saved = backend.recurrent_step(cell.name, x, h, c, w_ih, w_hh, b_ih, b_hh, threads, True)
        ctx.set_materialize_grads(False)
        # What autograd.save does takes 5 % of a step with B = 1.
        states = (h,) if c is None else (h, c)
        if h is None:
            states = () if c is None else (c,)
        if b_ih is None:
            ctx.save_for_backward(x, w_ih, w_hh, saved, *states)
        else:
            ctx.save_for_backward(x, w_ih, w_hh, saved, b_ih, b_hh, *states)
        ctx.how = cell, backend, [backend.active_isa()], b_ih is None, h is None, c is None
        return h_1, c_1

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple:
        """Gradients of the inputs, None for those that need none."""
        cell, backend, isas, no_bias, no_h, no_c = ctx.how
        x, w_ih, w_hh, saved, *others = ctx.saved_tensors
        c = None if no_c else others.pop()
        h = None if no_h else others.pop()
        weights = [w_ih, w_hh, *((None, None) if no_bias else others)]
        inputs = [x, h, c, *weights]
        needs = ctx.needs_input_grad[2:]
        if not routing.kernels_differentiate((dh, dc)):
            grads = composite_backward(lambda x, h, c, *w: formula.step(cell, x, h, c, w), inputs, (dh, dc), needs)
            return None, None, *grads
        dh, dc = unit_stride(dh), unit_stride(dc)
        grad = dc if dh is None else dh
        if grad is None:
            return (None,) * 9
        try:
            isa = isas.pop()  # atomic: `saved` serves one backward
        except IndexError:
            *_, saved = backend.recurrent_step(cell.name, x, h, c, *weights, torch.get_num_threads(), True)
            isa = backend.active_isa()
        dx, dh_0, dc_0, *dweights = backend.recurrent_backward(
            cell.name,
            x.unsqueeze(0),
            h,
            c,
            weights,
            grad.unsqueeze(0),  # y: only read as the state before a later step, so anything of its shape will do
            saved,
            isa,
            dy=None,
            dh_n=dh,
            dc_n=dc,
            dc_all=None,
            needs=needs,
        )
        return None, None, None if dx is None else dx.squeeze(0), dh_0, dc_0, *dweights


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
    if routing.saving_hooks():
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

"""A layer in torch ops, step by step: what the kernels mean, for every case that they do not serve.

Same arguments and results as the kernels' layer (`spec.Layer`). Whatever torch can do with its own ops (create_graph,
jvp, vmap, FakeTensor, tracing, any dtype or device) it can do with this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops import routing
from fastseq.ops.recurrent.spec import Cell, Direction, Layer, Results, States, Weights


def layer(call: Layer, x: Tensor, states: States, weights: Weights) -> Results:
    """Runs one layer. The states are (D, B, H); each direction of `weights` may end with a projection."""
    if routing.any_autocast() and torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return _autocast_layer(call, x, states, weights)
    if call.plain and call.cell.sequence_op is not None and not routing.transformed():
        return _torch_layer(call, x, states, weights)
    rows = call.rows
    if rows is not None and rows.packed:
        return _packed_layer(call, x, states, weights)

    steps = x.shape[0]
    live = None
    if rows is not None:
        x = x[: rows.longest]
        live = torch.arange(rows.longest, device=x.device).unsqueeze(1) < rows.lengths  # (T, B)
        x = torch.where(live.unsqueeze(2), x, 0)  # NaN in the padding must not reach a gradient
    directions = []
    for d, (direction, reverse) in enumerate(zip(weights, call.reverse, strict=True)):
        sizes = _state_sizes(call, direction)
        initial = tuple(_state(call, x, None if s is None else s[d], n) for s, n in zip(states, sizes, strict=True))
        directions.append(_direction(call, x, initial, direction, live, reverse))
    y, last, every = zip(*directions, strict=True)
    return Results(
        _extend(torch.cat(y, -1), steps),
        tuple(map(torch.stack, zip(*last, strict=True))),  # a copy: results share no memory
        tuple(_extend(torch.cat(s, -1), steps) for s in zip(*every, strict=True)),
    )


def _direction(
    call: Layer, x: Tensor, states: States, weights: Direction, live: Tensor | None, reverse: bool
) -> tuple[Tensor, States, States]:
    """y (T, B, H), the last states, and the other states at every step where they are asked for."""
    cell, steps, dtype = call.cell, x.shape[0], x.dtype
    if states[0].dtype is not dtype:  # float32 state beside bfloat16 storage: compute in float32, as the kernels do
        x, weights = x.float(), tuple(None if w is None else w.float() for w in weights)
    w_ih, w_hh, b_ih, b_hh = weights[:4]
    parameters, projection = weights[4 : 4 + len(cell.parameters)], weights[4 + len(cell.parameters) :]
    terms = F.linear(x, w_ih, b_ih)

    def step(t: int, states: States) -> States:
        new = _step(cell, terms[t], states, w_hh, b_hh, parameters)
        return (F.linear(new[0], projection[0]), *new[1:]) if projection else new

    outputs: list[States] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        cut = _cut(call.reset, live, t, steps, reverse)
        if cut is not None:
            states = tuple(torch.where(cut, 0, s) for s in states)
        new = step(t, states)
        if live is None:
            states = new
            outputs.append(new)
        else:
            row = live[t].unsqueeze(1)
            states = tuple(torch.where(row, s, before) for s, before in zip(new, states, strict=True))
            outputs.append(tuple(torch.where(row, s, 0) for s in new))
    if reverse:
        outputs.reverse()
    if not steps:  # every length is 0: nothing to compute, but a loss on the output still has a backward
        terms = terms[None, :, 0]
        new = step(0, tuple(s[:0] for s in states))
        y, *every = (s.unsqueeze(1).expand(0, x.shape[1], -1).to(dtype) for s in new)
    else:
        y, *every = (torch.stack(s).to(dtype) for s in zip(*outputs, strict=True))
    return y, states, tuple(every) if call.every_state else ()


def _step(
    cell: Cell, term: Tensor, states: States, w_hh: Tensor, b_hh: Tensor | None, parameters: Direction
) -> tuple[Tensor, ...]:
    """The states after a step, `term` being W_ih x + b_ih."""
    gates, count = cell.named, len(cell.gates)
    r = F.linear(states[0], w_hh, b_hh)
    return cell.formula(gates(*term.chunk(count, -1)), gates(*r.chunk(count, -1)), *states, *parameters)


def _extend(sequence: Tensor, steps: int) -> Tensor:
    missing = steps - sequence.shape[0]
    return sequence if not missing else torch.cat((sequence, sequence.new_zeros(missing, *sequence.shape[1:])))


def _cut(reset: Tensor | None, live: Tensor | None, t: int, steps: int, reverse: bool) -> Tensor | None:
    """(B, 1) bool: rows whose state is zeroed before step t. Going back, t + 1 may be the first of a segment."""
    if reset is None:
        return None
    t = t + 1 if reverse else t
    if t == steps:
        return None
    cut = reset[t] if live is None else reset[t] & live[t]
    return cut.unsqueeze(1)


def _state(call: Layer, x: Tensor, state: Tensor | None, size: int) -> Tensor:
    dtype = torch.float32 if call.float_state else x.dtype
    if state is None:
        return x.new_zeros(x.shape[1], size, dtype=dtype)
    return state.to(dtype) if call.float_state else state


def _state_sizes(call: Layer, weights: Direction) -> tuple[int, ...]:
    """Of h, which a projection may make smaller, and of the other states."""
    w_hh, cell = weights[1], call.cell
    return (w_hh.shape[1], *[w_hh.shape[0] // len(cell.gates)] * len(cell.states))


def _torch_layer(call: Layer, x: Tensor, states: States, weights: Weights) -> Results:
    """torch's own op, which knows neither a lone reverse direction nor absent states."""
    cell, rows = call.cell, call.rows
    backwards = call.reverse == (True,)
    batch = int(rows.batch_sizes[0]) if rows is not None else x.shape[1]
    sizes = _state_sizes(call, weights[0])
    states = tuple(
        x.new_zeros(len(weights), batch, size) if s is None else s for s, size in zip(states, sizes, strict=True)
    )
    hx = states if cell.states else states[0]
    flat = [w for direction in weights for w in direction if w is not None]
    options = (weights[0][2] is not None, 1, 0.0, torch.is_grad_enabled(), len(weights) == 2)
    if rows is not None:
        y, *last = cell.sequence_op(x, rows.batch_sizes, hx, flat, *options)
    else:
        y, *last = cell.sequence_op(x.flip(0) if backwards else x, hx, flat, *options, False)
    return Results(y.flip(0) if backwards else y, tuple(last), ())


def _autocast_layer(call: Layer, x: Tensor, states: States, weights: Weights) -> Results:
    """With torch's own result dtypes: GRU in that of its weights, the others in the lower precision."""
    device = x.device.type
    dtype = weights[0][0].dtype if call.cell.autocasts_to_weights else torch.get_autocast_dtype(device)

    def cast(tensors: States) -> States:
        return tuple(None if t is None else t.to(dtype) for t in tensors)

    with torch.autocast(device, enabled=False):
        return layer(call, x.to(dtype), cast(states), [cast(direction) for direction in weights])


def _packed_layer(call: Layer, x: Tensor, states: States, weights: Weights) -> Results:
    sizes = call.rows.batch_sizes.to(x.device)
    steps, batch = sizes.shape[0], int(sizes[0])
    live = torch.arange(batch, device=x.device) < sizes.unsqueeze(1)  # (T, B)
    place = live.flatten().nonzero().squeeze(1)  # packed row -> padded row
    padded = x.new_zeros(steps * batch, x.shape[1]).index_copy(0, place, x).unflatten(0, (steps, batch))
    rows = call.rows._replace(lengths=live.sum(0), packed=False)
    y, last, every = layer(call._replace(rows=rows), padded, states, weights)
    y, *every = (s.flatten(0, 1).index_select(0, place) for s in (y, *every))
    return Results(y, last, tuple(every))


def step(cell: Cell, x: Tensor, states: States, weights: Direction) -> tuple[Tensor, ...]:
    """One step of a cell on (B, I), by its formula: the states after it."""
    w_ih, w_hh, b_ih, b_hh, *parameters = weights
    states = tuple(x.new_zeros(x.shape[0], w_hh.shape[1]) if s is None else s for s in states)
    return _step(cell, F.linear(x, w_ih, b_ih), states, w_hh, b_hh, tuple(parameters))

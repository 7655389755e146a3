"""A layer in plain torch ops, step by step: what the kernels mean, for every case that they do not serve.

Same arguments and results as the kernels' layer (`spec.Layer`). Whatever torch can do with its own ops (create_graph,
jvp, vmap, FakeTensor, tracing, any dtype or device) it can do with this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops import routing
from fastseq.ops.recurrent.spec import Cell, Direction, Layer, Results, Weights


def layer(call: Layer, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Weights) -> Results:
    """Runs one layer. `h_0` and `c_0` are (D, B, H); each direction of `weights` may end with a projection."""
    if routing.any_autocast() and torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return _autocast_layer(call, x, h_0, c_0, weights)
    if call.plain and not routing.transformed():
        return _torch_layer(call, x, h_0, c_0, weights)
    rows = call.rows
    if rows is not None and rows.packed:
        return _packed_layer(call, x, h_0, c_0, weights)

    steps = x.shape[0]
    live = None
    if rows is not None:
        x = x[: rows.longest]
        live = torch.arange(rows.longest, device=x.device).unsqueeze(1) < rows.lengths  # (T, B)
        x = torch.where(live.unsqueeze(2), x, 0)  # NaN in the padding must not reach a gradient
    directions = []
    for d, (direction, reverse) in enumerate(zip(weights, call.reverse, strict=True)):
        h = _state(call, x, None if h_0 is None else h_0[d], _output_size(direction))
        c = _state(call, x, None if c_0 is None else c_0[d], _hidden_size(call, direction)) if call.cell.has_c else None
        directions.append(_direction(call, x, h, c, direction, live, reverse))
    y, h_n, c_n, c_all = zip(*directions, strict=True)
    return Results(
        _extend(torch.cat(y, -1), steps),
        torch.stack(h_n),  # a copy: results share no memory
        torch.stack(c_n) if call.cell.has_c else None,
        _extend(torch.cat(c_all, -1), steps) if call.want_c else None,
    )


def _direction(
    call: Layer,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Direction,
    live: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    steps, dtype = x.shape[0], x.dtype
    if h.dtype is not dtype:  # float32 state beside bfloat16 storage: compute in float32, as the kernels do
        x, weights = x.float(), tuple(None if w is None else w.float() for w in weights)
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    terms = F.linear(x, w_ih, b_ih)
    hs: list[Tensor] = []
    cs: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        cut = _cut(call.reset, live, t, steps, reverse)
        if cut is not None:
            h = torch.where(cut, 0, h)
            c = None if c is None else torch.where(cut, 0, c)
        h_t, c_t = call.cell.formula(terms[t], h, c, w_hh, b_hh)
        if projection:
            h_t = F.linear(h_t, projection[0])
        if live is None:
            h, c = h_t, c_t
        else:
            row = live[t].unsqueeze(1)
            h, h_t = torch.where(row, h_t, h), torch.where(row, h_t, 0)
            if c is not None:
                c, c_t = torch.where(row, c_t, c), torch.where(row, c_t, 0)
        hs.append(h_t)
        cs.append(c_t)
    if reverse:
        hs.reverse()
        cs.reverse()
    if not steps:  # every length is 0: nothing to compute, but a loss on the output still has a backward
        h_t, c_t = call.cell.formula(terms[:, 0], h[:0], None if c is None else c[:0], w_hh, b_hh)
        h_t = F.linear(h_t, projection[0]) if projection else h_t
        y, c_all = (None if s is None else s.unsqueeze(1).expand(0, x.shape[1], -1).to(dtype) for s in (h_t, c_t))
        return y, h, c, c_all
    return torch.stack(hs).to(dtype), h, c, torch.stack(cs).to(dtype) if call.want_c else None


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


def _output_size(weights: Direction) -> int:
    return weights[1].shape[1]


def _hidden_size(call: Layer, weights: Direction) -> int:
    return weights[1].shape[0] // call.cell.gates


def _torch_layer(call: Layer, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Weights) -> Results:
    """torch's own op, which knows neither a lone reverse direction nor absent states."""
    cell, rows = call.cell, call.rows
    backwards = call.reverse == (True,)
    batch = int(rows.batch_sizes[0]) if rows is not None else x.shape[1]
    if h_0 is None:
        h_0 = x.new_zeros(len(weights), batch, _output_size(weights[0]))
    if cell.has_c and c_0 is None:
        c_0 = x.new_zeros(len(weights), batch, _hidden_size(call, weights[0]))
    hx = (h_0, c_0) if cell.has_c else h_0
    flat = [w for direction in weights for w in direction if w is not None]
    options = (weights[0][2] is not None, 1, 0.0, torch.is_grad_enabled(), len(weights) == 2)
    if rows is not None:
        y, *states = cell.sequence_op(x, rows.batch_sizes, hx, flat, *options)
    else:
        y, *states = cell.sequence_op(x.flip(0) if backwards else x, hx, flat, *options, False)
    return Results(y.flip(0) if backwards else y, states[0], states[1] if cell.has_c else None, None)


def _autocast_layer(call: Layer, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Weights) -> Results:
    """With torch's own result dtypes: RNN and LSTM in the lower precision, GRU in that of its weights."""
    device = x.device.type
    dtype = weights[0][0].dtype if call.cell.name == "gru" else torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    with torch.autocast(device, enabled=False):
        return layer(call, cast(x), cast(h_0), cast(c_0), [tuple(map(cast, direction)) for direction in weights])


def _packed_layer(call: Layer, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Weights) -> Results:
    sizes = call.rows.batch_sizes.to(x.device)
    steps, batch = sizes.shape[0], int(sizes[0])
    live = torch.arange(batch, device=x.device) < sizes.unsqueeze(1)  # (T, B)
    place = live.flatten().nonzero().squeeze(1)  # packed row -> padded row
    padded = x.new_zeros(steps * batch, x.shape[1]).index_copy(0, place, x).unflatten(0, (steps, batch))
    rows = call.rows._replace(lengths=live.sum(0), packed=False)
    y, h_n, c_n, c_all = layer(call._replace(rows=rows), padded, h_0, c_0, weights)
    return Results(
        y.flatten(0, 1).index_select(0, place),
        h_n,
        c_n,
        None if c_all is None else c_all.flatten(0, 1).index_select(0, place),
    )


def step(cell: Cell, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Direction) -> tuple[Tensor, Tensor | None]:
    """One step of a cell on (B, I), by its formula."""
    w_ih, w_hh, b_ih, b_hh = weights
    size = w_hh.shape[1]
    h = x.new_zeros(x.shape[0], size) if h is None else h
    c = x.new_zeros(x.shape[0], size) if c is None and cell.has_c else c
    return cell.formula(F.linear(x, w_ih, b_ih), h, c, w_hh, b_hh)

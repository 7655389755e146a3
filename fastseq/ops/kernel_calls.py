"""One layer on the kernels, in one or two directions: what goes to the backend, forward and backward. No autograd
here."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastseq.ops.cell import Layer, Results
from fastseq.ops.lengths import Rows


def forward(
    call: Layer,
    backend: ModuleType,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor | None],
    save: bool,
) -> tuple[Results, tuple[Tensor, ...]]:
    """The results of a layer and, with `save`, what the backward needs, per direction."""
    cell, reverse, rows, reset, want_c, float_state, _, panels = call
    directions = len(reverse)
    # The backend makes a plain y itself. None is a view: autograd forbids changes of a view that a Function made.
    alone = directions == 1 and not call.batch_first and not _padded(rows)
    y = out = None if alone else _output(call, x, directions * weights[1].shape[1])
    batch_sizes = order = None
    packed = False
    if rows is not None:
        batch_sizes, order, packed = rows.batch_sizes, rows.order, rows.packed
        x, reset, out = _trim(rows, x), _trim(rows, reset), _trim(rows, out)
    x = unit_stride(x)
    h_n, c_n, c_all, saved = [], [], [], []
    for d in range(directions):
        w_ih, w_hh, b_ih, b_hh = weights[4 * d : 4 * d + 4]
        y_d, *states, c_steps, kept = backend.recurrent_forward(
            cell.name,
            x,
            None if h_0 is None else unit_stride(h_0[d]),
            None if c_0 is None else unit_stride(c_0[d]),
            (contiguous(w_ih), contiguous(w_hh), contiguous(b_ih), contiguous(b_hh)),
            panels=None if panels is None else panels[d],
            batch_sizes=batch_sizes,
            order=order,
            packed=packed,
            reverse=reverse[d],
            reset=reset,
            save=save,
            y=_part(out, d, directions),
            return_c=want_c,
            float_state=float_state,
        )
        h_n.append(states[0])
        c_n.append(states[1])
        c_all.append(c_steps)
        saved.append(kept)
    y = y_d if alone else y
    results = Results(
        y,
        _join(h_n),
        _join(c_n) if cell.has_c else None,
        _extend(torch.cat(c_all, -1) if directions > 1 else c_all[0], y.shape[0]) if want_c else None,
    )
    return results, tuple(saved) if save else ()


def backward(
    call: Layer,
    backend: ModuleType,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    saved: tuple[Tensor, ...],
    isa: str,
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and every weight. Both directions add to one dx."""
    rows = call.rows
    directions = len(call.reverse)
    dy, dh_n, dc_n, dc_all = map(unit_stride, grads)
    x, reset, steps = _trim(rows, unit_stride(x)), _trim(rows, call.reset), x.shape[0]
    y, dy, dc_all = _trim(rows, y), _trim(rows, dy), _trim(rows, dc_all)
    dx = None
    if needs[0] and (directions > 1 or _padded(rows)):
        dx = x.new_zeros(steps, *x.shape[1:]) if _padded(rows) else x.new_empty(x.shape)
    dh_0, dc_0, dweights = [], [], []
    for d, reverse in enumerate(call.reverse):
        dx_part, dh, dc, *dw = backend.recurrent_backward(
            call.cell.name,
            x,
            None if h_0 is None else unit_stride(h_0[d]),
            None if c_0 is None else unit_stride(c_0[d]),
            tuple(map(contiguous, weights[4 * d : 4 * d + 4])),
            _part(y, d, directions),
            saved[d],
            isa,
            dy=_part(dy, d, directions),
            dh_n=None if dh_n is None else dh_n[d],
            dc_n=None if dc_n is None else dc_n[d],
            dc_all=_part(dc_all, d, directions),
            needs=(*needs[:3], *needs[3 + 4 * d : 7 + 4 * d]),
            batch_sizes=None if rows is None else rows.batch_sizes,
            order=None if rows is None else rows.order,
            packed=rows is not None and rows.packed,
            reverse=reverse,
            reset=reset,
            float_state=call.float_state,
            dx=_trim(rows, dx),
            accumulate_dx=d > 0,
        )
        dx = dx_part if dx is None else dx
        dh_0.append(dh)
        dc_0.append(dc)
        dweights.extend(dw)
    return [
        dx if needs[0] else None,
        _join(dh_0) if needs[1] else None,
        _join(dc_0) if needs[2] else None,
        *dweights,
    ]


def _output(call: Layer, x: Tensor, width: int) -> Tensor:
    shape = (*x.shape[:-1], width)
    strides = (width, x.shape[0] * width, 1) if call.batch_first else None
    y = x.new_empty(shape) if strides is None else x.new_empty_strided(shape, strides)
    return y.zero_() if _padded(call.rows) else y


def _padded(rows: Rows | None) -> bool:
    return rows is not None and not rows.packed


def _trim(rows: Rows | None, sequence: Tensor | None) -> Tensor | None:
    """The steps that any row reaches."""
    return sequence[: rows.longest] if _padded(rows) and sequence is not None else sequence


def _part(sequence: Tensor | None, d: int, directions: int) -> Tensor | None:
    """The share of direction d in a (T, B, D*H) sequence."""
    if sequence is None or directions == 1:
        return sequence
    return sequence.unflatten(-1, (directions, -1)).select(-2, d)


def _join(states: Sequence[Tensor]) -> Tensor:
    return states[0].unsqueeze_(0) if len(states) == 1 else torch.stack(tuple(states))


def _extend(sequence: Tensor, steps: int) -> Tensor:
    missing = steps - sequence.shape[0]
    return sequence if not missing else torch.cat((sequence, sequence.new_zeros(missing, *sequence.shape[1:])))


def unit_stride(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where its last axis is contiguous, as the kernels need it, else a copy."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of axes of size 1


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where it is contiguous, else a copy."""
    return tensor if tensor is None else tensor.contiguous()

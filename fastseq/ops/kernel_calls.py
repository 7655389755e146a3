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
    rows = call.rows
    directions, hidden = len(call.reverse), weights[1].shape[1]
    y = _output(call, x, directions * hidden)
    x, reset = _trim(rows, unit_stride(x)), _trim(rows, call.reset)
    parts = []
    for d, reverse in enumerate(call.reverse):
        parts.append(
            backend.recurrent_forward(
                call.cell.name,
                x,
                None if h_0 is None else unit_stride(h_0[d]),
                None if c_0 is None else unit_stride(c_0[d]),
                tuple(map(contiguous, weights[4 * d : 4 * d + 4])),
                panels=None if call.panels is None else call.panels[d],
                batch_sizes=None if rows is None else rows.batch_sizes,
                order=None if rows is None else rows.order,
                packed=rows is not None and rows.packed,
                reverse=reverse,
                reset=reset,
                save=save,
                y=_trim(rows, _part(y, d, directions)),
                return_c=call.want_c,
                float_state=call.float_state,
            )
        )
    _, h_n, c_n, c_all, saved = zip(*parts, strict=True)
    results = Results(
        y,
        _join(h_n),
        _join(c_n) if call.cell.has_c else None,
        _extend(torch.cat(c_all, -1) if directions > 1 else c_all[0], y.shape[0]) if call.want_c else None,
    )
    return results, saved if save else ()


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
    """Never a view: autograd forbids in-place changes of a view that a Function returns."""
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
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where it is contiguous, else a copy."""
    return tensor if tensor is None else tensor.contiguous()

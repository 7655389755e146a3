"""One layer on the kernels, in one or two directions: what goes to the backend, forward and backward. No autograd
here."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.lengths import Rows
from fastseq.ops.memory import all_contiguous, unit_strides
from fastseq.ops.recurrent.spec import Layer, Results, States


def forward(
    call: Layer,
    backend: ModuleType,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor | None],
    panels: Sequence[Any] | None = None,
    save: bool = False,
) -> tuple[Results, tuple[Tensor, ...]]:
    """The results of a layer and, with `save`, what the backward needs, per direction."""
    cell, reverse, rows, reset, every_state, float_state, batch_first = call
    directions, steps = len(reverse), x.shape[0]
    batch_sizes, order, packed = (None, None, False) if rows is None else (rows.batch_sizes, rows.order, rows.packed)
    padded = rows is not None and not packed
    # The backend makes a plain y itself. None is a view: autograd forbids changes of a view that a Function made.
    y = out = None
    if directions > 1 or batch_first or padded:
        y = _output(call, x, directions * weights[1].shape[1])
        out = _steps_first(call, y)
    if padded:
        x, reset, out = _trim(rows, x), _trim(rows, reset), _trim(rows, out)
    x, *states = unit_strides(x, *states)
    h_0, c_0 = states if len(states) == 2 else (states[0], None)  # no kernels have more
    weights = all_contiguous(weights)
    h_n, c_n, c_all, saved = [], [], [], []
    h_d, c_d, w_d, y_d = h_0, c_0, weights, out
    for d in range(directions):
        if directions > 1:
            h_d, c_d, w_d, y_d = _state(h_0, d), _state(c_0, d), weights[4 * d : 4 * d + 4], _part(out, d, directions)
        y_d, h, c, c_steps, kept = backend.recurrent_forward(
            cell.name,
            x,
            h_d,
            c_d,
            w_d,
            panels=None if panels is None else panels[d],
            batch_sizes=batch_sizes,
            order=order,
            packed=packed,
            reverse=reverse[d],
            reset=reset,
            save=save,
            y=y_d,
            return_c=every_state,
            float_state=float_state,
            leading=True,
        )
        h_n.append(h)
        c_n.append(c)
        c_all.append(c_steps)
        saved.append(kept)
    if directions > 1:
        h, c = torch.cat(h_n), None if c is None else torch.cat(c_n)
        c_steps = None if c_steps is None else torch.cat(c_all, -1)
    last = (h,) if c is None else (h, c)
    every = () if c_steps is None else (_extend(c_steps, steps),)
    return Results(y_d if y is None else y, last, every), tuple(saved) if save else ()


def backward(
    call: Layer,
    backend: ModuleType,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor | None],
    y: Tensor,
    saved: tuple[Tensor, ...],
    isa: str,
    grads: Results,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, the states and every weight. Both directions add to one dx."""
    cell, reverse, rows, reset, _, float_state, _ = call
    directions, count = len(reverse), 1 + len(states)
    batch_sizes, order, packed = (None, None, False) if rows is None else (rows.batch_sizes, rows.order, rows.packed)
    padded = rows is not None and not packed
    h_0, c_0 = states if len(states) == 2 else (states[0], None)
    dh_n, dc_n = grads.last if len(states) == 2 else (grads.last[0], None)
    x, h_0, c_0, dy, dh_n, dc_n, dc_all = unit_strides(
        x, h_0, c_0, grads.y, dh_n, dc_n, grads.every[0] if grads.every else None
    )
    weights = all_contiguous(weights)
    if call.batch_first:
        y, dy = _steps_first(call, y), _steps_first(call, dy)
    dx = dx_trimmed = None
    if needs[0] and (directions > 1 or padded):
        dx = dx_trimmed = x.new_zeros(x.shape) if padded else x.new_empty(x.shape)
    if padded:
        x, reset, y, dy = _trim(rows, x), _trim(rows, reset), _trim(rows, y), _trim(rows, dy)
        dc_all, dx_trimmed = _trim(rows, dc_all), _trim(rows, dx)
    dh_0, dc_0, dweights = [], [], []
    y_d, dy_d, dc_all_d = y, dy, dc_all
    h_d, c_d, dh_d, dc_d = h_0, c_0, dh_n, dc_n
    needs_c = count == 3 and needs[2]
    for d in range(directions):
        if directions > 1:
            y_d, dy_d, dc_all_d = (_part(sequence, d, directions) for sequence in (y, dy, dc_all))
            h_d, c_d, dh_d, dc_d = (_state(state, d) for state in (h_0, c_0, dh_n, dc_n))
        dx_part, dh, dc, *dw = backend.recurrent_backward(
            cell.name,
            x,
            h_d,
            c_d,
            weights[4 * d : 4 * d + 4],
            y_d,
            saved[d],
            isa,
            dy=dy_d,
            dh_n=dh_d,
            dc_n=dc_d,
            dc_all=dc_all_d,
            needs=(needs[0], needs[1], needs_c, *needs[count + 4 * d : count + 4 * d + 4]),
            batch_sizes=batch_sizes,
            order=order,
            packed=packed,
            reverse=reverse[d],
            reset=reset,
            float_state=float_state,
            leading=True,
            dx=dx_trimmed,
            accumulate_dx=d > 0,
        )
        dx = dx_part if dx is None else dx
        dh_0.append(dh)
        dc_0.append(dc)
        dweights.extend(dw)
    dstates = [_join(dh_0) if needs[1] else None, _join(dc_0) if needs_c else None]
    return [dx if needs[0] else None, *dstates[: count - 1], *dweights]


def _output(call: Layer, x: Tensor, width: int) -> Tensor:
    rows = (x.shape[1], x.shape[0]) if call.batch_first else x.shape[:-1]
    y = x.new_empty((*rows, width))
    return y if call.rows is None or call.rows.packed else y.zero_()


def _steps_first(call: Layer, y: Tensor | None) -> Tensor | None:
    return y.transpose(0, 1) if call.batch_first and y is not None else y


def _trim(rows: Rows, sequence: Tensor | None) -> Tensor | None:
    """The steps that any row reaches, of a padded sequence."""
    return None if sequence is None else sequence[: rows.longest]


def _part(sequence: Tensor | None, d: int, directions: int) -> Tensor | None:
    """The share of direction d in a (T, B, D*H) sequence."""
    return None if sequence is None else sequence.unflatten(-1, (directions, -1)).select(-2, d)


def _state(states: Tensor | None, d: int) -> Tensor | None:
    """That of direction d, (1, B, H)."""
    return None if states is None else states[d : d + 1]


def _join(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)


def _extend(sequence: Tensor, steps: int) -> Tensor:
    missing = steps - sequence.shape[0]
    return sequence if not missing else torch.cat((sequence, sequence.new_zeros(missing, *sequence.shape[1:])))

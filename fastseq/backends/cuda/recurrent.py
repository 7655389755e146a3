"""The recurrent functions of `fastseq.backends.native` on tensors of a GPU.

The kernels run the loop over the steps, one launch each: the product of the state with w_hh, and the cell. The products
that span all steps (x with w_ih before it; dx, dw_ih, dw_hh after it) are torch's, and follow its flags for TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.backends.contract import Refused
from fastseq.backends.cuda.library import CELLS, compute_dtype, library, stream_of, to_device

__all__ = ["recurrent_backward", "recurrent_forward", "recurrent_step"]

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class _Saved:
    """The buffer that goes from forward to backward: the slots of all rows, then the carry after each step."""

    def __init__(self, cell: str, hidden_size: int, rows: int, like: Tensor, flat: Tensor | None = None) -> None:
        self.layout, self.hidden_size = CELLS[cell], hidden_size
        width = self.layout.slots * hidden_size
        if flat is None:
            flat = like.new_empty(rows * (width + self.layout.carry * hidden_size), dtype=compute_dtype(like.dtype))
        self.flat = flat
        self._slots = flat[: rows * width].view(rows, width)

    def of_input(self) -> Tensor:
        """W_ih x, later its gradient: (R, G*H), a view, in the order of the slots."""
        return self._from(self.layout.input_slot)

    def of_recurrence(self) -> Tensor:
        """The gradient of W_hh h: (R, G*H), a view, in torch's order of the gates."""
        return self._from(self.layout.recurrent_slot)

    def _from(self, slot: int) -> Tensor:
        return self._slots.narrow(1, slot * self.hidden_size, self.layout.gates * self.hidden_size)

    def to_slots(self, weight: Tensor) -> Tensor:
        """Rows in torch's order of the gates, put in that of the slots of the input."""
        shift = self.layout.first_gate * self.hidden_size
        return weight.roll(-shift, 0) if shift else weight

    def to_gates(self, weight: Tensor) -> Tensor:
        """The inverse."""
        shift = self.layout.first_gate * self.hidden_size
        return weight.roll(shift, 0) if shift else weight


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype is out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # emulated: torch has no such product on the CPU
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class _Rows:
    """The rows of a sequence (T, B, N) that are active, as a matrix (R, N) in packed order, and back."""

    def __init__(self, x: Tensor, batch_sizes: Tensor | None, order: Tensor | None, packed: bool) -> None:
        self.index = None
        if batch_sizes is not None and not packed:
            steps, batch = x.shape[:2]
            places = torch.arange(batch, device="cpu") if order is None else order
            live = torch.arange(batch, device="cpu") < batch_sizes.unsqueeze(1)
            self.index = to_device((torch.arange(steps, device="cpu").unsqueeze(1) * batch + places)[live], x.device)
        self.count = x.shape[0] if packed else x.shape[0] * x.shape[1] if self.index is None else len(self.index)

    def read(self, sequence: Tensor) -> Tensor:
        if sequence.dim() == 3:
            sequence = sequence.reshape(-1, sequence.shape[2])
        return sequence if self.index is None else sequence.index_select(0, self.index)

    def write(self, rows: Tensor, sequence: Tensor, accumulate: bool) -> None:
        if self.index is None:
            rows = rows.view(sequence.shape)
            sequence.add_(rows) if accumulate else sequence.copy_(rows)
            return
        place = self.index.div(sequence.shape[1], rounding_mode="floor"), self.index % sequence.shape[1]
        sequence[place] = sequence[place] + rows if accumulate else rows


def recurrent_forward(
    cell: str,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Weights,
    *,
    panels: None = None,
    batch_sizes: Tensor | None = None,
    order: Tensor | None = None,
    packed: bool = False,
    save: bool = False,
    y: Tensor | None = None,
    return_c: bool = False,
    float_state: bool = False,
    leading: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `native.recurrent_forward`, with its other keywords: (y, h_n, c_n, c_all, saved). There are no panels;
    `batch_sizes` and `order` are on the CPU.
    """
    w_ih, w_hh, *_ = weights
    if leading:
        h_0, c_0 = _squeezed(h_0), _squeezed(c_0)
    hidden_size, state = w_hh.shape[1], torch.float32 if float_state else x.dtype
    batch = _batch(x, h_0, c_0, batch_sizes, order, packed)
    rows = _Rows(x, batch_sizes, order, packed)
    keep = _Saved(cell, hidden_size, rows.count, x)
    if w_hh.shape[0] != w_ih.shape[0] or w_ih.shape[0] != keep.layout.gates * hidden_size:
        wanted = keep.layout.gates * hidden_size
        raise Refused(f"w_ih and w_hh must have {wanted} rows, got {w_ih.shape[0]} and {w_hh.shape[0]}")
    if x.shape[-1] != w_ih.shape[1] or x.dtype is not w_ih.dtype or x.device != w_ih.device:
        wanted = f"{x.shape[-1]} columns in {x.dtype} on {x.device}"
        raise Refused(f"w_ih must have {wanted}, got {w_ih.shape[1]} in {w_ih.dtype} on {w_ih.device}")
    _multiply(rows.read(x), keep.to_slots(w_ih).t(), keep.of_input())
    padded = batch_sizes is not None and not packed
    new_sequence = x.new_zeros if padded else x.new_empty
    y = new_sequence(*x.shape[:-1], hidden_size) if y is None else y
    c_all = new_sequence(*x.shape[:-1], hidden_size) if return_c and keep.layout.states else None
    h_n = x.new_empty(batch, hidden_size, dtype=state)
    c_n = torch.empty_like(h_n) if keep.layout.states else None
    library().recurrent_forward(
        cell, x, h_0, c_0, weights, keep.flat, y, h_n=h_n, c_n=c_n, c_all=c_all, read_x=False, batch_sizes=batch_sizes,
        order=order, placed_order=to_device(order, x.device), packed=packed, float_state=float_state,
        stream=stream_of(x.device), **options,
    )  # fmt: skip
    if leading:
        h_n, c_n = _unsqueezed(h_n), _unsqueezed(c_n)
    return y, h_n, c_n, c_all, keep.flat if save else None


def recurrent_step(
    cell: str,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    threads: int,
    save: bool = False,
    panels: None = None,
    float_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `native.recurrent_step`, in one launch: (y, h_n, c_n, saved). `threads` and `panels` are the CPU's."""
    if x.dim() != 2 or w_hh.dim() != 2:
        raise Refused(f"x and w_hh must have 2 dimensions, got {x.dim()} and {w_hh.dim()}")
    batch, hidden_size, state = x.shape[0], w_hh.shape[1], torch.float32 if float_state else x.dtype
    keep = _Saved(cell, hidden_size, batch, x)
    y = x.new_empty(1, batch, hidden_size)
    h_n = x.new_empty(batch, hidden_size, dtype=state) if float_state else None
    c_n = x.new_empty(batch, hidden_size, dtype=state) if keep.layout.states else None
    library().recurrent_forward(
        cell, x.unsqueeze(0), h, c, (w_ih, w_hh, b_ih, b_hh), keep.flat, y, h_n=h_n, c_n=c_n, read_x=True,
        float_state=float_state, stream=stream_of(x.device),
    )  # fmt: skip
    y = y.squeeze_(0)
    return y, y if h_n is None else h_n, c_n, keep.flat if save else None


def recurrent_backward(
    cell: str,
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Weights,
    y: Tensor,
    saved: Tensor,
    isa: str,
    *,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    needs: Sequence[bool],
    batch_sizes: Tensor | None = None,
    order: Tensor | None = None,
    packed: bool = False,
    float_state: bool = False,
    leading: bool = False,
    dx: Tensor | None = None,
    accumulate_dx: bool = False,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """As `native.recurrent_backward`, with its other keywords: (dx, dh_0, dc_0, dw_ih, dw_hh, db_ih, db_hh), None where
    `needs` says so.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    if leading:
        h_0, c_0, dh_n, dc_n = _squeezed(h_0), _squeezed(c_0), _squeezed(dh_n), _squeezed(dc_n)
    needs_x, needs_h_0, needs_c_0, needs_w_ih, needs_w_hh, needs_b_ih, needs_b_hh = needs
    hidden_size, state = w_hh.shape[1], torch.float32 if float_state else x.dtype
    batch = _batch(x, h_0, c_0, batch_sizes, order, packed)
    rows = _Rows(x, batch_sizes, order, packed)
    keep = _Saved(cell, hidden_size, rows.count, x, saved)
    dh_0 = x.new_empty(batch, hidden_size, dtype=state) if needs_h_0 else None
    dc_0 = x.new_empty(batch, hidden_size, dtype=state) if needs_c_0 and keep.layout.states else None
    dcarry = x.new_empty(batch, hidden_size, dtype=saved.dtype) if keep.layout.carry else None
    hidden = x.new_empty(rows.count, hidden_size) if needs_w_hh else None
    library().recurrent_backward(
        cell, x, h_0, c_0, weights, saved, y, dh_n=dh_n, dc_n=dc_n, dh_0=dh_0, dc_0=dc_0, dcarry=dcarry, hidden=hidden,
        batch_sizes=batch_sizes, order=order, placed_order=to_device(order, x.device), packed=packed,
        float_state=float_state, stream=stream_of(x.device), **options,
    )  # fmt: skip

    dw_ih = dw_hh = db_ih = db_hh = None
    of_input, of_recurrence = keep.of_input(), keep.of_recurrence()
    if needs_b_ih and b_ih is not None:
        db_ih = keep.to_gates(of_input.sum(0)).to(x.dtype)
    if needs_b_hh and b_hh is not None:
        db_hh = of_recurrence.sum(0).to(x.dtype)
    if needs_w_hh:
        dw_hh = torch.mm(of_recurrence.to(x.dtype).t(), hidden)
    if needs_w_ih or needs_x:
        of_input = of_input.to(x.dtype)
    if needs_w_ih:
        dw_ih = keep.to_gates(torch.mm(of_input.t(), rows.read(x)))
    if needs_x:
        dx_rows = torch.mm(of_input, keep.to_slots(w_ih))
        if dx is None and rows.index is None:
            dx = dx_rows.view(x.shape)
        else:
            dx = torch.zeros_like(x) if dx is None else dx
            rows.write(dx_rows, dx, accumulate_dx)
    if leading:
        dh_0, dc_0 = _unsqueezed(dh_0), _unsqueezed(dc_0)
    return dx if needs_x else None, dh_0, dc_0, dw_ih, dw_hh, db_ih, db_hh


def _squeezed(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.squeeze(0)


def _unsqueezed(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.unsqueeze_(0)


def _batch(
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    order: Tensor | None,
    packed: bool,
) -> int:
    if not packed:
        return x.shape[1]
    for tensor in (h_0, c_0, order):
        if tensor is not None:
            return tensor.shape[0]
    return int(batch_sizes[0])

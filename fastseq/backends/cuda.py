"""The CUDA kernels, with the recurrent and the attention functions of `fastseq.backends.native` on tensors of a GPU.

Of recurrent layers the kernels run the loop over the steps, one launch each: the product of the state with w_hh, and
the cell. The products that span all steps (x with w_ih before it; dx, dw_ih, dw_hh after it) are torch's, and follow
its flags for TF32. The products inside the loop, and those of attention, are in full float32, or float64.

Everything is queued on torch's current stream and nothing waits for it. Calls can be captured in a CUDA graph, but for
those with `order`, lengths or starts: these are on the CPU and are copied to the GPU.

They have not run on a GPU yet. `FASTSEQ_CUDA=on` in the environment switches them on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastseq._native as _native

__all__ = [
    "DTYPES",
    "LIBRARY",
    "active_isa",
    "attention_backward",
    "attention_forward",
    "isas",
    "open_library",
    "recurrent_backward",
    "recurrent_forward",
    "recurrent_step",
    "use_emulation",
    "use_isa",
    "why_off",
]

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
LIBRARY = Path(_native.__file__).with_name("libfastseq_cuda.so")

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def why_off() -> str:
    """Why calls do not take these kernels; empty where they do."""
    choice = os.environ.get("FASTSEQ_CUDA", "")
    if choice not in ("", "auto", "off", "on"):
        raise ValueError(f"FASTSEQ_CUDA must be on, off or auto, got {choice!r}")
    if choice != "on":
        return "off by default, as they have not run on a GPU yet: FASTSEQ_CUDA=on tries them"
    if not LIBRARY.exists():
        return "not built: no nvcc was found, or FASTSEQ_CUDA was off"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return ""


_library: _native.CudaLibrary | None = None


def open_library() -> None:
    """Loads the kernels, and says once that they are new."""
    global _library
    _library = _native.CudaLibrary(str(LIBRARY))
    warnings.warn(
        "fastseq's CUDA kernels are switched on by FASTSEQ_CUDA=on; they have not been tested on a GPU yet",
        RuntimeWarning,
        stacklevel=2,
    )


@contextmanager
def use_emulation(path: Path) -> Iterator[None]:
    """Runs the block with a library that takes tensors of the CPU, as tests build it."""
    global _library
    before, _library = _library, _native.CudaLibrary(str(path), emulated=True)
    try:
        yield
    finally:
        _library = before


def isas() -> tuple[str, ...]:
    """As `native.isas`; there is one set of kernels."""
    return ("cuda",)


def active_isa() -> str:
    """As `native.active_isa`."""
    return "cuda"


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """As `native.use_isa`, with nothing to choose."""
    if name != "cuda":
        raise ValueError(f"instruction set {name!r} is none of those of a GPU: cuda")
    yield


class _Layout(NamedTuple):
    """Where `saved` keeps what of a cell: csrc/math says the same."""

    gates: int
    slots: int
    input_slot: int
    recurrent_slot: int
    first_gate: int  # torch's index of the gate in `input_slot`; the others follow cyclically
    carry: bool


_LAYOUTS = {
    "rnn_tanh": _Layout(1, 1, 0, 0, 0, False),
    "rnn_relu": _Layout(1, 1, 0, 0, 0, False),
    "lstm": _Layout(4, 4, 0, 0, 0, True),
    "gru": _Layout(3, 4, 0, 1, 2, True),
}


class _Saved:
    """The buffer that goes from forward to backward: the slots of all rows, then the carry after each step."""

    def __init__(self, cell: str, hidden_size: int, rows: int, like: Tensor, flat: Tensor | None = None) -> None:
        self.layout, self.hidden_size = _LAYOUTS[cell], hidden_size
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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


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
            places = torch.arange(batch) if order is None else order
            live = torch.arange(batch) < batch_sizes.unsqueeze(1)
            self.index = _to_device((torch.arange(steps).unsqueeze(1) * batch + places)[live], x.device)
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


def _to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    if tensor is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


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
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `native.recurrent_forward`, with its other keywords: (y, h_n, c_n, c_all, saved). There are no panels;
    `batch_sizes` and `order` are on the CPU.
    """
    w_ih, w_hh, *_ = weights
    hidden_size, state = w_hh.shape[1], torch.float32 if float_state else x.dtype
    batch = _batch(x, h_0, c_0, batch_sizes, order, packed)
    rows = _Rows(x, batch_sizes, order, packed)
    keep = _Saved(cell, hidden_size, rows.count, x)
    if w_hh.shape[0] != w_ih.shape[0] or w_ih.shape[0] != keep.layout.gates * hidden_size:
        wanted = keep.layout.gates * hidden_size
        raise ValueError(f"w_ih and w_hh must have {wanted} rows, got {w_ih.shape[0]} and {w_hh.shape[0]}")
    _multiply(rows.read(x), keep.to_slots(w_ih).t(), keep.of_input())
    padded = batch_sizes is not None and not packed
    new_sequence = x.new_zeros if padded else x.new_empty
    y = new_sequence(*x.shape[:-1], hidden_size) if y is None else y
    c_all = new_sequence(*x.shape[:-1], hidden_size) if return_c and cell == "lstm" else None
    h_n = x.new_empty(batch, hidden_size, dtype=state)
    c_n = torch.empty_like(h_n) if cell == "lstm" else None
    _library.recurrent_forward(
        cell, x, h_0, c_0, weights, keep.flat, y, h_n=h_n, c_n=c_n, c_all=c_all, read_x=False, batch_sizes=batch_sizes,
        order=order, placed_order=_to_device(order, x.device), packed=packed, float_state=float_state,
        stream=_stream(x.device), **options,
    )  # fmt: skip
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
        raise ValueError(f"x and w_hh must have 2 dimensions, got {x.dim()} and {w_hh.dim()}")
    batch, hidden_size, state = x.shape[0], w_hh.shape[1], torch.float32 if float_state else x.dtype
    keep = _Saved(cell, hidden_size, batch, x)
    y = x.new_empty(1, batch, hidden_size)
    h_n = x.new_empty(batch, hidden_size, dtype=state) if float_state else None
    c_n = x.new_empty(batch, hidden_size, dtype=state) if cell == "lstm" else None
    _library.recurrent_forward(
        cell, x.unsqueeze(0), h, c, (w_ih, w_hh, b_ih, b_hh), keep.flat, y, h_n=h_n, c_n=c_n, read_x=True,
        float_state=float_state, stream=_stream(x.device),
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
    needs: Sequence[bool],
    batch_sizes: Tensor | None = None,
    order: Tensor | None = None,
    packed: bool = False,
    float_state: bool = False,
    dx: Tensor | None = None,
    accumulate_dx: bool = False,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """As `native.recurrent_backward`, with its other keywords: (dx, dh_0, dc_0, dw_ih, dw_hh, db_ih, db_hh), None where
    `needs` says so.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    needs_x, needs_h_0, needs_c_0, needs_w_ih, needs_w_hh, needs_b_ih, needs_b_hh = needs
    hidden_size, state = w_hh.shape[1], torch.float32 if float_state else x.dtype
    batch = _batch(x, h_0, c_0, batch_sizes, order, packed)
    rows = _Rows(x, batch_sizes, order, packed)
    keep = _Saved(cell, hidden_size, rows.count, x, saved)
    dh_0 = x.new_empty(batch, hidden_size, dtype=state) if needs_h_0 else None
    dc_0 = x.new_empty(batch, hidden_size, dtype=state) if needs_c_0 and cell == "lstm" else None
    dcarry = x.new_empty(batch, hidden_size, dtype=saved.dtype) if keep.layout.carry else None
    hidden = x.new_empty(rows.count, hidden_size) if needs_w_hh else None
    _library.recurrent_backward(
        cell, x, h_0, c_0, weights, saved, y, dh_0=dh_0, dc_0=dc_0, dcarry=dcarry, hidden=hidden,
        batch_sizes=batch_sizes, order=order, placed_order=_to_device(order, x.device), packed=packed,
        float_state=float_state, stream=_stream(x.device), **options,
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
    return dx if needs_x else None, dh_0, dc_0, dw_ih, dw_hh, db_ih, db_hh


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


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    q_starts: Tensor | None = None,
    k_starts: Tensor | None = None,
    seed: int = 0,
    return_lse: bool = False,
    out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `native.attention_forward`, with its other keywords: (out, lse). Lengths and starts are on the CPU."""
    _check_heads(q, k, v)
    gaps = _gaps(q_lengths, q_starts, q)
    if out is None:
        out = _empty_heads(q, v.shape[-1], gaps)
    lse = (q.new_zeros if gaps else q.new_empty)(q.shape[:3], dtype=torch.float64) if return_lse else None
    _library.attention_forward(
        q, k, v, out, lse, q_lengths=q_lengths, k_lengths=k_lengths, q_starts=q_starts, k_starts=k_starts,
        placed=_placed(q, q_lengths, k_lengths, q_starts, k_starts), seed=seed % 2**64,
        new_parts=partial(q.new_empty, dtype=compute_dtype(q.dtype)), stream=_stream(q.device), **options,
    )  # fmt: skip
    return out, lse


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    needs: Sequence[bool],
    bias: Tensor | None = None,
    bias_shape: Sequence[int] | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    q_starts: Tensor | None = None,
    k_starts: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """As `native.attention_backward`, with its other keywords but for the tensors to write into: (dq, dk, dv, dbias),
    None where `needs` says so. `out` is not read.
    """
    _check_heads(q, k, v)
    needs_q, needs_k, needs_v, needs_bias = needs
    q_gaps, k_gaps = _gaps(q_lengths, q_starts, q), _gaps(k_lengths, k_starts, k)
    dq = _empty_heads(q, q.shape[-1], q_gaps) if needs_q else None
    dk = _empty_heads(k, k.shape[-1], k_gaps) if needs_k else None
    dv = _empty_heads(v, v.shape[-1], k_gaps) if needs_v else None
    dbias = None
    if needs_bias and bias is not None:
        dbias = q.new_empty(bias.shape if bias_shape is None else bias_shape, dtype=compute_dtype(q.dtype))
    delta = q.new_empty(q.shape[:3], dtype=torch.float64)
    _library.attention_backward(
        q, k, v, lse, dout, dq=dq, dk=dk, dv=dv, dbias=dbias, delta=delta, bias=bias, q_lengths=q_lengths,
        k_lengths=k_lengths, q_starts=q_starts, k_starts=k_starts,
        placed=_placed(q, q_lengths, k_lengths, q_starts, k_starts), seed=seed % 2**64, stream=_stream(q.device),
        **options,
    )  # fmt: skip
    return dq, dk, dv, dbias if dbias is None else dbias.to(q.dtype)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What is asked of tensors before outputs can be made like them; the binding checks the rest."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {tensor.dim()}")


def _empty_heads(like: Tensor, size: int, zeros: bool) -> Tensor:
    """A tensor like `like` but for its last size, its axes in the same order in memory."""
    order = sorted(range(3), key=like.stride, reverse=True)
    tensor = (like.new_zeros if zeros else like.new_empty)(*(like.shape[axis] for axis in order), size)
    return tensor.permute(order.index(0), order.index(1), order.index(2), 3)


def _gaps(lengths: Tensor | None, starts: Tensor | None, rows: Tensor) -> bool:
    """True where a packed batch has rows that belong to no sequence."""
    return starts is not None and lengths is not None and int(lengths.sum()) < rows.shape[2]


def _placed(q: Tensor, *numbers: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(_to_device(n, q.device) for n in numbers)

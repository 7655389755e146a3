"""What the parts of ops say to each other: the spec of a cell, how a layer is run, what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastseq.ops.lengths import Rows

Direction = tuple[Tensor | None, ...]  # w_ih (G*H, I), w_hh (G*H, H), b_ih (G*H), b_hh (G*H), both biases or neither
Weights = Sequence[Direction]  # one entry per direction


class Cell(NamedTuple):
    """What a recurrent cell is to the layers around it."""

    name: str  # the kernels' name
    mode: str  # torch's name
    gates: int
    has_c: bool  # a second state, as LSTM's
    sequence_op: Callable[..., Any]  # torch's own ops
    step_op: Callable[..., Any]
    # (W_ih x + b_ih (B, G*H), h, c, w_hh, b_hh) -> (h', c'): the cell in torch ops
    formula: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Layer(NamedTuple):
    """How a layer is run, all but its tensors."""

    cell: Cell
    reverse: tuple[bool, ...] = (False,)  # per direction
    rows: Rows | None = None
    reset: Tensor | None = None  # (T, B) bool
    want_c: bool = False  # every cell state, not only the last
    float_state: bool = False  # bfloat16 only: states in float32
    batch_first: bool = False  # of the output y alone: (B, T, N)

    @property
    def plain(self) -> bool:
        """True where torch's own op does the same."""
        return (
            (self.rows is None or self.rows.packed) and self.reset is None and not self.want_c and not self.float_state
        )


class Results(NamedTuple):
    """y (T, B, D*H), or (B, T, D*H) where the call is `batch_first`, h_n and c_n (D, B, H), c_all (T, B, D*H); packed:
    (R, D*H) for y and c_all. No two share memory, and none is a view."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None
    c_all: Tensor | None

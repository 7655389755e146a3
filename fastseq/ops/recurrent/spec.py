"""The data that the recurrent modules share: the spec of a cell, how a layer is run, and its results."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from fastseq.ops.lengths import Rows

# w_ih (G*H, I), w_hh (G*H, H), b_ih (G*H), b_hh (G*H), both biases or neither, then the cell's parameters, each (H)
Direction = tuple[Tensor | None, ...]
Weights = Sequence[Direction]  # one entry per direction
States = tuple[Tensor | None, ...]  # h, then those of `Cell.states`; None for zeros


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell, as the layers see it.

    The formula is the cell in torch operators. It takes x = W_ih x + b_ih and r = W_hh h + b_hh, each with an attribute
    (B, H) for each gate, then h, the other states and the parameters. It returns h' and the other states after the
    step. It runs where the kernels do not serve a call; a cell without kernels runs by its formula alone.
    """

    name: str  # the kernels' name
    mode: str  # in messages; torch's name where torch has the cell
    gates: tuple[str, ...]  # a block of H rows of the weights each, in their order
    formula: Callable[..., tuple[Tensor, ...]]
    states: tuple[str, ...] = ()  # beside h
    parameters: tuple[str, ...] = ()  # of shape (H,)
    sequence_op: Callable[..., Any] | None = None  # torch's own ops, where it has the cell
    step_op: Callable[..., Any] | None = None
    autocasts_to_weights: bool = False  # under autocast torch's own op runs in the dtype of its weights
    kinks: bool = False  # the gradient jumps, as relu's at 0, next to which no two roundings can be compared
    named: type = field(init=False, repr=False)  # the named tuple of the gates, which the formula gets

    def __post_init__(self) -> None:
        object.__setattr__(self, "named", namedtuple("Gates", self.gates))

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        from fastseq.ops import CELLS

        if CELLS.get(self.name) is self:
            return known_cell, (self.name,)
        return Cell, tuple(getattr(self, each.name) for each in fields(self) if each.init)

    def __repr__(self) -> str:
        return f"<cell {self.name}: gates {' '.join(self.gates)}, states {' '.join(('h', *self.states))}>"


def known_cell(name: str) -> Cell:
    """The cell of the package with this name."""
    from fastseq.ops import CELLS  # their modules import this one

    return CELLS[name]


class Layer(NamedTuple):
    """How to run a layer: everything but its tensors."""

    cell: Cell
    reverse: tuple[bool, ...] = (False,)  # per direction
    rows: Rows | None = None
    reset: Tensor | None = None  # (T, B) bool
    every_state: bool = False  # the other states beside h at every step, not only the last
    float_state: bool = False  # bfloat16 only: states in float32
    batch_first: bool = False  # of the output y alone: (B, T, N)

    @property
    def plain(self) -> bool:
        """True where torch's own op does the same."""
        return (
            (self.rows is None or self.rows.packed)
            and self.reset is None
            and not self.every_state
            and not self.float_state
        )


class Results(NamedTuple):
    """The results of a layer. No two tensors share memory, and none is a view."""

    y: Tensor  # (T, B, D*H), or (B, T, D*H) where the call is `batch_first`; packed: (R, D*H)
    last: tuple[Tensor, ...]  # of each state, (D, B, H)
    every: tuple[Tensor, ...]  # of each state beside h, where asked for, (T, B, D*H); packed: (R, D*H)

    @classmethod
    def of(cls, call: Layer, flat: Sequence[Tensor]) -> Results:
        """Out of all tensors in a row, as autograd Functions return them."""
        states = 1 + len(call.cell.states)
        return cls(flat[0], tuple(flat[1 : 1 + states]), tuple(flat[1 + states :]))


class Output(NamedTuple):
    """The results of `fastseq.rnn`, `lstm` and `gru`."""

    output: Tensor  # (T, B, H): h after every step
    hx: Tensor | tuple[Tensor, ...]  # the last states, as the argument `hx`


class OutputAndStates(NamedTuple):
    """Their results with `return_states`."""

    output: Tensor
    hx: Tensor | tuple[Tensor, ...]
    states: Tensor | tuple[Tensor, ...]  # all states, each (T, B, H): h, or a tuple as `hx`

"""What is timed: sizes, and how the input comes."""

import os
from typing import NamedTuple

SMALL = os.environ.get("FASTSEQ_BENCH_SMALL", "") not in ("", "0")  # a smoke test: tiny shapes, one round

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3, "RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}


class Shape(NamedTuple):
    """Sizes of a sequence module, and how its input comes."""

    B: int
    T: int
    I: int  # noqa: E741  the house's letter for the input size
    H: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False

    @property
    def id(self) -> str:
        kind = ("-2layers-bidirectional" if self.bidirectional else "") + ("-packed" if self.packed else "")
        return f"B{self.B}-T{self.T}-I{self.I}-H{self.H}{kind}"

    def flops(self, name: str, tokens: int) -> int:
        """Multiply-adds of a forward pass over so many tokens, counted as two each."""
        directions, total, inputs = 1 + self.bidirectional, 0, self.I
        for _ in range(self.layers):
            total += 2 * tokens * directions * GATES[name] * self.H * (inputs + self.H)
            inputs = directions * self.H
        return total

    def weights_read(self, name: str) -> int:
        """How many recurrent weights a forward pass reads, all of them at every step."""
        return self.T * self.layers * (1 + self.bidirectional) * GATES[name] * self.H**2


class CellShape(NamedTuple):
    """Sizes of a cell with as many inputs as units."""

    B: int
    H: int

    @property
    def id(self) -> str:
        return f"B{self.B}-H{self.H}"

    def flops(self, name: str) -> int:
        return 2 * self.B * self.weights_read(name)

    def weights_read(self, name: str) -> int:
        return 2 * GATES[name] * self.H**2


SEQUENCES = (
    Shape(1, 100, 128, 128),
    Shape(1, 100, 512, 512),
    Shape(8, 64, 256, 256),
    Shape(32, 100, 256, 256),
    Shape(64, 100, 512, 512),
    Shape(64, 50, 1024, 1024),
    Shape(128, 20, 256, 512),
    Shape(32, 50, 256, 256, layers=2, bidirectional=True),
    Shape(32, 50, 256, 256, packed=True),
)
CELLS = (CellShape(1, 64), CellShape(1, 128), CellShape(1, 512), CellShape(32, 256), CellShape(64, 512))
if SMALL:
    SEQUENCES = (Shape(1, 3, 8, 8), Shape(9, 4, 5, 7, layers=2, bidirectional=True), Shape(3, 4, 5, 7, packed=True))
    CELLS = (CellShape(1, 8),)

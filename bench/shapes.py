"""What is timed: sizes, and how the input comes."""

import os
from typing import NamedTuple

from fastseq.ops import CELLS as CELL_SPECS

SMALL = os.environ.get("FASTSEQ_BENCH_SMALL", "") not in ("", "0")  # a smoke test: tiny shapes, one round

GATES = {cell.mode: len(cell.gates) for cell in CELL_SPECS.values()}
GATES |= {f"{mode}Cell": gates for mode, gates in GATES.items()}


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


class AttentionShape(NamedTuple):
    """Sizes of queries, keys and values, the last two of the same size."""

    B: int
    heads: int
    L: int
    S: int
    D: int
    kv_heads: int = 0  # as many as there are heads

    @property
    def id(self) -> str:
        heads = f"N{self.heads}" + (f"/{self.kv_heads}" if self.grouped else "")
        return f"B{self.B}-{heads}-L{self.L}-S{self.S}-D{self.D}"

    @property
    def grouped(self) -> bool:
        """Whether each head of the keys serves several of the queries."""
        return self.kv_heads not in (0, self.heads)

    @property
    def decode(self) -> bool:
        """Whether one query reads the cache of a whole sequence."""
        return self.L == 1

    @property
    def cache_elements(self) -> int:
        """Of keys and values, what every call must read."""
        return 2 * self.B * (self.kv_heads or self.heads) * self.S * self.D

    def flops(self, pairs: int) -> int:
        """Multiply-adds of a forward pass where so many pairs of a query and a key are seen, counted as two each."""
        return 4 * self.B * self.heads * pairs * self.D


class MultiheadShape(NamedTuple):
    """Sizes of self-attention."""

    B: int
    S: int
    E: int
    heads: int

    @property
    def id(self) -> str:
        return f"B{self.B}-S{self.S}-E{self.E}-N{self.heads}"

    @property
    def flops(self) -> int:
        """Four projections, the scores and the sums of values."""
        return self.B * self.S * self.E * (8 * self.E + 4 * self.S)


class NormShape(NamedTuple):
    """Sizes of a layer normalization."""

    rows: int
    features: int

    @property
    def id(self) -> str:
        return f"R{self.rows}-N{self.features}"


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
STEPS = tuple(Shape(1, 1, size, size) for size in (16, 128, 512, 1024))
CELLS = (CellShape(1, 64), CellShape(1, 128), CellShape(1, 512), CellShape(32, 256), CellShape(64, 512))
PREFILLS = (
    AttentionShape(1, 8, 512, 512, 64),
    AttentionShape(4, 8, 1024, 1024, 64),
    AttentionShape(1, 16, 4096, 4096, 128),
    AttentionShape(8, 8, 128, 128, 64),
    AttentionShape(32, 8, 32, 32, 64),
)
DECODES = (
    AttentionShape(1, 8, 1, 4096, 64),
    AttentionShape(1, 32, 1, 4096, 128),
    AttentionShape(8, 32, 1, 1024, 128),
    AttentionShape(1, 32, 1, 4096, 128, kv_heads=8),
    AttentionShape(8, 32, 1, 1024, 128, kv_heads=8),
)
MULTIHEADS = (
    MultiheadShape(8, 128, 512, 8),
    MultiheadShape(1, 512, 512, 8),
    MultiheadShape(32, 32, 512, 8),
    MultiheadShape(4, 1024, 512, 8),
)
NORMS = (NormShape(8 * 128, 512), NormShape(4 * 1024, 512), NormShape(1 * 512, 768))
# The scores of torch's training steps with dropout or a mask's gradient are in memory: 1 GiB each at 4096.
LONGEST_TRAINING = 1024
WINDOW = 64  # keys before its own that a query sees

if SMALL:
    SEQUENCES = (Shape(1, 3, 8, 8), Shape(9, 4, 5, 7, layers=2, bidirectional=True), Shape(3, 4, 5, 7, packed=True))
    STEPS = (Shape(1, 1, 8, 8),)
    CELLS = (CellShape(1, 8),)
    PREFILLS = (AttentionShape(1, 2, 7, 7, 8),)
    DECODES = (AttentionShape(2, 4, 1, 9, 8), AttentionShape(2, 4, 1, 9, 8, kv_heads=2))
    MULTIHEADS = (MultiheadShape(2, 5, 8, 2),)
    NORMS = (NormShape(5, 7),)

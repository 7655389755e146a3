"""Sequence modules beside torch's, with the same weights: what bench_rnn, bench_lstm and bench_gru run."""

from typing import NamedTuple

import pytest
import torch
from conftest import SMALL
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


class Shape(NamedTuple):
    """Sizes of a module, and how its input comes."""

    B: int
    T: int
    I: int  # noqa: E741  the house's letter for the input size
    H: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False

    @property
    def id(self) -> str:
        kind = ("-2layers" if self.layers == 2 else "") + ("-packed" if self.packed else "")
        return f"B{self.B}-T{self.T}-I{self.I}-H{self.H}{kind}"


SHAPES = (
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
if SMALL:
    SHAPES = (Shape(1, 3, 8, 8), Shape(3, 4, 5, 7, layers=2, bidirectional=True), Shape(3, 4, 5, 7, packed=True))

over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def flops(name: str, shape: Shape, tokens: int) -> int:
    """Multiply-adds of a forward pass, counted as two."""
    directions, total, inputs = 1 + shape.bidirectional, 0, shape.I
    for _ in range(shape.layers):
        total += 2 * tokens * directions * GATES[name] * shape.H * (inputs + shape.H)
        inputs = directions * shape.H
    return total


def run(race, name: str, shape: Shape, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    sizes = (shape.I, shape.H, shape.layers)
    theirs = getattr(nn, name)(*sizes, bidirectional=shape.bidirectional).to(dtype)
    ours = getattr(fastseq, name)(*sizes, bidirectional=shape.bidirectional).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape.T, shape.B, shape.I).to(dtype)
    tokens = shape.T * shape.B
    if shape.packed:
        lengths = torch.randint(1, shape.T + 1, (shape.B,))
        lengths[0], tokens = shape.T, int(lengths.sum())

    def inputs():
        leaf = x.detach().requires_grad_(training)
        return pack_padded_sequence(leaf, lengths, enforce_sorted=False) if shape.packed else leaf

    def output(module, sequence):
        y = module(sequence)[0]
        return y.data if shape.packed else y

    with torch.no_grad():
        expected, result = (output(module, inputs()) for module in (theirs, ours))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)

    if training:
        dy = torch.randn_like(expected)

        def call(module):
            module.zero_grad()
            output(module, inputs()).backward(dy)
    else:
        fixed = inputs()

        def call(module):
            with torch.no_grad():
                module(fixed)

    passes = 3 if training else 1
    race(lambda: call(ours), lambda: call(theirs), passes * flops(name, shape, tokens), dtype)

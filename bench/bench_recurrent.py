"""fastseq.nn.Recurrent with the cells that torch lacks, beside their formulas in torch operators."""

from __future__ import annotations

import copy

import pytest
import torch
from peers import checked
from sequences import over_dtypes
from shapes import SEQUENCES
from torch import nn

import fastseq
from fastseq import backends

LACKING = [cell for cell in fastseq.ops.CELLS.values() if cell.sequence_op is None]


class Kernels(nn.Module):
    """A module as it is."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *arguments):
        return self.layer(*arguments)


class Formula(Kernels):
    """The same on torch's operators, step by step."""

    def forward(self, *arguments):
        with backends.use_backend("torch"):
            return super().forward(*arguments)


@over_dtypes
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("shape", [shape for shape in SEQUENCES if not shape.packed], ids=lambda shape: shape.id)
@pytest.mark.parametrize("cell", LACKING, ids=lambda cell: cell.name)
def test_sequence(benchmark, race, cell, shape, mode, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.T, shape.B, shape.I, generator=generator)
    torch.manual_seed(0)
    layer = fastseq.nn.Recurrent(cell, shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional).to(dtype)
    ours, theirs = checked(Kernels(layer), Formula(copy.deepcopy(layer)), (x,), mode, dtype)
    name = cell.mode
    race(
        ours.call,
        {"torch": theirs.call},
        (3 if mode == "training" else 1) * shape.flops(name, shape.T * shape.B),
        dtype,
        mode,
        module=name,
        shape=shape.id,
        batch=shape.B,
        weight_bytes=(1 + (mode == "training")) * shape.weights_read(name) * dtype.itemsize,
    )

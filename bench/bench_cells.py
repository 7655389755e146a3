"""One step of a cell beside torch's: the call as much as the kernel."""

import pytest
import torch
from floors import floors
from peers import MODES, peers
from sequences import over_dtypes
from shapes import CELLS


@over_dtypes
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.replace(" ", "_"))
@pytest.mark.parametrize("shape", CELLS, ids=lambda shape: shape.id)
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cell(benchmark, race, name, shape, mode, dtype):
    generator = torch.Generator().manual_seed(0)
    x, h, c = (torch.randn(shape.B, shape.H, generator=generator) for _ in range(3))
    hx = (h, c) if name == "LSTMCell" else h
    ours, theirs = peers(name, (shape.H, shape.H), (x, hx), mode, dtype)
    passes = 3 if mode == "training" else 1
    race(
        ours.call,
        {"torch": theirs.call},
        passes * shape.flops(name),
        dtype,
        mode,
        module=name,
        shape=shape.id,
        batch=shape.B,
        weight_bytes=(1 + (mode == "training")) * shape.weights_read(name) * dtype.itemsize,
    )
    info = benchmark.extra_info
    info.update(floors(name, mode, shape, info["dtype"], info["threads"]))

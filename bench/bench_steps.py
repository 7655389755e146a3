"""A sequence module that is called for one step of one row after another, beside torch's: no_grad, not frozen.

The state of one call is that of every call: what is timed does not depend on its values.
"""

import pytest
import torch
from floors import floors
from peers import peers
from shapes import STEPS


@pytest.mark.parametrize("shape", STEPS, ids=lambda shape: shape.id)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_step(benchmark, race, name, shape):
    generator = torch.Generator().manual_seed(0)
    x, h, c = (torch.randn(1, 1, shape.H, generator=generator) for _ in range(3))
    arguments = (x, (h, c) if name == "LSTM" else h)
    ours, theirs = peers(name, (shape.I, shape.H), arguments, "forward", torch.float32)
    race(
        ours.call,
        {"torch": theirs.call},
        shape.flops(name, 1),
        torch.float32,
        "forward",
        module=name,
        shape=shape.id,
        batch=1,
        weight_bytes=2 * shape.weights_read(name) * torch.float32.itemsize,
    )
    info = benchmark.extra_info
    info.update(floors(name, "forward", shape, info["dtype"], info["threads"]))

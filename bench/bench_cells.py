"""One step of a cell beside torch's: the call as much as the kernel."""

import pytest
import torch
from conftest import SMALL
from torch import nn

import fastseq

GATES = {"RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}
SHAPES = ((1, 8),) if SMALL else ((1, 64), (1, 128), (1, 512), (32, 256), (64, 512))


@pytest.mark.parametrize("mode", ["no_grad", "forward", "training"])
@pytest.mark.parametrize(("batch", "size"), SHAPES, ids=lambda n: str(n))
@pytest.mark.parametrize("name", GATES)
def test_cell(race, name, batch, size, mode):
    torch.manual_seed(0)
    theirs, ours = getattr(nn, name)(size, size), getattr(fastseq, name)(size, size)
    ours.load_state_dict(theirs.state_dict())
    x, h = torch.randn(batch, size, requires_grad=mode != "no_grad"), torch.randn(batch, size)
    hx = (h, torch.randn(batch, size)) if name == "LSTMCell" else h
    result, expected = (cell(x, hx)[0] if name == "LSTMCell" else cell(x, hx) for cell in (ours, theirs))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn(batch, size)

    def call(cell):
        if mode == "no_grad":
            with torch.no_grad():
                cell(x, hx)
            return
        y = cell(x, hx)
        if mode == "training":
            (y[0] if name == "LSTMCell" else y).backward(dy)

    passes = 3 if mode == "training" else 1
    race(lambda: call(ours), lambda: call(theirs), passes * 4 * batch * GATES[name] * size * size)

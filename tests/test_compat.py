"""Layers that are instances of torch's classes under torch.compile: outside of its graphs, as torch's are."""

from __future__ import annotations

import copy

import pytest
import torch
from models import assert_close
from torch import nn
from torch._dynamo.utils import counters

import fastseq


class Padded(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(4, 4), cls(4, 5, 2, dropout=0.0), nn.Linear(5, 2)

    def forward(self, x):
        return self.after(self.layer(self.before(x))[0]).relu()


class Packed(Padded):
    lengths = (2, 5, 1)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.before(x), torch.tensor(self.lengths), enforce_sorted=False)
        return self.after(nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0])


def compiled(model, x):
    """The output and the gradients, and what torch.compile counted."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, backend=backend)
    for _ in range(2):
        y = run(x)
    results = [y, *torch.autograd.grad(y.sum(), list(model.parameters()))]
    breaks = sum(counters["graph_break"].values())
    return results, {"graphs": len(graphs), "breaks": breaks, **counters["frames"]}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("model", [Padded, Packed])
def test_fused_models_are_compiled_as_torchs_are(model, cls, training):
    torch.manual_seed(0)
    theirs, x = model(cls).train(training), torch.randn(5, 3, 4)
    ours = fastseq.fuse(copy.deepcopy(theirs))
    assert type(ours.layer) is getattr(fastseq.compat, cls.__name__)
    (expected, counted), (found, found_counted) = compiled(theirs, x), compiled(ours, x)
    assert_close(found, expected, "float32")
    assert found_counted == counted


def test_a_forward_of_torchs_own_takes_the_kernels_inside(monkeypatch):
    calls = []
    from fastseq.nn import sequences

    run_layer = sequences.run_layer
    monkeypatch.setattr(sequences, "run_layer", lambda *a, **k: (calls.append(a), run_layer(*a, **k))[1])
    model = fastseq.fuse(Padded(nn.GRU))
    torch._dynamo.reset()
    torch.compile(model, backend="eager")(torch.randn(5, 3, 4))
    assert len(calls) == 2  # layers

"""What may be done with a layer's results, in place and by views: all that torch's allow, with the same gradients."""

import copy

import pytest
import torch
from models import flat
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq

pytestmark = pytest.mark.usefixtures("native")

ACTIONS = {
    "detach_": lambda t: t.detach_(),
    "requires_grad_": lambda t: t.requires_grad_(),
    "requires_grad_(False)": lambda t: t.requires_grad_(False),
    "retain_grad": lambda t: t.retain_grad(),
    "mul_": lambda t: t.mul_(2),
    "relu_": lambda t: t.relu_(),
    "index": lambda t: t.__setitem__(0, 0),
    "view": lambda t: t.view(-1),
    "chunk": lambda t: t.chunk(2, -1)[0].mul_(2),
    "resize_": lambda t: t.resize_(3),
    "set_": lambda t: t.set_(torch.zeros(3)),
    "data": lambda t: setattr(t, "data", torch.zeros(2)),
}
RECURRENT = ["batched", "unbatched", "packed", "unsorted"]
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}]


class Attention(nn.Module):
    def __init__(self, weights, **options):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(8, 2, **options), weights

    def forward(self, x):
        return [t for t in self.attention(x, x, x, need_weights=self.weights) if t is not None]


def cases():
    for cls in (nn.RNN, nn.LSTM, nn.GRU):
        for first in (False, True):
            for options in OPTIONS:
                for kind in RECURRENT:
                    name = f"{cls.__name__}-{kind}{'-batch_first' * first}{'-deep' * bool(options)}"
                    yield name, lambda c=cls, f=first, o=options: c(4, 6, batch_first=f, **o), kind, first, 4
    for cls in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        yield cls.__name__, lambda c=cls: c(4, 6), "cell", False, 4
        yield f"{cls.__name__}-unbatched", lambda c=cls: c(4, 6), "vector", False, 4
    for first in (False, True):
        for kind in ("batched", "unbatched"):
            for weights in (False, True):
                name = f"attention-{kind}{'-batch_first' * first}{'-weights' * weights}"
                yield name, lambda f=first, w=weights: Attention(w, batch_first=f), kind, first, 8
        name = f"encoder{'-batch_first' * first}"
        yield name, lambda f=first: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=f), "batched", first, 8
    yield "layer_norm", lambda: nn.LayerNorm(8), "batched", False, 8
    yield "large_layer_norm", lambda: nn.LayerNorm(1024), "large", False, 1024


CASES = list(cases())


def argument(kind, first, features):
    torch.manual_seed(0)
    if kind in ("packed", "unsorted"):
        x = torch.randn(3, 5, features)
        lengths = [5, 4, 2] if kind == "packed" else [2, 5, 4]
        return pack_padded_sequence(x if first else x.transpose(0, 1), lengths, first, kind == "packed")
    shape = {"unbatched": (5,), "cell": (5,), "vector": (), "large": (4, 256)}.get(kind, (3, 5))
    return torch.randn(*shape, features)


def outcome(module, x, place, action):
    try:
        action(flat(module(x))[place])
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("name", "layer", "kind", "first", "features"), CASES, ids=[case[0] for case in CASES])
def test_in_place(name, layer, kind, first, features, grad):
    torch.manual_seed(0)
    torchs = layer()  # in training: in evaluation torch has one op for the whole of attention
    ours = fastseq.fuse(copy.deepcopy(torchs))
    x = argument(kind, first, features)
    with torch.set_grad_enabled(grad):
        for place, (t, o) in enumerate(zip(flat(torchs(x)), flat(ours(x)), strict=True)):
            assert (o.requires_grad, o.is_leaf) == (t.requires_grad, t.is_leaf)
            assert t._is_view() or not o._is_view()
            assert o.is_contiguous() or (not t.is_contiguous() and o.stride() == t.stride())
            for key, action in ACTIONS.items():
                if outcome(torchs, x, place, action) is None:
                    assert outcome(ours, x, place, action) is None, (key, place)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("cls", [fastseq.RNN, fastseq.LSTM, fastseq.GRU])
def test_gradients_of_a_changed_output(cls, first):
    torch.manual_seed(0)
    layer = cls(4, 6, 2, batch_first=first, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    reset = torch.zeros(3, 5, dtype=torch.bool)
    lengths = [3, 5, 1] if first else [3, 1, 2, 3, 3]
    for options in ({}, {"lengths": lengths}, {"reset": reset}, {"return_states": True}):
        found = []
        for change in (lambda y: y.mul_(3), lambda y: y * 3):
            y, *_ = layer(x, **options)
            found.append(torch.autograd.grad(change(y).sum(), list(layer.parameters())))
        torch.testing.assert_close(*found)
        results = flat(layer(x, **options))
        assert not any(t._is_view() for t in results[:2])
        results[0].detach_()

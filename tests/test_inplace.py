"""Tensors that are changed in place between forward and backward: torch's error, or the gradients of the unchanged
ones, never others without a word."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from cases import TOLERANCES
from models import FUNCTIONS, flat
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastseq
from fastseq import backends
from fastseq.ops import linear, normalization

if backends.select("recurrent") is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

T, B, I, H = 4, 3, 2, 5  # noqa: E741
N, S, D = 2, 6, 8  # heads, keys, features


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch):
    monkeypatch.setattr(normalization, "FEWEST_ELEMENTS", 0)
    monkeypatch.setattr(linear, "FEWEST_PRODUCTS_OF_TRAINING", 0)


def floats(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def layer(name, reset=False, lengths=False):
    gates, states = len(FUNCTIONS[name].gates), 1 + len(FUNCTIONS[name].states)
    given = {"x": floats(T, B, I)} | {f"h{i}": floats(B, H) for i in range(states)}
    given |= {"w_ih": floats(gates * H, I), "w_hh": floats(gates * H, H)}
    given |= {"b_ih": floats(gates * H), "b_hh": floats(gates * H)}
    if reset:
        given["reset"] = torch.rand(T, B) < 0.5
    if lengths:
        given["lengths"] = torch.tensor([2, 4, 1])

    def call(x, *rest, reset=None, lengths=None, **weights):
        states = [weights.pop(f"h{i}") for i in range(len(weights) - 4)]
        hx = states[0] if len(states) == 1 else tuple(states)
        return getattr(fastseq, name)(x, hx, **weights, reset=reset, lengths=lengths, return_states=True)

    return call, given


def cell(name):
    gates = len(FUNCTIONS[name].gates) * H
    given = {"x": floats(B, I), "h": floats(B, H), "w_ih": floats(gates, I)}
    given |= {"c": floats(B, H)} if name == "lstm" else {}
    given |= {"w_hh": floats(gates, H), "b_ih": floats(gates), "b_hh": floats(gates)}

    def call(x, h, c=None, **weights):
        return getattr(fastseq, f"{name}_cell")(x, h if c is None else (h, c), **weights)

    return call, given


def packed():
    module = fastseq.GRU(I, H, 2, bidirectional=True, dtype=torch.float64)
    data, sizes, order, back = pack_padded_sequence(floats(T, B, I).detach(), [2, 4, 3], enforce_sorted=False)
    given = {"data": data.requires_grad_(), "sizes": sizes, "order": order, "back": back, "h": floats(4, B, H)}

    def call(data, sizes, order, back, h):
        y, h_n = module(nn.utils.rnn.PackedSequence(data, sizes, order, back), h)
        return y.data, h_n

    return call, given


def attention(**options):
    given = {"query": floats(B, N, T, D), "key": floats(B, N, S, D), "value": floats(B, N, S, D)}
    return fastseq.scaled_dot_product_attention, given | options


def varlen():
    given = {name: floats(N, 9, D) for name in ("query", "key", "value")}
    given |= {name: torch.tensor([0, 2, 6, 9]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    return fastseq.scaled_dot_product_attention, given


def cached():
    """Keys and values in a cache, which grows before the backward."""
    cache = fastseq.KVCache(B, N, D, dtype=torch.float64)
    cache.append(floats(B, N, S, D), floats(B, N, S, D), lengths=[3, 6, 5])
    given = {"query": floats(B, N, T, D), "key": cache.keys, "value": cache.values, "lengths_k": cache.lengths}
    return fastseq.scaled_dot_product_attention, given


def multihead():
    module = fastseq.MultiheadAttention(2 * D, N, batch_first=True, dtype=torch.float64)
    given = {"x": floats(B, T, 2 * D), "padding": torch.rand(B, T) < 0.3, "mask": torch.rand(T, T) < 0.3}
    given |= dict(module.named_parameters())

    def call(x, padding, mask, **weights):
        return module(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0]

    return call, given


def self_attention():
    module = fastseq.MultiheadAttention(2 * D, N, batch_first=True, dtype=torch.float64)

    def call(x, **weights):
        return module(x, x, x, need_weights=False)[0]

    return call, {"x": floats(B, T, 2 * D)} | dict(module.named_parameters())


def norm(residual):
    given = {"input": floats(B, D), "weight": floats(D), "bias": floats(D)}
    given |= {"residual": floats(B, D)} if residual else {}
    return lambda **tensors: fastseq.layer_norm(normalized_shape=(D,), **tensors), given


def projection():
    def call(x, weight, bias):
        return linear.linear(backends.select("recurrent"), x, weight, bias)

    return call, {"x": floats(B, I), "weight": floats(H, I), "bias": floats(H)}


CALLS = {
    "rnn": lambda: layer("rnn", reset=True),
    "lstm": lambda: layer("lstm", reset=True, lengths=True),
    "gru": lambda: layer("gru", reset=True),
    "gru, lengths": lambda: layer("gru", lengths=True),
    "packed": packed,
    "rnn_cell": lambda: cell("rnn"),
    "lstm_cell": lambda: cell("lstm"),
    "gru_cell": lambda: cell("gru"),
    "attention": attention,
    "bool mask": lambda: attention(attn_mask=torch.rand(T, S) < 0.7),
    "float mask": lambda: attention(attn_mask=floats(N, T, S)),
    "lengths": lambda: attention(lengths_q=torch.tensor([4, 1, 2]), lengths_k=torch.tensor([6, 2, 3])),
    "slopes": lambda: attention(alibi_slopes=torch.rand(N)),
    "varlen": varlen,
    "cache": cached,
    "multihead": multihead,
    "self-attention": self_attention,
    "layer_norm": lambda: norm(False),
    "layer_norm, residual": lambda: norm(True),
    "linear": projection,
}


WAYS = {
    "eager": lambda call: call,
    "compile": lambda call: torch.compile(call, backend="aot_eager"),
    "checkpoint": lambda call: lambda **given: checkpoint(call, use_reentrant=False, **given),
}


OTHERS = {"sizes": [3, 2, 2, 2], "cu_seqlens_q": [0, 3, 7, 9], "cu_seqlens_k": [0, 3, 7, 9]}


def change(name, tensor):
    """Other values in place, which the call would take as well."""
    with torch.no_grad():
        if name in OTHERS:
            tensor.copy_(torch.tensor(OTHERS[name]))
        elif tensor.dtype is torch.bool:
            tensor.logical_not_()
        elif tensor.dtype is torch.int64:
            tensor.copy_(tensor.flip(0))
        else:
            tensor.add_(1)


def gradients(call, given, changed=None, before=False):
    """The gradients by name, None where torch tells of the change: in the argument of that name, or in the output of
    that number, after the forward or before it."""
    kept = {name: tensor.detach().clone() for name, tensor in given.items()}
    for tensor in given.values():
        tensor.grad = None
    try:
        if before:
            change(changed, given[changed])
        outputs = flat(call(**given))
        seeds = [torch.linspace(0.5, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
        if changed is not None and not before:
            change(changed, outputs[changed] if isinstance(changed, int) else given[changed])
        torch.autograd.backward(outputs, seeds)
    except CheckpointError:
        return None
    except RuntimeError as error:
        # The latter where one of two indices that go together is changed.
        if not re.search("modified by an inplace operation|must be the inverse of", str(error)):
            raise
        return None
    finally:
        with torch.no_grad():
            for name, tensor in given.items():
                tensor.copy_(kept[name])
    return {name: tensor.grad for name, tensor in given.items() if tensor.is_leaf and tensor.requires_grad}


def differ(a, b):
    rtol, atol = TOLERANCES["float64"]
    return any(not torch.allclose(a[name], b[name], rtol=rtol, atol=atol) for name in a)


# torch.compile never sees the function behind the projections.
@pytest.mark.parametrize(("name", "way"), [c for c in product(CALLS, WAYS) if c != ("linear", "compile")])
def test_change_before_backward(name, way):
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain, given = CALLS[name]()
    call = WAYS[way](plain)
    wanted = gradients(call, given)
    assert not differ(wanted, gradients(plain, given))
    wrong = []
    for changed in (*given, *range(len(flat(plain(**given))))):
        found = gradients(call, given, changed)
        if found is None or not differ(found, wanted):
            continue
        # A checkpoint runs the forward again before its backward: with all that is changed, or with nothing.
        if way != "checkpoint" or isinstance(changed, int) or differ(found, gradients(plain, given, changed, True)):
            wrong.append(changed)
    assert not wrong

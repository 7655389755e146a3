"""Multi-head attention, positions and whole blocks of the NumPy reference against torch.nn and ours in float64."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from cases import assert_close
from torch import nn
from transformer_blocks import Block, array, projections

import fastseq
from fastseq import reference
from fastseq.ops import LayerNormFunction

# torch's modules, and ours over the kernels
each_source = pytest.mark.parametrize("source", [nn, fastseq], ids=["torch", "fastseq"])


@pytest.fixture(autouse=True)
def norms_of_any_size_by_kernels(monkeypatch):
    """The sizes of tests are below those from which on the kernels are faster."""
    layer_norm = sys.modules[LayerNormFunction.__module__]
    monkeypatch.setattr(layer_norm, "FEWEST_ELEMENTS", 1)
    monkeypatch.setattr(layer_norm, "FEWEST_ELEMENTS_OF_SUMS", 1)


def leaf(array):
    return torch.tensor(array, requires_grad=True)


def module(cls, *args, **options):
    """A module in float64 with parameters that are nowhere zero or one by default."""
    torch.manual_seed(0)
    made = cls(*args, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def random_arrays(*shapes):
    rng = np.random.default_rng(5)
    return [rng.standard_normal(shape) for shape in shapes]


# Multi-head attention


@each_source
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (5, 7)])
def test_multi_head_attention(kdim, vdim, bias, source):
    attention = module(source.MultiheadAttention, 12, 3, bias=bias, kdim=kdim, vdim=vdim)
    query, key, value, dout = random_arrays((2, 7, 12), (2, 9, kdim or 12), (2, 9, vdim or 12), (2, 7, 12))
    out, cache = reference.multi_head_attention_forward(query, key, value, *projections(attention), 3)
    dquery, dkey, dvalue, dweights, dbiases = reference.multi_head_attention_backward(dout, cache)

    leaves = [leaf(a) for a in (query, key, value)]
    with torch.no_grad():
        _, weights = attention(*leaves, average_attn_weights=False)
    expected, _ = attention(*leaves, need_weights=False)
    expected.backward(torch.from_numpy(dout))
    assert_close({"out": out, "weights": cache[-1].weights}, {"out": array(expected), "weights": array(weights)})
    assert_close(dict(enumerate((dquery, dkey, dvalue))), {n: a.grad.numpy() for n, a in enumerate(leaves)})
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(parameter.grad)
    torch_dweights, torch_dbiases = projections(attention)
    assert_close(dict(enumerate(dweights)), dict(enumerate(torch_dweights)))
    if bias:
        assert_close(dict(enumerate(dbiases)), dict(enumerate(torch_dbiases)))


@each_source
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_of_multi_head_attention(need_weights, source):
    attention = module(source.MultiheadAttention, 12, 3)
    (x,) = random_arrays((2, 7, 12))
    rng = np.random.default_rng(6)
    padding = np.array([[False] * 7, [False] * 4 + [True] * 3])
    added = rng.standard_normal((7, 7))
    mask = np.where(padding[:, None, None], -np.inf, added)
    out, cache = reference.multi_head_attention_forward(x, x, x, *projections(attention), 3, mask)
    expected, weights = attention(
        *[torch.from_numpy(x)] * 3,
        key_padding_mask=torch.zeros(2, 7, dtype=torch.float64).masked_fill(torch.from_numpy(padding), -math.inf),
        attn_mask=torch.from_numpy(added),
        need_weights=need_weights,
    )
    assert_close({"out": out}, {"out": array(expected)})
    if need_weights:
        assert_close({"weights": cache[-1].weights.mean(axis=1)}, {"weights": array(weights)})


# Positions


@pytest.mark.parametrize(("length", "features"), [(1, 1), (7, 5), (65, 8)])
def test_positional_encoding(length, features):
    expected = np.empty((length, features))
    for t in range(length):
        for c in range(0, features, 2):
            angle = t / 10_000 ** (c / features)
            expected[t, c : c + 2] = [math.sin(angle), math.cos(angle)][: features - c]
    assert_close({"encoding": reference.positional_encoding(length, features)}, {"encoding": expected})
    assert reference.positional_encoding(length, features, np.longdouble).dtype == np.longdouble


# Blocks


@each_source
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_encoder_block(norm_first, is_causal, source):
    layer = module(source.TransformerEncoderLayer, 12, 3, 20, dropout=0.0, norm_first=norm_first)
    x, dout = random_arrays((2, 7, 12), (2, 7, 12))
    block = Block(layer)
    out = block.forward(x, is_causal=is_causal)
    dx, _ = block.backward(dout)

    tokens = leaf(x)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if is_causal else None
    expected = layer(tokens, mask, is_causal=is_causal)
    expected.backward(torch.from_numpy(dout))
    assert_close({"out": out, "dx": dx}, {"out": array(expected), "dx": tokens.grad.numpy()})
    assert_close(block.gradients, {name: p.grad.numpy() for name, p in layer.named_parameters()})


@each_source
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
def test_decoder_block(norm_first, source):
    layer = module(source.TransformerDecoderLayer, 12, 3, 20, dropout=0.0, norm_first=norm_first)
    x, memory, dout = random_arrays((2, 7, 12), (2, 9, 12), (2, 7, 12))
    block = Block(layer)
    out = block.forward(x, memory, is_causal=True)
    dx, dmemory = block.backward(dout)

    leaves = [leaf(a) for a in (x, memory)]
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    expected = layer(*leaves, mask, tgt_is_causal=True)
    expected.backward(torch.from_numpy(dout))
    assert_close(
        {"out": out, "dx": dx, "dmemory": dmemory},
        {"out": array(expected), "dx": leaves[0].grad.numpy(), "dmemory": leaves[1].grad.numpy()},
    )
    assert_close(block.gradients, {name: p.grad.numpy() for name, p in layer.named_parameters()})

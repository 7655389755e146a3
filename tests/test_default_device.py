"""Under torch.set_default_device calls on tensors of the CPU give what they give without it."""

from __future__ import annotations

import pytest
import torch
from models import assert_close
from torch import nn

import fastseq
from fastseq import backends

T, B, I, H = 5, 3, 4, 8  # noqa: E741


def weights(gates):
    return [torch.randn(gates * H, I), torch.randn(gates * H, H), torch.randn(gates * H), torch.randn(gates * H)]


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def layer(name, gates, **options):
    x, w = torch.randn(T, B, I), weights(gates)

    def run():
        inputs = leaves(x, *w)
        y, *_ = getattr(fastseq, name)(inputs[0], None, *inputs[1:], **options)
        return [y, *torch.autograd.grad(y.sum(), inputs)]

    return run


def module(cls, *args, call=(), **options):
    model, x = cls(*args), torch.randn(T, B, args[0])

    def run():
        y, *_ = model(x, *call, **options)
        with torch.no_grad():
            inference = model(x, *call, **options)[0]
        return [y, inference, *torch.autograd.grad(y.sum(), list(model.parameters()), allow_unused=True)]

    return run


def packed(cls):
    model, x = cls(I, H), torch.randn(T, B, I)

    def run():
        y, _ = model(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 5, 1], device="cpu"), enforce_sorted=False))
        return [y.data, *torch.autograd.grad(y.data.sum(), list(model.parameters()))]

    return run


def attention(*, bias=False, packed=False, **options):
    shape = (2, 10, 8) if packed else (3, 2, 10, 8)
    q, k, v, mask = torch.randn(3, *shape).unbind() + (torch.randn(10, 10),)

    def run():
        inputs = leaves(q, k, v)
        torch.manual_seed(1)
        out = fastseq.scaled_dot_product_attention(*inputs, *([mask] if bias else []), **options)
        out = torch.cat([part.flatten() for part in out]) if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.nan_to_num(neginf=0).sum(), inputs)]

    return run


def cache():
    new = torch.randn(2, B, 2, 1, 8)

    def run():
        kept = fastseq.KVCache(batch=B, heads=2, head_dim=8, device="cpu")
        kept.append(*new)
        kept.append(*new)
        return [fastseq.scaled_dot_product_attention(new[0], kept.keys, kept.values, lengths_k=kept.lengths)]

    return run


def normalization():
    x, residual = torch.randn(2, 600, 512).unbind()

    def run():
        return list(fastseq.layer_norm(x, (512,), residual=residual))

    return run


CASES = {
    "rnn": lambda: layer("rnn", 1),
    "lstm": lambda: layer("lstm", 4),
    "gru": lambda: layer("gru", 3),
    "lengths": lambda: layer("gru", 3, lengths=[2, 5, 0]),
    "reset": lambda: layer("gru", 3, reset=torch.rand(T, B) < 0.3),
    "no length": lambda: layer("gru", 3, lengths=[0, 0, 0]),
    "LSTM": lambda: module(fastseq.LSTM, I, H, 2, lengths=[2, 5, 1]),
    "RNN": lambda: module(fastseq.RNN, I, H),
    "packed": lambda: packed(fastseq.GRU),
    "GRUCell": lambda: module(lambda *sizes: FirstStep(fastseq.GRUCell(*sizes)), I, H),
    "MultiheadAttention": lambda: module(
        lambda size: fastseq.MultiheadAttention(size, 2), 8, call=[torch.randn(T, B, 8)] * 2, need_weights=False
    ),
    "attention": lambda: attention(is_causal=True),
    "mask": lambda: attention(bias=True),
    "dropout": lambda: attention(dropout_p=0.5),
    "lse": lambda: attention(return_lse=True, lengths_k=[3, 10, 0], window=(3, 0), causal="lower_right"),
    "cu_seqlens": lambda: attention(packed=True, cu_seqlens_q=[0, 4, 10], cu_seqlens_k=[0, 7, 10]),
    "KVCache": cache,
    "layer_norm": normalization,
}


class FirstStep(nn.Module):
    """A cell, called as a layer is: its output for the first step."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return (self.cell(x[0]),)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_the_default_device_is_not_asked(backend, name):
    torch.manual_seed(0)
    run = CASES[name]()
    with backends.use_backend(backend):
        expected = run()
        torch.set_default_device("meta")
        try:
            found = run()
        finally:
            torch.set_default_device(None)
    assert_close(found, expected)

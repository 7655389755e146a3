"""What saved-tensor hooks give back may lie anywhere in memory."""

from __future__ import annotations

import pytest
import torch
from models import assert_close

import fastseq

OFFSETS = (1, 4, 8)  # bytes beyond the alignment that an allocation has


def at(offset):
    """Hooks that move every saved tensor to memory of that offset."""

    def pack(tensor):
        contiguous = tensor.detach().contiguous()
        size = contiguous.numel() * contiguous.element_size()
        # torch itself reads numbers at addresses that are multiples of their size.
        shift = offset if contiguous.element_size() <= offset else 8 if contiguous.element_size() == 8 else 4
        memory = torch.empty(size + 64, dtype=torch.uint8)
        moved = memory[shift : shift + size]
        moved.copy_(contiguous.view(-1).view(torch.uint8))
        return moved, contiguous.dtype, contiguous.shape

    def unpack(packed):
        moved, dtype, shape = packed
        # Slices of bytes cannot be viewed as another dtype unless they start at a multiple of its size.
        found = moved.view(dtype).view(shape)
        assert found.data_ptr() % 64
        return found

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def recurrent(cls, dtype):
    layer, x = cls(4, 5, 2, bidirectional=True).to(dtype), torch.randn(7, 3, 4, dtype=dtype)
    return list(layer.parameters()), lambda: layer(x)[0]


def cell(cls, dtype):
    step, x = cls(4, 5).to(dtype), torch.randn(3, 4, dtype=dtype)

    def run():
        found = step(x)
        return found[0] if isinstance(found, tuple) else found

    return list(step.parameters()), run


def attention(dtype):
    tensors = [torch.randn(2, 2, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    bias = torch.randn(9, 9, dtype=dtype, requires_grad=True)
    return [*tensors, bias], lambda: fastseq.scaled_dot_product_attention(*tensors, bias)


def normalization(dtype):
    norm, x = fastseq.LayerNorm(512).to(dtype), torch.randn(2, 600, 512, dtype=dtype)
    return list(norm.parameters()), lambda: norm(x[0], residual=x[1])[0]


CASES = {
    **{name: lambda dtype, name=name: recurrent(getattr(fastseq, name), dtype) for name in ("RNN", "LSTM", "GRU")},
    **{name: lambda dtype, name=name: cell(getattr(fastseq, name), dtype) for name in ("LSTMCell", "GRUCell")},
    "attention": attention,
    "layer_norm": normalization,
}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_same(name, dtype, offset):
    torch.manual_seed(0)
    leaves, run = CASES[name](dtype)
    expected = torch.autograd.grad(run().float().sum(), leaves)
    with at(offset):
        loss = run().float().sum()
        found = torch.autograd.grad(loss, leaves)
    assert_close(list(found), list(expected))

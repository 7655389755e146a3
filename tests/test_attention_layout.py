"""The memory layout of attention's output is that of torch's: code that views it finds what it finds in torch."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from attention_calls import native
from cases import LONG

import fastseq
from fastseq.ops import Attention

SHAPES = [(2, 4, 5, 8), (1, 4, 5, 8), (2, 1, 5, 8), (2, 4, 1, 8), (1, 1, 5, 8), (1, 4, 1, 8)]
LAYOUTS = {
    "contiguous": lambda B, N, L, E: torch.randn(B, N, L, E),
    "heads inside": lambda B, N, L, E: torch.randn(B, L, N, E).transpose(1, 2),
    "rows outside": lambda B, N, L, E: torch.randn(L, B, N, E).permute(1, 2, 0, 3),
    "heads outside": lambda B, N, L, E: torch.randn(N, B, L, E).transpose(0, 1),
    "features strided": lambda B, N, L, E: torch.randn(B, N, E, L).mT,
    "batch expanded": lambda B, N, L, E: torch.randn(1, N, L, E).expand(B, N, L, E),
    "heads expanded": lambda B, N, L, E: torch.randn(B, 1, L, E).expand(B, N, L, E),
    "rows expanded": lambda B, N, L, E: torch.randn(B, N, 1, E).expand(B, N, L, E),
    "features expanded": lambda B, N, L, E: torch.randn(B, N, L, 1).expand(B, N, L, E),
    "all expanded": lambda B, N, L, E: torch.randn(E).expand(B, N, L, E),
    "batch expanded, heads inside": lambda B, N, L, E: torch.randn(1, L, N, E).transpose(1, 2).expand(B, N, L, E),
    "rows sliced": lambda B, N, L, E: torch.randn(B, N, L + 3, E)[:, :, :L],
    "every other row": lambda B, N, L, E: torch.randn(B, N, 2 * L, E)[:, :, ::2],
    "features sliced": lambda B, N, L, E: torch.randn(B, N, L, E + 3)[..., :E],
    "of one projection": lambda B, N, L, E: torch.randn(B, L, 3, N, E)[:, :, 0].transpose(1, 2),
    "heads sliced": lambda B, N, L, E: torch.randn(B, L, N + 2, E)[:, :, :N].transpose(1, 2),
}
KEYS = ("contiguous", "heads inside", "features strided", "heads expanded", "features sliced")
MASKS = {
    "none": lambda B, L, S: {},
    "causal": lambda B, L, S: {"is_causal": True},
    "bool": lambda B, L, S: {"attn_mask": torch.ones(L, S, dtype=torch.bool)},
    "padding": lambda B, L, S: {"attn_mask": torch.ones(B, 1, 1, S, dtype=torch.bool)},
    "bias": lambda B, L, S: {"attn_mask": torch.zeros(L, S)},
    "bias with a gradient": lambda B, L, S: {"attn_mask": torch.zeros(L, S, requires_grad=True)},
}
HEADS = ("as many", "groups", "one group")  # what torch makes of a single head that is broadcast is 2.13's or 2.14's


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    """All shapes, masks and numbers of heads, with and without autograd; of keys, values and dropout what is drawn."""
    draws = random.Random(layout)
    cases = itertools.product(SHAPES, MASKS, HEADS, (False, True))
    rest = list(itertools.product(KEYS, (0, 2), (0.0, 0.5)))
    for shape, mask, heads, grad in cases:
        B, N, L, E = shape
        q, S, kv_heads = LAYOUTS[layout](*shape), 6, {"as many": N, "groups": max(N // 2, 1)}.get(heads, 1)
        for keys, more, dropout_p in rest if LONG else [draws.choice(rest)]:
            k, v = LAYOUTS[keys](B, kv_heads, S, E), LAYOUTS[keys](B, kv_heads, S, E + more)
            k, v = k.requires_grad_(grad), v.requires_grad_(grad)
            options = {"dropout_p": dropout_p, "enable_gqa": "group" in heads, **MASKS[mask](B, L, S)}
            wanted = F.scaled_dot_product_attention(q, k, v, **options)
            out = fastseq.scaled_dot_product_attention(q, k, v, **options)
            case = f"{shape}, {mask}, {heads} heads, {grad=}, keys {keys}, {more=}, {dropout_p=}"
            assert out.stride() == wanted.stride(), case


def test_gradients_of_expanded_tensors():
    """The strides of 0 say nothing of an order."""
    if native is None:
        pytest.skip("no kernels here")
    q, k = torch.randn(1, 4, 5, 8).expand(3, 4, 5, 8), torch.randn(3, 1, 6, 8).expand(3, 4, 6, 8)
    call = Attention(1.0)
    out, lse = native.attention_forward(call, q, k, k, return_lse=True)
    grads = native.attention_backward(
        call, q, k, k, None, None, out, lse, torch.ones_like(out), None, [True] * 3 + [False]
    )
    for tensor in (out, *grads[:3]):
        assert tensor.is_contiguous()
    q = torch.randn(1, 5, 4, 8).transpose(1, 2).expand(3, 4, 5, 8)
    assert native.attention_forward(call, q, k, k)[0].stride() == (160, 8, 32, 1)

"""Calls of scaled_dot_product_attention and of what calls it, ours beside torch's."""

import torch
import torch.nn.functional as F
from cases import units
from models import assert_close
from torch.testing._internal.common_methods_invocations import op_db

import fastseq

sdpa = fastseq.scaled_dot_product_attention

SLOPES = torch.tensor([0.5, 0.1, 0.3, 0.7])  # of ALiBi, for 4 heads
OPINFO = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def make(*shape, dtype=torch.float64, requires_grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)


def given(outputs):
    """The gradients of outputs, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]


def gradients(outputs, inputs):
    """Gradients of a weighted sum of all finite outputs."""
    pairs = zip(outputs, given(outputs), strict=True)
    loss = sum((torch.where(o.isfinite(), o, 0) * weight.to(o.dtype)).sum() for o, weight in pairs)
    return torch.autograd.grad(loss, inputs)


def check(arguments, options, layout=False):
    """The result, with and without autograd, and the gradients of both functions."""
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    results = []
    for function in (sdpa, F.scaled_dot_product_attention):
        out = function(*arguments, **options)
        with torch.no_grad():
            alone = function(*arguments, **options)
        results.append([out, alone, *gradients([out], inputs)])
    assert_close(*results)
    if layout:
        assert [r.stride() for r in results[0][:2]] == [r.stride() for r in results[1][:2]]


def samples_agree(device):
    """torch's own samples, in float64."""
    count = 0
    for sample in OPINFO.sample_inputs(device, torch.float64, requires_grad=True):
        if sample.kwargs.get("dropout_p"):
            continue  # another random stream
        arguments = (sample.input, *sample.args)
        leaves = [t for t in (*arguments, *sample.kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
        results = []
        for function in (sdpa, F.scaled_dot_product_attention):
            out = function(*arguments, **sample.kwargs)
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        torch.testing.assert_close(*results, equal_nan=True)
        count += 1
    assert count > 10


def decoding_agrees(dtype, device):
    """Token by token against a cache, with a row that is ahead of the other, as in one causal call."""
    cache = fastseq.KVCache(2, 2, 16, capacity=4, dtype=dtype, device=device)
    q, k, v = (torch.randn(2, heads, 9, 16).to(device, dtype) for heads in (8, 2, 2))
    cache.append(k[:, :, :2], v[:, :, :2], lengths=[2, 1])
    for t in range(2, 9):
        now = [t, t - 1]
        token_k, token_v = (torch.stack([x[row, :, at : at + 1] for row, at in enumerate(now)]) for x in (k, v))
        cache.append(token_k, token_v)
        token = torch.stack([q[row, :, at : at + 1] for row, at in enumerate(now)])
        out = sdpa(token, cache.keys, cache.values, lengths_k=cache.lengths, causal="lower_right", enable_gqa=True)
    whole = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    expected = torch.stack([whole[row, :, at : at + 1] for row, at in enumerate(now)])
    assert_close(out.double(), expected, units(4, dtype))


def multihead_agrees(device):
    """The module, with and without masks."""
    options = {"batch_first": True, "device": device, "dtype": torch.float64}
    theirs, ours = (source.MultiheadAttention(32, 4, **options) for source in (torch.nn, fastseq))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 17, 32, dtype=torch.float64).to(device).requires_grad_()
    masks = {"key_padding_mask": torch.rand(3, 17) < 0.3, "attn_mask": torch.randn(17, 17).double()}
    for names in ((), ("key_padding_mask",), ("attn_mask",)):
        given = {name: masks[name].to(device) for name in names}
        results = []
        for module in (ours, theirs):
            out = module(x, x, x, need_weights=False, **given)[0]
            results.append([out, *torch.autograd.grad(out.cos().sum(), (x, *module.parameters()))])
        torch.testing.assert_close(*results)

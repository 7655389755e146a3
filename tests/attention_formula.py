"""Attention as a formula in NumPy, torch's own results beside it, and the comparison of the kernels with both."""

from __future__ import annotations

import numpy as np
import torch
from cases import error_rule
from torch.nn.functional import scaled_dot_product_attention

from fastseq import backends

__all__ = ["DTYPES", "NAMES", "check", "heads", "make", "ours", "philox"]

native = backends.select()

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NAMES = ("dq", "dk", "dv", "dbias")


# ---- the formula


def philox(counter, key):
    """Philox4x32-7 of Salmon et al. 2011; counter: four arrays, key: two words."""
    x = [np.asarray(c, dtype=np.uint64) for c in counter]
    key, low = [np.uint64(word) for word in key], np.uint64(0xFFFFFFFF)
    for _ in range(7):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(b >> np.uint64(32)) ^ x[1] ^ key[0], b & low, (a >> np.uint64(32)) ^ x[3] ^ key[1], a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return x


def kept(p, seed, B, N, L, S):
    """Where dropout keeps: (B, N, L, S)."""
    j, i, n = np.arange(S), np.arange(L)[:, None], np.arange(B * N)[:, None, None]
    shape = B * N, L, S
    words = philox([np.broadcast_to(c, shape) for c in (j // 4, i, n, 0)], (seed & 0xFFFFFFFF, seed >> 32))
    draws = np.choose(np.broadcast_to(j % 4, shape), words)
    return (draws >= round(p * 2**32)).reshape(B, N, L, S)


def visible(shape, left, right, lower_right, allowed, q_lengths, k_lengths):
    """Which keys a query may see, and i + shift - j: (B, N, L, S) or what broadcasts to it."""
    B, _, L, S = shape
    q_lengths = np.full(B, L) if q_lengths is None else q_lengths.numpy()
    k_lengths = np.full(B, S) if k_lengths is None else k_lengths.numpy()
    shift = (k_lengths - q_lengths if lower_right else np.zeros(B, dtype=np.int64)).reshape(B, 1, 1, 1)
    distance = np.arange(L)[:, None] + shift - np.arange(S)
    seen = np.arange(S) < k_lengths.reshape(B, 1, 1, 1)
    seen = seen & (np.arange(L)[:, None] < q_lengths.reshape(B, 1, 1, 1))
    if left is not None:
        seen = seen & (distance <= left)
    if right is not None:
        seen = seen & (-distance <= right)
    return seen if allowed is None else seen & allowed.numpy(), distance


def formula(
    q, k, v, dout, dlse, exact, *, scale, bias=None, allowed=None, softcap=0.0, left=None, right=None,
    lower_right=False, q_lengths=None, k_lengths=None, alibi_slopes=None, dropout_p=0.0, seed=0,
):  # fmt: skip
    """out, lse and the gradients, of arrays in `exact`; dbias in the full shape."""
    group = q.shape[1] // k.shape[1]
    kv = k.shape
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    shape = *q.shape[:3], k.shape[2]
    seen, distance = visible(shape, left, right, lower_right, allowed, q_lengths, k_lengths)
    s, derivative = scale * (q @ k.swapaxes(2, 3)), 1
    if softcap:
        t = np.tanh(s / softcap)
        s, derivative = softcap * t, 1 - t * t
    if bias is not None:
        s = s + bias
    if alibi_slopes is not None:
        s = s - alibi_slopes.numpy().astype(exact)[:, :, None, None] * np.abs(distance)
    s = np.where(seen, s, -np.inf)
    largest = np.max(s, axis=3, keepdims=True, initial=-np.inf)
    e = np.exp(s - np.where(np.isneginf(largest), 0, largest))
    total = e.sum(axis=3, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (largest + np.log(total))[..., 0]
    p = e / np.where(total == 0, 1, total)
    drop = kept(dropout_p, seed, *shape) / (1 - dropout_p) if dropout_p else 1
    dropped = p * drop
    out = dropped @ v
    dp = (dout @ v.swapaxes(2, 3)) * drop
    ds = p * (dp - (dout * out).sum(axis=3, keepdims=True) + dlse[..., None])
    dv = dropped.swapaxes(2, 3) @ dout
    dproduct = scale * ds * derivative
    dq, dk = dproduct @ k, dproduct.swapaxes(2, 3) @ q
    dk, dv = (g.reshape(*kv[:2], group, *g.shape[2:]).sum(axis=2) for g in (dk, dv))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": ds}


def summed(gradient, shape):
    """A gradient of the expanded bias as that of one of `shape`."""
    axes = tuple(axis for axis in range(4) if shape[axis] == 1)
    return gradient.sum(axis=axes, keepdims=True)


# ---- ours and torch's


def heads(B, N, rows, dim, dtype):
    return torch.randn(B, N, rows, dim, dtype=dtype)


def make(B, N, Nk, L, S, D, E, dtype, bias_shape=None, **options):
    """Inputs of a case: (q, k, v, dout, dlse) and the keywords of the kernels."""
    inputs = heads(B, N, L, D, dtype), heads(B, Nk, S, D, dtype), heads(B, Nk, S, E, dtype)
    inputs += heads(B, N, L, E, dtype), torch.randn(B, N, L, dtype=torch.promote_types(dtype, torch.float32))
    options = {"scale": D**-0.5} | options
    if bias_shape is not None:
        options["bias"] = torch.randn(bias_shape, dtype=dtype).expand(B, N, L, S)
    return inputs, options


def ours(inputs, options, bias_shape=None):
    q, k, v, dout, dlse = inputs
    out, lse = native.attention_forward(q, k, v, return_lse=True, **options)
    gradients = native.attention_backward(
        q, k, v, out, lse, dout, dlse=dlse, needs=[True] * 4, bias_shape=bias_shape, **options
    )
    results = {"out": out, "lse": lse, **dict(zip(NAMES, gradients, strict=True))}
    return {name: t for name, t in results.items() if t is not None}


def array(t, exact=None):
    t = t.float() if t.dtype == torch.bfloat16 else t
    return t.numpy() if exact is None else t.numpy().astype(exact)


def yardstick(inputs, options, ref, bias_shape):
    """torch's own results in the dtype of the inputs: SDPA with all but softcap and dropout in an additive mask."""
    q, k, v, dout, _ = inputs
    if options.get("softcap") or options.get("dropout_p"):
        # torch has no counterpart whose draws are ours: the formula in the dtype that the kernel computes in.
        plain = torch.promote_types(q.dtype, torch.float32)
        arrays = [array(t.to(plain)) for t in inputs]
        mask = {"bias": array(options["bias"])} if "bias" in options else {}
        results = formula(*arrays, arrays[0].dtype, **options | mask)
        if bias_shape:
            results["dbias"] = summed(results["dbias"], bias_shape)
        return {name: array(torch.from_numpy(results[name]).to(q.dtype)) for name in ref}
    names = ("left", "right", "lower_right", "allowed", "q_lengths", "k_lengths")
    defaults = dict.fromkeys(names)
    shape = *q.shape[:3], k.shape[2]
    seen, distance = visible(shape, **defaults | {n: options[n] for n in names if n in options})
    mask = torch.zeros(shape, dtype=q.dtype)
    bias = None
    if "bias" in options:
        bias = options["bias"].detach()[tuple(slice(size) for size in bias_shape)].clone().requires_grad_()
        mask = mask + bias
    if "alibi_slopes" in options:
        mask = mask - (options["alibi_slopes"][:, :, None, None] * torch.from_numpy(np.abs(distance))).to(q.dtype)
    mask = mask.masked_fill(~torch.from_numpy(np.broadcast_to(seen, shape).copy()), -torch.inf)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = scaled_dot_product_attention(*leaves, attn_mask=mask, scale=options["scale"], enable_gqa=True)
    gradients = torch.autograd.grad(out, [*leaves, *([] if bias is None else [bias])], dout)
    return {"out": array(out.detach())} | {n: array(g) for n, g in zip(NAMES, gradients, strict=False)}


def check(inputs, options, bias_shape=None, isas=None):
    """Ours by the error rule, over out and all gradients; lse by the last bits of float32 or float64."""
    dtype = inputs[0].dtype
    exact = np.longdouble if dtype == torch.float64 else np.float64
    if not (options.get("softcap") or options.get("dropout_p")):
        inputs = *inputs[:4], torch.zeros_like(inputs[4])  # SDPA has no lse to differentiate
    arrays = [array(t, exact) for t in inputs]
    bias = {"bias": array(options["bias"], exact)} if "bias" in options else {}
    ref = formula(*arrays, exact, **options | bias)
    if bias_shape:
        ref["dbias"] = summed(ref["dbias"], bias_shape)
    else:
        del ref["dbias"]
    lse = ref.pop("lse")
    torch_ = yardstick(inputs, options, ref, bias_shape)
    for isa in isas or native.isas():
        with native.use_isa(isa):
            results = {name: array(t) for name, t in ours(inputs, options, bias_shape).items()}
        ours_lse = results.pop("lse")
        assert results.keys() == ref.keys()
        verdict = error_rule(results, torch_, ref, dtype)
        assert verdict.ok, f"{isa}: {verdict}"
        finite = np.isfinite(lse)
        assert (ours_lse[~finite] == -np.inf).all()
        eps = np.finfo(ours_lse.dtype).eps
        np.testing.assert_allclose(ours_lse[finite], lse[finite].astype(ours_lse.dtype), rtol=8 * eps, atol=16 * eps)

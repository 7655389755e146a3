"""Attention by its formula in float64, with the signatures of the kernels: stands in for them where they are not built.

Loops over sequences and heads. Shares nothing with fastseq.ops.
"""

import math

import torch


def philox(key, counter):
    """One block of Philox4x32-7, in Python's integers."""
    low = 0xFFFFFFFF
    k0, k1 = key & low, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def keep(seed, dropout_p, place, queries, keys):
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return torch.tensor(
        [[philox(seed, (j // 4, i, place, 0))[j % 4] >= threshold for j in range(keys)] for i in range(queries)]
    ).reshape(queries, keys)


def one_head(q, k, v, bias, allowed, place, slope, *, scale, softcap, left, right, lower_right, dropout_p, seed):
    """out, lse of one sequence and one head, differentiable."""
    queries, keys = q.shape[0], k.shape[0]
    s = scale * q @ k.T
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
    i = i + (keys - queries if lower_right else 0)
    if slope is not None:
        s = s - slope * (i - j).abs()
    seen = torch.ones(queries, keys, dtype=torch.bool) if allowed is None else allowed
    if left is not None:
        seen = seen & (j - i >= -left)
    if right is not None:
        seen = seen & (j - i <= right)
    s = s.masked_fill(~seen, -math.inf)
    dead = (s == -math.inf).all(1)
    lse = torch.where(dead, -math.inf, torch.logsumexp(torch.where(dead[:, None], 0, s), 1))
    p = torch.where(dead[:, None], 0, torch.exp(s - torch.where(dead, 0, lse)[:, None]))
    if dropout_p:
        p = torch.where(keep(seed, dropout_p, place, queries, keys), p / (1 - dropout_p), 0)
    return p @ v, lse


def check(q, k, v, bias, allowed, lengths, starts):
    batch, heads, queries, depth = q.shape
    assert k.shape[0] == v.shape[0] == batch
    assert heads % k.shape[1] == 0
    assert k.shape[1:3] == v.shape[1:3]
    assert k.shape[3] == depth
    for t in (q, k, v):
        assert t.stride(-1) == 1
        assert type(t) in (torch.Tensor, torch.nn.Parameter)
        assert t.dtype is q.dtype
        assert t.numel()
    for t, dtype in ((bias, q.dtype), (allowed, torch.bool)):
        if t is not None:
            assert t.shape == (batch, heads, queries, k.shape[2])
            assert t.dtype is dtype
    for t in (*lengths, *starts):
        if t is not None:
            assert t.dtype is torch.int64
            assert t.is_cpu
            assert t.is_contiguous()


def run(q, k, v, bias, allowed, *, q_lengths, k_lengths, q_starts, k_starts, max_q, max_k, alibi_slopes, **options):
    check(q, k, v, bias, allowed, (q_lengths, k_lengths), (q_starts, k_starts))
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    packed = q_starts is not None
    sequences = len(q_starts) if packed else q.shape[0]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf)
    for b in range(sequences):
        lq = q.shape[2] if q_lengths is None else int(q_lengths[b])
        lk = k.shape[2] if k_lengths is None else int(k_lengths[b])
        begin_q, begin_k = (int(q_starts[b]), int(k_starts[b])) if packed else (0, 0)
        assert not packed or (lq <= max_q and lk <= max_k)
        rows_q, rows_k = slice(begin_q, begin_q + lq), slice(begin_k, begin_k + lk)
        row = 0 if packed else b
        for n in range(heads):
            part_out, part_lse = one_head(
                q[row, n, rows_q],
                k[row, n // groups, rows_k],
                v[row, n // groups, rows_k],
                None if bias is None else bias[b, n, :lq, :lk],
                None if allowed is None else allowed[b, n, :lq, :lk],
                b * heads + n,
                None if alibi_slopes is None else alibi_slopes[b, n].double(),
                **options,
            )
            out = index_put(out, (row, n, rows_q), part_out)
            lse = index_put(lse, (row, n, rows_q), part_lse)
    return out, lse


def index_put(whole, place, part):
    whole = whole.clone()
    whole[place] = part
    return whole


def defaults(options):
    return {
        **dict.fromkeys(("left", "right", "q_lengths", "k_lengths", "q_starts", "k_starts", "max_q", "max_k")),
        "softcap": 0.0,
        "lower_right": False,
        "alibi_slopes": None,
        "dropout_p": 0.0,
        "seed": 0,
        **options,
    }


def wide(*tensors):
    return [None if t is None else t.detach().double() for t in tensors]


def narrow(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def attention_forward(q, k, v, *, bias=None, allowed=None, return_lse=False, out=None, **options):
    check(q, k, v, bias, allowed, (), ())
    with torch.no_grad(), torch.device("cpu"):
        result, lse = run(*wide(q, k, v, bias), allowed, **defaults(options))
    if out is None:
        out = q.new_empty(result.shape)
    assert out.shape == result.shape
    out.copy_(result)
    return out, lse.to(narrow(q.dtype)) if return_lse else None


def attention_backward(
    q, k, v, out, lse, dout, *, bias=None, allowed=None, dlse=None, needs, bias_shape=None, **options
):
    check(q, k, v, bias, allowed, (), ())
    assert dout.shape == out.shape
    assert dout.stride(-1) == 1
    assert (bias is None) is (bias_shape is None)
    leaves = [None if t is None else t.requires_grad_() for t in wide(q, k, v, bias)]
    with torch.enable_grad(), torch.device("cpu"):
        result, found = run(*leaves, allowed, **defaults(options))
        torch.testing.assert_close(result.detach(), out.double(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found.detach(), lse.double(), rtol=1e-2, atol=1e-2)
        loss = (result * dout.double()).sum()
        if dlse is not None:
            alive = found != -math.inf
            loss = loss + (found[alive] * dlse.double()[alive]).sum()
        grads = torch.autograd.grad(loss, [t for t in leaves if t is not None], allow_unused=True)
    grads = list(grads) + [None] * (4 - len(grads))
    if grads[3] is not None:
        grads[3] = grads[3].sum_to_size(bias_shape)
    return tuple(None if g is None or not need else g.to(q.dtype) for g, need in zip(grads, needs, strict=True))

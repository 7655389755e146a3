"""Attention in plain torch ops: what the kernels mean, for every case that they do not serve.

Every transform, device and dtype of torch works with it. It holds all scores in memory, L x S numbers for each head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.backends.contract import Attention
from fastseq.ops import routing


def attention(
    call: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output (B, N, L, E) and the log-sum-exp of the scores (B, N, L).

    Args:
        q, k, v: (B, N, L, D), (B, Nk, S, D), (B, Nk, S, E); B = 1 where `call.packed`.
        bias: added to the scores, broadcasts to (B, N, L, S).
        allowed: bool, True where a query may see a key; broadcasts likewise.
    """
    device = q.device.type
    if routing.any_autocast() and torch.is_autocast_enabled(device) and q.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(device, enabled=False):
            return attention(call, q, k, v, bias, allowed)
    dtype = q.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    places = _places(call, q, k)
    if places.real_q is not None:  # NaN in the padding must not reach a gradient
        q = torch.where(places.real_q, q, 0)
    if places.real_k is not None:
        k, v = torch.where(places.real_k, k, 0), torch.where(places.real_k, v, 0)
    groups = q.shape[1] // max(k.shape[1], 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    scores = call.scale * (q @ k.mT)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.detach().to(wide)
        distance = (places.i + places.shift - places.j).abs()
        if call.packed:
            scores = scores - slopes[places.b.squeeze(1)].mT.unsqueeze(2) * distance
        else:
            scores = scores - slopes[..., None, None] * distance
    for part in (allowed, *places.visible):
        if part is not None:
            scores = scores.masked_fill(~part, -math.inf)
    p, lse = probabilities(scores)
    if call.dropout_p:
        p = _dropout(call, p, places)
    return (p @ v).to(dtype), lse


def probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of scores (..., L, S) over S, and its log-sum-exp (..., L): 0 and -inf for a row of -inf alone."""
    if not scores.shape[-1]:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    scores = torch.where(dead, 0, scores)  # before the softmax: its gradient there would be NaN
    p = torch.where(dead, 0, torch.softmax(scores, -1))
    lse = torch.where(dead.squeeze(-1), -math.inf, torch.logsumexp(scores, -1))
    return p, lse


class _Places(NamedTuple):
    """Where queries and keys stand, as int64 tensors that broadcast to (B, N, L, S)."""

    b: Tensor  # the sequence of a query
    i: Tensor  # its place in that sequence
    j: Tensor
    shift: Tensor | int
    visible: list[Tensor]  # bool, True where the query may see the key
    real_q: Tensor | None  # (..., L, 1): False at padding
    real_k: Tensor | None  # (..., S, 1)


def _places(call: Attention, q: Tensor, k: Tensor) -> _Places:
    batch, queries, keys, device = q.shape[0], q.shape[2], k.shape[2], q.device
    i = torch.arange(queries, device=device).unsqueeze(1)
    j = torch.arange(keys, device=device)
    lengths_q = None if call.lengths_q is None else call.lengths_q.to(device)
    lengths_k = None if call.lengths_k is None else call.lengths_k.to(device)
    visible, real_q, real_k = [], None, None
    if call.packed:
        starts_q, starts_k = call.starts_q.to(device), call.starts_k.to(device)
        b = torch.searchsorted(starts_q, i, right=True) - 1
        row = torch.searchsorted(starts_k, j, right=True) - 1
        i, j = i - starts_q[b], j - starts_k[row]
        lengths_q, lengths_k = lengths_q[b], lengths_k[b]
        visible.append(b == row)
    else:
        b = torch.arange(batch, device=device)[:, None, None, None]
        if lengths_q is not None:
            lengths_q = lengths_q[:, None, None, None]
            real_q = i < lengths_q
            visible.append(real_q)
        if lengths_k is not None:
            lengths_k = lengths_k[:, None, None, None]
            visible.append(j < lengths_k)
            real_k = visible[-1].mT
    shift = 0
    if call.lower_right:
        shift = (keys if lengths_k is None else lengths_k) - (queries if lengths_q is None else lengths_q)
    ahead = j - (i + shift)
    if call.left is not None:
        visible.append(ahead >= -call.left)
    if call.right is not None:
        visible.append(ahead <= call.right)
    return _Places(b, i, j, shift, visible, real_q, real_k)


# ---- dropout: the generator of the kernels, so that a seed drops the same numbers here and there


def _dropout(call: Attention, p: Tensor, places: _Places) -> Tensor:
    if call.dropout_p == 1:
        return p * 0
    heads = p.shape[1]
    row = places.b * heads + torch.arange(heads, device=p.device)[:, None, None]
    draws = philox(call.seed, places.j // 4, places.i, row)
    word = places.j % 4
    draw = draws[3]
    for n in (2, 1, 0):
        draw = torch.where(word == n, draws[n], draw)
    threshold = min(math.floor(call.dropout_p * 2**32 + 0.5), 2**32 - 1)
    return torch.where(draw >= threshold, p / (1 - call.dropout_p), 0)


def philox(seed: Tensor | int, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words, as int64, of the counter (c0, c1, c2, 0) under the key `seed`: Philox4x32-7.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    c3 = torch.zeros_like(c0)
    for _ in range(7):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32-bit numbers; by halves of x, as int64 has no room for the whole."""
    low = factor * (x & 0xFFFF)
    rest = factor * (x >> 16) + (low >> 16)
    return rest >> 16, ((rest & 0xFFFF) << 16) | (low & 0xFFFF)

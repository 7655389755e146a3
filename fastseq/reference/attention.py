"""Scaled dot-product attention (Vaswani et al. 2017) in NumPy, with what has been built around it since.

B rows, N heads, L queries, S keys, D features of queries and keys, E of values. The score of query i and key j is

    s = scale * <q_i, k_j>
    s = softcap * tanh(s / softcap)
    s = s + mask_ij                             with a float mask
    s = s - slope * |i + shift - j|             with ALiBi (Press et al. 2022)

    p_ij = exp(s_ij) / sum_j exp(s_ij)          over the keys that the query may see
    out_i = sum_j p_ij v_j

A query that may see no key, or only ones with a score of -inf, has weights and a result of 0. Everything is computed in
the dtype of the arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .philox import philox4x32


class AttentionCache(NamedTuple):
    """What the backward needs. `weights` and `lse` are results as well."""

    q: np.ndarray  # (..., L, D), 0 at padding; k and v likewise, a head for every head of q
    k: np.ndarray
    v: np.ndarray
    group: int  # how many heads of q each head of k and v serves
    scale: float
    slope_of_cap: np.ndarray | None  # of softcap * tanh(s / softcap)
    p: np.ndarray  # (..., L, S) the softmax
    keep: np.ndarray  # (..., L, S) what dropout multiplies p by: 0 or 1 / (1 - dropout_p)
    mask_shape: tuple[int, ...] | None  # of a float mask
    real: np.ndarray  # (..., L, 1) False at padding
    lse: np.ndarray  # (..., L) log sum_j exp(s_ij), before dropout; -inf where a query sees no key

    @property
    def weights(self) -> np.ndarray:
        """(..., L, S) the weights that the values were summed with, after dropout."""
        return self.p * self.keep


def scaled_dot_product_attention_forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    attn_mask: np.ndarray | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    lower_right: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    lengths_q: np.ndarray | None = None,
    lengths_k: np.ndarray | None = None,
    softcap: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, AttentionCache]:
    """Attention of every query to the keys it may see.

    q (..., L, D), k (..., S, D), v (..., S, E) with equal axes before. Of q (..., N, L, D) the heads of k and v may be
    N / g as well, each for g heads of q in a row. Returns out (..., L, E) and the cache for the backward, whose `lse`
    and `weights` are the other two results.

    attn_mask: broadcast to (..., L, S); of bool, True where the query may see the key, or of floats that are added to
        the scores.
    is_causal: the query sees no key after its own place.
    scale: 1 / sqrt(D) if None.
    lower_right: the last query stands at the place of the last key; otherwise the first at that of the first. For
        is_causal, window and alibi_slopes.
    window: how many keys before and after its own place a query sees; None for all.
    lengths_q, lengths_k (B,): of the rows of q (B, N, L, D) and of k and v. Beyond, nothing is looked at and out is 0.
    alibi_slopes (N,) or (B, N).
    dropout_p, seed: the probability that a weight is set to 0, and the 64 bits that choose which; see `dropout_kept`.

    >>> q, k, v = np.zeros((2, 4)), np.zeros((3, 4)), np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = scaled_dot_product_attention_forward(q, k, v)
    >>> out.ravel().tolist()
    [3.0, 3.0]
    >>> out, cache = scaled_dot_product_attention_forward(q, k, v, is_causal=True)
    >>> out.ravel().tolist(), cache.weights.tolist()
    ([1.0, 1.5], [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    """
    (L, D), S = q.shape[-2:], k.shape[-2]
    query, key = np.arange(L)[:, None], np.arange(S)
    length_q = L if lengths_q is None else np.reshape(lengths_q, (-1, 1, 1, 1))
    length_k = S if lengths_k is None else np.reshape(lengths_k, (-1, 1, 1, 1))
    place = query + (length_k - length_q if lower_right else 0)  # of the query, counted in keys

    left, right = window
    if is_causal:
        right = 0 if right is None else min(right, 0)
    allowed = (query < length_q) & (key < length_k)
    if left is not None:
        allowed = allowed & (key >= place - left)
    if right is not None:
        allowed = allowed & (key <= place + right)

    real, real_key = query < length_q, key[:, None] < length_k
    q, k, v = np.where(real, q, 0), np.where(real_key, k, 0), np.where(real_key, v, 0)
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    if group > 1:
        k, v = (np.repeat(a, group, axis=-3) for a in (k, v))

    scale = 1 / np.sqrt(q.dtype.type(D)) if scale is None else scale
    s = scale * (q @ k.swapaxes(-1, -2))
    slope_of_cap, mask_shape = None, None
    if softcap is not None:
        tanh = np.tanh(s / softcap)
        s, slope_of_cap = softcap * tanh, 1 - tanh * tanh
    if attn_mask is not None and attn_mask.dtype == bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        s, mask_shape = s + attn_mask, attn_mask.shape
    if alibi_slopes is not None:
        s = s - alibi_slopes[..., None, None] * np.abs(place - key).astype(s.dtype)
    s = np.where(allowed, s, -np.inf)

    p, lse = _softmax(s)
    if dropout_p == 0:
        keep = np.ones_like(p)
    elif dropout_p == 1:
        keep = np.zeros_like(p)
    else:
        keep = dropout_kept(p.shape, dropout_p, seed).astype(p.dtype) / (1 - dropout_p)
    cache = AttentionCache(q, k, v, group, scale, slope_of_cap, p, keep, mask_shape, real, lse)
    return cache.weights @ v, cache


def scaled_dot_product_attention_backward(
    dout: np.ndarray, cache: AttentionCache, dlse: np.ndarray | None = None, *, return_dmask: bool = False
) -> tuple[np.ndarray, ...]:
    """Gradients from those of out (..., L, E) and, if given, of the cache's lse (..., L).

    Returns dq (..., L, D), dk (..., S, D), dv (..., S, E), in the shapes that came in; with return_dmask=True also the
    gradient of the float mask, in its own shape. Raises ValueError if there was none.

    >>> q, k, v = np.zeros((2, 4)), np.zeros((3, 4)), np.ones((3, 5))
    >>> out, cache = scaled_dot_product_attention_forward(q, k, v, np.zeros((1, 3)))
    >>> dq, dk, dv, dmask = scaled_dot_product_attention_backward(np.ones_like(out), cache, return_dmask=True)
    >>> dq.shape, dk.shape, dv.shape, dmask.shape
    ((2, 4), (3, 4), (3, 5), (1, 3))
    >>> bool(np.allclose(dv, 2 / 3))
    True
    """
    if return_dmask and cache.mask_shape is None:
        raise ValueError("return_dmask=True needs a float attn_mask in the forward, got none")
    q, k, v, p = cache.q, cache.k, cache.v, cache.p
    dout = np.where(cache.real, dout, 0)
    dv = cache.weights.swapaxes(-1, -2) @ dout
    dp = (dout @ v.swapaxes(-1, -2)) * cache.keep
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    if dlse is not None:
        ds = ds + p * np.where(cache.real, dlse[..., None], 0)
    dmask = _sum_to_shape(ds, cache.mask_shape) if return_dmask else None
    if cache.slope_of_cap is not None:
        ds = ds * cache.slope_of_cap
    dq, dk = cache.scale * (ds @ k), cache.scale * (ds.swapaxes(-1, -2) @ q)
    if cache.group > 1:
        dk, dv = (_sum_groups(a, cache.group) for a in (dk, dv))
    return (dq, dk, dv, dmask) if return_dmask else (dq, dk, dv)


def dropout_kept(shape: tuple[int, ...], dropout_p: float, seed: int) -> np.ndarray:
    """Which weights dropout keeps, of shape (..., L, S): each with probability 1 - dropout_p.

    The draw of query i and key j in head h, counted over all axes before L, is word j % 4 of Philox4x32-7 at the
    counter (j / 4, i, h, 0) under the key (low half of seed, high half). Kept is what drew at least dropout_p * 2^32.

    >>> float(dropout_kept((8, 100, 100), 0.25, seed=1).mean().round(2))
    0.75
    """
    *heads, L, S = shape
    h, i, j = np.ogrid[: int(np.prod(heads)), :L, : -(-S // 4)]
    counter = np.stack(np.broadcast_arrays(j, i, h, 0), axis=-1)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return (words.reshape(-1, L, words.shape[2] * 4)[:, :, :S] >= threshold).reshape(shape)


def _softmax(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The softmax over the last axis and the logarithm of its sum; 0 and -inf where all is -inf."""
    largest = s.max(axis=-1, keepdims=True, initial=-np.inf)
    largest = np.where(largest == -np.inf, 0, largest)
    with np.errstate(invalid="ignore", divide="ignore"):  # inf - inf is NaN, log(0) is -inf, and both are meant
        e = np.exp(s - largest)
        total = e.sum(axis=-1, keepdims=True)
        return e / np.where(total == 0, 1, total), (largest + np.log(total))[..., 0]


def _sum_groups(a: np.ndarray, group: int) -> np.ndarray:
    """(..., N, S, D) -> (..., N / group, S, D)."""
    return a.reshape(*a.shape[:-3], a.shape[-3] // group, group, *a.shape[-2:]).sum(axis=-3)


def _sum_to_shape(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sum over the axes along which an array of this shape is broadcast to that of `a`."""
    a = a.sum(axis=tuple(range(a.ndim - len(shape))))
    return a.sum(axis=tuple(n for n, size in enumerate(shape) if size == 1), keepdims=True)

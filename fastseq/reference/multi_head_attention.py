"""Multi-head attention (Vaswani et al. 2017) in NumPy: projections into heads, attention in each, one more projection.

N rows, L queries, S keys, H heads, M features of all heads together. All is computed in the dtype of the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .attention import scaled_dot_product_attention_backward, scaled_dot_product_attention_forward
from .layers import temporal_affine_backward, temporal_affine_forward


def multi_head_attention_forward(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    weights: Sequence[np.ndarray],
    biases: Sequence[np.ndarray],
    num_heads: int,
    attn_mask: np.ndarray | None = None,
    is_causal: bool = False,
    **options,
) -> tuple[np.ndarray, tuple]:
    """Attention in num_heads projections at once.

    query (N, L, Dq), key (N, S, Dk), value (N, S, Dv); weights are Wq (Dq, M), Wk (Dk, M), Wv (Dv, M), Wo (M, Do) and
    biases bq, bk, bv (M,), bo (Do,). Returns out (N, L, Do) and the cache for the backward; its last part is that of
    the attention, whose `weights` (N, H, L, S) are those of every head. attn_mask, broadcast to (N, H, L, S), is_causal
    and options are those of `scaled_dot_product_attention_forward`.

    >>> x = np.ones((2, 5, 8))
    >>> weights, biases = [np.eye(8)] * 4, [np.zeros(8)] * 4
    >>> out, cache = multi_head_attention_forward(x, x, x, weights, biases, num_heads=2, is_causal=True)
    >>> out.shape, cache[-1].weights.shape
    ((2, 5, 8), (2, 2, 5, 5))
    """
    (q, cache_q), (k, cache_k), (v, cache_v) = (
        temporal_affine_forward(x, w, b) for x, w, b in zip((query, key, value), weights[:3], biases[:3], strict=True)
    )
    q, k, v = (_split_heads(a, num_heads) for a in (q, k, v))
    heads, cache_attention = scaled_dot_product_attention_forward(q, k, v, attn_mask, is_causal, **options)
    out, cache_out = temporal_affine_forward(_join_heads(heads), weights[3], biases[3])
    return out, (cache_q, cache_k, cache_v, cache_out, cache_attention)


def multi_head_attention_backward(dout: np.ndarray, cache: tuple) -> tuple:
    """dout (N, L, Do) -> dquery, dkey, dvalue, dweights, dbiases: the last two are tuples of four, in the order above.

    Where one array came in twice, as in self-attention, its gradient is the sum of those here.

    >>> x = np.ones((2, 5, 8))
    >>> out, cache = multi_head_attention_forward(x, x, x, [np.eye(8)] * 4, [np.zeros(8)] * 4, num_heads=2)
    >>> dquery, dkey, dvalue, dweights, dbiases = multi_head_attention_backward(np.ones_like(out), cache)
    >>> dbiases[3].tolist() == [10.0] * 8
    True
    """
    cache_q, cache_k, cache_v, cache_out, cache_attention = cache
    dheads, dWo, dbo = temporal_affine_backward(dout, cache_out)
    dheads = _split_heads(dheads, cache_attention.q.shape[1])
    dqkv = (_join_heads(d) for d in scaled_dot_product_attention_backward(dheads, cache_attention))
    (dquery, dWq, dbq), (dkey, dWk, dbk), (dvalue, dWv, dbv) = (
        temporal_affine_backward(d, part) for d, part in zip(dqkv, (cache_q, cache_k, cache_v), strict=True)
    )
    return dquery, dkey, dvalue, (dWq, dWk, dWv, dWo), (dbq, dbk, dbv, dbo)


def positional_encoding(length: int, features: int, dtype: type = np.float64) -> np.ndarray:
    """Sines and cosines of each place, in wavelengths from 2 pi up to 20000 pi: (length, features).

        out[t, 2c] = sin(t / 10000^(2c / features)), out[t, 2c + 1] = cos(the same)

    >>> positional_encoding(2, 4).round(2).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.84, 0.54, 0.01, 1.0]]
    """
    t = np.arange(length, dtype=dtype)[:, None]
    c = np.arange(features) // 2
    angle = t / dtype(10_000) ** (2 * c.astype(dtype) / features)
    return np.where(np.arange(features) % 2 == 0, np.sin(angle), np.cos(angle))


def _split_heads(a: np.ndarray, heads: int) -> np.ndarray:
    """(N, T, M) -> (N, H, T, M / H)."""
    return a.reshape(*a.shape[:2], heads, -1).swapaxes(1, 2)


def _join_heads(a: np.ndarray) -> np.ndarray:
    """(N, H, T, M / H) -> (N, T, M)."""
    return a.swapaxes(1, 2).reshape(a.shape[0], a.shape[2], -1)

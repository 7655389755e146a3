"""The layers around a recurrent network: embedding, affine, softmax loss, layer norm; and the sigmoid.

N rows, T steps, D inputs, M outputs, V words. Everything is computed in the dtype of the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), elementwise, without overflow for any x.

    >>> sigmoid(np.array([-1e4, 0.0, 1e4]))
    array([0. , 0.5, 1. ])
    """
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def affine_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, tuple]:
    """x w + b, every row of x flattened: x (N, d_1, ..., d_k), w (D, M) with D = d_1 ... d_k, b (M,) -> (N, M), cache.

    >>> out, cache = affine_forward(np.ones((2, 3, 4)), np.ones((12, 5)), np.ones(5))
    >>> out.shape, float(out[0, 0])
    ((2, 5), 13.0)
    """
    return x.reshape(len(x), w.shape[0]) @ w + b, (x, w)


def affine_backward(dout: np.ndarray, cache: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dout (N, M) -> dx (N, d_1, ..., d_k), dw (D, M), db (M,).

    >>> out, cache = affine_forward(np.ones((2, 3, 4)), np.ones((12, 5)), np.ones(5))
    >>> [d.shape for d in affine_backward(out, cache)]
    [(2, 3, 4), (12, 5), (5,)]
    """
    x, w = cache
    return (dout @ w.T).reshape(x.shape), x.reshape(len(x), w.shape[0]).T @ dout, dout.sum(axis=0)


def temporal_affine_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, tuple]:
    """x w + b at every step: x (N, T, D), w (D, M), b (M,) -> (N, T, M), cache.

    >>> out, cache = temporal_affine_forward(np.ones((2, 3, 4)), np.ones((4, 5)), np.ones(5))
    >>> out.shape, float(out[0, 0, 0])
    ((2, 3, 5), 5.0)
    """
    return x @ w + b, (x, w)


def temporal_affine_backward(dout: np.ndarray, cache: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dout (N, T, M) -> dx (N, T, D), dw (D, M), db (M,).

    >>> out, cache = temporal_affine_forward(np.ones((2, 3, 4)), np.ones((4, 5)), np.ones(5))
    >>> [d.shape for d in temporal_affine_backward(out, cache)]
    [(2, 3, 4), (4, 5), (5,)]
    """
    x, w = cache
    dw = x.reshape(-1, x.shape[2]).T @ dout.reshape(-1, dout.shape[2])
    return dout @ w.T, dw, dout.sum(axis=(0, 1))


def word_embedding_forward(x: np.ndarray, W: np.ndarray) -> tuple[np.ndarray, tuple]:
    """The vector of every word: x (N, T) integers in [0, V), W (V, D) -> (N, T, D), cache.

    Raises IndexError for a word beyond V. Negative words count from the end, as in NumPy.

    >>> out, cache = word_embedding_forward(np.array([[2, 0]]), np.eye(3))
    >>> out
    array([[[0., 0., 1.],
            [1., 0., 0.]]])
    """
    return W[x], (x, W)


def word_embedding_backward(dout: np.ndarray, cache: tuple) -> np.ndarray:
    """dout (N, T, D) -> dW (V, D): the gradients of all places where a word stands are added.

    >>> out, cache = word_embedding_forward(np.array([[2, 0, 2]]), np.eye(3))
    >>> word_embedding_backward(np.ones_like(out), cache)
    array([[1., 1., 1.],
           [0., 0., 0.],
           [2., 2., 2.]])
    """
    x, W = cache
    dW = np.zeros_like(W)
    np.add.at(dW, x, dout)
    return dW


def temporal_softmax_loss(
    x: np.ndarray, y: np.ndarray, mask: np.ndarray, verbose: bool = False
) -> tuple[np.floating, np.ndarray]:
    """Softmax cross-entropy over the vocabulary at every step, summed over the steps, averaged over the N rows.

    x (N, T, V) scores, y (N, T) integers in [0, V): the true words, mask (N, T): 1 or True where the step counts.
    Returns the loss and dx (N, T, V). verbose prints the shape of dx. y is not looked at where mask is 0 or False.

    >>> loss, dx = temporal_softmax_loss(np.zeros((1, 2, 4)), np.array([[3, 0]]), np.array([[True, False]]))
    >>> bool(np.isclose(loss, np.log(4))), dx[0, 0].tolist()
    (True, [0.25, 0.25, 0.25, -0.75])
    """
    N = len(x)
    mask = np.asarray(mask).astype(x.dtype)
    true_word = np.where(mask == 0, 0, y)[..., None]
    shifted = x - x.max(axis=2, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
    loss = -(mask * np.take_along_axis(log_p, true_word, axis=2)[..., 0]).sum() / N
    dx = np.exp(log_p)
    np.put_along_axis(dx, true_word, np.take_along_axis(dx, true_word, axis=2) - 1, axis=2)
    dx *= mask[..., None] / N
    if verbose:
        print("dx:", dx.shape)
    return loss, dx


def layernorm_forward(
    x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, ln_param: Mapping[str, float] | float = 1e-5
) -> tuple[np.ndarray, tuple]:
    """Layer normalization over the last axis (Ba et al. 2016): x (..., D), gamma (D,), beta (D,) -> (..., D), cache.

        out = gamma * (x - mean) / sqrt(var + eps) + beta          with the biased variance, as torch

    ln_param: the course's dict, of which "eps" is read, 1e-5 where it has none; or eps itself.

    >>> out, cache = layernorm_forward(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2), {"eps": 0.0})
    >>> out
    array([[-1.,  1.]])
    """
    eps = ln_param.get("eps", 1e-5) if isinstance(ln_param, Mapping) else ln_param
    centered = x - x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt((centered * centered).mean(axis=-1, keepdims=True) + eps)
    x_hat = centered * rstd
    return gamma * x_hat + beta, (x_hat, rstd, gamma)


def layernorm_backward(dout: np.ndarray, cache: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dout (..., D) -> dx (..., D), dgamma (D,), dbeta (D,).

    >>> out, cache = layernorm_forward(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2))
    >>> dx, dgamma, dbeta = layernorm_backward(np.ones_like(out), cache)
    >>> bool(np.allclose(dx, 0)), dbeta.tolist()
    (True, [1.0, 1.0])
    """
    x_hat, rstd, gamma = cache
    rows = tuple(range(dout.ndim - 1))
    dx_hat = dout * gamma
    mean = dx_hat.mean(axis=-1, keepdims=True)
    projection = (dx_hat * x_hat).mean(axis=-1, keepdims=True)
    return rstd * (dx_hat - mean - x_hat * projection), (dout * x_hat).sum(axis=rows), dout.sum(axis=rows)

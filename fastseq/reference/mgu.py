"""Minimal gated unit (Zhou et al. 2016) with the gate inside the candidate applied after the matmul, in NumPy.

    f = sigmoid(x_t Wx + h_{t-1} Wh + b)
    n = tanh(x_t Wx_n + b_n + f * (h_{t-1} Wh_n + b_hn))
    h_t = (1 - f) * h_{t-1} + f * n

N rows, T steps, D inputs, H units. The columns of Wx, Wh and b are two blocks of H: f, n. b_hn (H,) is the bias inside
the gate's product. The paper gates h before the matmul, as the first GRU did; after it, as here and in torch's GRU, one
product serves both gates. Everything is computed in the dtype of the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .layers import sigmoid
from .loop import loop_backward, loop_forward
from .torch_layout import TorchLayer, join_biases, split_biases


def mgu_step_forward(
    x: np.ndarray,
    prev_h: np.ndarray,
    Wx: np.ndarray,
    Wh: np.ndarray,
    b: np.ndarray,
    b_hn: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple]:
    """One step of a minimal gated unit.

    x (N, D), prev_h (N, H), Wx (D, 2H), Wh (H, 2H), b (2H,), b_hn (H,), zeros if None.
    Returns next_h (N, H) and the cache for `mgu_step_backward`.

    >>> x, prev_h = np.zeros((2, 3)), np.ones((2, 4))
    >>> next_h, cache = mgu_step_forward(x, prev_h, np.ones((3, 8)), np.zeros((4, 8)), np.zeros(8))
    >>> bool(np.all(next_h == 0.5))
    True
    """
    b_hn = np.zeros_like(b[: prev_h.shape[1]]) if b_hn is None else b_hn
    x_f, x_n = np.split(x @ Wx + b, 2, axis=1)
    h_f, h_n = np.split(prev_h @ Wh, 2, axis=1)
    h_n = h_n + b_hn
    f = sigmoid(x_f + h_f)
    n = np.tanh(x_n + f * h_n)
    next_h = (1 - f) * prev_h + f * n
    return next_h, (x, prev_h, Wx, Wh, f, n, h_n)


def mgu_step_backward(dnext_h: np.ndarray, cache: tuple) -> tuple[np.ndarray, ...]:
    """Gradients of one step, from the gradient of next_h (N, H).

    Returns dx (N, D), dprev_h (N, H), dWx (D, 2H), dWh (H, 2H), db (2H,), db_hn (H,).

    >>> x, prev_h = np.zeros((2, 3)), np.ones((2, 4))
    >>> _, cache = mgu_step_forward(x, prev_h, np.ones((3, 8)), np.zeros((4, 8)), np.zeros(8))
    >>> dx, dprev_h, dWx, dWh, db, db_hn = mgu_step_backward(np.ones((2, 4)), cache)
    >>> db_hn
    array([0.5, 0.5, 0.5, 0.5])
    """
    x, prev_h, Wx, Wh, f, n, h_n = cache
    da_n = dnext_h * f * (1 - n * n)
    da_f = (dnext_h * (n - prev_h) + da_n * h_n) * f * (1 - f)
    # The n gate's input term and recurrent term differ by the factor f; those of f are the same sum.
    da_x = np.concatenate([da_f, da_n], axis=1)
    da_h = np.concatenate([da_f, da_n * f], axis=1)
    dprev_h = dnext_h * (1 - f) + da_h @ Wh.T
    return da_x @ Wx.T, dprev_h, x.T @ da_x, prev_h.T @ da_h, da_x.sum(axis=0), (da_n * f).sum(axis=0)


def mgu_forward(
    x: np.ndarray,
    h0: np.ndarray,
    Wx: np.ndarray,
    Wh: np.ndarray,
    b: np.ndarray,
    b_hn: np.ndarray | None = None,
    *,
    lengths: np.ndarray | None = None,
    reset: np.ndarray | None = None,
    reverse: bool = False,
    return_states: bool = False,
) -> tuple:
    """A minimal gated unit over a whole sequence.

    x (N, T, D), h0 (N, H), Wx (D, 2H), Wh (H, 2H), b (2H,), b_hn (H,), zeros if None. Returns h (N, T, H) and the
    cache for `mgu_backward`; with return_states=True: h, h_n, cache, where h_n (N, H) is the state after the last step
    that a row runs.

    lengths (N,): steps beyond a row's length output 0, keep the state, and their x is not looked at.
    reset (N, T) bool: True marks the first step of a segment, the state is zero before it.
    reverse: every row runs from its last valid step to its first, cut at the same places.
    See `schedule` for the details and the errors.

    >>> x, h0, Wx, Wh, b = np.ones((2, 5, 3)), np.zeros((2, 4)), np.ones((3, 8)), np.ones((4, 8)), np.zeros(8)
    >>> h, cache = mgu_forward(x, h0, Wx, Wh, b)
    >>> h.shape
    (2, 5, 4)
    >>> reset = np.zeros((2, 5), dtype=bool)
    >>> reset[:, 3] = True
    >>> h, h_n, cache = mgu_forward(x, h0, Wx, Wh, b, reset=reset, return_states=True)
    >>> bool(np.all(h[:, 3] == h[:, 0])), bool(np.all(h_n == h[:, 4]))
    (True, True)
    """
    b_hn = np.zeros_like(b[: h0.shape[1]]) if b_hn is None else b_hn
    (h,), (h_n,), cache = loop_forward(mgu_step_forward, x, [h0], [Wx, Wh, b, b_hn], lengths, reset, reverse)
    return (h, h_n, cache) if return_states else (h, cache)


def mgu_backward(dh: np.ndarray, cache: tuple, dh_n: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Gradients of a whole sequence, from the gradients of h (N, T, H) and, if given, of h_n (N, H).

    Returns dx (N, T, D), dh0 (N, H), dWx (D, 2H), dWh (H, 2H), db (2H,), db_hn (H,). Nothing passes across a cut; dx is
    0 and dh is not looked at beyond a row's length.

    >>> x, h0, Wx, Wh, b = np.ones((2, 5, 3)), np.zeros((2, 4)), np.ones((3, 8)), np.ones((4, 8)), np.zeros(8)
    >>> h, cache = mgu_forward(x, h0, Wx, Wh, b)
    >>> dx, dh0, dWx, dWh, db, db_hn = mgu_backward(np.ones_like(h), cache)
    >>> [d.shape for d in (dx, dh0, dWx, dWh, db, db_hn)]
    [(2, 5, 3), (2, 4), (3, 8), (4, 8), (8,), (4,)]
    """
    dx, (dh0,), (dWx, dWh, db, db_hn) = loop_backward(mgu_step_backward, [dh], [dh_n], cache)
    return dx, dh0, dWx, dWh, db, db_hn


def _forward_from_torch(
    x: np.ndarray, states: Sequence[np.ndarray], weights: Sequence[np.ndarray], options: dict
) -> tuple:
    w_ih, w_hh, b_ih, b_hh = weights
    b, b_hn = join_biases(b_ih, b_hh, w_hh.shape[1])
    h, h_n, cache = mgu_forward(x, *states, w_ih.T, w_hh.T, b, b_hn, return_states=True, **options)
    return [h], [h_n], cache


def _backward_to_torch(devery: Sequence[np.ndarray], dlast: Sequence[np.ndarray], cache: tuple) -> tuple:
    dx, dh0, dWx, dWh, db, db_hn = mgu_backward(*devery, cache, *dlast)
    return dx, [dh0], (dWx.T, dWh.T, *split_biases(db, db_hn))


TORCH_LAYERS = {"mgu": TorchLayer(2, "h", _forward_from_torch, _backward_to_torch)}

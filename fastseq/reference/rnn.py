"""Vanilla RNN (Elman, "Finding structure in time", 1990), in NumPy.

    h_t = tanh(x_t Wx + h_{t-1} Wh + b)          or relu instead of tanh

N rows, T steps, D inputs, H units. Everything is computed in the dtype of the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from .loop import loop_backward, loop_forward
from .torch_layout import TorchLayer


def rnn_step_forward(
    x: np.ndarray, prev_h: np.ndarray, Wx: np.ndarray, Wh: np.ndarray, b: np.ndarray, nonlinearity: str = "tanh"
) -> tuple[np.ndarray, tuple]:
    """One step of a vanilla RNN.

    x (N, D), prev_h (N, H), Wx (D, H), Wh (H, H), b (H,); nonlinearity "tanh" or "relu", else ValueError.
    Returns next_h (N, H) and the cache for `rnn_step_backward`.

    >>> next_h, cache = rnn_step_forward(np.ones((2, 3)), np.zeros((2, 4)), np.eye(3, 4), np.eye(4), np.zeros(4))
    >>> bool(np.all(next_h[:, :3] == np.tanh(1.0))), next_h.shape
    (True, (2, 4))
    """
    a = x @ Wx + prev_h @ Wh + b
    if nonlinearity == "tanh":
        next_h = np.tanh(a)
    elif nonlinearity == "relu":
        next_h = np.maximum(a, 0)
    else:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return next_h, (x, prev_h, Wx, Wh, next_h, nonlinearity)


def rnn_step_backward(dnext_h: np.ndarray, cache: tuple) -> tuple[np.ndarray, ...]:
    """Gradients of one step, from the gradient of next_h (N, H).

    Returns dx (N, D), dprev_h (N, H), dWx (D, H), dWh (H, H), db (H,). As in torch, relu has slope 0 at 0.

    >>> _, cache = rnn_step_forward(np.zeros((2, 3)), np.zeros((2, 4)), np.eye(3, 4), np.eye(4), np.zeros(4))
    >>> dx, dprev_h, dWx, dWh, db = rnn_step_backward(np.ones((2, 4)), cache)
    >>> db
    array([2., 2., 2., 2.])
    """
    x, prev_h, Wx, Wh, next_h, nonlinearity = cache
    if nonlinearity == "tanh":
        da = dnext_h * (1 - next_h * next_h)
    else:
        da = dnext_h * (next_h > 0)
    return da @ Wx.T, da @ Wh.T, x.T @ da, prev_h.T @ da, da.sum(axis=0)


def rnn_forward(
    x: np.ndarray,
    h0: np.ndarray,
    Wx: np.ndarray,
    Wh: np.ndarray,
    b: np.ndarray,
    nonlinearity: str = "tanh",
    *,
    lengths: np.ndarray | None = None,
    reset: np.ndarray | None = None,
    reverse: bool = False,
    return_states: bool = False,
) -> tuple:
    """A vanilla RNN over a whole sequence.

    x (N, T, D), h0 (N, H), Wx (D, H), Wh (H, H), b (H,). Returns h (N, T, H) and the cache for `rnn_backward`;
    with return_states=True: h, h_n, cache, where h_n (N, H) is the state after the last step that a row runs.

    lengths (N,): steps beyond a row's length output 0, keep the state, and their x is not looked at.
    reset (N, T) bool: True marks the first step of a segment, the state is zero before it.
    reverse: every row runs from its last valid step to its first, cut at the same places.
    See `schedule` for the details and the errors.

    >>> x, h0, Wx, Wh, b = np.ones((2, 5, 3)), np.zeros((2, 4)), np.ones((3, 4)), np.ones((4, 4)), np.zeros(4)
    >>> h, cache = rnn_forward(x, h0, Wx, Wh, b)
    >>> h.shape
    (2, 5, 4)
    >>> h, h_n, cache = rnn_forward(x, h0, Wx, Wh, b, lengths=np.array([5, 2]), return_states=True)
    >>> bool(np.all(h_n[1] == h[1, 1])), bool(np.all(h[1, 2:] == 0))
    (True, True)
    """
    step = partial(rnn_step_forward, nonlinearity=nonlinearity)
    (h,), (h_n,), cache = loop_forward(step, x, [h0], [Wx, Wh, b], lengths, reset, reverse)
    return (h, h_n, cache) if return_states else (h, cache)


def rnn_backward(dh: np.ndarray, cache: tuple, dh_n: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Gradients of a whole sequence, from the gradients of h (N, T, H) and, if given, of h_n (N, H).

    Returns dx (N, T, D), dh0 (N, H), dWx (D, H), dWh (H, H), db (H,). Nothing passes across a cut; dx is 0 and dh is
    not looked at beyond a row's length.

    >>> x, h0, Wx, Wh, b = np.ones((2, 5, 3)), np.zeros((2, 4)), np.eye(3, 4), np.eye(4), np.zeros(4)
    >>> h, cache = rnn_forward(x, h0, Wx, Wh, b)
    >>> dx, dh0, dWx, dWh, db = rnn_backward(np.ones_like(h), cache)
    >>> [d.shape for d in (dx, dh0, dWx, dWh, db)]
    [(2, 5, 3), (2, 4), (3, 4), (4, 4), (4,)]
    """
    dx, (dh0,), (dWx, dWh, db) = loop_backward(rnn_step_backward, [dh], [dh_n], cache)
    return dx, dh0, dWx, dWh, db


def _forward_from_torch(
    nonlinearity: str, x: np.ndarray, states: Sequence[np.ndarray], weights: Sequence[np.ndarray], options: dict
) -> tuple:
    w_ih, w_hh, b_ih, b_hh = weights
    h, h_n, cache = rnn_forward(x, *states, w_ih.T, w_hh.T, b_ih + b_hh, nonlinearity, return_states=True, **options)
    return [h], [h_n], cache


def _backward_to_torch(devery: Sequence[np.ndarray], dlast: Sequence[np.ndarray], cache: tuple) -> tuple:
    dx, dh0, dWx, dWh, db = rnn_backward(*devery, cache, *dlast)
    return dx, [dh0], (dWx.T, dWh.T, db, db)


TORCH_LAYERS = {
    f"rnn_{name}": TorchLayer(1, "h", partial(_forward_from_torch, name), _backward_to_torch)
    for name in ("tanh", "relu")
}

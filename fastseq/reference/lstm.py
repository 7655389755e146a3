"""Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000), in NumPy.

    i, f, o = sigmoid(x_t Wx + h_{t-1} Wh + b)        g = tanh(x_t Wx + h_{t-1} Wh + b)
    c_t = f * c_{t-1} + i * g                         h_t = o * tanh(c_t)

N rows, T steps, D inputs, H units. The columns of Wx, Wh and b are four blocks of H in the order `gate_order`: "ifog"
as in the course, "ifgo" as in torch. Everything is computed in the dtype of the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from .layers import sigmoid
from .loop import loop_backward, loop_forward
from .torch_layout import TorchLayer


def lstm_step_forward(
    x: np.ndarray,
    prev_h: np.ndarray,
    prev_c: np.ndarray,
    Wx: np.ndarray,
    Wh: np.ndarray,
    b: np.ndarray,
    gate_order: str = "ifog",
) -> tuple[np.ndarray, np.ndarray, tuple]:
    """One step of an LSTM.

    x (N, D), prev_h (N, H), prev_c (N, H), Wx (D, 4H), Wh (H, 4H), b (4H,).
    Returns next_h (N, H), next_c (N, H) and the cache for `lstm_step_backward`. ValueError if gate_order is not the
    four letters i, f, o, g in some order.

    >>> x, prev_h, prev_c = np.zeros((2, 3)), np.zeros((2, 4)), np.ones((2, 4))
    >>> next_h, next_c, cache = lstm_step_forward(x, prev_h, prev_c, np.ones((3, 16)), np.ones((4, 16)), np.zeros(16))
    >>> bool(np.all(next_c == 0.5))
    True
    """
    if sorted(gate_order) != sorted("ifog"):
        raise ValueError(f"gate_order must name the gates i, f, o, g once each, got '{gate_order}'")
    a = dict(zip(gate_order, np.split(x @ Wx + prev_h @ Wh + b, 4, axis=1), strict=True))
    i, f, o, g = sigmoid(a["i"]), sigmoid(a["f"]), sigmoid(a["o"]), np.tanh(a["g"])
    next_c = f * prev_c + i * g
    next_h = o * np.tanh(next_c)
    return next_h, next_c, (x, prev_h, prev_c, Wx, Wh, i, f, o, g, next_c, gate_order)


def lstm_step_backward(dnext_h: np.ndarray, dnext_c: np.ndarray, cache: tuple) -> tuple[np.ndarray, ...]:
    """Gradients of one step, from the gradients of next_h (N, H) and next_c (N, H).

    Returns dx (N, D), dprev_h (N, H), dprev_c (N, H), dWx (D, 4H), dWh (H, 4H), db (4H,).

    >>> x, prev_h, prev_c = np.zeros((2, 3)), np.zeros((2, 4)), np.ones((2, 4))
    >>> _, _, cache = lstm_step_forward(x, prev_h, prev_c, np.ones((3, 16)), np.ones((4, 16)), np.zeros(16))
    >>> dx, dprev_h, dprev_c, dWx, dWh, db = lstm_step_backward(np.zeros((2, 4)), np.ones((2, 4)), cache)
    >>> bool(np.all(dprev_c == 0.5))
    True
    """
    x, prev_h, prev_c, Wx, Wh, i, f, o, g, next_c, gate_order = cache
    tanh_c = np.tanh(next_c)
    dc = dnext_c + dnext_h * o * (1 - tanh_c * tanh_c)
    da = {
        "i": dc * g * i * (1 - i),
        "f": dc * prev_c * f * (1 - f),
        "o": dnext_h * tanh_c * o * (1 - o),
        "g": dc * i * (1 - g * g),
    }
    da = np.concatenate([da[gate] for gate in gate_order], axis=1)
    return da @ Wx.T, da @ Wh.T, dc * f, x.T @ da, prev_h.T @ da, da.sum(axis=0)


def lstm_forward(
    x: np.ndarray,
    h0: np.ndarray,
    Wx: np.ndarray,
    Wh: np.ndarray,
    b: np.ndarray,
    c0: np.ndarray | None = None,
    gate_order: str = "ifog",
    *,
    lengths: np.ndarray | None = None,
    reset: np.ndarray | None = None,
    reverse: bool = False,
    return_states: bool = False,
) -> tuple:
    """An LSTM over a whole sequence.

    x (N, T, D), h0 (N, H), Wx (D, 4H), Wh (H, 4H), b (4H,), c0 (N, H), zeros if None (as in the course).
    Returns h (N, T, H) and the cache for `lstm_backward`; with return_states=True: h, c, h_n, c_n, cache, where
    c (N, T, H) are all cell states and h_n, c_n (N, H) the states after the last step that a row runs.

    lengths (N,): steps beyond a row's length output 0, keep the state, and their x is not looked at.
    reset (N, T) bool: True marks the first step of a segment, both states are zero before it.
    reverse: every row runs from its last valid step to its first, cut at the same places.
    See `schedule` for the details and the errors.

    >>> x, h0, Wx, Wh, b = np.ones((2, 5, 3)), np.zeros((2, 4)), np.ones((3, 16)), np.ones((4, 16)), np.zeros(16)
    >>> h, cache = lstm_forward(x, h0, Wx, Wh, b)
    >>> h.shape
    (2, 5, 4)
    >>> h, c, h_n, c_n, cache = lstm_forward(x, h0, Wx, Wh, b, reverse=True, return_states=True)
    >>> bool(np.all(h_n == h[:, 0])), bool(np.all(c_n == c[:, 0]))
    (True, True)
    """
    c0 = np.zeros_like(h0) if c0 is None else c0
    step = partial(lstm_step_forward, gate_order=gate_order)
    (h, c), (h_n, c_n), cache = loop_forward(step, x, [h0, c0], [Wx, Wh, b], lengths, reset, reverse)
    return (h, c, h_n, c_n, cache) if return_states else (h, cache)


def lstm_backward(
    dh: np.ndarray,
    cache: tuple,
    dc: np.ndarray | None = None,
    dh_n: np.ndarray | None = None,
    dc_n: np.ndarray | None = None,
    *,
    return_dc0: bool = False,
) -> tuple[np.ndarray, ...]:
    """Gradients of a whole sequence, from those of h (N, T, H) and, if given, of c (N, T, H), h_n and c_n (N, H).

    Returns dx (N, T, D), dh0 (N, H), dWx (D, 4H), dWh (H, 4H), db (4H,); with return_dc0=True, as in the step:
    dx, dh0, dc0, dWx, dWh, db. Nothing passes across a cut; dx is 0 and dh, dc are not looked at beyond a row's length.

    >>> x, h0, Wx, Wh, b = np.ones((2, 5, 3)), np.zeros((2, 4)), np.ones((3, 16)), np.ones((4, 16)), np.zeros(16)
    >>> h, cache = lstm_forward(x, h0, Wx, Wh, b)
    >>> dx, dh0, dWx, dWh, db = lstm_backward(np.ones_like(h), cache)
    >>> [d.shape for d in (dx, dh0, dWx, dWh, db)]
    [(2, 5, 3), (2, 4), (3, 16), (4, 16), (16,)]
    """
    dx, (dh0, dc0), (dWx, dWh, db) = loop_backward(lstm_step_backward, [dh, dc], [dh_n, dc_n], cache)
    return (dx, dh0, dc0, dWx, dWh, db) if return_dc0 else (dx, dh0, dWx, dWh, db)


def _forward_from_torch(
    x: np.ndarray, states: Sequence[np.ndarray], weights: Sequence[np.ndarray], options: dict
) -> tuple:
    w_ih, w_hh, b_ih, b_hh = weights
    h0, c0 = states
    h, c, h_n, c_n, cache = lstm_forward(
        x, h0, w_ih.T, w_hh.T, b_ih + b_hh, c0, gate_order="ifgo", return_states=True, **options
    )
    return [h, c], [h_n, c_n], cache


def _backward_to_torch(devery: Sequence[np.ndarray], dlast: Sequence[np.ndarray], cache: tuple) -> tuple:
    dh, dc = devery
    dx, dh0, dc0, dWx, dWh, db = lstm_backward(dh, cache, dc, *dlast, return_dc0=True)
    return dx, [dh0, dc0], (dWx.T, dWh.T, db, db)


TORCH_LAYERS = {"lstm": TorchLayer(4, "hc", _forward_from_torch, _backward_to_torch)}

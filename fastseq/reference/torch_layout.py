"""The recurrent references run from torch's layouts: one layer, one direction, forward and all gradients by name.

What a kernel takes and gives is (T, B, ...), weights (G*H, I) with two biases, gates i f g o and r z n. This module
only transposes; the arithmetic is that of rnn.py, lstm.py and gru.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .gru import gru_backward, gru_forward
from .lstm import lstm_backward, lstm_forward
from .rnn import rnn_backward, rnn_forward

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def recurrent_forward_backward(
    cell: str,
    x: np.ndarray,
    h_0: np.ndarray | None,
    c_0: np.ndarray | None,
    weights: Sequence[np.ndarray | None],
    dy: np.ndarray | None,
    dh_n: np.ndarray | None = None,
    dc_n: np.ndarray | None = None,
    dc_all: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    reset: np.ndarray | None = None,
    reverse: bool = False,
    dtype: type = np.float64,
) -> dict[str, np.ndarray]:
    """Outputs and gradients of one recurrent layer in one direction, in torch's layouts, computed in `dtype`.

    cell "rnn_tanh", "rnn_relu", "lstm" or "gru"; x (T, B, I); h_0, c_0 (B, H) or None for zeros; weights are
    w_ih (G*H, I), w_hh (G*H, H), b_ih (G*H,), b_hh (G*H,), both biases may be None; lengths (B,), reset (T, B) and
    reverse as in `schedule`.
    dy (T, B, H), dh_n, dc_n (B, H), dc_all (T, B, H): gradients of the outputs, None for zeros. Arrays of another dtype
    are converted, also CPU tensors that NumPy can read (bfloat16 it cannot: pass `tensor.float()`, which is exact).

    Returns y, h_n, dx, dh_0, dw_ih, dw_hh, with biases db_ih, db_hh, and for the LSTM c_n, c_all, dc_0.
    Raises ValueError for an unknown cell and for cell states or their gradients given to a cell that has none.

    >>> x, dy = np.ones((5, 2, 3)), np.ones((5, 2, 4))
    >>> weights = np.ones((16, 3)), np.ones((16, 4)), np.zeros(16), np.zeros(16)
    >>> result = recurrent_forward_backward("lstm", x, None, None, weights, dy, dtype=np.longdouble)
    >>> list(result)
    ['y', 'h_n', 'c_n', 'c_all', 'dx', 'dh_0', 'dc_0', 'dw_ih', 'dw_hh', 'db_ih', 'db_hh']
    >>> result["y"].shape, result["dw_ih"].shape
    ((5, 2, 4), (16, 3))
    """
    if cell not in GATES:
        raise ValueError(f"cell must be one of {', '.join(GATES)}, got '{cell}'")
    if cell != "lstm" and any(a is not None for a in (c_0, dc_n, dc_all)):
        raise ValueError(f"c_0, dc_n and dc_all are for lstm only, got them for '{cell}'")

    def converted(a, default_shape):
        return np.zeros(default_shape, dtype) if a is None else np.asarray(a, dtype)

    T, B, _ = x.shape
    H = weights[1].shape[1]
    w_ih, w_hh, b_ih, b_hh = (converted(a, GATES[cell] * H) for a in weights)
    x, dy = (converted(a, (T, B, H)).swapaxes(0, 1) for a in (x, dy))
    h_0, dh_n = (converted(a, (B, H)) for a in (h_0, dh_n))
    Wx, Wh, b = w_ih.T, w_hh.T, b_ih + b_hh
    options = {
        "lengths": None if lengths is None else np.asarray(lengths),
        "reset": None if reset is None else np.asarray(reset).T,
        "reverse": reverse,
        "return_states": True,
    }

    if cell == "lstm":
        c_0, dc_n = (converted(a, (B, H)) for a in (c_0, dc_n))
        dc_all = converted(dc_all, (T, B, H)).swapaxes(0, 1)
        y, c_all, h_n, c_n, cache = lstm_forward(x, h_0, Wx, Wh, b, c_0, gate_order="ifgo", **options)
        dx, dh_0, dc_0, dWx, dWh, db = lstm_backward(dy, cache, dc_all, dh_n, dc_n, return_dc0=True)
        db_hh = db
    elif cell == "gru":
        # b_hh of the n gate stands inside the reset gate's product, so it is not part of the sum.
        b, b_hn = np.concatenate([b[: 2 * H], b_ih[2 * H :]]), b_hh[2 * H :]
        y, h_n, cache = gru_forward(x, h_0, Wx, Wh, b, b_hn, **options)
        dx, dh_0, dWx, dWh, db, db_hn = gru_backward(dy, cache, dh_n)
        db_hh = np.concatenate([db[: 2 * H], db_hn])
    else:
        y, h_n, cache = rnn_forward(x, h_0, Wx, Wh, b, cell.removeprefix("rnn_"), **options)
        dx, dh_0, dWx, dWh, db = rnn_backward(dy, cache, dh_n)
        db_hh = db

    result = {"y": y.swapaxes(0, 1), "h_n": h_n}
    if cell == "lstm":
        result |= {"c_n": c_n, "c_all": c_all.swapaxes(0, 1)}
    result |= {"dx": dx.swapaxes(0, 1), "dh_0": dh_0}
    if cell == "lstm":
        result["dc_0"] = dc_0
    result |= {"dw_ih": dWx.T, "dw_hh": dWh.T}
    if weights[2] is not None:
        result |= {"db_ih": db, "db_hh": db_hh}
    return result

"""The recurrent references run from torch's layouts: one layer, one direction, forward and all gradients by name.

What a kernel takes and gives is (T, B, ...), weights (G*H, I) with two biases, gates in torch's order. This module only
transposes; the arithmetic is that of the cells' own modules, each of which says in `TORCH_LAYERS` how it is called.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["TorchLayer", "join_biases", "recurrent_forward_backward", "split_biases", "torch_layers"]


class TorchLayer(NamedTuple):
    """How the module of a cell is called with weights as torch lays them out, and sequences (N, T, ...)."""

    gates: int
    states: str  # a letter each, h first
    forward: Callable[..., tuple]  # (x, states, weights, options) -> (every state, the last states, cache)
    backward: Callable[..., tuple]  # (their gradients, cache) -> (dx, of the states, of the weights)


@cache
def torch_layers() -> dict[str, TorchLayer]:
    """Those of all cells, by the cell's name, out of the modules beside this one."""
    modules = (
        import_module(f"{__package__}.{found.name}") for found in pkgutil.iter_modules([str(Path(__file__).parent)])
    )
    return {name: layer for module in modules for name, layer in getattr(module, "TORCH_LAYERS", {}).items()}


def join_biases(b_ih: np.ndarray, b_hh: np.ndarray, H: int) -> tuple[np.ndarray, np.ndarray]:
    """b and b_hn: the last block of b_hh stands inside a gate's product, so it is not part of the sum."""
    return np.concatenate([b_ih[:-H] + b_hh[:-H], b_ih[-H:]]), b_hh[-H:]


def split_biases(db: np.ndarray, db_hn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of b_ih and b_hh, out of those of b and b_hn."""
    return db, np.concatenate([db[: -db_hn.size], db_hn])


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

    cell is a key of `torch_layers()`; x (T, B, I); h_0, c_0 (B, H) or None for zeros; weights are w_ih (G*H, I),
    w_hh (G*H, H), b_ih (G*H,), b_hh (G*H,), both biases may be None; lengths (B,), reset (T, B) and reverse as in
    `schedule`.

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
    layers = torch_layers()
    if cell not in layers:
        raise ValueError(f"cell must be one of {', '.join(layers)}, got '{cell}'")
    layer = layers[cell]
    if len(layer.states) == 1 and any(a is not None for a in (c_0, dc_n, dc_all)):
        raise ValueError(f"c_0, dc_n and dc_all are for cells with a state beside h, got them for '{cell}'")

    def converted(a, default_shape):
        return np.zeros(default_shape, dtype) if a is None else np.asarray(a, dtype)

    T, B, _ = x.shape
    H, others = weights[1].shape[1], layer.states[1:]
    options = {
        "lengths": None if lengths is None else np.asarray(lengths),
        "reset": None if reset is None else np.asarray(reset).T,
        "reverse": reverse,
    }
    states = [converted(a, (B, H)) for a in (h_0, c_0)[: len(layer.states)]]
    dlast = [converted(a, (B, H)) for a in (dh_n, dc_n)[: len(layer.states)]]
    devery = [converted(a, (T, B, H)).swapaxes(0, 1) for a in (dy, dc_all)[: len(layer.states)]]
    every, last, cache = layer.forward(
        converted(x, None).swapaxes(0, 1), states, [converted(a, layer.gates * H) for a in weights], options
    )
    dx, dstates, dweights = layer.backward(devery, dlast, cache)

    y, *every = (states_t.swapaxes(0, 1) for states_t in every)
    result = {"y": y} | {f"{name}_n": state for name, state in zip(layer.states, last, strict=True)}
    result |= {f"{name}_all": states_t for name, states_t in zip(others, every, strict=True)}
    result |= {"dx": dx.swapaxes(0, 1)} | {f"d{name}_0": d for name, d in zip(layer.states, dstates, strict=True)}
    names = ("dw_ih", "dw_hh", "db_ih", "db_hh")
    return result | {name: d for name, d, weight in zip(names, dweights, weights, strict=True) if weight is not None}

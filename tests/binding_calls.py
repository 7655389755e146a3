"""Calls of the binding's recurrent functions on good arguments, with changes."""

from __future__ import annotations

import torch

from fastseq import backends
from fastseq.ops import CELLS

native = backends.select("recurrent")

T, B, I, H = 7, 5, 9, 11  # noqa: E741


def make_weights(cell, dtype=torch.float32, bias=True):
    rows = len(CELLS[cell].gates) * H
    shapes = (rows, I), (rows, H), (rows,), (rows,)
    weights = tuple(torch.empty(shape, dtype=dtype).uniform_(-0.3, 0.3) for shape in shapes)
    return weights if bias else (*weights[:2], None, None)


def make_inputs(cell, dtype=torch.float32):
    x, h = torch.randn(T, B, I, dtype=dtype), torch.randn(B, H, dtype=dtype)
    return x, h, torch.randn(B, H, dtype=dtype) if cell == "lstm" else None


def same(a, b):
    """Equal results: tuples of tensors and None, bit for bit."""
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


def forward(cell="lstm", **changes):
    """recurrent_forward on good arguments, with changes."""
    x, h_0, c_0 = make_inputs(cell)
    arguments = {"x": x, "h_0": h_0, "c_0": c_0, "weights": make_weights(cell)} | changes
    return native.recurrent_forward(cell, **arguments)


def backward(cell="lstm", **changes):
    """recurrent_backward on good arguments, with changes."""
    x, h_0, c_0 = make_inputs(cell)
    weights = make_weights(cell)
    y, _, _, _, saved = native.recurrent_forward(cell, x, h_0, c_0, weights, save=True)
    arguments = {"x": x, "h_0": h_0, "c_0": c_0, "weights": weights, "y": y, "saved": saved}
    arguments |= {"isa": native.active_isa(), "dy": torch.randn(T, B, H), "needs": [True] * 7}
    arguments |= dict.fromkeys(("dh_n", "dc_n", "dc_all"))
    return native.recurrent_backward(cell, **arguments | changes)

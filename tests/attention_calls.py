"""Calls of the attention kernels, forward and backward, on random inputs; and what a call may ask for."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastseq import backends
from fastseq.ops import Attention
from fastseq.tools.verify.attention import MASK_AXES

native = backends.select("attention")

NAMES = ("dq", "dk", "dv", "dbias")

# Options of a case of fastseq.tools.verify.attention.
OPTIONS = (
    {},
    {"is_causal": True, "heads_inside": True},
    {"is_causal": True, "lower_right": True, "lse": True},
    {"bool_mask": "BLS"},
    {"float_mask": "NLS", "heads_inside": True},
    {"float_mask": "BS", "is_causal": True},
    {"float_mask": "BNLS", "lengths": "k"},
    {"window": (5, 2)},
    {"window": (17, None), "is_causal": True, "lower_right": True, "bool_mask": "S"},
    {"lengths": "qk", "lse": True},
    {"lengths": "qk", "packed": True, "is_causal": True},
    {"lengths": "qk", "packed": True, "lower_right": True, "window": (9, 1), "alibi": True, "dropout_p": 0.5},
    {"softcap": 2.0, "logits": 4.0},
    {"alibi": True, "is_causal": True},
    {"dropout_p": 0.2},
    {
        "float_mask": "BNLS", "bool_mask": "LS", "lengths": "qk", "is_causal": True, "lower_right": True,
        "window": (40, 0), "softcap": 3.0, "alibi": True, "dropout_p": 0.1, "lse": True,
    },
)  # fmt: skip

# The axes of (B, N, L, S) that a mask has whole; it is of size 1 along the others.
WHOLE_AXES = [axes for n in range(5) for axes in itertools.combinations(range(4), n)]
each_bias = pytest.mark.parametrize(
    "whole", WHOLE_AXES, ids=lambda axes: "".join(MASK_AXES[a] for a in axes) or "scalar"
)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")


def heads(B, N, rows, dim, dtype):
    return torch.randn(B, N, rows, dim, dtype=dtype)


def make(B, N, Nk, L, S, D, E, dtype, bias_shape=None, **options):
    """Inputs of a call: (q, k, v, dout, dlse), and bias, allowed and the fields of `Attention` by name."""
    inputs = heads(B, N, L, D, dtype), heads(B, Nk, S, D, dtype), heads(B, Nk, S, E, dtype)
    inputs += heads(B, N, L, E, dtype), torch.randn(B, N, L, dtype=torch.float64)
    options = {"scale": D**-0.5} | options
    if bias_shape is not None:
        options["bias"] = torch.randn(bias_shape, dtype=dtype)
    return inputs, options


def arguments(inputs, options):
    """What forward and backward take alike."""
    options = dict(options)
    masks = options.pop("bias", None), options.pop("allowed", None)
    return Attention(**options), *inputs[:3], *masks


def run(inputs, options, backend=native):
    """Outputs and gradients by name."""
    *_, dout, dlse = inputs
    call = arguments(inputs, options)
    out, lse = backend.attention_forward(*call, return_lse=True)
    gradients = backend.attention_backward(*call, out, lse, dout, dlse, [True] * 4)
    results = {"out": out, "lse": lse, **dict(zip(NAMES, gradients, strict=True))}
    return {name: t for name, t in results.items() if t is not None}


def bias_of(whole, sizes):
    return torch.randn([size if axis in whole else 1 for axis, size in enumerate(sizes)])

"""Calls of the attention kernels, forward and backward, on random inputs."""

from __future__ import annotations

import torch

from fastseq import backends

native = backends.select("attention")

NAMES = ("dq", "dk", "dv", "dbias")


def heads(B, N, rows, dim, dtype):
    return torch.randn(B, N, rows, dim, dtype=dtype)


def make(B, N, Nk, L, S, D, E, dtype, bias_shape=None, **options):
    """Inputs of a call: (q, k, v, dout, dlse) and the keywords of the kernels."""
    inputs = heads(B, N, L, D, dtype), heads(B, Nk, S, D, dtype), heads(B, Nk, S, E, dtype)
    inputs += heads(B, N, L, E, dtype), torch.randn(B, N, L, dtype=torch.float64)
    options = {"scale": D**-0.5} | options
    if bias_shape is not None:
        options["bias"] = torch.randn(bias_shape, dtype=dtype)
    return inputs, options


def run(inputs, options):
    """Outputs and gradients by name."""
    q, k, v, dout, dlse = inputs
    out, lse = native.attention_forward(q, k, v, return_lse=True, **options)
    gradients = native.attention_backward(q, k, v, out, lse, dout, dlse=dlse, needs=[True] * 4, **options)
    results = {"out": out, "lse": lse, **dict(zip(NAMES, gradients, strict=True))}
    return {name: t for name, t in results.items() if t is not None}

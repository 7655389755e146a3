"""The compiled kernels, as functions of tensors: recurrent layers in one direction, attention and layer
normalization, forward and backward; linear layers, forward.

Of the recurrent functions: T steps, B rows, input size I, hidden size H, G gates. Weights are (w_ih (G*H, I), w_hh
(G*H, H), b_ih (G*H,), b_hh (G*H,)) in torch's layout and gate order, the biases both None or both given. Cells are
those of `CELLS`, by name. Of all: dtypes are float32, float64 and bfloat16, one per call. Tensors must be plain
(Tensor or Parameter, on the CPU), with a unit stride along the last dimension: what anything else means is for the
caller to say. `Refused` for anything else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

import fastseq._native as _native  # `from fastseq import` would not tell a missing module from a broken one
from fastseq._native import Panels
from fastseq.backends.contract import Attention, CellFacts, Refused

__all__ = [
    "CELLS",
    "DEVICE",
    "PACKS",
    "SERVES",
    "Panels",
    "active_isa",
    "attach",
    "attention_backward",
    "attention_forward",
    "checksum",
    "filled_with_nan",
    "fma_peak",
    "isas",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_forward",
    "pack",
    "pack_linear",
    "read_rate",
    "recurrent_backward",
    "recurrent_forward",
    "recurrent_step",
    "use_isa",
    "vector_bytes",
]

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

DEVICE = "cpu"
_ALL = frozenset((torch.float32, torch.float64, torch.bfloat16))
SERVES = {"recurrent": _ALL, "attention": _ALL, "layer_norm": _ALL, "linear": _ALL}
PACKS = frozenset(("recurrent", "linear"))
CELLS = {facts.name: facts for facts in map(CellFacts._make, _native.cells())}


# By the name of a dtype, what makes a tensor of a shape, on the CPU whatever the default device is. new_empty takes
# 1.2 us, torch.empty with a dtype and a device 2.4, and a backward pass makes up to seven tensors.
_EMPTY = {
    dtype: torch.empty(0, dtype=getattr(torch, dtype), device="cpu").new_empty
    for dtype in ("float32", "float64", "bfloat16", "uint8")
}


def attach(*, empty: Mapping[str, Callable[..., Tensor]] = _EMPTY, exchange: bool = True) -> bool:
    """Hands `Refused`, `Attention` and torch's types and functions to the extension; done at import.

    Tests do it again: with `exchange=False` to read tensors as on a torch without the DLPack exchange table, or with
    an `empty` that poisons what it makes. Returns whether the table is in use.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None) if exchange else None
    return _native.attach(
        Refused, Attention, Tensor, torch.nn.Parameter, Tensor.is_neg, torch.get_num_threads, empty, capsule
    )


attach()

isas = _native.isas
active_isa = _native.active_isa
vector_bytes = _native.vector_bytes

if active_isa() is None:
    raise ValueError(
        f"FASTSEQ_ISA is {os.environ['FASTSEQ_ISA']!r}, which is none of those of this machine: {', '.join(isas())}"
    )


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the block, in every thread of the process, with the instruction set of this name out of `isas()`."""
    before = active_isa()
    _native.activate(name)
    try:
        yield
    finally:
        _native.activate(before)


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Runs the block with new memory that holds NaN: in every dtype that is all bits set. Without the exchange table,
    which allocates the results of steps by itself."""

    def filled(new_empty: Callable[..., Tensor], *shape: int) -> Tensor:
        tensor = new_empty(*shape)
        tensor.view(torch.uint8).fill_(255)
        return tensor

    attach(exchange=False, empty={dtype: partial(filled, new_empty) for dtype, new_empty in _EMPTY.items()})
    try:
        yield
    finally:
        attach()


def fma_peak(dtype: torch.dtype = torch.float32, seconds: float = 0.05) -> float:
    """Flops per second that one core reaches with the active instruction set when it does nothing else."""
    return _native.fma_peak(str(dtype).removeprefix("torch."), seconds)


def read_rate(tensor: Tensor, seconds: float = 0.05) -> float:
    """Bytes per second at which torch.get_num_threads() threads read a contiguous tensor, over and over.

    That of a tensor much larger than the caches is the bandwidth of memory. What a kernel reads is to be compared with
    a tensor of the same size, as the caches keep the same share of it.
    """
    return _native.read_rate(tensor, seconds, torch.get_num_threads())


def pack(cell: str, weights: Weights) -> Panels:
    """The weights, packed for the active instruction set; `nbytes` and `isa` tell how large and for which.

    Panels are a copy: they do not follow later changes of the weights.
    """
    return _native.pack(cell, weights, torch.get_num_threads())


# recurrent_step(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, threads, save=False, panels=None, float_state=False)
#   -> (y, h_n, c_n, saved)
# One step: x (B, I), h and c (B, H) or None for zeros. h_n is y itself, but for float_state. Not wrapped, since at one
# row the kernel takes hardly longer than a Python call.
recurrent_step = _native.recurrent_step


# Nor these: they read the number of threads and take keywords themselves, and say what those mean.
checksum = _native.checksum
recurrent_forward = _native.recurrent_forward
recurrent_backward = _native.recurrent_backward
attention_forward = _native.attention_forward
attention_backward = _native.attention_backward


def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    return_sum: bool = True,
    save: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Layer normalization over the last axis: (y, z, mean, rstd), contiguous.

        z = x + residual, y = (z - mean) / sqrt(var + eps) * weight + bias          with the biased variance

    Args:
        x, residual: (N,), (B, N) or (T, B, N) with any strides, but 1 along the last axis. residual None: z is x.
        weight, bias: (N,) contiguous, or None for 1 and 0.
        return_sum: z, where there is a residual; None otherwise.
        save: the mean and 1 / sqrt(var + eps) of every row, which `layer_norm_backward` needs, float64 for float64 and
            else float32; None otherwise.
    """
    return _native.layer_norm_forward(x, residual, weight, bias, eps, return_sum, save, torch.get_num_threads())


def layer_norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients (dx, dweight, dbias), None where `needs` says so; dx is that of the residual as well.

    Args:
        dy: the gradient of y.
        dz: that of z from elsewhere, which is added to dx. None: zero.
        z, mean, rstd: what `layer_norm_forward(save=True)` returned, z being x where there was no residual.
        needs: three bools, in the order of the result.
    """
    return _native.layer_norm_backward(dy, dz, z, weight, mean, rstd, needs, torch.get_num_threads())


# pack_linear(weight, bias, threads) -> LinearPanels
# weight (N, K) and bias (N,) or None, packed for the active instruction set; as `Panels` of `pack` otherwise.
pack_linear = _native.pack_linear

# linear_forward(x, panels, threads) -> y
# y = x W^T + bias: x (K,), (B, K) or (T, B, K) with any strides, but 1 along the last axis; y (..., N) contiguous.
# Not wrapped, as tiny calls are as long as a Python call.
linear_forward = _native.linear_forward

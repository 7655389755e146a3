"""Linear layers: the projections around attention, over the kernels where those are the faster ones."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.backends.contract import Refused
from fastseq.ops import routing
from fastseq.ops.autograd import c_apply, composite_backward, needs_grad
from fastseq.ops.memory import contiguous, unit_stride
from fastseq.ops.recurrent.checks import check_devices, check_tensor

# torch's time over ours on Zen 3 (AVX2), with the check of the packed weights, for K = 512, N = 512 and 1536, M rows.
# float32: with one thread 1.1 to 1.5 for M of 4 to 32 and 0.97 to 1.02 above, where both are near the peak; with four
# 1.3 to 1.6. float64: 0.9 to 2.0. With fewer rows, reading the weights for the check is most of it: 0.6 to 1.1.
FEWEST_ROWS = 4
FEWEST_PRODUCTS = 2**20  # M * K * N: smaller calls are as long as their checks
# Where the forward packs the weights in every call: at M = 1024, 0.97 with one thread and 1.33 with four. Backward is
# torch's, as a transposed copy for the kernel would take what it saves.
FEWEST_PRODUCTS_OF_TRAINING = 2**27

# bfloat16: 2.5 to 6.6, where torch has no product of its own library for it, and forward and backward. oneDNN's needs
# AVX-512, and is not measured here.
_onednn_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)()


def packs(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True where `linear` takes packed weights: in calls without gradients that the kernels serve faster than torch.

    Args:
        x: (..., K), weight (N, K), bias (N,): what `routing.route` answered KERNELS for.
    """
    if needs_grad(x, weight, bias):
        return False
    if x.dtype is torch.bfloat16:
        return not _onednn_bfloat16
    outputs, inputs = weight.shape
    elements = x.numel()
    return elements >= FEWEST_ROWS * inputs and elements * outputs >= FEWEST_PRODUCTS


def linear(backend: ModuleType | None, x: Tensor, weight: Tensor, bias: Tensor | None, panels: Any = None) -> Tensor:
    """x @ weight.mT + bias, as `torch.nn.functional.linear`: (..., N).

    Args:
        backend: what `routing.route` answered for these tensors; None for torch's own op.
        x: (..., K) with 1 to 3 axes, weight (N, K), bias (N,).
        panels: `backend.pack_linear(weight, bias)` where `packs`, else None.
    """
    if backend is None:
        return F.linear(x, weight, bias)
    try:
        if panels is not None:
            return backend.linear_forward(unit_stride(x), panels, torch.get_num_threads())
        if needs_grad(x, weight, bias):
            if x.dtype is torch.bfloat16:
                trains = not _onednn_bfloat16
            else:
                trains = x.numel() * weight.shape[0] >= FEWEST_PRODUCTS_OF_TRAINING
            if trains:
                return _apply(backend, x, weight, bias)
        elif x.dtype is torch.bfloat16 and not _onednn_bfloat16:  # weights that are not contiguous
            return _multiply(backend, x, weight, bias)
    except Refused:
        pass
    return F.linear(x, weight, bias)


def _multiply(backend: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    threads = torch.get_num_threads()
    panels = backend.pack_linear(contiguous(weight), contiguous(bias), threads)
    return backend.linear_forward(unit_stride(x), panels, threads)


class LinearFunction(torch.autograd.Function):
    """x @ weight.mT + bias by the kernels. In bfloat16 they also compute the gradients; otherwise torch does.

    `LinearFunction.apply(backend, x, weight, bias)` returns (..., N): `backend` is a module with `pack_linear` and
    `linear_forward`, x (..., K) with 1 to 3 axes, weight (N, K), bias (N,) or None. All three get gradients. With
    `create_graph=True` torch ops compute them. A call that the kernels do not serve runs torch's op, which also raises
    the errors.

    Example:
        >>> import torch
        >>> from fastseq import backends
        >>> from fastseq.ops import LinearFunction
        >>> x, weight = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
        >>> if (backend := backends.select("linear")) is not None:
        ...     LinearFunction.apply(backend, x, weight, None).sum().backward()
    """

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See the class."""
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            if tensor is not None or name != "bias":
                check_tensor(name, tensor)
        ctx.save_for_backward(x, weight)  # no gradient depends on the bias, which torch lets its owner change
        ctx.backend, ctx.bias_shape = backend, None if bias is None else bias.shape
        try:
            return _multiply(backend, x, weight, bias)
        except Refused:  # torch computes it, or names the mistake
            ctx.backend = None
            check_devices((x, weight, bias))
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        """Gradients of x, weight and bias, None for those that need none."""
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if ctx.backend is None or not routing.kernels_differentiate((dy,)):
            bias = weight.new_zeros(ctx.bias_shape, requires_grad=True) if needs[2] else None
            grads = composite_backward(
                lambda x, weight, bias: (F.linear(x, weight, bias),), (x, weight, bias), (dy,), needs
            )
            return None, *grads
        dx = dweight = dbias = None
        rows = dy.reshape(-1, dy.shape[-1])
        if x.dtype is torch.bfloat16:
            if needs[0]:
                dx = _multiply(ctx.backend, dy, weight.mT)
            if needs[1]:
                dweight = _multiply(ctx.backend, rows.mT.contiguous(), x.reshape(-1, x.shape[-1]).mT)
        else:
            if needs[0]:
                dx = dy @ weight
            if needs[1]:
                dweight = rows.mT @ x.reshape(-1, x.shape[-1])
        if needs[2]:
            dbias = rows.sum(0)
        return None, dx, dweight, dbias


_apply = c_apply(LinearFunction)

"""Layer normalization: torch's function, over kernels that also add a residual in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm as torchs_layer_norm  # now: the name may come to lead here

from fastseq.backends.contract import Refused
from fastseq.ops import routing
from fastseq.ops.autograd import c_apply, composite_backward, needs_grad, save, saved
from fastseq.ops.memory import contiguous, unit_stride
from fastseq.ops.recurrent.checks import check_tensor
from fastseq.ops.routing import Route

# From how many elements on the kernels are faster than torch's op, measured with 1 and with 4 threads on Zen 3: below,
# the way to them costs more than they save. A number of elements and not of threads, on which no result may depend.
FEWEST_ELEMENTS = 2**20
FEWEST_ELEMENTS_OF_SUMS = 2**18  # with a residual and without gradients
DTYPES = (torch.float32, torch.float64)  # torch's op in bfloat16 is the faster one


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(z - mean) / sqrt(var + eps) * weight + bias over the last axes, with torch's arguments, results and errors.

    z is the input, or input + residual. Every Transformer layer adds and then normalizes; given a residual, this
    function does both in one pass over memory, forward and backward.

    Args:
        input: (*, *normalized_shape).
        normalized_shape: the sizes of the last axes, over which mean and biased variance are taken.
        weight, bias: of shape normalized_shape; None for 1 and 0.
        eps: added to the variance.
        residual: shaped as the input.

    Returns:
        The normalized tensor, shaped as the input. With a residual, a pair: that and the sum z, whose strides may
        differ from the input's.

    The kernels run float32 and float64 on the CPU where they are faster than torch's op: from 2**20 elements on, and
    from 2**18 on where there is a residual and autograd records nothing. Other calls run torch's op (`fastseq info`
    prints the table).

    Raises:
        TypeError: arguments of wrong types.
        RuntimeError: shapes, dtypes or devices that do not fit, in torch's words; a residual not shaped as the input.

    Sources: Ba et al., "Layer normalization", 2016;
        https://pytorch.org/docs/stable/generated/torch.nn.functional.layer_norm.html

    Example:
        >>> import torch, fastseq
        >>> x, sublayer = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        >>> y, z = fastseq.layer_norm(sublayer, (16,), residual=x)
        >>> torch.equal(z, x + sublayer), y.shape
        (True, torch.Size([2, 5, 16]))
    """
    if residual is None:
        # The size is asked first, as it sends most calls to torch: on a small one each further question shows.
        if routing.is_compiling() or not isinstance(input, Tensor) or input.numel() < FEWEST_ELEMENTS:
            return torchs_layer_norm(input, normalized_shape, weight, bias, eps)
        return _normalize(input, normalized_shape, weight, bias, eps, None, False)[0]
    check_tensor("input", input)
    check_tensor("residual", residual)
    if residual.shape != input.shape:
        raise RuntimeError(f"residual must have the shape of input, {tuple(input.shape)}, got {tuple(residual.shape)}")
    return _normalize(input, normalized_shape, weight, bias, eps, residual, True)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The first result of `layer_norm` with a residual, for callers that do not need the sum: where autograd records
    nothing, the kernel does not write it.
    """
    return _normalize(input, normalized_shape, weight, bias, eps, residual, False)[0]


def _normalize(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    want_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    differentiable = needs_grad(*(t for t in (input, weight, bias, residual) if isinstance(t, Tensor)))
    fewest = FEWEST_ELEMENTS if residual is None or differentiable else FEWEST_ELEMENTS_OF_SUMS
    backend = _backend(input, normalized_shape, weight, bias, eps, residual, fewest)
    if backend is not None:
        try:
            return _by_kernels(backend, input, len(normalized_shape), weight, bias, eps, residual, want_sum)
        except Refused:
            pass
    z = input if residual is None else input + residual
    return torchs_layer_norm(z, normalized_shape, weight, bias, eps), z


def _by_kernels(
    backend: ModuleType,
    input: Tensor,
    axes: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    want_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    shape = input.shape
    if axes > 1 or len(shape) > 3:  # views for autograd to see
        features = shape[-axes:].numel()
        input = input.reshape(-1, features)
        residual = None if residual is None else residual.reshape(-1, features)
        weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
    if needs_grad(input, weight, bias, residual):
        y, z = _apply(backend, eps, input, residual, weight, bias)
    else:
        y, z, _, _ = _forward(backend, eps, input, residual, weight, bias, want_sum, False)
    if y.shape == shape:
        return y, z
    return y.view(shape), None if z is None else z.view(shape)


def _backend(
    input: object,
    normalized_shape: object,
    weight: object,
    bias: object,
    eps: object,
    residual: object,
    fewest: int,
) -> ModuleType | None:
    """The backend that serves a call; None where torch's op must compute it or name the mistake."""
    if routing.is_compiling():  # asked first: a look at the size would become a guard of the graph
        return None
    if not isinstance(input, Tensor) or not isinstance(normalized_shape, tuple | list) or not normalized_shape:
        return None
    if not all(t is None or isinstance(t, Tensor) for t in (weight, bias)) or type(eps) not in (float, int):
        return None
    if input.dtype not in DTYPES or input.numel() < fewest:
        return None
    shape = input.shape
    if shape[-len(normalized_shape) :] != tuple(normalized_shape) or not all(type(n) is int for n in normalized_shape):
        return None
    if not all(t is None or t.shape == shape[-len(normalized_shape) :] for t in (weight, bias)):
        return None
    route, backend = routing.route("layer_norm", (input, weight, bias, residual))
    return backend if route is Route.KERNELS else None


def _forward(
    backend: ModuleType,
    eps: float,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    want_sum: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return backend.layer_norm_forward(
        unit_stride(x), unit_stride(residual), contiguous(weight), contiguous(bias), eps, return_sum=want_sum, save=save
    )


class LayerNormFunction(torch.autograd.Function):
    """A residual addition and layer normalization over the kernels.

    `LayerNormFunction.apply(backend, eps, x, residual, weight, bias)` returns the normalized sum y and the sum z:
    `backend` is a module with `layer_norm_forward` and `layer_norm_backward`, x and residual are (N,), (B, N) or
    (T, B, N), weight and bias (N,) or None. All four get gradients. If residual is None, so is z.

    The backward keeps z, the weight, the bias and two numbers per row. In its one pass it also adds the gradient that
    reaches z from other uses. With `create_graph=True` torch ops compute the gradients.

    Example:
        >>> import torch
        >>> from fastseq import backends
        >>> from fastseq.ops import LayerNormFunction
        >>> x = torch.randn(3, 8, requires_grad=True)
        >>> if (backend := backends.select("layer_norm")) is not None:
        ...     y, z = LayerNormFunction.apply(backend, 1e-5, x, x, None, None)
        ...     (y * z).sum().backward()
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: ModuleType,
        eps: float,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See the class."""
        y, z, mean, rstd = _forward(backend, eps, x, residual, weight, bias, True, True)
        ctx.set_materialize_grads(False)
        save(ctx, x if residual is None else z, weight, bias, mean, rstd)
        ctx.how = backend, eps
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple:
        """Gradients of x, residual, weight and bias, None for those that need none."""
        needs_x, needs_residual, *needs_affine = ctx.needs_input_grad[2:]
        if dy is None:
            return None, None, dz if needs_x else None, dz if needs_residual else None, None, None
        z, weight, bias, mean, rstd = saved(ctx)
        backend, eps = ctx.how
        needs = (needs_x or needs_residual, *needs_affine)
        if routing.kernels_differentiate((dy, dz)):
            dx, dweight, dbias = backend.layer_norm_backward(
                unit_stride(dy), unit_stride(dz), unit_stride(z), contiguous(weight), mean, rstd, needs=needs
            )
        else:
            dx, dweight, dbias = composite_backward(
                lambda z, weight, bias: (torchs_layer_norm(z, z.shape[-1:], weight, bias, eps),),
                (z, weight, bias),
                (dy,),
                needs,
            )
            dx = dx if dx is None or dz is None else dx + dz
        return None, None, dx if needs_x else None, dx if needs_residual else None, dweight, dbias


_apply = c_apply(LayerNormFunction)

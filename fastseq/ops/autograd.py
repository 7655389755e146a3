"""What the autograd Functions of every family share: when to record, the cheap way in, gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor | None) -> bool:
    """True where autograd must record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator is a call for each
            if t is not None and t.requires_grad:
                return True
    return False


def c_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its Python prologue, which only serves torch.func; `routing.route` keeps those calls
    away.

    It is a detail of torch that the method of the C base class can be reached this way, so a trial call checks it. The
    trial runs no backward, because the threads of the autograd engine must not start at import.
    """

    class Trial(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    try:
        with torch.enable_grad():
            result = super(torch.autograd.Function, Trial).apply(torch.ones((), device="cpu", requires_grad=True))
        if result.item() == 2 and result.grad_fn.name() == "TrialBackward":
            return super(torch.autograd.Function, function).apply
    except (AttributeError, RuntimeError, TypeError):
        pass
    return function.apply


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward` of all that are not None: tools that read `grad_fn.saved_tensors` expect no None."""
    for t in tensors:
        if t is None:
            ctx.given = [t is not None for t in tensors]
            ctx.save_for_backward(*[t for t in tensors if t is not None])
            return
    ctx.given = None
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> Sequence[Tensor | None]:
    """What was given to `save`."""
    if ctx.given is None:
        return ctx.saved_tensors
    found = iter(ctx.saved_tensors)
    return [next(found) if given else None for given in ctx.given]


def composite_backward(
    run: Callable[..., Sequence[Tensor | None]],
    inputs: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The forward once more in torch ops, and torch's own backward: can be differentiated again, takes any gradient."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: one input may be computed from another, whose gradient must not pass through both.
        inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
        outputs = [(r, g.to(r.dtype)) for r, g in zip(run(*inputs), grads, strict=True) if g is not None]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    if not outputs:
        return [None] * len(inputs)
    results, dresults = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(results, wanted, dresults, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]

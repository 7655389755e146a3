"""Checks of integers that are data: lengths, and the bounds of packed sequences.

Where Python can see the values, also behind the wrappers of torch.func, it checks them. Elsewhere the recorded graph
checks the values that it is run with: a graph of torch.compile by an op of ours, which raises the same error; a graph
that has to run without fastseq by torch's assertion, which raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch

from fastseq.ops import routing


class Limits(NamedTuple):
    """Lengths lie in [0, most]; bounds rise from 0 to `most`."""

    name: str  # the argument, for messages
    most: int
    what: str | None  # what lengths count at most `most` of, for messages; None: bounds

    def hold(self, values: np.ndarray | Tensor) -> bool | np.bool_ | Tensor:
        """Whether values (..., B) are as they should be: a bool of NumPy, of a Tensor a Tensor."""
        if self.what is not None:
            return ((values >= 0) & (values <= self.most)).all()
        ends = (values[..., 0] == 0) & (values[..., -1] == self.most)
        return ends.all() & (values[..., 1:] >= values[..., :-1]).all()

    def misfit(self, values: Sequence[int]) -> str | None:
        """What is wrong with values that Python has, in the words of the error."""
        # Loops and int(), as in a graph these may be symbols, which Dynamo compares, but neither sorts nor prints.
        if self.what is not None:
            for n in values:
                if not 0 <= n <= self.most:
                    return f"{self.name} must lie in [0, {int(self.most)}], the number of {self.what}, got {int(n)}"
            return None
        rises = values[0] == 0 and values[-1] == self.most
        for a, b in pairwise(values):
            rises = rises and a <= b
        got = None if rises else [int(n) for n in values]
        return got and f"{self.name} must rise from 0 to {int(self.most)}, the total length, got {got}"

    def check(self, values: np.ndarray) -> None:
        """Values (..., B): ValueError where they are not as they should be."""
        if not self.hold(values):
            rows = values.reshape(-1, values.shape[-1]).tolist()
            raise ValueError(next(filter(None, map(self.misfit, rows))))


@routing.inlined
def readable(values: object) -> bool:
    """True where Python may look at the values, and what is computed may depend on them."""
    if routing.is_compiling():
        return False
    if not isinstance(values, Tensor):
        return True
    # A trace would keep the values as constants.
    return _has_values(values) and not (routing.transformed() or routing.tracing() is not None or routing.proxying())


def seen(values: Tensor) -> np.ndarray | None:
    """The values, also behind transforms and tracers, with the axes of torch.func.vmap first. They may only be checked,
    as no graph records what is done with them. None in graphs of torch.compile and for tensors without values.
    """
    if routing.is_compiling():
        return None
    with _unobserved():
        values = _innermost(values)
        return values.detach().cpu().numpy() if _has_values(values) else None


def in_graph(limits: Limits, values: object) -> tuple[Tensor, bool]:
    """In a graph, a tensor of lengths that are not a tensor yet, and whether its values are checked: Dynamo knows those
    of a list.
    """
    if isinstance(values, np.ndarray):
        return torch.as_tensor(values, device="cpu"), False
    listed = isinstance(values, list | tuple | range)
    numbers = list(values) if listed else [values]
    if all(type(n) is int for n in numbers):
        misfit = limits.misfit(numbers) if numbers else None
        if misfit is not None:
            raise ValueError(misfit)
        return torch.tensor(numbers if listed else values, dtype=torch.int64, device="cpu"), True
    if all(isinstance(n, Tensor) for n in numbers):
        return torch.stack(numbers), False
    if all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in numbers):
        return torch.as_tensor(values, device="cpu"), False
    raise TypeError(f"{limits.name} must be integers, got {values!r}")


def assured(limits: Limits, values: Tensor) -> Tensor:
    """Checks int64 values (B,) that Python must not read. Use the returned tensor in their place: a graph drops a check
    whose result nobody uses.
    """
    if routing.is_compiling() and not torch.compiler.is_exporting():
        return checked_integers(values, *limits)
    if (array := seen(values)) is not None:
        limits._replace(most=int(limits.most)).check(array)  # under torch.jit.trace sizes are tensors
    rule = f"{limits.name} must lie in [0, the number of {limits.what}]"
    if limits.what is None:
        rule = f"{limits.name} must rise from 0 to the total length"
    if routing.tracing() is not None and not torch.onnx.is_in_onnx_export():  # it has no such op, and knows no errors
        return torch._functional_assert_async(limits.hold(values), rule, values)  # of the other nothing is kept
    if routing.is_compiling():
        torch._assert_async(limits.hold(values), rule)
    elif routing.dispatch_modes():
        torch._assert_async(limits.hold(_innermost(values)), rule)  # no rule for vmap
    return values


@torch.library.custom_op("fastseq::checked_integers", mutates_args=())
def checked_integers(values: Tensor, name: str, most: int, what: str | None) -> Tensor:
    """A copy of int64 values (..., B) that are as they should be.

    Raises:
        ValueError: they are not.
    """
    Limits(name, most, what).check(values.detach().cpu().numpy())
    return values.clone(memory_format=torch.contiguous_format)


@checked_integers.register_fake
def _(values, name, most, what):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@checked_integers.register_vmap
def _(info, axes, values, *limits):
    return checked_integers(values.movedim(axes[0], 0), *limits), 0


def _has_values(values: Tensor) -> bool:
    # A subclass with a dispatch of its own may have no memory; FakeTensor is one.
    return type(values).__torch_dispatch__ is Tensor.__torch_dispatch__ and not values.is_meta


def _innermost(values: Tensor) -> Tensor:
    """What the transforms of torch.func have wrapped, the axes that vmap takes away first."""
    axes = []
    while _functorch.is_functorch_wrapped_tensor(values):
        axes.append(_functorch.maybe_get_bdim(values))
        values = _functorch.get_unwrapped(values)
    for place, axis in enumerate(axis for axis in reversed(axes) if axis >= 0):
        values = values.movedim(axis + place, 0)
    return values


@contextmanager
def _unobserved() -> Iterator[None]:
    """No transform, mode or tracer sees what is done inside."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    state = routing.tracing()
    torch._C._set_tracing_state(None)
    try:
        with temporarily_clear_interpreter_stack(), _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)

"""Ours and torch's module with the same weights and input, and the gate before every race: the results must agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from cases import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastseq

MODES = ("forward", "forward with grad", "training")  # forward: under no_grad


@dataclass
class Job:
    """A module and its arguments: what is timed."""

    module: nn.Module
    arguments: tuple
    mode: str

    def __post_init__(self):
        leaf = self.arguments[0]
        x = leaf.data if isinstance(leaf, PackedSequence) else leaf
        x.requires_grad_(self.mode != "forward")
        self.leaves = {"x": x, **dict(self.module.named_parameters())}

    @cached_property
    def dy(self) -> Tensor:
        with torch.no_grad():
            y = flat(self.module(*self.arguments))[0]
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)

    @property
    def call(self) -> Callable[[], object]:
        """What is timed, without a frame of our own where the call is all there is. The caller sets the grad mode."""
        return self.step if self.mode == "training" else partial(self.module, *self.arguments)

    def step(self) -> object:
        for leaf in self.leaves.values():
            leaf.grad = None
        result = self.module(*self.arguments)
        flat(result)[0].backward(self.dy)
        return result

    def results(self) -> dict[str, Tensor]:
        """All outputs and, after a training step, all gradients."""
        with grad_mode(self.mode):
            results = {f"output {n}": value.detach() for n, value in enumerate(flat(self.call()))}
        if self.mode == "training":
            results |= {f"gradient of {name}": leaf.grad for name, leaf in self.leaves.items()}
        return results

    def with_module(self, module: nn.Module, dtype: torch.dtype) -> Job:
        """The same call to another module, its input converted."""
        return Job(module, tuple(converted(value, dtype) for value in self.arguments), self.mode)


def grad_mode(mode: str) -> AbstractContextManager:
    return torch.set_grad_enabled(mode != "forward")


def flat(result: object) -> list[Tensor]:
    """The tensors of a result, the data of a PackedSequence among them."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def converted(value: object, dtype: torch.dtype) -> object:
    """A copy of a tensor, a PackedSequence or a tuple of tensors, in `dtype`."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype, copy=True)
    if isinstance(value, PackedSequence):
        return value._replace(data=converted(value.data, dtype))
    return tuple(converted(part, dtype) for part in value)


def peers(name: str, sizes: tuple, arguments: tuple, mode: str, dtype: torch.dtype, **options) -> tuple[Job, Job]:
    """Ours and torch's, checked to agree. Raises AssertionError if they do not: no time is taken of a wrong result."""
    torch.manual_seed(0)
    theirs, ours = (getattr(source, name)(*sizes, **options).to(dtype) for source in (nn, fastseq))
    ours.load_state_dict(theirs.state_dict())
    return checked(ours, theirs, arguments, mode, dtype)


def checked(ours: nn.Module, theirs: nn.Module, arguments: tuple, mode: str, dtype: torch.dtype) -> tuple[Job, Job]:
    """The jobs of two modules with the same weights. Raises AssertionError if they do not agree."""
    job = Job(ours, tuple(converted(value, dtype) for value in arguments), mode)
    # torch's own bfloat16 is the less exact of the two, so both dtypes are compared with torch in float32.
    exact = job.with_module(copy.deepcopy(theirs).float(), torch.float32)
    gate(job.results(), exact.results(), str(dtype).removeprefix("torch."))
    return job, job.with_module(theirs, dtype)


def gate(result: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> None:
    """Each tensor agrees within the tolerance, as a fraction of its largest value."""
    scales = {name: float(value.abs().max()) or 1.0 for name, value in expected.items()}

    def scaled(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
        return {name: (tensor.float() / scales[name]).numpy() for name, tensor in tensors.items()}

    assert_close(scaled(result), scaled(expected), f"benchmark {dtype}")

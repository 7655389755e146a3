"""A call of something public, and what those of malformed_recurrent.py and malformed_calls.py are made with."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]
    ours: Callable[[dict[str, Any]], Any]
    torchs: Callable[[dict[str, Any]], Any]


@contextlib.contextmanager
def checked():
    """Torch's own ops without those that trust their arguments."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def some(rng: random.Random, *choices: Any) -> Any:
    return rng.choice(choices)


def odds(rng: random.Random, p: float) -> bool:
    return rng.random() < p


def with_parameters(module: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """The module with these for parameters, in the ways that users have."""
    for path, value in parameters.items():
        owner, _, name = path.rpartition(".")
        owner = module.get_submodule(owner)
        if isinstance(value, torch.Tensor):
            old = getattr(owner, name)
            value = nn.Parameter(value.detach(), requires_grad=old.requires_grad and value.is_floating_point())
        setattr(owner, name, value)
    return module

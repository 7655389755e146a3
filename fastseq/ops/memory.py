"""The memory of tensors: the layouts that kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_stride(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where its last axis is contiguous, as the kernels need it, else a copy."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of axes of size 1


def unit_strides(*tensors: Tensor | None) -> list[Tensor | None]:
    """`unit_stride` of each, in one call."""
    found = []
    for t in tensors:
        found.append(t if t is None or t.stride(-1) == 1 else unit_stride(t))
    return found


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where it is contiguous, else a copy."""
    return tensor if tensor is None else tensor.contiguous()


def all_contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`contiguous` of each, in one call."""
    found = []
    for t in tensors:
        found.append(t if t is None else t.contiguous())
    return found

"""The library of the CUDA kernels: when it is used, how it is opened, and what all calls of it share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import fastseq._native as _native
from fastseq.backends.contract import CellFacts

__all__ = [
    "CELLS",
    "LIBRARY",
    "compute_dtype",
    "library",
    "open_library",
    "stream_of",
    "to_device",
    "use_emulation",
    "why_off",
]

CELLS = {facts.name: facts for facts in map(CellFacts._make, _native.cells())}
LIBRARY = Path(_native.__file__).with_name("libfastseq_cuda.so")


def why_off() -> str:
    """Why calls do not take these kernels; empty where they do."""
    choice = os.environ.get("FASTSEQ_CUDA", "")
    if choice not in ("", "off", "on"):
        raise ValueError(f"FASTSEQ_CUDA must be on or off, got {choice!r}")
    if choice != "on":
        return "off by default, as they have not run on a GPU yet: FASTSEQ_CUDA=on tries them"
    if not LIBRARY.exists():
        return "not built: `make cuda`, or FASTSEQ_BUILD_CUDA=on at the build, makes them with nvcc"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return ""


_library: _native.CudaLibrary | None = None


def open_library() -> None:
    """Loads the kernels, and says once that they are new."""
    global _library
    _library = _native.CudaLibrary(str(LIBRARY))
    warnings.warn(
        "fastseq's CUDA kernels are switched on by FASTSEQ_CUDA=on; they have not been tested on a GPU yet",
        RuntimeWarning,
        stacklevel=2,
    )


def library() -> _native.CudaLibrary:
    """The one that was opened, or that of the emulation."""
    return _library


@contextmanager
def use_emulation(path: Path) -> Iterator[None]:
    """Runs the block with a library that takes tensors of the CPU, as tests build it."""
    global _library
    before, _library = _library, _native.CudaLibrary(str(path), emulated=True)
    try:
        yield
    finally:
        _library = before


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A copy on the GPU of a tensor of the CPU, made without waiting."""
    if tensor is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait


def stream_of(device: torch.device) -> int:
    """torch's current stream, as CUDA's handle of it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

"""The only place that chooses what runs: the first backend that serves a call, or torch's own operators."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["BACKENDS", "select", "select_for", "use_backend"]

BACKENDS = ("native", "torch")


def _load() -> ModuleType | None:
    try:
        from fastseq.backends import native
    except ModuleNotFoundError as error:
        # Only a source tree without a build is forgiven; a build that does not load is an error to be seen.
        if error.name != "fastseq._native":
            raise
        warnings.warn(
            "fastseq._native is not built, so torch's own operators run instead of the kernels; "
            "`make build` in the source tree builds it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return native


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"the backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_native = _load()
_default = _checked(os.environ.get("FASTSEQ_BACKEND") or "native")
_choice: ContextVar[str] = ContextVar("backend", default=_default)


def _load_cuda() -> ModuleType | None:
    if _native is None:
        return None
    from fastseq.backends import cuda

    if cuda.why_off():
        return None
    cuda.open_library()
    return cuda


@cache
def _backend(device: str) -> ModuleType | None:
    """The kernels for tensors of a device."""
    return _native if device == "cpu" else _load_cuda() if device == "cuda" else None


@cache
def _select(choice: str, op: str, device: str, dtype: torch.dtype | None) -> ModuleType | None:
    backend = _backend(device) if choice == "native" else None
    if backend is None:
        return None
    dtypes = backend.SERVES.get(op, ())
    return backend if dtypes and (dtype is None or dtype in dtypes) else None


_NONE: dict[torch.dtype, ModuleType] = {}
# The answers for tensors of the CPU: by choice, op and dtype.
_on_cpu = {
    "native": {} if _native is None else {op: dict.fromkeys(dtypes, _native) for op, dtypes in _native.SERVES.items()},
    "torch": {},
}


def select(op: str, device: str = "cpu", dtype: torch.dtype | None = None) -> ModuleType | None:
    """The backend to call, or None where torch's own operators are to run.

    Args:
        op: "recurrent", "attention", "layer_norm" or "linear".
        device: the type of the device that the tensors are on.
        dtype: of the tensors; None: any that the backend serves.
    """
    return _select(_choice.get(), op, device, dtype)


def select_for(op: str, tensor: Tensor) -> ModuleType | None:
    """`select` for the device and the dtype of a tensor. A step of a cell takes 40 times as long as this."""
    if tensor.is_cpu:
        return _on_cpu[_choice.get()].get(op, _NONE).get(tensor.dtype)
    return _select(_choice.get(), op, tensor.device.type, tensor.dtype)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses "native" or "torch" inside the block, for this thread or task. FASTSEQ_BACKEND sets the default."""
    token = _choice.set(_checked(name))
    try:
        yield
    finally:
        _choice.reset(token)

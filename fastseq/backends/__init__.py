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

__all__ = ["BACKENDS", "select", "use_backend"]

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
def _backends(choice: str, device: str) -> tuple[ModuleType, ...]:
    """Those that may serve tensors of a device, best first."""
    if choice == "native" and device in ("cpu", "cuda"):
        backend = _native if device == "cpu" else _load_cuda()
        return () if backend is None else (backend,)
    return ()


def select(op: str, device: str = "cpu", dtype: torch.dtype | None = None) -> ModuleType | None:
    """The backend to call, or None where torch's own operators are to run.

    Args:
        op: "recurrent", "attention", "layer_norm" or "linear".
        device: the type of the device that the tensors are on.
        dtype: of the tensors; None: any that the backend serves.
    """
    for backend in _backends(_choice.get(), device):
        dtypes = backend.SERVES.get(op)
        if dtypes is not None and (dtype is None or dtype in dtypes):
            return backend
    return None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses "native" or "torch" inside the block, for this thread or task. FASTSEQ_BACKEND sets the default."""
    token = _choice.set(_checked(name))
    try:
        yield
    finally:
        _choice.reset(token)

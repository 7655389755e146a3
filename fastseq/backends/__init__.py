"""The only place that chooses what runs: the compiled kernels, or torch's own operators where there are none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

__all__ = ["BACKENDS", "select", "select_cuda", "use_backend"]

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


def select() -> ModuleType | None:
    """The backend to call: `fastseq.backends.native`, or None where torch's own operators are to run."""
    return _native if _choice.get() == "native" else None


@cache
def _load_cuda() -> ModuleType | None:
    if _native is None:
        return None
    from fastseq.backends import cuda

    if cuda.why_off():
        return None
    cuda.open_library()
    return cuda


def select_cuda() -> ModuleType | None:
    """The backend for tensors of a GPU: `fastseq.backends.cuda`, or None where torch's own operators are to run."""
    return _load_cuda() if _choice.get() == "native" else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses "native" or "torch" inside the block, for this thread or task. FASTSEQ_BACKEND sets the default."""
    token = _choice.set(_checked(name))
    try:
        yield
    finally:
        _choice.reset(token)

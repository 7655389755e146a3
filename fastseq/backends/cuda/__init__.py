"""The CUDA kernels, with the recurrent and the attention functions of `fastseq.backends.native` on tensors of a GPU.

The products inside the kernels are in full float32, or float64.

Everything is queued on torch's current stream and nothing waits for it. Calls can be captured in a CUDA graph, but for
those with `order`, lengths or starts: these are on the CPU and are copied to the GPU.

They have not run on a GPU yet. `FASTSEQ_CUDA=on` in the environment switches them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastseq.backends.cuda.attention import attention_backward, attention_forward
from fastseq.backends.cuda.library import LIBRARY, open_library, use_emulation, why_off
from fastseq.backends.cuda.recurrent import recurrent_backward, recurrent_forward, recurrent_step

__all__ = [
    "LIBRARY",
    "active_isa",
    "attention_backward",
    "attention_forward",
    "isas",
    "open_library",
    "recurrent_backward",
    "recurrent_forward",
    "recurrent_step",
    "use_emulation",
    "use_isa",
    "why_off",
]


def isas() -> tuple[str, ...]:
    """As `native.isas`; there is one set of kernels."""
    return ("cuda",)


def active_isa() -> str:
    """As `native.active_isa`."""
    return "cuda"


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """As `native.use_isa`, with nothing to choose."""
    if name != "cuda":
        raise ValueError(f"instruction set {name!r} is none of those of a GPU: cuda")
    yield

"""The CUDA kernels, with the recurrent and the attention functions of `fastseq.backends.native` on tensors of a GPU.

The products inside the kernels are in full float32, or float64.

Everything is queued on torch's current stream and nothing waits for it. Calls can be captured in a CUDA graph, but for
those with `order`, lengths or starts: these are on the CPU and are copied to the GPU.

They have not run on a GPU yet. `FASTSEQ_CUDA=on` in the environment switches them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastseq.backends.cuda.attention import attention_backward, attention_forward
from fastseq.backends.cuda.library import CELLS, LIBRARY, open_library, use_emulation, why_off
from fastseq.backends.cuda.recurrent import recurrent_backward, recurrent_forward, recurrent_step

__all__ = [
    "CELLS",
    "DEVICE",
    "LIBRARY",
    "PACKS",
    "SERVES",
    "active_isa",
    "attention_backward",
    "attention_forward",
    "filled_with_nan",
    "isas",
    "open_library",
    "recurrent_backward",
    "recurrent_forward",
    "recurrent_step",
    "use_emulation",
    "use_isa",
    "why_off",
]

DEVICE = "cuda"
_ALL = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
SERVES = {"recurrent": _ALL, "attention": _ALL}
PACKS = frozenset()  # tensors hold the weights as the kernels read them


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


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """As `native.filled_with_nan`: all memory comes from torch, which fills it in this mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

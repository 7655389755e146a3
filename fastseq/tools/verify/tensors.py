"""What the families of kernels share: memory full of NaN, and tensors as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def poisoned_memory(backend) -> Iterator[None]:
    """What the backend allocates itself, outputs and saved gates, holds NaN: in every dtype that is all bits set."""
    if not hasattr(backend, "attach"):  # it allocates by torch alone, which fills what it allocates in this mode
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        return

    def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        tensor.view(torch.uint8).fill_(255)
        return tensor

    backend.attach(empty=empty)
    try:
        yield
    finally:
        backend.attach()


def array(a: Tensor) -> np.ndarray:
    """The values of a tensor, exactly; of bfloat16 in float32."""
    return (a.float() if a.dtype == torch.bfloat16 else a).detach().cpu().numpy()

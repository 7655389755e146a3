"""`with sdpa_kernels():` sends a model's calls of torch's scaled_dot_product_attention to the kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops import scaled_dot_product_attention
from fastseq.ops.attention import torch_attention

__all__ = ["sdpa_kernels"]

# Why the name in torch.nn.functional and not a TorchFunctionMode: a mode is asked on every torch call, which costs
# 1.5 us (measured: an addition of 8 numbers takes 2.9 us under an empty mode, 1.4 us without).
_inside: ContextVar[bool] = ContextVar("sdpa_kernels", default=False)
_lock = threading.Lock()
_blocks = 0  # entered and not yet left, in all threads
_outside: Any = torch_attention  # what the name stood for: torch's op, or what others have put there


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    # The compiler first: it cannot see through a ContextVar, and torch's own op is what it knows.
    if torch.compiler.is_compiling() or not _inside.get():
        return _outside(*args, **kwargs)
    return scaled_dot_product_attention(*args, **kwargs)


@contextmanager
def sdpa_kernels() -> Iterator[None]:
    """Inside the block, `torch.nn.functional.scaled_dot_product_attention` is `fastseq.scaled_dot_product_attention`.

    For models that call that function themselves, which `fuse` cannot see. Calls that the kernels do not serve take
    torch's op, as always; so do the graphs of torch.compile. Holds for this thread or task, not for threads started
    inside; blocks may be nested. What has the function under another name, by `from torch.nn.functional import
    scaled_dot_product_attention`, is not reached, and torch.jit.script does not work inside. Where checkpointing runs a
    forward again, the backward belongs inside too.

    Example:
        >>> import torch, fastseq
        >>> import torch.nn.functional as F
        >>> q = torch.randn(2, 8, 5, 16)
        >>> with fastseq.sdpa_kernels():
        ...     out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> out.shape
        torch.Size([2, 8, 5, 16])
    """
    global _blocks, _outside
    with _lock:
        if _blocks == 0:
            _outside = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = _attention
        _blocks += 1
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                F.scaled_dot_product_attention = _outside

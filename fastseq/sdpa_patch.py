"""`with sdpa_kernels():` sends a model's calls of torch's scaled_dot_product_attention to the kernels."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

from fastseq.ops import scaled_dot_product_attention
from fastseq.ops.attention.sdpa import overridden, torch_attention

__all__ = ["sdpa_kernels"]

# Why a name in torch.nn.functional and not a TorchFunctionMode: torch asks a mode on every call, which costs 1.5 us
# (measured: an addition of 8 numbers takes 2.9 us under an empty mode, 1.4 us without). While a block is open the name
# is also a property of the module, at 50 ns a call. Through it, overrides, which compare the called function with the
# name, and other threads find torch's own function there.
NAME = "scaled_dot_product_attention"
# The functions that compare with the name: overrides, which also run where torch's op was called by another name and
# so did not pass through ours, and the makers of the cached tables of torch.overrides.
OVERRIDES = frozenset(("__torch_function__", "get_testing_overrides", "_get_overridable_functions"))
_depth: ContextVar[int] = ContextVar("sdpa_kernels", default=0)  # of the blocks that this thread or task is in
_lock = threading.Lock()
_blocks = 0  # entered and not yet left, in all threads


def _over(below: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What the name gives inside a block: fastseq's function there, `below` outside of blocks."""

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        # The compiler is asked first: it cannot trace a ContextVar, and it knows torch's own op.
        if torch.compiler.is_compiling() or _depth.get() <= 0:
            return below(*args, **kwargs)
        given = (*args, *kwargs.values())
        if has_torch_function(given) and overridden(given):
            # Overrides see what they see without the block: torch's function called, and its name bound to it.
            token = _depth.set(0)
            try:
                return below(*args, **kwargs)
            finally:
                _depth.reset(token)
        return scaled_dot_product_attention(*args, **kwargs)

    attention.__name__ = NAME
    _made[attention] = below
    return attention


_made: WeakKeyDictionary[Callable[..., Tensor], Callable[..., Tensor]] = WeakKeyDictionary()  # what is below each
_over_torchs = _over(torch_attention)
_over_torchs.__qualname__ = "_over_torchs"  # by which pickle finds it
_below, _ours = torch_attention, _over_torchs  # in the open blocks


def _theirs(function: Any) -> Any:
    """The function itself, or what is below one of ours."""
    return _made.get(function, function) if type(function) is FunctionType else function


class _Functional(ModuleType):
    """torch.nn.functional while a block is open, and after it where others have patched the name."""

    @property
    def scaled_dot_product_attention(self) -> Callable[..., Tensor]:
        there = self.__dict__[NAME]
        if there is not _ours:
            return there
        if _depth.get() <= 0 or sys._getframe(1).f_code.co_name in OVERRIDES:
            return _below
        return _ours

    @scaled_dot_product_attention.setter
    def scaled_dot_product_attention(self, function: Any) -> None:
        self.__dict__[NAME] = function if function is _ours and _blocks else _theirs(function)


@contextmanager
def sdpa_kernels() -> Iterator[None]:
    """Inside the block, `torch.nn.functional.scaled_dot_product_attention` is `fastseq.scaled_dot_product_attention`.

    The block is for models that call that function themselves, which `fuse` cannot see. Calls that the kernels do not
    serve run torch's op, as always. So do the graphs of torch.compile and calls that a mode or a tensor subclass
    overrides; these see torch's own function.

    The block holds for this thread or task, not for threads started inside, and blocks may be nested. A patch of the
    name that someone makes inside the block takes precedence and stays after it. The block does not reach code that
    holds the function under another name, by `from torch.nn.functional import scaled_dot_product_attention`.
    torch.jit.script does not work inside. Where checkpointing runs a forward again, the backward must be inside, too.

    Example:
        >>> import torch, fastseq
        >>> import torch.nn.functional as F
        >>> q = torch.randn(2, 8, 5, 16)
        >>> with fastseq.sdpa_kernels():
        ...     out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> out.shape
        torch.Size([2, 8, 5, 16])
    """
    global _blocks, _below, _ours
    with _lock:
        if _blocks == 0:
            _below = _theirs(F.__dict__[NAME])
            _ours = F.__dict__[NAME] = _over_torchs if _below is torch_attention else _over(_below)
            F.__class__ = _Functional
        _blocks += 1
    _depth.set(_depth.get() + 1)
    try:
        yield
    finally:
        _depth.set(_depth.get() - 1)
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                if F.__dict__[NAME] is _ours:
                    F.__dict__[NAME] = _below
                if F.__dict__[NAME] is torch_attention:  # else someone who undoes a patch may put back one of ours
                    F.__class__ = ModuleType

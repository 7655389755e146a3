"""A backend is a module of kernels for tensors on one kind of device. `native` and `cuda` are backends."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Attention", "Backend", "CellFacts", "Refused"]


class Refused(Exception):
    """A backend does not serve the call. No other exception means that.

    A backend raises it, before it computes anything, for arguments that it has no kernel for or that do not fit
    together. The message names the argument, what was expected and what came. The caller may then run torch's own op,
    which computes the call or names the mistake. Every other exception is a failure, such as a lack of memory or an
    error of a device, and must reach the user.
    """


class Attention(NamedTuple):
    """The options of a call of attention: all but query, key, value and masks.

    Query i may see key j where -left <= j - (i + shift) <= right. Both count within their sequence; shift is 0, or the
    number of keys less that of queries with `lower_right`.
    """

    scale: float
    softcap: float = 0.0  # 0: none
    left: int | None = None  # None: unlimited
    right: int | None = None
    lower_right: bool = False
    dropout_p: float = 0.0  # below 1 for kernels
    seed: int | Tensor = (
        0  # of the dropout: a draw follows from it and its place (b, n, i, j) alone; an int for kernels
    )
    lengths_q: Tensor | None = None  # (B,) int64; on the CPU unless their values cannot be read
    lengths_k: Tensor | None = None
    starts_q: Tensor | None = None  # (B,) int64: where each sequence of a packed batch begins, in order
    starts_k: Tensor | None = None
    max_q: int | None = None  # of a packed batch: no length is larger
    max_k: int | None = None
    alibi_slopes: Tensor | None = None  # (B, N) float32

    @property
    def packed(self) -> bool:
        """True where the sequences lie one after the other along the length axis."""
        return self.starts_q is not None


class CellFacts(NamedTuple):
    """The facts about a cell that its compiled kernels report: CellKernels in csrc/kernels.h."""

    name: str
    gates: int  # blocks of H rows in the weights
    states: int  # beside h
    slots: int  # values kept per unit for backward; of CUDA's `saved` the next four say where what lies
    input_slot: int
    recurrent_slot: int
    first_gate: int  # the gate in `input_slot`; the others follow cyclically
    carry: bool  # something goes from step to step outside the matrix product


class Backend(Protocol):
    """The names that a backend has.

    For each op in `SERVES` it has that op's functions, as `fastseq.backends.native` describes them. They take tensors
    on `DEVICE` in the dtypes that `SERVES` gives, and raise `Refused` for a call that they do not serve.

    | op | functions |
    |---|---|
    | recurrent | recurrent_forward, recurrent_backward, recurrent_step |
    | attention | attention_forward, attention_backward |
    | layer_norm | layer_norm_forward, layer_norm_backward |
    | linear | linear_forward |

    For the ops in `PACKS` it also has a function that packs their weights, `pack` for recurrent and `pack_linear` for
    linear, and `checksum(*tensors)`, by which packed weights are compared with their tensors.
    """

    DEVICE: str  # "cpu", "cuda"
    SERVES: Mapping[str, frozenset[torch.dtype]]
    PACKS: frozenset[str]
    CELLS: Mapping[str, CellFacts]  # by name

    def isas(self) -> tuple[str, ...]:
        """The sets of kernels that this machine can run, the best one last."""

    def active_isa(self) -> str:
        """The set that calls use. Only that set can read what its forward saved, so the backward is told its name."""

    def use_isa(self, name: str) -> AbstractContextManager[Any]:
        """Runs a block with another set."""

    def filled_with_nan(self) -> AbstractContextManager[Any]:
        """Runs a block in which new memory, of results and of saved values, holds NaN, so that an element that a kernel
        does not write shows. For tests and `fastseq verify`.
        """

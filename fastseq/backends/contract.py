"""What a backend is to whoever calls it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CellFacts", "Refused"]


class Refused(Exception):
    """The one exception that means: not served, let torch speak.

    A backend raises it for arguments that it has no kernel for or that do not fit together, before anything is
    computed; the message names the argument, what was expected and what came. Whoever calls may let torch's own op
    compute the call or name the mistake. Every other exception is a failure and comes through: no memory, an error of a
    device, a fault.
    """


class CellFacts(NamedTuple):
    """What the compiled kernels know of a cell: CellKernels in csrc/kernels.h."""

    name: str
    gates: int  # blocks of H rows in the weights
    states: int  # beside h
    slots: int  # values kept per unit for backward; of CUDA's `saved` the next four say where what lies
    input_slot: int
    recurrent_slot: int
    first_gate: int  # the gate in `input_slot`; the others follow cyclically
    carry: bool  # something goes from step to step outside the matrix product

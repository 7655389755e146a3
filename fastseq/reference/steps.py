"""Which rows run at which step, in which order, and where their state is cut.

The three sequence loops (rnn, lstm, gru) walk over this list forward, and over its reverse in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Step(NamedTuple):
    """One time step of a sequence loop."""

    t: int
    active: np.ndarray  # (N, 1) bool: t lies within the row's length
    cut: np.ndarray  # (N, 1) bool: the state is zeroed before this step runs


def schedule(
    N: int, T: int, lengths: np.ndarray | None = None, reset: np.ndarray | None = None, reverse: bool = False
) -> list[Step]:
    """The steps of a sequence loop, in the order in which they run.

    lengths (N,) integers in [0, T]: row n has the steps t < lengths[n]; None: all of them.
    reset (N, T) bool: True at (n, t) marks the first step of a segment, no state passes between t - 1 and t, in either
    direction. So in a forward loop reset at t = 0 drops the initial state; in a reverse loop, whose initial state
    enters at the last valid step, it has no effect. Marks beyond a row's length have none either.

    Raises TypeError for lengths that are not integers or a reset that is not bool, ValueError for wrong shapes or
    lengths out of range.

    >>> [(s.t, bool(s.cut)) for s in schedule(1, 3, reset=np.array([[True, False, True]]))]
    [(0, True), (1, False), (2, True)]
    >>> [(s.t, bool(s.cut)) for s in schedule(1, 3, reset=np.array([[True, False, True]]), reverse=True)]
    [(2, False), (1, True), (0, False)]
    """
    lengths = np.full(N, T) if lengths is None else np.asarray(lengths)
    reset = np.zeros((N, T), dtype=bool) if reset is None else np.asarray(reset)
    if not np.issubdtype(lengths.dtype, np.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if reset.dtype != bool:
        raise TypeError(f"reset must be bool, got {reset.dtype}")
    if lengths.shape != (N,):
        raise ValueError(f"lengths must have shape {(N,)}, got {lengths.shape}")
    if reset.shape != (N, T):
        raise ValueError(f"reset must have shape {(N, T)}, got {reset.shape}")
    if np.any((lengths < 0) | (lengths > T)):
        raise ValueError(f"lengths must lie in [0, {T}], got {lengths.tolist()}")

    active = np.arange(T) < lengths[:, None]
    cut = reset & active
    if reverse:  # the mark at t + 1 lies between t + 1 and t; before the last step there is nothing to cut
        cut = np.concatenate([cut[:, 1:], np.zeros((N, min(T, 1)), dtype=bool)], axis=1)
    order = range(T - 1, -1, -1) if reverse else range(T)
    return [Step(t, active[:, t, None], cut[:, t, None]) for t in order]

"""Variable length: from the caller's lengths, or a PackedSequence's batch sizes, to the rows that are active at each
step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastseq.ops import routing
from fastseq.ops.limits import Limits, assured, in_graph, readable


class Rows(NamedTuple):
    """Which rows of a sequence are active at which steps.

    The same fact in two forms: kernels read `batch_sizes`, with rows numbered by falling length; torch ops mask with
    `lengths`.
    """

    lengths: Tensor | None  # (B,) int64, in the caller's order, on the input's device; None for packed sequences
    batch_sizes: Tensor | None  # (longest,) int64 on the CPU; None if `lengths` cannot be read
    order: Tensor | None  # (B,) int64: the batch index of row b; None: b
    longest: int  # steps to run
    packed: bool


def packed_rows(batch_sizes: Tensor) -> Rows:
    """The rows of a PackedSequence: already sorted by its maker."""
    return Rows(None, batch_sizes, None, batch_sizes.shape[0], True)


@routing.inlined
def padded_rows(
    lengths: Tensor | Sequence[int] | int, steps: int, batch: int, device: torch.device, op_checks: bool = False
) -> Rows | None:
    """Checks `lengths` and sorts them. None where every sequence has full length.

    Args:
        lengths: `batch` integers in [0, steps], any order; a list, a NumPy array or a tensor on any device.
        op_checks: what Python cannot read goes to an op that reads it by this function.

    Raises:
        TypeError: lengths that are not integers (floats, NaN, bools, None).
        ValueError: not `batch` of them, or one out of [0, steps].
    """
    name, what = "lengths", "steps in the input"
    if not readable(lengths):
        lengths = _unread_lengths(Limits(name, steps, what), lengths, batch, device, op_checks)
        return Rows(lengths, None, None, steps, False)
    steps, batch = int(steps), int(batch)  # under torch.jit.trace sizes are tensors
    values = _read_lengths(Limits(name, steps, what), lengths, batch)
    if (values == steps).all():
        return None
    falling = bool((values[:-1] >= values[1:]).all())
    order = None if falling else torch.from_numpy(np.argsort(-values, kind="stable"))
    ended = np.cumsum(np.bincount(values))  # rows with a length of at most t
    longest = int(values.max())
    return Rows(
        torch.from_numpy(values).to(device),
        torch.from_numpy(batch - ended[:longest]),
        order,
        longest,
        False,
    )


@routing.inlined
def row_lengths(
    name: str, lengths: Tensor | Sequence[int] | int, most: int, what: str, batch: int, device: torch.device
) -> Tensor | None:
    """Checks the lengths of padded rows, without sorting them. None where every row has full length.

    Args:
        name: the argument, for messages.
        lengths: `batch` integers in [0, most], any order; a list, a NumPy array or a tensor on any device.
        what: what `most` counts, for messages.
        device: of the result where the values cannot be read.

    Returns:
        (B,) int64 on the CPU, a copy; on `device` and unread under a compiler, a tracer, a transform or a fake tensor
        mode.

    Raises:
        TypeError: lengths that are not integers.
        ValueError: not `batch` of them, or one out of [0, most].
    """
    if not readable(lengths):
        return _unread_lengths(Limits(name, most, what), lengths, batch, device)
    most, batch = int(most), int(batch)
    values = _read_lengths(Limits(name, most, what), lengths, batch)
    return None if (values == most).all() else torch.from_numpy(values)


def integers(name: str, lengths: Tensor | Sequence[int] | int) -> np.ndarray:
    """The values of `lengths`, which must be integers: TypeError for anything else, bools too."""
    if isinstance(lengths, Tensor):
        values = lengths.detach().cpu().resolve_conj().resolve_neg()
        values = values.float().numpy() if values.dtype is torch.bfloat16 else values.numpy()
    else:
        try:
            values = np.asarray(lengths)
        except ValueError as error:
            raise TypeError(f"{name} must be integers, one per sequence, got {lengths!r}") from error
        if values.size == 0:
            values = values.astype(np.int64)
        # Of larger integers NumPy makes floats or objects.
        if values.dtype.kind not in "iu" and all(type(n) is int for n in np.asarray(lengths, dtype=object).flat):
            raise ValueError(f"{name} must be integers of 64 bits, got {lengths!r}")
    _check_integers(name, values.dtype.kind in "iu", lengths)
    return values


def _read_lengths(limits: Limits, lengths: Tensor | Sequence[int] | int, batch: int) -> np.ndarray:
    values = integers(limits.name, lengths)
    _check_count(limits.name, values.shape, batch)
    values = values.reshape(batch)
    limits.check(values)
    return np.array(values, dtype=np.int64)  # a copy: whoever keeps it, the caller may go on counting


def _unread_lengths(
    limits: Limits, lengths: Tensor | Sequence[int] | int, batch: int, device: torch.device, checked: bool = False
) -> Tensor:
    if not isinstance(lengths, Tensor):
        lengths, known = in_graph(limits, lengths)
        checked = checked or known
    check_unread_integers(limits.name, lengths)
    _check_count(limits.name, tuple(lengths.shape), batch)
    lengths = lengths.to(device=device, dtype=torch.int64).reshape(batch)
    return lengths if checked else assured(limits, lengths)


def check_unread_integers(name: str, values: Tensor) -> None:
    """The dtype of `integers`."""
    inexact = values.is_floating_point() or values.is_complex()
    _check_integers(name, not inexact and values.dtype is not torch.bool, values)


def _check_integers(name: str, integers: bool, lengths: object) -> None:
    if not integers:
        kind = lengths.dtype if isinstance(lengths, Tensor | np.ndarray) else repr(lengths)
        raise TypeError(f"{name} must be integers, got {kind}")


def _check_count(name: str, shape: tuple[int, ...], batch: int) -> None:
    if shape != (batch,) and not (shape == () and batch == 1):
        raise ValueError(f"{name} must have one entry per sequence, shape ({batch},), got shape {tuple(shape)}")

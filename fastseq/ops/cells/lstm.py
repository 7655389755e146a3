"""The LSTM with forget gate: c' = f c + i g, h' = o tanh(c'), gates in torch's order i, f, g, o."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from fastseq.ops.recurrent.function import run_cell, run_sequence
from fastseq.ops.recurrent.spec import Cell, Output, OutputAndStates


def _lstm(x: Any, r: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.sigmoid(x.f + r.f) * c + torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g)
    return torch.sigmoid(x.o + r.o) * torch.tanh(c), c


LSTM = Cell(
    "lstm",
    "LSTM",
    gates=("i", "f", "g", "o"),
    states=("c",),
    formula=_lstm,
    sequence_op=_VF.lstm,
    step_op=_VF.lstm_cell,
)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    return_states: bool = False,
) -> Output | OutputAndStates:
    """An LSTM over a sequence: one layer, one direction.

    Args:
        input: (T, B, I), T >= 1.
        hx: h_0 and c_0, each (B, H), or None for zeros. Beside a bfloat16 input they may be float32; then h_n and
            c_n are, too.
        w_ih, w_hh: (4*H, I), (4*H, H), rows in the order i, f, g, o.
        b_ih, b_hh: (4*H), both or neither.
        lengths: B integers in [0, T], the steps that each sequence has, in any order.
        reset: (T, B) bool: True at the first step of each segment.
        reverse: True runs from the last step to the first.
        return_states: True adds `states`, every h and every c, each (T, B, H).

    Returns:
        The named tuple (output, hx): output (T, B, H), hx = (h_n, c_n), each (B, H).

    The kernels serve float32, float64 and bfloat16 on the CPU; other calls run torch ops. `help(fastseq.ops)` explains
    `lengths`, `reset` and `reverse`.

    Raises:
        TypeError: arguments that are not tensors; lengths that are not integers; a reset that is not bool.
        ValueError: dtypes that differ, lengths out of range, an input that is not 3-D.
        RuntimeError: sizes or devices that do not fit, T = 0.

    Sources: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9, 1997; Gers, Schmidhuber and
        Cummins, "Learning to forget", Neural Computation 12, 2000;
        https://pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    Example:
        >>> import torch, fastseq
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(16, 3), torch.randn(16, 4)
        >>> output, (h_n, c_n), (h, c) = fastseq.lstm(x, None, w_ih, w_hh, return_states=True)
        >>> output.shape, c_n.shape, c.shape
        (torch.Size([7, 2, 4]), torch.Size([2, 4]), torch.Size([7, 2, 4]))
    """
    return run_sequence(
        LSTM,
        input,
        hx,
        (w_ih, w_hh, b_ih, b_hh),
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        return_states=return_states,
    )


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, with the argument order of torch's `lstm_cell`.

    Args:
        input: (B, I).
        hx: h and c, each (B, H).
        w_ih, w_hh: (4*H, I), (4*H, H), rows in the order i, f, g, o.
        b_ih, b_hh: (4*H), both or neither.

    Returns:
        h' and c', each (B, H).

    Raises:
        TypeError: arguments that are not tensors.
        RuntimeError: not two states; sizes, dtypes or devices that do not fit, in torch's words.

    Sources: Hochreiter and Schmidhuber, 1997; Gers et al., 2000;
        https://pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html

    Example:
        >>> import torch, fastseq
        >>> state = torch.zeros(2, 4), torch.zeros(2, 4)
        >>> h, c = fastseq.lstm_cell(torch.randn(2, 3), state, torch.randn(16, 3), torch.randn(16, 4))
        >>> h.shape, c.shape
        (torch.Size([2, 4]), torch.Size([2, 4]))
    """
    return run_cell(LSTM, input, hx, (w_ih, w_hh, b_ih, b_hh))

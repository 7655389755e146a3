"""The vanilla (Elman) RNN: h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from fastseq.ops.recurrent.function import run_cell, run_sequence
from fastseq.ops.recurrent.spec import Cell, Output, OutputAndStates


def _tanh(x: Any, r: Any, h: Tensor) -> tuple[Tensor]:
    return (torch.tanh(x.a + r.a),)


def _relu(x: Any, r: Any, h: Tensor) -> tuple[Tensor]:
    return (torch.relu(x.a + r.a),)


TANH = Cell("rnn_tanh", "RNN", gates=("a",), formula=_tanh, sequence_op=_VF.rnn_tanh, step_op=_VF.rnn_tanh_cell)
RELU = Cell(
    "rnn_relu", "RNN", gates=("a",), formula=_relu, sequence_op=_VF.rnn_relu, step_op=_VF.rnn_relu_cell, kinks=True
)


def rnn_of(nonlinearity: str) -> Cell:
    """The cell of torch's `nonlinearity` argument."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return TANH if nonlinearity == "tanh" else RELU


def rnn(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    return_states: bool = False,
) -> Output | OutputAndStates:
    """A vanilla RNN over a sequence: one layer, one direction.

    Args:
        input: (T, B, I), T >= 1.
        hx: h_0 (B, H), or None for zeros. Beside a bfloat16 input it may be float32; then h_n is, too.
        w_ih, w_hh: (H, I), (H, H).
        b_ih, b_hh: (H), both or neither.
        nonlinearity: "tanh" or "relu".
        lengths: B integers in [0, T], the steps that each sequence has, in any order.
        reset: (T, B) bool: True at the first step of each segment.
        reverse: True runs from the last step to the first.
        return_states: True adds `states`, every h, (T, B, H).

    Returns:
        The named tuple (output, hx): output (T, B, H), hx = h_n (B, H).

    The kernels serve float32, float64 and bfloat16 on the CPU; other calls run torch ops. `help(fastseq.ops)` explains
    `lengths`, `reset` and `reverse`.

    Raises:
        TypeError: arguments that are not tensors; lengths that are not integers; a reset that is not bool.
        ValueError: dtypes that differ, lengths out of range, an input that is not 3-D, an unknown nonlinearity.
        RuntimeError: sizes or devices that do not fit, T = 0.

    Source: Elman, "Finding structure in time", Cognitive Science 14, 1990;
        https://pytorch.org/docs/stable/generated/torch.nn.RNN.html

    Example:
        >>> import torch, fastseq
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(4, 3), torch.randn(4, 4)
        >>> output, h_n = fastseq.rnn(x, None, w_ih, w_hh, lengths=[5, 7])
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 4]), torch.Size([2, 4]))
    """
    return run_sequence(
        rnn_of(nonlinearity),
        input,
        hx,
        (w_ih, w_hh, b_ih, b_hh),
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        return_states=return_states,
    )


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of a vanilla RNN, with the argument order of torch's `rnn_tanh_cell`.

    Args:
        input: (B, I).
        hx: (B, H).
        w_ih, w_hh: (H, I), (H, H).
        b_ih, b_hh: (H), both or neither.
        nonlinearity: "tanh" or "relu".

    Returns:
        h' (B, H).

    Raises:
        TypeError: arguments that are not tensors.
        ValueError: an unknown nonlinearity.
        RuntimeError: sizes, dtypes or devices that do not fit, in torch's words.

    Source: Elman, 1990; https://pytorch.org/docs/stable/generated/torch.nn.RNNCell.html

    Example:
        >>> import torch, fastseq
        >>> fastseq.rnn_cell(torch.randn(2, 3), torch.zeros(2, 4), torch.randn(4, 3), torch.randn(4, 4)).shape
        torch.Size([2, 4])
    """
    return run_cell(rnn_of(nonlinearity), input, hx, (w_ih, w_hh, b_ih, b_hh))[0]

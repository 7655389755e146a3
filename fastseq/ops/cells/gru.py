"""The GRU as torch defines it: n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h, gates in the order r,
z, n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from fastseq.ops.recurrent.function import run_cell, run_sequence
from fastseq.ops.recurrent.spec import Cell, Output, OutputAndStates


def _gru(x: Any, r: Any, h: Tensor) -> tuple[Tensor]:
    n = torch.tanh(x.n + torch.sigmoid(x.r + r.r) * r.n)
    return (n + torch.sigmoid(x.z + r.z) * (h - n),)


GRU = Cell(
    "gru",
    "GRU",
    gates=("r", "z", "n"),
    formula=_gru,
    sequence_op=_VF.gru,
    step_op=_VF.gru_cell,
    autocasts_to_weights=True,
)


def gru(
    input: Tensor,
    hx: Tensor | None,
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
    """A GRU over a sequence: one layer, one direction. The reset gate acts after the matrix product, as in torch.

    Args:
        input: (T, B, I), T >= 1.
        hx: h_0 (B, H), or None for zeros. Beside a bfloat16 input it may be float32; then h_n is, too.
        w_ih, w_hh: (3*H, I), (3*H, H), rows in the order r, z, n.
        b_ih, b_hh: (3*H), both or neither.
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
        ValueError: dtypes that differ, lengths out of range, an input that is not 3-D.
        RuntimeError: sizes or devices that do not fit, T = 0.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
        EMNLP 2014; https://pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Example:
        >>> import torch, fastseq
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(12, 3), torch.randn(12, 4)
        >>> output, h_n = fastseq.gru(x, None, w_ih, w_hh, reset=torch.rand(7, 2) < 0.2)
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 4]), torch.Size([2, 4]))
    """
    return run_sequence(
        GRU,
        input,
        hx,
        (w_ih, w_hh, b_ih, b_hh),
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        return_states=return_states,
    )


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, with the argument order of torch's `gru_cell`.

    Args:
        input: (B, I).
        hx: (B, H).
        w_ih, w_hh: (3*H, I), (3*H, H), rows in the order r, z, n.
        b_ih, b_hh: (3*H), both or neither.

    Returns:
        h' (B, H).

    Raises:
        TypeError: arguments that are not tensors.
        RuntimeError: sizes, dtypes or devices that do not fit, in torch's words.

    Source: Cho et al., 2014; https://pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    Example:
        >>> import torch, fastseq
        >>> fastseq.gru_cell(torch.randn(2, 3), torch.zeros(2, 4), torch.randn(12, 3), torch.randn(12, 4)).shape
        torch.Size([2, 4])
    """
    return run_cell(GRU, input, hx, (w_ih, w_hh, b_ih, b_hh))[0]

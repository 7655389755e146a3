"""LSTM and LSTMCell as drop-in modules."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from fastseq.nn.cell import CellModule
from fastseq.nn.sequences import SequenceModule
from fastseq.ops.cells.lstm import LSTM as LSTM_CELL
from fastseq.ops.recurrent import checks


class LSTMSequences(SequenceModule):
    """The LSTM's forward and step, for `fastseq.LSTM` and `fastseq.compat.LSTM`."""

    _torch_class = nn.LSTM

    _cell = LSTM_CELL


class LSTM(LSTMSequences, nn.RNNBase):
    """A drop-in `torch.nn.LSTM`: same arguments, parameters, initialization, state_dict, shapes and errors.

    `lengths`, `reset`, `return_states` and the method `step` are beyond torch: `help(fastseq.nn)` explains them. The
    kernels serve float32, float64 and bfloat16 on the CPU.

    Args:
        input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
        hx: (h_0, c_0), each (L*D, B, H), without B if unbatched; None for zeros. Where proj_size is set, it takes the
            place of H in h_0, in h_n and in the output.
        lengths: B integers in [0, T], the steps that each sequence has.
        reset: bool, (T, B) or with the input's first axes in their order: True at the first step of each segment.
        return_states: True adds a third result: every h and every c, each (T, L*D, B, H), or (B, T, L*D, H) with
            batch_first.

    Returns:
        output (T, B, D*H) and (h_n, c_n), each (L*D, B, H).

    Raises:
        ValueError: an input of a wrong rank or dtype, lengths out of range, lengths or reset with a PackedSequence.
        TypeError: lengths that are not integers, a reset that is not bool.
        RuntimeError: sizes or devices that do not fit, T = 0.

    Sources: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber and Cummins, "Learning to
        forget", 2000; https://pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    Example:
        >>> import torch, fastseq
        >>> lstm = fastseq.LSTM(3, 4, num_layers=2, bidirectional=True)
        >>> output, (h_n, c_n) = lstm(torch.randn(7, 2, 3), lengths=[5, 7])
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 8]), torch.Size([4, 2, 4]))
    """

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class LSTMCell(CellModule, nn.LSTMCell):
    """A drop-in `torch.nn.LSTMCell`: same arguments, parameters, initialization, state_dict, shapes and errors.

    Args:
        input: (B, I) or (I).
        hx: h and c, each (B, H) or (H); None for zeros.

    Returns:
        h' and c', each (B, H) or (H).

    Raises:
        ValueError: an input or a state that is neither 1-D nor 2-D.
        RuntimeError: not two states; sizes, dtypes or devices that do not fit.

    Source: https://pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html

    Example:
        >>> import torch, fastseq
        >>> cell, state = fastseq.LSTMCell(3, 4), None
        >>> for x in torch.randn(7, 2, 3):
        ...     state = cell(x, state)
        >>> state[0].shape
        torch.Size([2, 4])
    """

    _torch_class = nn.LSTMCell

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: see the class."""
        result = h = c = None
        if hx is None:
            result = self._step(LSTM_CELL, input, None, None)
        elif isinstance(hx, tuple | list):
            if len(hx) != 2:
                checks.check_hx(LSTM_CELL, hx, "lstm_cell")
            h, c = hx
            result = None if h is None or c is None else self._step(LSTM_CELL, input, h, c)
        return self._step_of_torch(LSTM_CELL, input, hx, h, c) if result is None else result

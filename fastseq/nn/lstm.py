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

    Beyond torch, at call time:

    Args:
        input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
        hx: (h_0, c_0), each (L*D, B, H) (h_0: proj_size in place of H where set), without B if unbatched; None for
            zeros.
        lengths: B integers in [0, T], in any order, as a list or a tensor on any device. The output is 0 from there on;
            h_n and c_n are the states after the last step of each sequence (h_0 and c_0 for a length of 0). No sorting
            or packing is needed.
        reset: bool, (T, B) or as the first axes of the input lie. True marks the first step of a segment: the states
            are zero before it, the reverse direction is cut at the same places, and no gradient passes a cut.
        return_states: add a third result: all h and all c, each (T, L*D, B, H), or (B, T, L*D, H) with batch_first;
            zero at padding.

    Returns:
        output (T, B, D*H) and (h_n, c_n), each (L*D, B, H).

    `step(x_t, state)` runs one step with the same weights. Float32, float64 and bfloat16 on the CPU run in kernels;
    everything else takes torch's own path (`fastseq info` prints the table). The class derives from `nn.RNNBase`, not
    from `nn.LSTM`, because torch.compile refuses every instance of the latter; `fastseq.compat.LSTM` is the same with
    `nn.LSTM` as base.

    Raises:
        ValueError: the rank or the dtype of the input, lengths out of range, lengths or reset with a PackedSequence.
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

"""RNN and RNNCell as drop-in modules."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from fastseq.nn.cell import CellModule
from fastseq.nn.sequences import SequenceModule
from fastseq.ops.cells.rnn import RELU, TANH, rnn_of
from fastseq.ops.recurrent import checks
from fastseq.ops.recurrent.spec import Cell


class RNNSequences(SequenceModule):
    """The vanilla RNN's forward and step, for `fastseq.RNN` and `fastseq.compat.RNN`."""

    _torch_class = nn.RNN

    @property
    def _cell(self) -> Cell:
        return TANH if self.mode == "RNN_TANH" else RELU


class RNN(RNNSequences, nn.RNNBase):
    """A drop-in `torch.nn.RNN`: same arguments, parameters, initialization, state_dict, shapes and errors.

    `lengths`, `reset`, `return_states` and the method `step` are beyond torch: `help(fastseq.nn)` explains them. The
    kernels serve float32, float64 and bfloat16 on the CPU.

    Args:
        input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
        hx: h_0 (L*D, B, H), without B if unbatched; None for zeros.
        lengths: B integers in [0, T], the steps that each sequence has.
        reset: bool, (T, B) or with the input's first axes in their order: True at the first step of each segment.
        return_states: True adds a third result: every h (T, L*D, B, H), or (B, T, L*D, H) with batch_first.

    Returns:
        output (T, B, D*H) and h_n (L*D, B, H).

    Raises:
        ValueError: an input of a wrong rank or dtype, lengths out of range, lengths or reset with a PackedSequence.
        TypeError: lengths that are not integers, a reset that is not bool.
        RuntimeError: sizes or devices that do not fit, T = 0.

    Source: Elman, "Finding structure in time", 1990; https://pytorch.org/docs/stable/generated/torch.nn.RNN.html

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.RNN(3, 4, nonlinearity="relu")
        >>> output, h_n, h = rnn(torch.randn(7, 2, 3), return_states=True)
        >>> output.shape, h_n.shape, h.shape
        (torch.Size([7, 2, 4]), torch.Size([1, 2, 4]), torch.Size([7, 1, 2, 4]))
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        checks.check_no_projection(kwargs)
        if len(args) > 3:  # torch.nn.RNN alone has the nonlinearity in fourth place
            *args, kwargs["nonlinearity"] = *args[:3], *args[4:], args[3]
        nonlinearity = kwargs.pop("nonlinearity", "tanh")
        cell = rnn_of(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(cell.name.upper(), *args, **kwargs)


class RNNCell(CellModule, nn.RNNCell):
    """A drop-in `torch.nn.RNNCell`: same arguments, parameters, initialization, state_dict, shapes and errors.

    Args:
        input: (B, I) or (I).
        hx: (B, H) or (H); None for zeros.

    Returns:
        h' (B, H) or (H).

    Raises:
        ValueError: an input or a state that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit; a nonlinearity that is neither "tanh" nor "relu".

    Source: https://pytorch.org/docs/stable/generated/torch.nn.RNNCell.html

    Example:
        >>> import torch, fastseq
        >>> cell, h = fastseq.RNNCell(3, 4), None
        >>> for x in torch.randn(7, 2, 3):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([2, 4])
    """

    _torch_class = nn.RNNCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: see the class."""
        if self.nonlinearity != "tanh" and self.nonlinearity != "relu":
            return self._torchs(input, hx)  # which says so
        cell = TANH if self.nonlinearity == "tanh" else RELU
        result = self._step(cell, input, hx)
        return self._step_of_torch(cell, input, hx, hx) if result is None else result[0]

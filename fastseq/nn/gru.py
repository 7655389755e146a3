"""GRU and GRUCell as drop-in modules."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from fastseq.nn.cell import CellModule
from fastseq.nn.sequences import SequenceModule
from fastseq.ops.cells.gru import GRU as GRU_CELL
from fastseq.ops.recurrent import checks


class GRUSequences(SequenceModule):
    """The GRU's forward and step, for `fastseq.GRU` and `fastseq.compat.GRU`."""

    _torch_class = nn.GRU

    _cell = GRU_CELL


class GRU(GRUSequences, nn.RNNBase):
    """A drop-in `torch.nn.GRU`: same arguments, parameters, initialization, state_dict, shapes and errors.

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

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
        2014; https://pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Example:
        >>> import torch, fastseq
        >>> gru = fastseq.GRU(3, 4)
        >>> output, h_n = gru(torch.randn(7, 2, 3), reset=torch.rand(7, 2) < 0.2)
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 4]), torch.Size([1, 2, 4]))
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        checks.check_no_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


class GRUCell(CellModule, nn.GRUCell):
    """A drop-in `torch.nn.GRUCell`: same arguments, parameters, initialization, state_dict, shapes and errors.

    Args:
        input: (B, I) or (I).
        hx: (B, H) or (H); None for zeros.

    Returns:
        h' (B, H) or (H).

    Raises:
        ValueError: an input or a state that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit.

    Source: https://pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    Example:
        >>> import torch, fastseq
        >>> cell, h = fastseq.GRUCell(3, 4), None
        >>> for x in torch.randn(7, 2, 3):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([2, 4])
    """

    _torch_class = nn.GRUCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: see the class."""
        result = self._step(GRU_CELL, input, hx)
        return self._step_of_torch(GRU_CELL, input, hx, hx) if result is None else result[0]

"""RNN, LSTM and GRU that are instances of torch's own classes, for code that checks types.

They run the same code as `fastseq.RNN`, `fastseq.LSTM` and `fastseq.GRU`, but `isinstance(m, torch.nn.LSTM)` is true.
For that very reason torch.compile leaves them out of its graphs unless `torch._dynamo.config.allow_rnn` is set.

Example:
    >>> import torch, fastseq
    >>> isinstance(fastseq.compat.LSTM(3, 4), torch.nn.LSTM)
    True
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn

from fastseq.nn.gru import GRUSequences
from fastseq.nn.lstm import LSTMSequences
from fastseq.nn.rnn import RNNSequences
from fastseq.nn.sequences import SequenceModule
from fastseq.ops.routing import inlined

__all__ = ["GRU", "LSTM", "RNN"]


def _left_alone(function: FunctionType) -> Any:
    """The same function, which torch.compile leaves alone with all that it calls.

    A call of an nn.LSTM ends a graph of torch.compile, which would then compile each function that the forward calls: a
    dozen fragments that slow each other down. It does not do so in torch's own forward, which it knows.
    """
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__, copy.__doc__, copy.__annotations__ = (
        function.__kwdefaults__,
        function.__doc__,
        function.__annotations__,
    )
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return inlined(copy)


class _Sequences:
    forward = _left_alone(SequenceModule.forward)
    step = _left_alone(SequenceModule.step)


class RNN(_Sequences, RNNSequences, nn.RNN):
    """`fastseq.RNN` as a subclass of `torch.nn.RNN`."""


class LSTM(_Sequences, LSTMSequences, nn.LSTM):
    """`fastseq.LSTM` as a subclass of `torch.nn.LSTM`."""


class GRU(_Sequences, GRUSequences, nn.GRU):
    """`fastseq.GRU` as a subclass of `torch.nn.GRU`."""

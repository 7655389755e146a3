"""RNN, LSTM and GRU that are instances of torch's own classes, for code that checks types.

The same code as `fastseq.RNN`, `fastseq.LSTM` and `fastseq.GRU`. What differs is the base class: `isinstance(m,
torch.nn.LSTM)` holds, and for that very reason torch.compile leaves the module out of its graph unless
`torch._dynamo.config.allow_rnn` is set.

Example:
    >>> import torch, fastseq
    >>> isinstance(fastseq.compat.LSTM(3, 4), torch.nn.LSTM)
    True
"""

from __future__ import annotations

from torch import nn

from fastseq.nn.gru import GRUSequences
from fastseq.nn.lstm import LSTMSequences
from fastseq.nn.rnn import RNNSequences

__all__ = ["GRU", "LSTM", "RNN"]


class RNN(RNNSequences, nn.RNN):
    """`fastseq.RNN` as a subclass of `torch.nn.RNN`."""


class LSTM(LSTMSequences, nn.LSTM):
    """`fastseq.LSTM` as a subclass of `torch.nn.LSTM`."""


class GRU(GRUSequences, nn.GRU):
    """`fastseq.GRU` as a subclass of `torch.nn.GRU`."""

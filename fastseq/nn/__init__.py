"""Modules that replace torch's of the same names.

RNN, LSTM and GRU take three keyword arguments that torch's do not have:

lengths: B integers in [0, T], in any order, as a list or a tensor on any device. The output is 0 from there on, and the
    last states are those after the last step of each sequence; for a length of 0 they are the initial states. Nothing
    has to be sorted or packed.
reset: a bool tensor (T, B), or with the input's first axes in their order. True marks the first step of a segment: all
    states are zero before it, and no gradient passes. The reverse direction is cut at the same places.
return_states: True adds a third result, the states after every step, which are zero at padding.

Their method `step(x_t, state)` runs one step with the same weights.

They derive from `nn.RNNBase`, not from `nn.RNN`, `nn.LSTM` and `nn.GRU`, because torch.compile refuses every instance
of those three. `fastseq.compat` has the same modules with those three as bases.

Recurrent and RecurrentCell are the same for any cell, those that torch lacks among them.

A call that the kernels do not serve runs torch's own ops: `fastseq info` prints the table.
"""

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.gru import GRU, GRUCell
from fastseq.nn.kv_cache import KVCache
from fastseq.nn.layer_norm import LayerNorm
from fastseq.nn.lstm import LSTM, LSTMCell
from fastseq.nn.recurrent import Recurrent, RecurrentCell
from fastseq.nn.rnn import RNN, RNNCell
from fastseq.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "LayerNorm",
    "MultiheadAttention",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]

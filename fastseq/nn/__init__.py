"""Drop-in torch.nn modules."""

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.gru import GRU, GRUCell
from fastseq.nn.kv_cache import KVCache
from fastseq.nn.layer_norm import LayerNorm
from fastseq.nn.lstm import LSTM, LSTMCell
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
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]

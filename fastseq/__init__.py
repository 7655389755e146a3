"""Fused recurrent and attention kernels for PyTorch on the CPU: drop-in modules, functions and `fuse` for models that
exist already."""

import torch  # noqa: F401  first: its OpenMP library must be the one that the kernels find

from fastseq import cells, compat, nn, ops, reference
from fastseq.nn import (
    GRU,
    LSTM,
    RNN,
    GRUCell,
    KVCache,
    LayerNorm,
    LSTMCell,
    MultiheadAttention,
    RNNCell,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastseq.ops import gru, gru_cell, layer_norm, lstm, lstm_cell, rnn, rnn_cell, scaled_dot_product_attention
from fastseq.sdpa_patch import sdpa_kernels
from fastseq.swap import freeze, fuse, fuse_report, unfreeze, unfuse

__version__ = "0.1.0"

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
    "cells",
    "compat",
    "freeze",
    "fuse",
    "fuse_report",
    "gru",
    "gru_cell",
    "layer_norm",
    "lstm",
    "lstm_cell",
    "nn",
    "ops",
    "reference",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
    "sdpa_kernels",
    "unfreeze",
    "unfuse",
]

"""Differentiable functions: the functional API and the autograd Functions behind it."""

from fastseq.ops.attention.function import AttentionFunction, SelfAttentionFunction
from fastseq.ops.attention.sdpa import scaled_dot_product_attention
from fastseq.ops.attention.spec import Attention
from fastseq.ops.cells.gru import GRU, gru, gru_cell
from fastseq.ops.cells.lstm import LSTM, lstm, lstm_cell
from fastseq.ops.cells.rnn import RELU, TANH, rnn, rnn_cell
from fastseq.ops.linear import LinearFunction
from fastseq.ops.normalization import LayerNormFunction, layer_norm
from fastseq.ops.recurrent.function import RecurrentFunction, StepFunction
from fastseq.ops.recurrent.spec import Cell, Layer
from fastseq.ops.routing import SERVICE

CELLS = {cell.name: cell for cell in (TANH, RELU, LSTM, GRU)}

__all__ = [
    "CELLS",
    "SERVICE",
    "Attention",
    "AttentionFunction",
    "Cell",
    "Layer",
    "LayerNormFunction",
    "LinearFunction",
    "RecurrentFunction",
    "SelfAttentionFunction",
    "StepFunction",
    "gru",
    "gru_cell",
    "layer_norm",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]

"""Differentiable functions: the functional API and the autograd Functions behind it."""

from fastseq.ops.cell import Cell, Layer
from fastseq.ops.gru import gru, gru_cell
from fastseq.ops.lstm import lstm, lstm_cell
from fastseq.ops.recurrent import RecurrentFunction, StepFunction
from fastseq.ops.rnn import rnn, rnn_cell
from fastseq.ops.support import SERVICE

__all__ = [
    "SERVICE",
    "Cell",
    "Layer",
    "RecurrentFunction",
    "StepFunction",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
]

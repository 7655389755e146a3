"""Differentiable functions, and the autograd Functions behind them.

rnn, lstm and gru run one layer in one direction. All their tensors share one dtype and one device. They share these
arguments:

lengths: B integers in [0, T], in any order, as a list or a tensor on any device. The output is 0 from there on, and the
    last states are those after the last step of each sequence; for a length of 0 they are the initial states.
reset: a bool tensor (T, B). True marks the first step of a segment: all states are zero before it, and no gradient
    passes.
reverse: True runs each sequence from its last step to its first, cut by `reset` at the same places.
return_states: True adds `states`, the states after every step, which are zero at padding.
"""

import pkgutil
from importlib import import_module

from fastseq.backends.contract import Attention
from fastseq.ops import cells
from fastseq.ops.attention.function import AttentionFunction
from fastseq.ops.attention.sdpa import scaled_dot_product_attention
from fastseq.ops.cells.gru import gru, gru_cell
from fastseq.ops.cells.lstm import lstm, lstm_cell
from fastseq.ops.cells.rnn import rnn, rnn_cell
from fastseq.ops.linear import LinearFunction
from fastseq.ops.normalization import LayerNormFunction, layer_norm
from fastseq.ops.recurrent.function import RecurrentFunction, StepFunction
from fastseq.ops.recurrent.spec import Cell, Layer
from fastseq.ops.routing import SERVICE

# By name: each module of the room `cells` holds one or more.
_modules = (import_module(f"{cells.__name__}.{found.name}") for found in pkgutil.iter_modules(cells.__path__))
CELLS = {cell.name: cell for module in _modules for cell in vars(module).values() if isinstance(cell, Cell)}

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

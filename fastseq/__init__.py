"""Fused RNN, LSTM and GRU kernels behind torch.nn's own interface."""

import torch  # noqa: F401  first, so that the kernels find its OpenMP pool already loaded

__version__ = "0.1.0"

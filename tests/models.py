"""The sequence modules under test: made, called and compared in the same way everywhere."""

import torch
from cases import TOLERANCES, Tolerance

import fastseq
from fastseq import ops

MODULES = {
    "rnn_tanh": fastseq.RNN,
    "rnn_relu": lambda *args, **kwargs: fastseq.RNN(*args, nonlinearity="relu", **kwargs),
    "lstm": fastseq.LSTM,
    "gru": fastseq.GRU,
}
# The functions of one layer, fastseq.<name> and fastseq.<name>_cell, and what they run.
FUNCTIONS = {"rnn": ops.CELLS["rnn_tanh"], "lstm": ops.CELLS["lstm"], "gru": ops.CELLS["gru"]}
# (ours, torch's)
SEQUENCES = [
    (fastseq.RNN, torch.nn.RNN),
    (fastseq.LSTM, torch.nn.LSTM),
    (fastseq.GRU, torch.nn.GRU),
    (fastseq.compat.RNN, torch.nn.RNN),
    (fastseq.compat.LSTM, torch.nn.LSTM),
    (fastseq.compat.GRU, torch.nn.GRU),
]
CELLS = [
    (fastseq.RNNCell, torch.nn.RNNCell),
    (fastseq.LSTMCell, torch.nn.LSTMCell),
    (fastseq.GRUCell, torch.nn.GRUCell),
]


def make(cell, *args, **kwargs):
    torch.manual_seed(0)
    return MODULES[cell](*args, dtype=torch.float64, **kwargs)


def pair(ours, torchs, *args, dtype=torch.float64, **kwargs):
    """The same module twice, ours and torch's, from one seed."""
    modules = []
    for cls in (ours, torchs):
        torch.manual_seed(0)
        modules.append(cls(*args, dtype=dtype, **kwargs))
    return modules


def random_hx(rnn, batch, requires_grad=False):
    places = rnn.num_layers * (2 if rnn.bidirectional else 1)
    dtype = rnn.weight_ih_l0.dtype
    h = torch.randn(places, batch, rnn.proj_size or rnn.hidden_size, dtype=dtype, requires_grad=requires_grad)
    c = torch.randn(places, batch, rnn.hidden_size, dtype=dtype, requires_grad=requires_grad)
    return (h, c) if rnn.mode == "LSTM" else h


def flat(result):
    """All tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, torch.nn.utils.rnn.PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def gradients(outputs, inputs):
    """The gradients of a random weighted sum, the same weights on every call."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss + sum(0 * i.sum() for i in inputs), inputs)  # so that each has a gradient


def assert_close(result, expected, tolerance="float64"):
    """Within a row of the table, or within a tolerance that is derived."""
    rtol, atol = tolerance if isinstance(tolerance, Tolerance) else TOLERANCES[tolerance]
    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)

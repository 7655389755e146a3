"""Wrong arguments of the modules: torch's error type, and a message that begins with torch's."""

import itertools

import pytest
import torch
from models import CELLS, SEQUENCES, pair
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq

pytestmark = pytest.mark.usefixtures("route")


# Where torch's module does not look, a product deep inside of its op complains, or oneDNN; and what is said instead.
FROM_INSIDE = (
    "mat1 and mat2",
    "get_mkldnn_dtype",
    "The size of tensor a",
    "Dimension out of",
    "got an incorrect number",
    "Tensor on device",
)
FOR_IT = (
    "Expected hidden[",
    "Input and hidden tensors are not ",
    "Input and parameter tensors are not ",
    "input.size(-1) must be equal to input_size",
)


def error_of(module, arguments):
    try:
        module(*arguments)
    except Exception as error:
        return error
    return None


def says_the_same(error, wanted, described):
    if str(wanted).startswith(FROM_INSIDE):
        assert type(error) is RuntimeError, described
        assert str(error).startswith(FOR_IT), described
    else:
        assert type(error) is type(wanted), described
        assert wanted is None or str(error).startswith(str(wanted)), described


def states(rnn, *shape, **kwargs):
    hx = torch.zeros(*shape, **kwargs)
    return (hx, hx) if rnn.mode == "LSTM" else hx


def wrong_calls(rnn):
    x = torch.randn(7, 5, 3)
    packed = pack_padded_sequence(x, [7, 6, 5, 4, 3])
    yield (x[0, 0],)
    yield (x[None],)
    yield (torch.tensor(1.0),)
    yield (x[..., :2],)
    yield (x.double(),)
    yield (x.half(),)
    yield (x.long(),)
    yield (x[:0],)
    yield (x[:, :0][:0],)
    yield (x.to("meta"),)
    yield (None,)
    yield ([1.0],)
    yield (x.numpy(),)
    yield (x, states(rnn, 1, 4, 4))
    yield (x, states(rnn, 2, 5, 4))
    yield (x, states(rnn, 1, 5, 5))
    yield (x, states(rnn, 1, 1, 4))
    yield (x, states(rnn, 5, 4))
    yield (x, states(rnn, 1, 1, 5, 4))
    yield (x, states(rnn, 1, 5, 4, dtype=torch.float64))
    yield (x, states(rnn, 1, 5, 4, device="meta"))
    yield (x[:, 0], states(rnn, 1, 5, 4))
    yield (x[:, 0], states(rnn, 2, 4))
    yield (x[:0, 0],)
    yield (packed, states(rnn, 5, 4))
    yield (packed, states(rnn, 1, 4, 4))
    yield (packed, states(rnn, 1, 5, 5))
    yield (packed._replace(data=packed.data[:, :2]),)
    yield (packed._replace(data=packed.data.double()),)
    hx = torch.zeros(1, 5, 4)
    if rnn.mode == "LSTM":
        yield (x, (hx, hx[:, :4]))
        yield (x, (hx,))
        yield (x, (hx, hx, hx))
        yield (x, (hx, None))
        yield (x, hx)
        yield (packed, (hx, hx[..., :3]))
    else:
        yield (x, (hx, hx))
        yield (x, 1.0)


@pytest.mark.parametrize(("ours", "torchs"), SEQUENCES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_sequences(ours, torchs, requires_grad):
    rnn, reference = (m.requires_grad_(requires_grad) for m in pair(ours, torchs, 3, 4, dtype=torch.float32))
    for call in wrong_calls(rnn):
        wanted = error_of(reference, call)
        error = error_of(rnn, call)
        described = [getattr(a, "shape", a) for a in call]
        says_the_same(error, wanted, described)


def test_no_steps():
    for (ours, _), batch_first in itertools.product(SEQUENCES, [False, True]):
        rnn = ours(3, 4, batch_first=batch_first)
        x = torch.zeros(5, 0, 3) if batch_first else torch.zeros(0, 5, 3)
        message = "Expected sequence length to be larger than 0 in RNN, got input of shape"
        for options in ({}, {"return_states": True}, {"lengths": [0] * 5}):
            with pytest.raises(RuntimeError, match=message):
                rnn(x, **options)


def test_wrong_arguments_with_lengths():
    """What torch checks is checked beside our own arguments too."""
    lstm, gru = fastseq.LSTM(3, 4), fastseq.GRU(3, 4)
    x, lengths = torch.randn(7, 5, 3), [1, 2, 3, 4, 5]
    for rnn in (lstm, gru):
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 2"):
            rnn(x[..., :2], lengths=lengths)
        with pytest.raises(ValueError, match="does not match weight dtype"):
            rnn(x.double(), lengths=lengths)
        with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 4D"):
            rnn(x[None], lengths=lengths)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            rnn(x, states(rnn, 1, 4, 4), lengths=lengths)
        with pytest.raises(RuntimeError, match="dtype"):
            rnn(x, states(rnn, 1, 5, 4, dtype=torch.float64), lengths=lengths)
        with pytest.raises(RuntimeError, match="device"):
            rnn(x.to("meta"), lengths=lengths)


def wrong_cell_calls(cell):
    x, h = torch.randn(5, 3), torch.zeros(5, 4)

    def hx(*args, **kwargs):
        state = torch.zeros(*args, **kwargs)
        return (state, state) if isinstance(cell, nn.LSTMCell) else state

    yield (x[None],)
    yield (torch.tensor(1.0),)
    yield (x[:, :2],)
    yield (x[0, :2],)
    yield (x.double(),)
    yield (x.to("meta"),)
    yield (None,)
    yield (x.numpy(),)
    yield (x, hx(5, 5))
    yield (x, hx(4, 4))
    yield (x, hx(1, 4))
    yield (x, hx(5, 4, dtype=torch.float64))
    yield (x, hx(5, 4, device="meta"))
    yield (x, hx(1, 5, 4))
    yield (x, hx(4))
    yield (x[0], hx(5, 4))
    yield (x[0], hx(3))
    if isinstance(cell, nn.LSTMCell):
        yield (x, (h,))
        yield (x, (h, h, h))
        yield (x, (h, h[:, :3]))
        yield (x, (h, h[:4]))
        yield (x, (h, h.double()))
        yield (x, h)
        yield (x, (h, None))
    else:
        yield (x, (h, h))


@pytest.mark.parametrize(("ours", "torchs"), CELLS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_cells(ours, torchs, requires_grad):
    cell, reference = (m.requires_grad_(requires_grad) for m in pair(ours, torchs, 3, 4, dtype=torch.float32))
    for call in wrong_cell_calls(cell):
        wanted = error_of(reference, call)
        error = error_of(cell, call)
        described = [getattr(a, "shape", a) for a in call]
        says_the_same(error, wanted, described)


def test_lstm_cell_says_how_many_states_came():
    with pytest.raises(RuntimeError, match=r"lstm_cell expects two hidden states, \(h, c\), got a sequence of 1"):
        fastseq.LSTMCell(3, 4)(torch.randn(5, 3), (torch.zeros(5, 4),))


def test_unknown_nonlinearity_of_a_cell():
    cell = fastseq.RNNCell(3, 4, nonlinearity="foo")  # torch's cells check nothing before the first call
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: foo"):
        cell(torch.randn(5, 3))

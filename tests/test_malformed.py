"""Calls that do not fit: each ends in an error, whoever computes, and none reaches an op that does not look."""

import pytest
import torch
from models import CELLS, SEQUENCES, pair
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq

pytestmark = pytest.mark.usefixtures("route")

x = torch.randn(7, 5, 3)
padding_free, packed = (pack_padded_sequence(x, lengths) for lengths in ([7] * 5, [7, 6, 5, 4, 3]))
unsorted = pack_padded_sequence(x, [3, 6, 5, 4, 7], enforce_sorted=False)
sizes, order, back = packed.batch_sizes, unsorted.sorted_indices, unsorted.unsorted_indices


@pytest.mark.parametrize(("ours", "torchs"), SEQUENCES[:3])
@pytest.mark.parametrize("features", [1, 2, 4, 64])
def test_features_of_packed_input(ours, torchs, features):
    """20 times, as what torch's op writes beyond its memory shows late."""
    rnn = pair(ours, torchs, 3, 4, dtype=torch.float32)[0]
    message = rf"input.size\(-1\) must be equal to input_size. Expected 3, got {features}"
    for _ in range(20):
        with pytest.raises(RuntimeError, match=message):
            rnn(padding_free._replace(data=torch.randn(35, features)))


@pytest.mark.parametrize(("ours", "torchs"), SEQUENCES[:3])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters(ours, torchs, bias):
    """Of another size, rank, dtype or device: oneDNN's LSTM takes them as they are."""
    options = {"num_layers": 2, "bidirectional": True, "bias": bias}
    calls = [lambda m, data=data: m(data) for data in (x, x[:, 0], packed)]
    calls += [lambda m: m(x, lengths=[1, 2, 3, 4, 5])]
    rnn = pair(ours, torchs, 3, 4, dtype=torch.float32, **options)[0]
    modules = [(rnn, calls)]
    if rnn.mode == "LSTM":
        modules.append((pair(ours, torchs, 3, 4, proj_size=2, dtype=torch.float32, **options)[0], calls))
    options["bidirectional"] = False
    modules.append((pair(ours, torchs, 3, 4, dtype=torch.float32, **options)[0], [*calls, lambda m: m.step(x[0])]))
    for module, calls in modules:
        for name, weight in list(module.named_parameters()):
            size = weight.shape[0]
            wrong = [weight[: size - 1], torch.cat((weight, weight)), weight[..., None], weight[None], weight[..., :0]]
            wrong += [weight[:, :-1]] if weight.dim() == 2 else [weight[0]]
            wrong = [(w, f"{name} must have shape") for w in wrong]
            wrong += [(weight.double(), "dtype"), (weight.to("meta"), "not at the same device")]
            for other, message in wrong:
                setattr(module, name, nn.Parameter(other.detach()))
                for call in calls:
                    with pytest.raises((RuntimeError, ValueError), match=message):
                        call(module)
            setattr(module, name, weight)
            for call in calls:
                call(module)


def test_missing_parameters():
    gru = fastseq.GRU(3, 4)
    gru.bias_hh_l0 = None
    for call in (lambda: gru(x), lambda: gru(packed), lambda: gru(x, lengths=[1, 2, 3, 4, 5])):
        with pytest.raises(TypeError, match="expected Tensor as element 3"):
            call()
    with pytest.raises(RuntimeError, match="bias_hh_l0 of the GRU must be a Tensor, got None"):
        gru.step(x[0])


@pytest.mark.parametrize(("ours", "torchs"), CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(ours, torchs, bias):
    """Torch's ops take gates apart that are not there, of an hx with three axes or weights with too few rows."""
    cell = pair(ours, torchs, 3, 1, bias, dtype=torch.float32)[0]
    name = ours.__name__.removesuffix("Cell").lower()
    function, x, hx = getattr(fastseq, f"{name}_cell"), torch.randn(1, 3), torch.zeros(1, 1)
    hx = (hx, hx) if name == "lstm" else hx

    def weights():
        return cell.weight_ih, cell.weight_hh, *((cell.bias_ih, cell.bias_hh) if bias else ())

    with pytest.raises(RuntimeError, match="hidden0 must have 2 dimensions, got 3"):
        cell(x[0], hx)
    with pytest.raises(RuntimeError, match="hidden0 must have 2 dimensions, got 3"):
        function(x, tuple(s[None] for s in hx) if name == "lstm" else hx[None], *weights())
    parameters = dict(cell.named_parameters())
    for fewer in (0, 2):  # all of them, so that they fit each other
        for name, weight in parameters.items():
            setattr(cell, name, nn.Parameter(torch.zeros(fewer, *weight.shape[1:])))
        for call in (lambda: cell(x), lambda: cell(x, hx), lambda: function(x, hx, *weights())):
            with pytest.raises(RuntimeError, match="w_ih must have . rows"):
                call()
    for name, weight in parameters.items():
        setattr(cell, name, weight)
    for name, weight in parameters.items():
        for wrong in (weight[None], weight[0], torch.cat((weight, weight)), weight.double(), weight.to("meta")):
            setattr(cell, name, nn.Parameter(wrong.detach()))
            for call in (lambda: cell(x), lambda: cell(x[0]), lambda: function(x, hx, *weights())):
                with pytest.raises(
                    RuntimeError, match=r"(w_ih|w_hh|b_ih|b_hh) must have|input_size|hidden_size|tensors are"
                ):
                    call()
        setattr(cell, name, weight)


PACKED = {
    "rising": packed._replace(batch_sizes=sizes.flip(0)),
    "too many rows": packed._replace(batch_sizes=sizes + 1),
    "too few rows": packed._replace(batch_sizes=sizes[:-1]),
    "int32": packed._replace(batch_sizes=sizes.int()),
    "float": packed._replace(batch_sizes=sizes.float()),
    "zero": packed._replace(batch_sizes=torch.cat((sizes, sizes[:1] * 0))),
    "negative": packed._replace(batch_sizes=torch.cat((sizes, sizes[:1] * 0 - 1))),
    "empty": packed._replace(batch_sizes=sizes[:0]),
    "2-D": packed._replace(batch_sizes=sizes[None]),
    "scalar": packed._replace(batch_sizes=sizes[0]),
    "huge": packed._replace(batch_sizes=sizes * 2**40),
    "on meta": packed._replace(batch_sizes=sizes.to("meta")),
    "list": packed._replace(batch_sizes=sizes.tolist()),
    "none": packed._replace(batch_sizes=None),
    "no data": packed._replace(data=None),
    "3-D data": packed._replace(data=packed.data[None]),
    "order out of range": unsorted._replace(sorted_indices=order + 3),
    "order with negatives": unsorted._replace(sorted_indices=order - 1),
    "order twice": unsorted._replace(sorted_indices=order * 0),
    "short order": unsorted._replace(sorted_indices=order[:2]),
    "2-D order": unsorted._replace(sorted_indices=order[None]),
    "float order": unsorted._replace(sorted_indices=order.float()),
    "order on meta": unsorted._replace(sorted_indices=order.to("meta")),
    "list for an order": unsorted._replace(sorted_indices=order.tolist()),
    "back out of range": unsorted._replace(unsorted_indices=back + 3),
    "short back": unsorted._replace(unsorted_indices=back[:2]),
    "not the inverse": unsorted._replace(unsorted_indices=back.roll(1)),
}
SAID = "batch_sizes|sorted_indices|data|input must have 2 dimensions"


@pytest.mark.parametrize(("ours", "torchs"), SEQUENCES[:3])
@pytest.mark.parametrize("case", PACKED)
def test_packed_sequences(ours, torchs, case):
    rnn = pair(ours, torchs, 3, 4, dtype=torch.float32)[0]
    state = torch.zeros(1, 5, 4)
    for hx in (None, (state, state) if rnn.mode == "LSTM" else state):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=SAID):
            rnn(PACKED[case], hx)


def test_packed_sequences_that_torch_takes():
    """int32 indices, and one of the two alone."""
    gru, reference = pair(fastseq.GRU, nn.GRU, 3, 4, dtype=torch.float32)
    for input in (
        unsorted._replace(sorted_indices=order.int(), unsorted_indices=back.int()),
        unsorted._replace(sorted_indices=None),
        unsorted._replace(unsorted_indices=None),
    ):
        torch.testing.assert_close(gru(input)[1], reference(input)[1])

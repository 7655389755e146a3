"""fastseq.nn.Recurrent and RecurrentCell: any cell, by kernels and by its formula."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import assert_close, flat, gradients
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import backends, cells
from fastseq.ops import CELLS, Cell

T, B, I, H = 6, 3, 5, 7  # noqa: E741


def _peephole(x, r, h, c, p, q):
    c = torch.sigmoid(x.f + r.f + p * c) * c + torch.tanh(x.g + r.g)
    return torch.sigmoid(x.o + r.o + q * c) * torch.tanh(c), c


PEEPHOLE = Cell("peephole", "Peephole", gates=("f", "g", "o"), states=("c",), parameters=("p", "q"), formula=_peephole)
ALL = [*CELLS.values(), PEEPHOLE]
each_cell = pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(cell, *options, **named):
    return fastseq.nn.Recurrent(cell, I, H, *options, dtype=torch.float64, **named)


def states_of(cell, *shape):
    states = tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in ("h", *cell.states))
    return states if cell.states else states[0]


def by_formula(call):
    with backends.use_backend("torch"):
        return call()


@each_cell
@pytest.mark.parametrize("options", [{}, {"lengths": [6, 0, 4]}, {"reset": True}, {"return_states": True}], ids=str)
def test_kernels_compute_the_formula(cell, options):
    layer, x = make(cell, 2, bidirectional=True), torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    if "reset" in options:
        options = {"reset": torch.rand(T, B) < 0.3}
    hx = states_of(cell, 4, B, H)
    leaves = [x, *flat(hx), *layer.parameters()]
    results = [flat(call(lambda: layer(x, hx, **options))) for call in (lambda f: f(), by_formula)]
    assert_close(*results)
    assert_close(*(gradients(result, leaves) for result in results))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_torchs_cells_are_torchs_modules(name):
    theirs = getattr(nn, name)(I, H, 2, bidirectional=True)
    cell = next(cell for cell in CELLS.values() if cell.mode == name and not cell.kinks)
    ours = fastseq.nn.Recurrent(cell, I, H, 2, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    fused, x = fastseq.fuse(theirs), torch.randn(T, B, I)
    assert all(map(torch.equal, flat(ours(x)), flat(fused(x))))


@each_cell
def test_a_step_a_cell_and_a_sequence_agree(cell):
    layer, x = make(cell), torch.randn(T, B, I, dtype=torch.float64)
    single = fastseq.nn.RecurrentCell(cell, I, H, dtype=torch.float64)
    single.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    output, last = layer(x)
    state = of_cell = None
    for x_t in x:
        y, state = layer.step(x_t, state)
        of_cell = single(x_t, of_cell)
    assert_close([y, *flat(state)], [output[-1], *flat(last)])
    assert_close(flat(of_cell), [s[0] for s in flat(last)])
    alone = single(x[0, 0])
    assert_close(flat(alone), [s[0] for s in flat(single(x[0]))])


@each_cell
def test_layouts(cell):
    layer, x = make(cell, bias=False), torch.randn(T, B, I, dtype=torch.float64)
    first = make(cell, bias=False, batch_first=True)
    first.load_state_dict(layer.state_dict())
    output, _ = layer(x)
    assert_close([first(x.transpose(0, 1))[0].transpose(0, 1), layer(x[:, 0])[0]], [output, output[:, 0]])
    packed, packed_last = layer(pack_padded_sequence(x, [6, 4, 1]))
    padded, padded_last = layer(x, lengths=[6, 4, 1])
    assert_close([packed.data, *flat(packed_last)], [pack_padded_sequence(padded, [6, 4, 1]).data, *flat(padded_last)])


@each_cell
def test_gradients_of_gradients(cell):
    layer, x = make(cell), torch.randn(2, 2, I, dtype=torch.float64, requires_grad=True)
    if cell.kinks:
        pytest.skip("a second derivative next to a kink is none")
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@each_cell
def test_parameters(cell):
    layer = make(cell, 2, bidirectional=True)
    bound, rows = H**-0.5, len(cell.gates) * H
    kinds = "weight_ih", "weight_hh", "bias_ih", "bias_hh", *cell.parameters
    names = [f"{kind}_l{n}{suffix}" for n in range(2) for suffix in ("", "_reverse") for kind in kinds]
    assert [name for name, _ in layer.named_parameters()] == names
    assert layer.weight_ih_l1.shape == (rows, 2 * H)
    assert all(getattr(layer, f"{name}_l0").shape == (H,) for name in cell.parameters)
    assert all(p.abs().max() <= bound and p.abs().max() > bound / 2 for p in layer.parameters())


@each_cell
def test_copies_and_pickles_keep_the_cell(cell):
    layer, x = make(cell), torch.randn(T, B, I, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.cell.name == cell.name
        assert cell is PEEPHOLE or other.cell is cell
        assert_close(flat(other(x)), flat(layer(x)))


@each_cell
def test_compiled_and_mapped(cell):
    layer, x = make(cell), torch.randn(T, B, I, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=cell is not PEEPHOLE)
    assert_close(flat(compiled(x)), flat(layer(x)))
    assert_close([vmap(lambda x: layer(x)[0])(torch.stack([x, -x]))], [torch.stack([layer(x)[0], layer(-x)[0]])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen(dtype):
    layer = fastseq.freeze(fastseq.nn.Recurrent(cells.gru, I, H, dtype=dtype))
    x = torch.randn(T, B, I, dtype=dtype)
    with torch.no_grad():
        expected = layer(x)[0]
        assert torch.equal(layer(x)[0], expected)
        layer.weight_hh_l0.mul_(2)
        assert torch.equal(layer(x)[0], expected)
        assert not torch.equal(fastseq.unfreeze(layer)(x)[0], expected)


X = torch.randn(T, B, I, dtype=torch.float64)
MISTAKES = {
    "features": (
        lambda layer: layer(X[..., 1:]),
        RuntimeError,
        "input.size.-1. must be equal to input_size. Expected 5",
    ),
    "rank": (lambda layer: layer(X[0, 0]), ValueError, "GRU: Expected input to be 2D or 3D, got 1D"),
    "type": (lambda layer: layer("x"), TypeError, "input must be a Tensor or a PackedSequence, got str"),
    "state": (lambda layer: layer(X, torch.zeros(1, B, 4)), RuntimeError, r"Expected hidden size \(1, 3, 7\), got"),
    "states": (lambda layer: layer(X, (X, X)), RuntimeError, "gru expects a Tensor for hx"),
    "dtype": (lambda layer: layer(X.float()), RuntimeError, "not the same dtype"),
    "steps": (lambda layer: layer(X[:0]), RuntimeError, "Expected sequence length to be larger than 0"),
    "lengths": (lambda layer: layer(X, lengths=[7, 1, 1]), ValueError, "lengths must lie in"),
    "step": (lambda layer: layer.step(X[0, :, 1:]), RuntimeError, "input.size.-1. must be equal"),
    "script": (lambda layer: torch.jit.script(layer), RuntimeError, "torch has no Recurrent"),
    "cell": (lambda _: fastseq.nn.Recurrent("mgu", 3, 4), TypeError, "cell must be a Cell, .* got str"),
    "name": (
        lambda _: make(Cell("gru", "G", ("a",), None)),
        ValueError,
        "must not have the name of another one, 'gru'",
    ),
    "size": (
        lambda _: fastseq.nn.Recurrent(cells.gru, 3, 0),
        ValueError,
        "hidden_size must be greater than zero, got 0",
    ),
    "size type": (lambda _: fastseq.nn.Recurrent(cells.gru, 3.0, 4), TypeError, "input_size should be of type int"),
    "dropout": (lambda _: make(cells.gru, 2, dropout=2), ValueError, r"dropout should be a number in range \[0, 1\]"),
}
OF_CELLS = {
    "features": (lambda cell: cell(X[0, :, 1:]), RuntimeError, "input has inconsistent input_size: got 4 expected 5"),
    "rank": (lambda cell: cell(X), ValueError, "RecurrentCell: Expected input to be 1D or 2D, got 3D"),
    "type": (lambda cell: cell("x"), TypeError, "input must be a Tensor, got str"),
    "batch": (
        lambda cell: cell(X[0], torch.zeros(2, H)),
        RuntimeError,
        "Input batch size 3 doesn't match hidden0 batch",
    ),
    "state": (lambda cell: cell(X[0], (X[0],)), TypeError, "hx must be a Tensor, got tuple"),
    "dtype": (lambda cell: cell(X[0].float()), RuntimeError, "not the same dtype"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call(make(cells.gru))


@pytest.mark.parametrize("mistake", OF_CELLS)
def test_mistakes_of_cells(mistake):
    call, error, message = OF_CELLS[mistake]
    with pytest.raises(error, match=message):
        call(fastseq.nn.RecurrentCell(cells.gru, I, H, dtype=torch.float64))


def test_repr():
    assert (
        repr(fastseq.nn.Recurrent(cells.gru, 3, 4, 2, batch_first=True))
        == "Recurrent(gru, 3, 4, num_layers=2, batch_first=True)"
    )
    assert repr(fastseq.nn.RecurrentCell(cells.gru, 3, 4, bias=False)) == "RecurrentCell(gru, 3, 4, bias=False)"

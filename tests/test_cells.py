"""RNNCell, LSTMCell and GRUCell beside torch's."""

import copy
import itertools
import pickle

import pytest
import torch
from models import CELLS, assert_close, flat, gradients, pair
from torch import nn

import fastseq

pytestmark = pytest.mark.usefixtures("route")
each = pytest.mark.parametrize(("ours", "torchs"), CELLS)


def random_state(cell, *shape, requires_grad=False):
    states = [torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad) for _ in range(2)]
    return tuple(states) if isinstance(cell, nn.LSTMCell) else states[0]


def results_agree(cell, reference, x, hx):
    result, wanted = cell(x, hx), reference(x, hx)
    assert isinstance(result, tuple) is isinstance(wanted, tuple)
    assert_close(flat(result), flat(wanted))
    inputs = [t for t in (x, *([] if hx is None else flat(hx))) if t.requires_grad]
    ours = gradients(flat(result), [*inputs, *cell.parameters()])
    assert_close(ours, gradients(flat(wanted), [*inputs, *reference.parameters()]))
    with torch.no_grad():
        assert_close(flat(cell(x, hx)), flat(wanted))


@each
def test_same_seed_same_parameters(ours, torchs):
    for args, kwargs in [((3, 4), {}), ((3, 4, False), {}), ((3, 4), {"bias": "relu"}), ((10, 20, "relu"), {})]:
        cell, reference = pair(ours, torchs, *args, **kwargs)
        assert repr(cell) == repr(reference)
        assert isinstance(cell, torchs)
        for (name, a), (other, b) in zip(cell.named_parameters(), reference.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(a, b)
        reference.load_state_dict(cell.state_dict())
        cell.load_state_dict(reference.state_dict())
    assert ours(3, 4, bias=False).bias_ih is None
    assert repr(fastseq.RNNCell(3, 4, nonlinearity="relu")) == "RNNCell(3, 4, nonlinearity=relu)"


@each
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_torch(ours, torchs, bias):
    for batch, inputs, hidden in [(1, 1, 1), (5, 3, 4), (7, 63, 65), (1, 129, 7), (65, 7, 17)]:
        cell, reference = pair(ours, torchs, inputs, hidden, bias)
        x = torch.randn(batch, inputs, dtype=torch.float64, requires_grad=True)
        results_agree(cell, reference, x, None)
        results_agree(cell, reference, x, random_state(cell, batch, hidden, requires_grad=True))
        results_agree(cell, reference, x[0].detach().requires_grad_(), None)
        results_agree(cell, reference, x[0], random_state(cell, hidden, requires_grad=True))
    if ours is fastseq.RNNCell:
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        results_agree(*pair(ours, torchs, 3, 4, bias, "relu"), x, None)


@each
def test_strides_and_hx_kinds(ours, torchs):
    cell, reference = pair(ours, torchs, 3, 4)
    x = torch.randn(3, 5, dtype=torch.float64).T.requires_grad_()
    state = torch.randn(4, 5, dtype=torch.float64).T.requires_grad_()
    row = torch.randn(1, 4, dtype=torch.float64).expand(5, 4)
    lstm = isinstance(cell, nn.LSTMCell)
    for hx in (state, row):
        results_agree(cell, reference, x, (hx, hx) if lstm else hx)
    sequence = torch.randn(5, 7, 3, dtype=torch.float64, requires_grad=True)
    results_agree(cell, reference, sequence[:, 2], None)
    if lstm:
        assert_close(flat(cell(x, [state, state])), flat(reference(x, [state, state])))
    for module in (cell, reference):
        module.weight_hh = nn.Parameter(module.weight_hh.detach().T.contiguous().T)
    results_agree(cell, reference, x, None)


@each
def test_empty(ours, torchs):
    for batch, hidden in [(0, 4), (5, 0)]:
        cell, reference = pair(ours, torchs, 3, hidden)
        x = torch.randn(batch, 3, dtype=torch.float64, requires_grad=True)
        results_agree(cell, reference, x, None)


@each
def test_partial_gradients(ours, torchs):
    cell, reference = pair(ours, torchs, 3, 4)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for place in range(2 if isinstance(cell, nn.LSTMCell) else 1):
        modules = [flat(m(x))[place].sum() for m in (cell, reference)]
        grads = [
            torch.autograd.grad(loss, [x, *m.parameters()], allow_unused=True)
            for loss, m in zip(modules, (cell, reference), strict=True)
        ]
        assert_close(
            *([torch.zeros_like(p) if g is None else g for g, p in zip(gs, [x, *cell.parameters()], strict=True)]
              for gs in grads)
        )  # fmt: skip
    for module in (cell, reference):
        module.weight_hh.requires_grad_(False)
    totals = []
    for module in (cell, reference):
        state = flat(module(x))[0]
        state.sum().backward(retain_graph=True)
        state.sin().sum().backward()
        totals.append([p.grad for p in module.parameters() if p.requires_grad])
    assert_close(*totals)
    assert cell.weight_hh.grad is None


@each
def test_changes_before_backward(ours, torchs):
    cell, reference = pair(ours, torchs, 3, 4)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    h = flat(cell(x, random_state(cell, 5, 4, requires_grad=True)))[0]
    with torch.no_grad():
        cell.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
    if torchs is nn.RNNCell:  # torch's keeps its output and refuses
        return
    with torch.no_grad():
        cell.weight_hh.sub_(1)
        reference.load_state_dict(cell.state_dict())
    grads = []
    for module in (cell, reference):
        h = flat(module(x))[0]
        h *= 2
        grads.append(gradients([h], [x, *module.parameters()]))
    assert_close(*grads)


@each
def test_loops_of_cells(ours, torchs):
    cell, reference = pair(ours, torchs, 3, 4)
    x = torch.randn(9, 5, 3, dtype=torch.float64, requires_grad=True)
    outputs = []
    for module in (cell, reference):
        state, hs = None, []
        for x_t in x:
            state = module(x_t, state)
            hs += flat(state)
        outputs.append((hs, gradients(hs, [x, *module.parameters()])))
    assert_close(*outputs)


@each
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_change_between_calls(ours, torchs, frozen):
    cell, reference = pair(ours, torchs, 3, 4)
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        if frozen:
            fastseq.freeze(cell)
        assert_close(flat(cell(x)), flat(reference(x)))
        for module in (cell, reference):
            module.weight_ih = nn.Parameter(module.weight_ih * 2)
        assert_close(flat(cell(x)), flat(reference(x)))
        fastseq.unfreeze(cell)
        for module in (cell, reference):
            module.weight_ih.data.mul_(3)
        assert_close(flat(cell(x)), flat(reference(x)))


@each
def test_copies_parametrizations_functional_call(ours, torchs):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    cell, reference = pair(ours, torchs, 3, 4)
    fastseq.freeze(cell)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert type(other) is ours
        results_agree(other, reference, x, None)
    weights = {k: (v * 0.5).detach().requires_grad_() for k, v in cell.named_parameters()}
    results = [torch.func.functional_call(m, weights, (x,)) for m in (cell, reference)]
    assert_close(*map(flat, results))
    assert_close(*(gradients(flat(r), list(weights.values())) for r in results))
    for module in (cell, reference):
        nn.utils.parametrizations.weight_norm(module, "weight_hh")
    results_agree(cell, reference, x, None)


@each
def test_dtypes(ours, torchs):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        cell, reference = pair(ours, torchs, 16, 16, dtype=dtype)
        x = torch.randn(5, 16).to(dtype)
        ours_, torchs_ = flat(cell(x)), flat(reference(x))
        assert all(t.dtype is dtype for t in ours_)
        if dtype in (torch.float32, torch.float64):
            assert_close(ours_, torchs_, str(dtype).removeprefix("torch."))
    cell = ours(3, 4, device="meta")
    assert flat(cell(torch.randn(5, 3, device="meta")))[0].is_meta


def test_kernels_run(route, monkeypatch):
    """Every call that the table says is served reaches the backend: nothing takes torch's path unseen."""
    if route != "native":
        pytest.skip("about the kernels")
    from fastseq.backends import native

    calls = []
    step = native.recurrent_step
    monkeypatch.setattr(native, "recurrent_step", lambda *args: calls.append(args) or step(*args))
    for (ours, _), dtype, grad in itertools.product(
        CELLS, (torch.float32, torch.float64, torch.bfloat16), (False, True)
    ):
        cell = ours(3, 4, dtype=dtype).requires_grad_(grad)
        cell(torch.randn(5, 3, dtype=dtype))
        cell(torch.randn(3, dtype=dtype))
        cell(torch.randn(5, 3, dtype=dtype), cell(torch.randn(5, 3, dtype=dtype)))
        fastseq.freeze(cell)(torch.randn(5, 3, dtype=dtype))
        assert len(calls) == 5
        assert (calls[-1][-1] is not True) or grad
        calls.clear()

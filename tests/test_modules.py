"""The sequence modules beside torch's: construction, results, gradients, state."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from models import SEQUENCES, assert_close, flat, gradients, pair, random_hx
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fastseq

pytestmark = pytest.mark.usefixtures("route")
each = pytest.mark.parametrize(("ours", "torchs"), SEQUENCES)

OPTIONS = [
    {},
    {"num_layers": 2},
    {"bias": False},
    {"bidirectional": True},
    {"batch_first": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    {"nonlinearity": "relu", "num_layers": 2},
    {"proj_size": 3},
    {"proj_size": 2, "num_layers": 2, "bidirectional": True},
]


def options_of(torchs):
    allowed = {nn.RNN: "nonlinearity", nn.LSTM: "proj_size"}.get(torchs)
    return [o for o in OPTIONS if not (o.keys() & {"nonlinearity", "proj_size"}) - {allowed}]


def results_agree(rnn, reference, x, hx, tolerance="float64"):
    """Outputs and all gradients."""
    result, wanted = rnn(x, hx), reference(x, hx)
    assert type(result[0]) is type(wanted[0])
    assert isinstance(result[1], tuple) is isinstance(wanted[1], tuple)
    assert_close(flat(result), flat(wanted), tolerance)
    inputs = [t for t in flat([x, [] if hx is None else hx]) if t.requires_grad]
    ours = gradients(flat(result), [*inputs, *rnn.parameters()])
    torchs = gradients(flat(wanted), [*inputs, *reference.parameters()])
    assert_close(ours, torchs, tolerance)
    with torch.no_grad():
        assert_close(flat(rnn(x, hx)), flat(wanted), tolerance)


@each
def test_same_seed_same_parameters(ours, torchs):
    for options in options_of(torchs):
        rnn, reference = pair(ours, torchs, 5, 7, **options)
        assert list(rnn.state_dict()) == list(reference.state_dict())
        for (name, a), (other, b) in zip(rnn.named_parameters(), reference.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(a, b)
        assert repr(rnn) == repr(reference)
        assert rnn._all_weights == reference._all_weights
        for name in ("mode", "input_size", "hidden_size", "bias", "dropout", "proj_size", "_flat_weights_names"):
            assert getattr(rnn, name) == getattr(reference, name)


def test_nonlinearity_in_fourth_place():
    for cls in (fastseq.RNN, fastseq.compat.RNN):
        rnn = cls(3, 4, 2, "relu", False, True)
        assert (rnn.mode, rnn.nonlinearity, rnn.bias, rnn.batch_first) == ("RNN_RELU", "relu", False, True)
        assert repr(rnn) == "RNN(3, 4, num_layers=2, bias=False, batch_first=True)"
    assert fastseq.LSTM(3, 4, 2, False).bias is False


@each
@pytest.mark.parametrize("hx_given", [False, True])
def test_batched(ours, torchs, hx_given):
    for options, (steps, batch, inputs, hidden) in itertools.product(
        options_of(torchs), [(7, 5, 3, 9), (1, 1, 1, 7), (1, 7, 63, 17), (9, 1, 7, 65)]
    ):
        rnn, reference = pair(ours, torchs, inputs, hidden, **options)
        shape = (batch, steps, inputs) if rnn.batch_first else (steps, batch, inputs)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        results_agree(rnn, reference, x, random_hx(rnn, batch, requires_grad=True) if hx_given else None)


@each
def test_unbatched(ours, torchs):
    for options in options_of(torchs):
        rnn, reference = pair(ours, torchs, 3, 4, **options)
        x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
        results_agree(rnn, reference, x, None)
        states = random_hx(rnn, 1)
        hx = tuple(s[:, 0].requires_grad_() for s in states) if rnn.mode == "LSTM" else states[:, 0].requires_grad_()
        results_agree(rnn, reference, x, hx)


@each
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed(ours, torchs, enforce_sorted):
    lengths = [7, 6, 3, 3, 1] if enforce_sorted else [3, 7, 1, 6, 3]
    for options, hx_given in itertools.product(options_of(torchs), [False, True]):
        rnn, reference = pair(ours, torchs, 3, 4, **options)
        padded = torch.randn(7, 5, 3, dtype=torch.float64)
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=enforce_sorted)
        x = PackedSequence(packed.data.requires_grad_(), *packed[1:])
        hx = random_hx(rnn, 5, requires_grad=True) if hx_given else None
        results_agree(rnn, reference, x, hx)
        y, _ = rnn(x, hx)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            assert getattr(y, name) is getattr(x, name)


@each
def test_long_and_large_in_float32(ours, torchs):
    for steps, batch, hidden in [(200, 3, 65), (5, 33, 129)]:
        rnn, reference = pair(ours, torchs, 31, hidden, bidirectional=True, dtype=torch.float32)
        with torch.no_grad():
            x = torch.randn(steps, batch, 31)
            assert_close(flat(rnn(x)), flat(reference(x)), "float32")


@each
def test_strided_inputs(ours, torchs):
    rnn, reference = pair(ours, torchs, 3, 4, 2)
    x = torch.randn(3, 5, 7, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    results_agree(rnn, reference, x, None)
    x = torch.randn(7, 1, 3, dtype=torch.float64).expand(7, 5, 3).requires_grad_()
    states = [torch.randn(1, 1, 4, dtype=torch.float64).expand(2, 5, 4).requires_grad_() for _ in range(2)]
    results_agree(rnn, reference, x, tuple(states) if rnn.mode == "LSTM" else states[0])
    states = [torch.randn(4, 5, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_() for _ in range(2)]
    results_agree(rnn, reference, x, tuple(states) if rnn.mode == "LSTM" else states[0])


@each
def test_lists_as_hx(ours, torchs):
    rnn, reference = pair(ours, torchs, 3, 4)
    if rnn.mode == "LSTM":
        x, hx = torch.randn(7, 5, 3, dtype=torch.float64), random_hx(rnn, 5)
        assert_close(flat(rnn(x, list(hx))), flat(reference(x, list(hx))))
        assert_close(flat(rnn(input=x, hx=hx)), flat(reference(input=x, hx=hx)))


@each
def test_empty_batch(ours, torchs):
    rnn, reference = pair(ours, torchs, 3, 4, 2, bidirectional=True)
    x = torch.randn(7, 0, 3, dtype=torch.float64, requires_grad=True)
    results_agree(rnn, reference, x, None)
    y, _ = rnn(x, lengths=[], reset=torch.zeros(7, 0, dtype=torch.bool))
    assert y.shape == (7, 0, 8)


@each
def test_dropout_draws_what_torch_draws(ours, torchs):
    for options in ({}, {"bidirectional": True}, {"batch_first": True}):
        rnn, reference = pair(ours, torchs, 3, 16, 3, dropout=0.5, **options)
        x = torch.randn(7, 5, 3, dtype=torch.float64)
        packed = pack_padded_sequence(x, [5, 7, 2, 4, 1], enforce_sorted=False)
        if rnn.batch_first:
            x = x.transpose(0, 1)
        for p, inputs in itertools.product([0.5, 0.1, 1.0, 0.0], [x, packed]):
            rnn.dropout = reference.dropout = p
            results = []
            for module in (rnn, reference):
                torch.manual_seed(3)
                results.append([*flat(module(inputs)), torch.rand(1)])
            assert_close(*results)
            assert all(t.isfinite().all() for t in results[0])
        rnn.dropout = 0.5
        assert not torch.equal(rnn(x)[0], rnn(x)[0])
        rnn.eval()
        assert torch.equal(rnn(x)[0], rnn(x)[0])


@each
def test_partial_gradients(ours, torchs):
    """Only h_n, only c_n, frozen weights, an input without gradient, two backwards through one graph."""
    rnn, reference = pair(ours, torchs, 3, 4, 2, bidirectional=True)
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    for place in range(len(flat(rnn(x)))):
        results = [torch.autograd.grad(flat(m(x))[place].sum(), [x, *m.parameters()]) for m in (rnn, reference)]
        assert_close(*results)
    for module in (rnn, reference):
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l1.requires_grad_(False)
    for inputs in (x, x.detach()):
        grads = []
        for module in (rnn, reference):
            module.zero_grad()
            y = module(inputs)[0]
            y.sum().backward(retain_graph=True)
            y.sin().sum().backward(retain_graph=True)
            y.cos().sum().backward()
            grads.append([p.grad for p in module.parameters() if p.requires_grad])
            assert module.weight_hh_l0.grad is None
            with pytest.raises(RuntimeError, match="second time"):
                y.sum().backward()
        assert_close(*grads)
    for p in rnn.parameters():
        p.requires_grad_(False)
    assert not rnn(x.detach())[0].requires_grad
    assert rnn(x)[0].requires_grad


@each
def test_changes_before_backward(ours, torchs):
    """A changed weight is torch's error; a changed output is not, as for torch's RNN and GRU."""
    rnn, reference = pair(ours, torchs, 3, 4)
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    y, _ = rnn(x)
    with torch.no_grad():
        rnn.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        rnn.weight_hh_l0.sub_(1)
        reference.load_state_dict(rnn.state_dict())
    grads = []
    for module in (rnn, reference):
        y, hx = module(x)
        y.mul_(2)
        flat(hx)[0].add_(1)
        grads.append(gradients([y, flat(hx)[0]], [x, *module.parameters()]))
    assert_close(*grads)


@each
def test_swapped_tied_and_missing_weights(ours, torchs):
    rnn, reference = pair(ours, torchs, 3, 4, bidirectional=True)
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    for module in (rnn, reference):
        module.bias_ih_l0_reverse = module.bias_ih_l0
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 2)
    assert len(list(rnn.parameters())) == 7
    results_agree(rnn, reference, x, None)

    weight = rnn.weight_hh_l0
    del rnn.weight_hh_l0, reference.weight_hh_l0
    rnn.to(torch.float64)
    for module in (rnn, reference):
        module.weight_hh_l0 = weight.detach() * 3  # a plain tensor
    assert_close(flat(rnn(x)), flat(reference(x)))

    del rnn.weight_hh_l0, reference.weight_hh_l0
    assert_close(flat(rnn(x)), flat(reference(x)))  # torch goes on with the last one it had


@each
def test_state_goes_to_torch_and_back(ours, torchs):
    rnn, reference = pair(ours, torchs, 3, 4, 2)
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    wanted = flat(reference(x))
    torch.manual_seed(7)
    other = ours(3, 4, 2, dtype=torch.float64)
    other.load_state_dict(reference.state_dict())
    assert_close(flat(other(x)), wanted)
    other = ours(3, 4, 2, device="meta", dtype=torch.float64)
    other.load_state_dict(reference.state_dict(), assign=True)
    assert_close(flat(other(x)), wanted)
    reference.load_state_dict(rnn.state_dict())


@each
def test_copies_and_pickles(ours, torchs):
    rnn = pair(ours, torchs, 3, 4, 2, bidirectional=True)[0]
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    fastseq.freeze(rnn)
    with torch.no_grad():
        wanted = flat(rnn(x))  # packs the weights
    buffer = io.BytesIO()
    torch.save(rnn, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), saved, copy.copy(rnn)):
        assert type(other) is ours
        with torch.no_grad():
            assert_close(flat(other(x)), wanted)
        if other.weight_ih_l0 is not rnn.weight_ih_l0:
            with torch.no_grad():
                other.weight_ih_l0.zero_()
                assert not torch.equal(flat(other(x))[0], wanted[0])
    state = rnn.__getstate__()
    del state["proj_size"]  # as in files older than torch 1.8
    old = ours.__new__(ours)
    old.__setstate__(state)
    assert_close(flat(old(x)), wanted)


@each
def test_functional_call(ours, torchs):
    rnn, reference = pair(ours, torchs, 3, 4, 2)
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    weights = {k: (v * 0.5).detach().requires_grad_() for k, v in rnn.named_parameters()}
    results = [torch.func.functional_call(m, weights, (x,)) for m in (rnn, reference)]
    assert_close(*map(flat, results))
    assert_close(*(gradients(flat(r), list(weights.values())) for r in results))
    with torch.no_grad():
        first = flat(rnn(x))
        assert_close(flat(torch.func.functional_call(rnn, weights, (x,))), flat(results[1]))
        assert_close(flat(rnn(x)), first)


@each
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_weight_norm_and_parametrizations(ours, torchs):
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    for wrap in (
        lambda m: nn.utils.parametrizations.weight_norm(m, "weight_hh_l0"),
        lambda m: nn.utils.weight_norm(m, "weight_ih_l0"),
        lambda m: nn.utils.parametrizations.spectral_norm(m, "weight_hh_l0"),
        lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    ):
        modules = pair(ours, torchs, 3, 4)
        for module in modules:
            torch.manual_seed(4)
            wrap(module)
            module.eval()
        results_agree(*modules, x, None)
        with torch.no_grad():
            for module in modules:
                for p in module.parameters():
                    p.mul_(1.5)
            assert_close(*(flat(m(x)) for m in modules))


@each
def test_devices_and_dtypes(ours, torchs):
    rnn, reference = pair(ours, torchs, 3, 4, 2)
    y, _ = rnn.to("meta")(torch.randn(7, 5, 3, device="meta", dtype=torch.float64))
    assert y.device.type == "meta"
    assert y.shape == (7, 5, 4)
    rnn = ours(3, 4, 2, device="meta").to_empty(device="cpu")
    rnn.load_state_dict(reference.state_dict())
    x = torch.randn(7, 5, 3)
    for dtype in (torch.float32, torch.float64):
        rnn, reference, x = rnn.to(dtype), reference.to(dtype), x.to(dtype)
        with torch.no_grad():
            assert_close(flat(rnn(x)), flat(reference(x)), str(dtype).removeprefix("torch."))
    rnn = rnn.half()
    assert rnn(x.half())[0].dtype is torch.float16
    rnn = rnn.bfloat16()
    assert rnn(x.bfloat16())[0].dtype is torch.bfloat16
    assert flat(rnn(x.bfloat16())[1])[0].dtype is torch.bfloat16


@each
def test_constructor_errors_are_torchs(ours, torchs):
    for args, kwargs in [
        ((), {}),
        ((3,), {}),
        ((3.0, 4), {}),
        ((0, 4), {}),
        ((3, "4"), {}),
        ((3, -1), {}),
        ((3, 4), {"num_layers": 0}),
        ((3, 4), {"bias": 1}),
        ((3, 4), {"batch_first": 0}),
        ((3, 4), {"dropout": 1.5}),
        ((3, 4), {"dropout": True}),
        ((3, 4), {"dropout": "0.5"}),
        ((3, 4), {"proj_size": 4}),
        ((3, 4), {"proj_size": -1}),
        ((3, 4), {"proj_size": 0}),
        ((3, 4), {"nonlinearity": "selu"}),
        ((3, 4, 1, "selu"), {}),
        ((3, 4), {"unknown": 1}),
    ]:
        errors = []
        for cls in (torchs, ours):
            try:
                cls(*args, **kwargs)
                errors.append(None)
            except Exception as error:
                errors.append(error)
        wanted, error = errors
        assert type(error) is type(wanted)
        if wanted is not None and "__init__()" not in str(wanted):
            assert str(error).startswith(str(wanted))


@each
def test_dropout_of_one_layer_warns(ours, torchs):
    for cls in (ours, torchs):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            cls(3, 4, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(3, 4, 2, dropout=0.5)


@each
def test_torchs_methods_are_there(ours, torchs):
    rnn = ours(3, 4)
    assert len(rnn.all_weights) == 1
    rnn.flatten_parameters()
    rnn.reset_parameters()
    x, hx = torch.randn(7, 5, 3), torch.zeros(1, 5, 4)
    rnn.check_input(x, None)
    assert rnn.get_expected_hidden_size(x, None) == (1, 5, 4)
    rnn.check_forward_args(x, (hx, hx) if rnn.mode == "LSTM" else hx, None)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 5, 4\), got \[1, 5, 4, 1\]"):
        rnn.check_hidden_size(hx[..., None], (1, 5, 4))
    permuted = rnn.permute_hidden((hx, hx) if rnn.mode == "LSTM" else hx, torch.arange(5))
    assert flat(permuted)[0].shape == (1, 5, 4)
    assert isinstance(rnn, torchs) is (ours.__module__ == "fastseq.compat")
    assert isinstance(rnn, nn.RNNBase)


def test_replicas_for_data_parallel():
    rnn = fastseq.LSTM(3, 4)
    replica = rnn._replicate_for_data_parallel()
    for name in rnn._flat_weights_names:
        setattr(replica, name, getattr(rnn, name) * 2)  # as torch.nn.parallel.replicate does: not parameters
    x = torch.randn(7, 5, 3)
    doubled = copy.deepcopy(rnn)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    assert_close(flat(replica(x)), flat(doubled(x)), "float32")


def test_packed_of_one():
    rnn, reference = pair(fastseq.GRU, nn.GRU, 3, 4)
    x = pack_sequence([torch.randn(1, 3, dtype=torch.float64)])
    assert_close(flat(rnn(x)), flat(reference(x)))

"""The functions: fastseq.rnn, lstm, gru and their cells, and the autograd Functions behind them."""

import doctest
import importlib
import itertools
import pkgutil

import loop
import pytest
import torch
from cases import SHAPES, SMALL_SHAPES
from interpreter import run
from models import assert_close, flat, gradients
from torch import _VF

import fastseq
from fastseq import backends, ops

routes = pytest.mark.usefixtures("route")
each = pytest.mark.parametrize("cell", [name for name, cell in ops.CELLS.items() if cell.sequence_op])  # of functions


def inputs(cell, shape, bias=True, dtype=torch.float64, requires_grad=True):
    torch.manual_seed(0)
    B, T, I, H = shape  # noqa: E741
    G = len(ops.CELLS[cell].gates)
    sizes = [(T, B, I), (B, H), (B, H), (G * H, I), (G * H, H), (G * H,), (G * H,)]
    tensors = [torch.randn(size, dtype=dtype) * (1 if i < 3 else H**-0.5) for i, size in enumerate(sizes)]
    tensors = [t.requires_grad_(requires_grad) for t in tensors]
    if not bias:
        tensors[5:] = None, None
    if cell != "lstm":
        tensors[2] = None
    return tensors


def call(cell, x, h_0, c_0, *weights, **options):
    if cell == "lstm":
        return flat(fastseq.lstm(x, None if h_0 is None else (h_0, c_0), *weights, **options))
    if cell == "gru":
        return flat(fastseq.gru(x, h_0, *weights, **options))
    return flat(fastseq.rnn(x, h_0, *weights, nonlinearity=cell.removeprefix("rnn_"), **options))


def call_cell(cell, x, h, c, *weights):
    if cell == "lstm":
        return fastseq.lstm_cell(x, (h, c), *weights)
    if cell == "gru":
        return (fastseq.gru_cell(x, h, *weights),)
    return (fastseq.rnn_cell(x, h, *weights, nonlinearity=cell.removeprefix("rnn_")),)


@routes
@each
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [*SMALL_SHAPES, SHAPES[6]], ids=lambda shape: shape.id)
def test_sequences(cell, shape, reverse):
    for bias, states, ragged, cuts in itertools.product(*[[False, True]] * 4):
        x, h_0, c_0, *weights = inputs(cell, shape, bias)
        if not states:
            h_0 = c_0 = None
        lengths = torch.randint(0, shape.T + 1, (shape.B,)).tolist() if ragged else None
        reset = torch.rand(shape.T, shape.B) < 0.3 if cuts else None
        result = call(cell, x, h_0, c_0, *weights, lengths=lengths, reset=reset, reverse=reverse, return_states=True)
        y, h_n, c_n, c_all = loop.layer(cell, x, h_0, c_0, weights, lengths, reset, reverse)
        wanted = [y, h_n, c_n, y, c_all] if cell == "lstm" else [y, h_n, y]
        assert_close(result, wanted)
        leaves = [t for t in (x, h_0, c_0, *weights) if t is not None]
        assert_close(gradients(result, leaves), gradients(wanted, leaves))
        with torch.no_grad():
            assert_close(call(cell, x, h_0, c_0, *weights, lengths=lengths, reset=reset, reverse=reverse), wanted[: 3 if cell == "lstm" else 2])  # fmt: skip  # noqa: E501


@routes
@each
def test_cells(cell):
    for shape, bias in itertools.product([*SMALL_SHAPES, SHAPES[6]], [False, True]):
        x, h, c, *weights = inputs(cell, shape, bias)
        x = x[0].detach().requires_grad_()
        result = call_cell(cell, x, h, c, *weights)
        op = {"lstm": _VF.lstm_cell, "gru": _VF.gru_cell}.get(cell, getattr(_VF, f"{cell}_cell", None))
        wanted = op(x, (h, c) if cell == "lstm" else h, *weights)
        wanted = wanted if cell == "lstm" else (wanted,)
        assert_close(list(result), list(wanted))
        leaves = [t for t in (x, h, c, *weights) if t is not None]
        assert_close(gradients(result, leaves), gradients(wanted, leaves))


@routes
@each
def test_gradcheck(cell):
    tensors = inputs(cell, SMALL_SHAPES[3])
    reset = torch.rand(6, 4) < 0.3
    given = [t for t in tensors if t is not None]

    def run(*leaves):
        leaves = iter(leaves)
        arguments = [None if t is None else next(leaves) for t in tensors]
        return tuple(call(cell, *arguments, lengths=[4, 6, 0, 3], reset=reset, return_states=True))

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


@routes
@each
def test_float32_states_of_bfloat16(cell):
    x, h_0, c_0, *weights = inputs(cell, SMALL_SHAPES[4], dtype=torch.bfloat16)
    h_0, c_0 = (None if s is None else s.detach().float().requires_grad_() for s in (h_0, c_0))
    y, h_n, *_ = call(cell, x, h_0, c_0, *weights)
    assert y.dtype is torch.bfloat16
    assert h_n.dtype is torch.float32
    dh_0, dx = torch.autograd.grad(h_n.sum() + y.float().sum(), [h_0, x])
    assert dh_0.dtype is torch.float32
    assert dx.dtype is torch.bfloat16


def wrong(cell):
    x, h_0, c_0, w_ih, w_hh, b_ih, b_hh = inputs(cell, (5, 7, 3, 4), dtype=torch.float32, requires_grad=False)
    weights = w_ih, w_hh, b_ih, b_hh
    yield (None, h_0, c_0, *weights), TypeError, "input must be a Tensor, got NoneType"
    yield (x, h_0, c_0, None, w_hh), TypeError, "w_ih must be a Tensor, got NoneType"
    yield (x, h_0, c_0, w_ih, [1.0]), TypeError, "w_hh must be a Tensor, got list"
    yield (x[0], h_0, c_0, *weights), ValueError, r"Expected input to be 3D, \(T, B, I\), got 2D instead"
    yield (x[..., :2], h_0, c_0, *weights), RuntimeError, "must be equal to input_size. Expected 3, got 2"
    yield (x, h_0[:4], c_0, *weights), RuntimeError, r"Expected hidden size \(5, 4\), got \[4, 4\] for h_0"
    yield (x, h_0, c_0, w_ih[:-1], *weights[1:]), RuntimeError, "w_ih must have shape"
    yield (x, h_0, c_0, w_ih, w_hh[:-1], b_ih, b_hh), RuntimeError, "w_hh must have shape"
    yield (x, h_0, c_0, w_ih, w_hh[0], b_ih, b_hh), RuntimeError, "w_hh must have shape"
    yield (x, h_0, c_0, w_ih, w_hh, b_ih), ValueError, "b_ih and b_hh must both be given or both be None"
    yield (x, h_0, c_0, w_ih, w_hh, b_ih, b_hh[1:]), RuntimeError, "b_hh must have shape"
    yield (x.double(), h_0, c_0, *weights), ValueError, "RNN input dtype .* does not match w_ih dtype"
    yield (x, h_0.double(), c_0, *weights), ValueError, "does not match h_0 dtype"
    yield (x.to("meta"), h_0, c_0, *weights), RuntimeError, "parameter tensors are not at the same device"
    yield (x, h_0.to("meta"), c_0, *weights), RuntimeError, "hidden tensors are not at the same device"
    yield (x[:0], h_0, c_0, *weights), RuntimeError, "Expected sequence length to be larger than 0 in RNN, got input"


@routes
@each
def test_wrong_arguments(cell):
    for arguments, error, text in wrong(cell):
        with pytest.raises(error, match=text):
            call(cell, *arguments)
    x, h_0, c_0, *weights = inputs(cell, (5, 7, 3, 4))
    with pytest.raises(TypeError, match="lengths must be integers"):
        call(cell, x, h_0, c_0, *weights, lengths=[1.0] * 5)
    with pytest.raises(ValueError, match="lengths must lie in"):
        call(cell, x, h_0, c_0, *weights, lengths=[8] * 5)
    with pytest.raises(ValueError, match="reset must have the shape"):
        call(cell, x, h_0, c_0, *weights, reset=torch.zeros(5, 7, dtype=torch.bool))


@routes
def test_wrong_arguments_of_single_functions():
    x, h, c, *weights = inputs("lstm", (5, 7, 3, 4))
    with pytest.raises(RuntimeError, match=r"lstm expects two hidden states, \(h, c\), got a sequence of 1"):
        fastseq.lstm(x, (h,), *weights)
    with pytest.raises(TypeError, match=r"lstm_cell: hx must be a tuple of Tensors, \(h, c\), got Tensor"):
        fastseq.lstm_cell(x[0], h, *weights)
    with pytest.raises(TypeError, match="c must be a Tensor, got NoneType"):
        fastseq.lstm(x, (h, None), *weights)
    with pytest.raises(RuntimeError):
        fastseq.lstm_cell(x[0], (h, c[:, :3]), *weights)
    x, h, _, *weights = inputs("gru", (5, 7, 3, 4))
    with pytest.raises(RuntimeError, match="input has inconsistent input_size: got 2 expected 3"):
        fastseq.gru_cell(x[0, :, :2], h, *weights)
    with pytest.raises(TypeError, match="hx must be a Tensor, got NoneType"):
        fastseq.gru_cell(x[0], None, *weights)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'selu'"):
        fastseq.rnn(*inputs("rnn_tanh", (5, 7, 3, 4))[:2], *weights, nonlinearity="selu")


@routes
@each
def test_other_dtypes_and_devices(cell):
    for dtype in (torch.float16, torch.bfloat16):
        x, h_0, c_0, *weights = inputs(cell, (5, 7, 16, 16), dtype=dtype)
        result = call(cell, x, h_0, c_0, *weights, lengths=[1, 2, 3, 4, 7], return_states=True)
        assert all(t.dtype is dtype for t in result)
    tensors = [None if t is None else t.to("meta") for t in inputs(cell, (5, 7, 3, 4))]
    result = call(cell, *tensors, lengths=[1, 2, 3, 4, 7], reset=torch.zeros(7, 5, dtype=torch.bool, device="meta"))
    assert result[0].device.type == "meta"
    assert result[0].shape == (7, 5, 4)


@routes
@each
def test_compile(cell):
    torch._dynamo.reset()
    tensors = inputs(cell, (5, 7, 3, 4))
    lengths, reset = torch.tensor([3, 0, 7, 2, 5]), torch.rand(7, 5) < 0.3
    compiled = torch.compile(lambda *t: call(cell, *t, lengths=lengths, reset=reset, reverse=True), backend="aot_eager")
    result, wanted = compiled(*tensors), call(cell, *tensors, lengths=lengths, reset=reset, reverse=True)
    leaves = [t for t in tensors if t is not None]
    assert_close(result, wanted)
    assert_close(gradients(result, leaves), gradients(wanted, leaves))


@each
def test_functions_are_public(cell):
    backend = backends.select("recurrent")
    if backend is None:
        pytest.skip("they call the kernels")
    x, h_0, c_0, *weights = inputs(cell, (5, 7, 3, 4))
    spec = ops.CELLS[cell]
    states = (h_0, c_0)[: 1 + len(spec.states)]
    y, h_n, *_ = ops.RecurrentFunction.apply(ops.Layer(spec), backend, x, *(s[None] for s in states), *weights)
    assert_close([y, h_n[0]], call(cell, x, h_0, c_0, *weights)[:2])
    step = ops.StepFunction.apply(spec, backend, x[0], *states, *weights)
    assert_close(step[0], call_cell(cell, x[0], h_0, c_0, *weights)[0])
    leaves = [t for t in (x, h_0, c_0, *weights) if t is not None]
    assert_close(gradients([y], leaves), gradients(call(cell, x, h_0, c_0, *weights)[:1], leaves))


def test_the_short_way_into_autograd():
    """A torch where it is closed works, slower; the one tested with has it."""
    from fastseq.ops.recurrent import function

    for apply in (function._apply_layer, function._apply_step):
        assert type(apply).__name__ == "builtin_function_or_method"


def test_public_names_are_there():
    """In a process that has imported nothing else."""
    found = run("import fastseq; print(*[n for n in fastseq.__all__ if hasattr(fastseq, n)])").split()
    assert found == fastseq.__all__
    assert {"compat", "ops", "reference"} <= set(found)


def test_the_table_of_what_is_served():
    assert all(row.case and row.reason and row.served_by in ("kernels", "torch", "torch ops") for row in ops.SERVICE)


@pytest.mark.parametrize(
    "name",
    ["fastseq.compat", "fastseq.sdpa_patch", "fastseq.swap"]
    + [
        module.name
        for package in (fastseq.ops, fastseq.nn)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ],
)
def test_examples(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0

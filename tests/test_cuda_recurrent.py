"""The recurrent kernels on a GPU: the comparison of `fastseq verify` with cuDNN as torch's side, and what only a GPU
has: streams, devices, graphs, TF32. Where there is none, tests/test_cuda_on_host.py is what can be shown.
"""

import cases
import pytest
import torch
from cases import LENGTHS, LONG_SHAPES, RESET, SHAPES
from cuda_device import DEVICE, cuda, ignore_first_use, tf32
from models import flat
from torch.autograd import gradcheck
from torch.nn.utils.rnn import pack_padded_sequence
from torch_samples import each_recurrent, samples_agree

import fastseq
from fastseq import backends
from fastseq.ops import CELLS
from fastseq.tools.verify import FAMILIES
from fastseq.tools.verify.recurrent import Case

DTYPES = ("float32", "float64", "bfloat16", "float16")
OPTIONS = ({}, {"bias": False}, {"lengths": True}, {"packed": True}, {"reset": True}, {"lengths": True, "reset": True})
MODULES = ("RNN", "LSTM", "GRU")
pytestmark = ignore_first_use


@pytest.fixture(autouse=True)
def selected():
    assert backends.select("recurrent", "cuda") is cuda


@pytest.fixture
def exact_products():
    """Without TF32, whatever ran before."""
    with tf32(False):
        yield


def check(cell, case, dtype, seed=0):
    cases.check(FAMILIES[cell], cuda, case, getattr(torch, dtype), seed=seed, device=DEVICE, trust_torch=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_case(cell, dtype, exact_products):
    for seed, case in enumerate(FAMILIES[cell].cases(dtype)):
        check(cell, case, dtype, seed)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes(cell, dtype, options, exact_products):
    """Also what bench/cuda_check.sh runs under compute-sanitizer."""
    for T, B, I, H in ((1, 1, 1, 1), (5, 7, 1, 65), (3, 33, 7, 33)):  # noqa: E741
        for reverse in (False, True):
            check(cell, Case(T, B, I, H, reverse=reverse, **options), dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_tf32(cell):
    with tf32(True):
        for seed, case in enumerate(FAMILIES[cell].cases("float32")):
            check(cell, case, "float32", seed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("cell", CELLS)
def test_shapes(cell, shape, dtype, exact_products):
    check(cell, Case(shape.T, shape.B, shape.I, shape.H), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("cell", CELLS)
def test_long(cell, shape, dtype, exact_products):
    check(cell, Case(shape.T, shape.B, shape.I, shape.H), dtype)


# ---- through the modules


def module_and_input(name, T=7, B=5, I=9, H=33, dtype=torch.float32, **options):  # noqa: E741
    torch.manual_seed(0)
    module = getattr(fastseq, name)(I, H, **options).to(DEVICE, dtype)
    x = torch.randn(T, B, I).to(DEVICE, dtype).requires_grad_()
    return module, x


def results_of(module, x, **options):
    """Outputs and all gradients."""
    outputs = flat(module(x, **options))
    inputs = [x, *module.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(a) for a in outputs])]


def assert_equal(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODULES)
def test_calls_take_the_kernels(name, dtype, monkeypatch):
    called = []

    def record(name):
        run = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *args, **kwargs: called.append(name) or run(*args, **kwargs))

    for function in ("recurrent_forward", "recurrent_backward", "recurrent_step"):
        record(function)
    module, x = module_and_input(name, dtype=getattr(torch, dtype))
    results_of(module, x)
    with torch.no_grad():
        module(x)
        module.step(x[0])
        getattr(fastseq, f"{name}Cell")(9, 33, device=DEVICE, dtype=x.dtype)(x[0])
    assert called == ["recurrent_forward", "recurrent_backward", "recurrent_forward", *["recurrent_step"] * 2]


@pytest.mark.parametrize(
    "options", [{}, {"lengths": LENGTHS}, {"reset": RESET}, {"lengths": LENGTHS, "reset": RESET}], ids=str
)
@pytest.mark.parametrize("name", MODULES)
def test_gradcheck(name, options):
    """The kernels' gradients, which must also be the same in bits each time."""
    options = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    module, x = module_and_input(name, 4, 3, 2, 5, torch.float64, num_layers=2, bidirectional=True)
    names, weights = zip(*module.named_parameters(), strict=True)

    def call(x, *weights):
        return flat(torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x, options))

    assert gradcheck(call, (x, *weights))


@pytest.mark.parametrize("name", MODULES)
def test_gradcheck_of_cells(name):
    torch.manual_seed(0)
    module = getattr(fastseq, f"{name}Cell")(2, 5, device=DEVICE, dtype=torch.float64)
    x = torch.randn(3, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, *_: flat(module(x)), (x, *module.parameters()))


@each_recurrent
def test_samples_of_torch(ours, torchs):
    samples_agree(ours, torchs, DEVICE)


@pytest.mark.parametrize("name", MODULES)
def test_lengths_packing_and_order_agree(name, exact_products):
    module, x = module_and_input(name, dtype=torch.float64, bidirectional=True)
    lengths = torch.tensor([3, 7, 1, 5, 7])
    y, states = module(x, lengths=lengths)
    packed, packed_states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    torch.testing.assert_close(padded, y)
    torch.testing.assert_close(packed_states, states)
    on_gpu, _ = module(x, lengths=lengths.to(DEVICE))
    assert torch.equal(on_gpu, y)


@pytest.mark.parametrize("name", MODULES)
def test_an_empty_batch_is_torchs(name):
    module, x = module_and_input(name, B=0)
    reference = getattr(torch.nn, name)(9, 33, device=DEVICE)
    try:
        expected = flat(reference(x))
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20].replace("(", r"\(")):
            module(x)
    else:
        assert [a.shape for a in flat(module(x))] == [a.shape for a in expected]


@pytest.mark.parametrize("name", MODULES)
def test_steps_follow_the_sequence(name, exact_products):
    module, x = module_and_input(name, dtype=torch.float64)
    with torch.no_grad():
        y, _ = module(x)
        state, steps = None, []
        for x_t in x:
            step, state = module.step(x_t, state)
            steps.append(step)
    torch.testing.assert_close(torch.stack(steps), y)
    with torch.no_grad():
        torch.testing.assert_close(fastseq.freeze(module)(x)[0], y)


@pytest.mark.parametrize("name", MODULES)
def test_runs_repeat_in_bits(name):
    module, x = module_and_input(name, 33, 17, 65, 129, num_layers=2, bidirectional=True)
    expected = results_of(module, x)
    for _ in range(50):
        assert_equal(results_of(module, x), expected)


@pytest.mark.parametrize("name", MODULES)
def test_compiled(name, exact_products):
    module, x = module_and_input(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results_of(compiled, x), results_of(module, x))


def test_what_torch_serves():
    """Autocast, double backward and a mix of devices."""
    module, x = module_and_input("LSTM")
    with torch.autocast("cuda", dtype=torch.float16):
        assert module(x)[0].dtype is torch.float16
    y, _ = module(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.square().sum(), x)[0].isfinite().all()
    with pytest.raises((RuntimeError, ValueError), match="device"):
        module(x.cpu())
    with pytest.raises((RuntimeError, ValueError), match="device"):
        module(x, (torch.zeros(1, 5, 33), torch.zeros(1, 5, 33)))


# ---- streams, devices, graphs


@pytest.mark.parametrize("name", MODULES)
def test_another_stream(name):
    """The input is written late, on the same stream: a launch or an allocation elsewhere would see the old one."""
    module, x = module_and_input(name)
    expected = results_of(module, x)
    stream = torch.cuda.Stream()
    for _ in range(3):
        late = torch.full_like(x, float("nan")).requires_grad_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            late.data.copy_(x)
            results = results_of(module, late)
        stream.synchronize()
        assert_equal(results, expected)


@pytest.mark.parametrize("name", MODULES)
def test_another_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    module, x = module_and_input(name)
    expected = [a.cpu() for a in results_of(module, x)]
    other = torch.device("cuda", 1)
    results = results_of(module.to(other), x.detach().to(other).requires_grad_())
    assert torch.cuda.current_device() == 0
    assert {a.device for a in results} == {other}
    torch.testing.assert_close([a.cpu() for a in results], expected)


@pytest.mark.parametrize("options", [{}, {"reset": True}], ids=["plain", "reset"])
@pytest.mark.parametrize("name", MODULES)
def test_graph(name, options):
    """Captured once, replayed on other inputs."""
    module, x = module_and_input(name, num_layers=2, bidirectional=True)
    options = {"reset": torch.rand(7, 5, device=DEVICE) < 0.3} if options else {}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            results_of(module, x, **options)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results_of(module, x, **options)
    for seed in range(3):
        torch.manual_seed(seed)
        x.data.copy_(torch.randn_like(x))
        graph.replay()
        expected = results_of(module, x, **options)
        torch.cuda.synchronize()
        assert_equal(captured, expected)


def test_a_step_of_a_cell_is_captured():
    cell = fastseq.LSTMCell(9, 33, device=DEVICE)
    x, state = torch.randn(5, 9, device=DEVICE), (torch.zeros(5, 33, device=DEVICE),) * 2
    with torch.no_grad():
        expected = cell(x, state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cell(x, state)
        graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, expected)

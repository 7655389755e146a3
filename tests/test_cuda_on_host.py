"""The recurrent kernels of csrc/cuda, compiled by g++ with the headers in cuda_on_host/ and run on the CPU, by the
comparison of `fastseq verify`. What this cannot show is whatever only a GPU has: its exp and tanh, the code of its
compiler, races between blocks, streams, speed.
"""

import cases
import numpy as np
import pytest
import torch
from cases import assert_close

from fastseq import backends
from fastseq.backends.contract import Refused
from fastseq.ops import CELLS, Layer, RecurrentFunction, StepFunction
from fastseq.ops.lengths import packed_rows, padded_rows
from fastseq.tools.verify import FAMILIES
from fastseq.tools.verify.recurrent import Case, kernel_results, make_inputs

if backends.select("recurrent") is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

from fastseq.backends import cuda
from fastseq.backends.cuda import library

SHAPES = ((1, 1, 1, 1), (1, 7, 5, 33), (7, 1, 65, 7), (5, 7, 1, 65), (3, 33, 7, 33), (2, 65, 33, 1))
OPTIONS = (
    {},
    {"bias": False},
    {"lengths": True},
    {"packed": True},
    {"reset": True},
    {"lengths": True, "reset": True},
)


@pytest.fixture(autouse=True)
def emulation(cuda_on_host):
    with cuda.use_emulation(cuda_on_host):
        yield


def check(cell, case, dtype):
    cases.check(FAMILIES[cell], cuda, case, getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("cell", CELLS)
def test_every_case(cell, options, reverse, dtype):
    for T, B, I, H in SHAPES:  # noqa: E741
        check(cell, Case(T, B, I, H, reverse=reverse, **options), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_halves(cell, dtype):
    check(cell, Case(3, 33, 7, 33), dtype)
    check(cell, Case(5, 7, 1, 65, lengths=True, reset=True, reverse=True), dtype)
    if dtype == "bfloat16":
        check(cell, Case(5, 7, 9, 17, float_state=True), dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("cell", CELLS)
def test_the_order_of_threads_does_not_matter(cell, options, monkeypatch):
    """A thread that reads what another has yet to write, with no barrier between, gives another result in one order."""
    case = Case(3, 17, 9, 33, **options)
    inputs = make_inputs(cell, case, torch.float32)
    results = []
    for order in ("rising", "falling"):
        monkeypatch.setenv("EMULATION_ORDER", order)
        results.append([run for _, run in kernel_results(cell, cuda, case, inputs, "cuda")])
    for rising, falling in zip(*results, strict=True):
        assert all(np.array_equal(rising[name], falling[name]) for name in rising)


@pytest.mark.parametrize("rows", ["plain", "lengths", "packed"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_a_layer_in_two_directions(cell, rows):
    """Through autograd, as a module calls it: both directions into one output and one dx, states in and out."""
    torch.manual_seed(0)
    lengths = torch.tensor([5, 2, 0, 5, 3]) if rows == "lengths" else None
    x = torch.randn(12, 3, dtype=torch.float64) if rows == "packed" else torch.randn(5, 5, 3, dtype=torch.float64)
    rows = packed_rows(torch.tensor([5, 3, 2, 1, 1])) if rows == "packed" else None
    rows = padded_rows(lengths, 5, 5, x.device) if lengths is not None else rows
    spec = CELLS[cell]
    layer = Layer(spec, (False, True), rows, every_state=bool(spec.states))
    states = [torch.randn(2, 5, 7, dtype=torch.float64) for _ in ("h", *spec.states)]
    gates = 7 * len(spec.gates)
    weights = [
        torch.randn(size, dtype=torch.float64) for _ in range(2) for size in ((gates, 3), (gates, 7), gates, gates)
    ]
    tensors = [None if a is None else a.requires_grad_() for a in (x, *states, *weights)]
    results = []
    for backend in (cuda, backends.select("recurrent")):
        outputs = RecurrentFunction.apply(layer, backend, *tensors)
        ones = [torch.ones_like(a) for a in outputs]
        gradients = torch.autograd.grad(outputs, [a for a in tensors if a is not None], ones)
        results.append({str(n): a.detach().numpy() for n, a in enumerate((*outputs, *gradients))})
    assert_close(*results)


@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
def test_a_step(cell):
    inputs = make_inputs(cell, Case(1, 17, 9, 33), torch.float64)
    spec = CELLS[cell]
    states = (inputs.h_0, inputs.c_0)[: 1 + len(spec.states)]
    tensors = [a.requires_grad_() for a in (inputs.x[0], *states, *inputs.weights)]
    results = []
    for backend in (cuda, backends.select("recurrent")):
        outputs = StepFunction.apply(spec, backend, *tensors)
        gradients = torch.autograd.grad(outputs, [a for a in tensors if a is not None], [a.cos() for a in outputs])
        results.append({str(n): a.detach().numpy() for n, a in enumerate((*outputs, *gradients))})
    assert_close(*results)


def test_a_wrong_result_is_seen(monkeypatch):
    sound = cuda.recurrent_backward

    def damaged(*arguments, **options):
        gradients = sound(*arguments, **options)
        gradients[4].add_(1e-3)  # dw_hh
        return gradients

    monkeypatch.setattr(cuda, "recurrent_backward", damaged)
    with pytest.raises(AssertionError, match="training, .*: Verdict"):
        check("lstm", Case(3, 5, 7, 9), "float32")


def test_what_must_not_reach_a_kernel():
    x, w_ih, w_hh = torch.randn(3, 2, 5), torch.randn(12, 5), torch.randn(12, 4)
    with pytest.raises(Refused, match="w_ih and w_hh must have 9 rows, got 12 and 12"):
        cuda.recurrent_forward("gru", x, None, None, (w_ih, w_hh[:, :3].contiguous(), None, None))
    with pytest.raises(Refused, match="w_hh must have dtype float32, got float64"):
        cuda.recurrent_forward("gru", x, None, None, (w_ih, w_hh.double(), None, None))
    with pytest.raises(Refused, match="w_ih must have 5 columns in torch.float32 on cpu, got 5 in torch.float64"):
        cuda.recurrent_forward("gru", x, None, None, (w_ih.double(), w_hh, None, None))
    with pytest.raises(Refused, match="w_ih must have 5 columns .*, got 4"):
        cuda.recurrent_forward("gru", x, None, None, (w_ih[:, 1:], w_hh, None, None))
    with pytest.raises(Refused, match="2 dimensions, got 3 and 2"):
        cuda.recurrent_step("gru", x, None, None, w_ih, w_hh, None, None, 1)
    sizes = torch.tensor([1, 2, 2])
    with pytest.raises(Refused, match="batch_sizes must not increase"):
        cuda.recurrent_forward("gru", x, None, None, (w_ih, w_hh, None, None), batch_sizes=sizes)
    forward = ("gru", x, None, None, (w_ih, w_hh, None, None))
    y, *_, saved = cuda.recurrent_forward(*forward, save=True)
    options = {"dy": y, "dh_n": None, "dc_n": None, "dc_all": None, "needs": (True,) * 7}
    with pytest.raises(Refused, match="saved must have shape"):
        cuda.recurrent_backward(*forward, y, torch.cat((saved, saved)), "cuda", **options)
    for unknown in ({"resets": None}, {"read_x": True}):
        with pytest.raises(TypeError, match=f"got .* keyword argument '{next(iter(unknown))}'"):
            cuda.recurrent_forward(*forward, **unknown)
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            cuda.recurrent_backward(*forward, y, saved, "cuda", **options, **unknown)


# ---- off, unless it is asked for


def test_off_by_default(monkeypatch):
    for value in (None, "", "off"):
        monkeypatch.delenv("FASTSEQ_CUDA", raising=False)
        if value is not None:
            monkeypatch.setenv("FASTSEQ_CUDA", value)
        assert "off by default" in cuda.why_off()
    for value in ("yes", "auto"):
        monkeypatch.setenv("FASTSEQ_CUDA", value)
        with pytest.raises(ValueError, match=f"FASTSEQ_CUDA must be on or off, got '{value}'"):
            cuda.why_off()


def test_why_it_is_off_though_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSEQ_CUDA", "on")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libfastseq_cuda.so")
    assert "not built: `make cuda`, or FASTSEQ_BUILD_CUDA=on" in cuda.why_off()
    (tmp_path / "libfastseq_cuda.so").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.why_off() == "torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda.why_off() == ""
    with pytest.raises(OSError, match="libfastseq_cuda"), cuda.use_emulation(tmp_path / "libfastseq_cuda.so"):
        pass

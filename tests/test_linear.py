"""Linear layers: kernels against the reference, the function and the module around it against torch's."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from cases import check, each_dtype, error_rule, permutations
from models import assert_close
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fastseq
from fastseq import backends
from fastseq.backends.contract import Refused
from fastseq.ops import LinearFunction
from fastseq.tools.verify import linear

module = sys.modules[LinearFunction.__module__]


@pytest.fixture
def kernels_at_any_size(monkeypatch):
    """The sizes of tests are below those from which on the kernels are faster."""
    monkeypatch.setattr(module, "FEWEST_ROWS", 1)
    monkeypatch.setattr(module, "FEWEST_PRODUCTS", 1)
    monkeypatch.setattr(module, "_onednn_bfloat16", False)


@pytest.fixture
def calls(monkeypatch, native):
    """The names of the calls of linear_forward, pack_linear and checksum."""
    names = []
    for name in ("linear_forward", "pack_linear", "checksum"):
        function = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, f=function, n=name: names.append(n) or f(*args))
    return names


def make(*shape, dtype=torch.float64, requires_grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


@each_dtype
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", list(linear.cases("float32")), ids=str)
def test_kernels_as_exact_as_torch(native, case, threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(linear.FAMILY, native, case, dtype)
    finally:
        torch.set_num_threads(before)


@each_dtype
def test_any_number_of_threads_and_rows_gives_the_same_bits(native, dtype):
    x, weight, bias = make(150, 300, dtype=dtype), make(101, 300, dtype=dtype), make(101, dtype=dtype)
    results = [native.linear_forward(x, native.pack_linear(weight, bias, n), n) for n in (1, 2, 3)]
    assert all(torch.equal(results[0], r) for r in results)
    panels = native.pack_linear(weight, bias, 1)
    for rows in (slice(0, 1), slice(3, 5), slice(60, 149)):
        assert torch.equal(native.linear_forward(x[rows], panels, 2), results[0][rows])
    assert torch.equal(native.linear_forward(x[7], panels, 2), results[0][7])


def test_what_the_kernel_refuses(native):
    weight, bias = make(5, 3), make(5)
    panels = native.pack_linear(weight, bias, 1)
    assert panels.isa == native.active_isa()
    assert panels.nbytes > 0
    for call in (
        lambda: native.pack_linear(weight[0], bias, 1),
        lambda: native.pack_linear(weight.mT, None, 1),
        lambda: native.pack_linear(weight[:0], None, 1),
        lambda: native.pack_linear(weight, bias[1:], 1),
        lambda: native.pack_linear(weight, bias.float(), 1),
        lambda: native.pack_linear(weight.half(), None, 1),
        lambda: native.linear_forward(make(2, 3).float(), panels, 1),
        lambda: native.linear_forward([1.0], panels, 1),
        lambda: native.linear_forward(make(2, 4), panels, 1),
        lambda: native.linear_forward(make(3, 2).mT, panels, 1),
        lambda: native.linear_forward(make(0, 3), panels, 1),
        lambda: native.linear_forward(make(1, 2, 2, 3), panels, 1),
        lambda: native.linear_forward(make(1, 1, 3).expand(2**30, 2**30, 3), panels, 1),
    ):
        with pytest.raises(Refused):
            call()
    if len(native.isas()) > 1:
        with native.use_isa(native.isas()[0]), pytest.raises(Refused, match="packed for"):
            native.linear_forward(make(2, 3), panels, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_gradients(native, shape, bias):
    x, weight = make(*shape, requires_grad=True), make(9, 7, requires_grad=True)
    bias = make(9, requires_grad=True) if bias else None

    def function(*tensors):
        return LinearFunction.apply(native, *tensors)

    assert gradcheck(function, (x, weight, bias))
    assert gradgradcheck(function, (x, weight, bias))
    torch.testing.assert_close(function(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.usefixtures("kernels_at_any_size")
def test_bfloat16_gradients_as_exact_as_torchs(native, calls):
    shapes = {"x": (3, 21, 65), "weight": (33, 65), "bias": (33,), "dy": (3, 21, 33)}
    axes = {"x": "TBK", "weight": "NK", "bias": "N", "y": "TBN"}
    axes |= {f"d{name}": letters for name, letters in axes.items()}
    inputs = {name: make(*s, dtype=torch.bfloat16, seed=n) for n, (name, s) in enumerate(shapes.items())}

    def results_of(function, dtype, x, weight, bias, dy):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        y.backward(dy.to(dtype))
        arrays = [t.detach().double().numpy() for t in (y, *(leaf.grad for leaf in leaves))]
        return dict(zip(("y", "dx", "dweight", "dbias"), arrays, strict=True))

    ours, theirs = [], []
    for form in permutations({"T": 3, "B": 21, "K": 65, "N": 33}):
        given = form.apply(inputs, axes)
        for found, function in ((ours, lambda *t: module.linear(native, *t)), (theirs, F.linear)):
            found.append(form.undo(results_of(function, torch.bfloat16, **given), axes))
    verdict = error_rule(ours, theirs, results_of(F.linear, torch.float64, **inputs), "bfloat16")
    assert verdict.ok, verdict
    assert calls.count("linear_forward") == 3 * len(ours)


@pytest.mark.parametrize("needs", range(3))
def test_gradients_that_are_not_wanted(native, needs):
    tensors = [make(5, 7), make(9, 7), make(9)]
    tensors[needs].requires_grad_()
    LinearFunction.apply(native, *tensors).sum().backward()
    assert [t.grad is not None for t in tensors] == [n == needs for n in range(3)]


# ---- the module


KINDS = {
    "self": ({}, lambda x, y: (x, x, x)),
    "memory": ({}, lambda x, y: (x, y, y)),
    "three": ({"bias": False}, lambda x, y: (x, y, y + 1)),
    "sizes": ({"kdim": 16, "vdim": 16}, lambda x, y: (x, y, y)),
}


@pytest.mark.usefixtures("kernels_at_any_size")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_projections(kind, calls):
    options, inputs = KINDS[kind]
    attention = fastseq.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64, **options)
    torchs = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64, **options)
    torchs.load_state_dict(attention.state_dict())
    arguments = inputs(make(2, 5, 16), make(2, 7, 16, seed=3))

    def agrees():
        torchs.load_state_dict(attention.state_dict())
        with torch.no_grad():
            result = attention(*arguments, need_weights=False)[0]
            assert_close([result], [torchs(*arguments, need_weights=False)[0]])
        return result

    first = agrees()
    assert calls.count("pack_linear") == calls.count("linear_forward") > 1
    calls.clear()
    agrees()
    assert "pack_linear" not in calls
    assert "checksum" in calls
    assert "linear_forward" in calls
    for name, parameter in attention.named_parameters():
        calls.clear()
        parameter.data.mul_(2).add_(0.125)  # which no version counter sees
        changed = agrees()
        assert "pack_linear" in calls, name
        if "in_proj_bias" not in name:
            assert not torch.equal(changed, first)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(0.5)
    agrees()
    fastseq.freeze(attention)
    agrees()  # load_state_dict of the other one: nothing of this one changes
    calls.clear()
    agrees()
    assert "checksum" not in calls
    assert "pack_linear" not in calls
    fastseq.unfreeze(attention)
    attention.float()
    assert attention.in_proj_weight is None or attention.in_proj_weight.dtype is torch.float32


@pytest.mark.usefixtures("kernels_at_any_size")
def test_calls_with_gradients_pack_nothing(calls):
    attention = fastseq.MultiheadAttention(16, 2)
    x = make(5, 2, 16, dtype=torch.float32)
    attention(x, x, x, need_weights=False)[0].sum().backward()
    assert calls == []


def test_large_calls_with_gradients(calls, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_PRODUCTS_OF_TRAINING", 1)
    attention, torchs = (source.MultiheadAttention(16, 2, dtype=torch.float64) for source in (fastseq, nn))
    torchs.load_state_dict(attention.state_dict())
    x = make(5, 2, 16, requires_grad=True)
    found = []
    for layer in (attention, torchs):
        out = layer(x, x, x, need_weights=False)[0]
        found.append([out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])])
    assert calls.count("linear_forward") == 2
    assert_close(*found)


def test_small_calls_are_torchs(calls):
    attention = fastseq.MultiheadAttention(16, 2)
    x = make(5, 2, 16, dtype=torch.float32)
    with torch.no_grad():
        attention(x, x, x, need_weights=False)
        assert calls == []
        with backends.use_backend("torch"):
            attention(x, x, x)
        assert calls == []

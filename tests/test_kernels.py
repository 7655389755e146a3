"""Every kernel against the reference by the error rule: verify's comparison, over more shapes, threads and layouts."""

import numpy as np
import pytest
import torch
from cases import LONG_SHAPES, SHAPES, Shape, check, each_dtype

from fastseq import backends
from fastseq.ops import CELLS
from fastseq.tools.verify import FAMILIES
from fastseq.tools.verify.recurrent import Case, kernel_results, make_inputs

native = backends.select("recurrent")
if native is None:
    pytest.skip("the kernels are not built", allow_module_level=True)


def check_cell(cell, case, dtype):
    """Right with one thread, and the same bits with three."""
    found = check(FAMILIES[cell], native, case, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inputs = make_inputs(cell, case, dtype)
        three = {isa: dict(kernel_results(cell, native, case, inputs, isa)) for isa in native.isas()}
    finally:
        torch.set_num_threads(before)
    for one in found:
        for name, result in three[one.isa][one.kernel].items():
            assert np.array_equal(result, one.results[name]), (one.isa, one.kernel, name)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("cell", CELLS)
def test_plain(cell, shape, dtype):
    check_cell(cell, Case(shape.T, shape.B, shape.I, shape.H), dtype)


@each_dtype
@pytest.mark.parametrize(
    "options", [{"lengths": True}, {"packed": True}, {"reset": True}, {"lengths": True, "reset": True}]
)
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_variable_length_and_resets(cell, reverse, options, dtype):
    for T, B, I, H in ((7, 5, 9, 33), (13, 17, 3, 65), (2, 65, 1, 7)):  # noqa: E741
        check_cell(cell, Case(T, B, I, H, reverse=reverse, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("cell", CELLS)
def test_long(cell, shape, dtype):
    """However much torch errs: over 2000 steps it sums bfloat16 gradients in bfloat16, and its error there (66 of 5000
    for the relu cell, where ours is 3) would be taken for a broken comparison.
    """
    case = Case(shape.T, shape.B, shape.I, shape.H)
    check(FAMILIES[cell], native, case, dtype, [native.active_isa()], trust_torch=True)


@pytest.mark.parametrize("cell", CELLS)
def test_strides(cell):
    """A view of a larger tensor, batch first, every second row: what matters is the unit stride of the last axis."""
    T, B, I, H = 5, 3, 7, 9  # noqa: E741
    inputs = make_inputs(cell, Case(T, B, I, H, reset=True), torch.float32)
    arguments = (inputs.h_0, inputs.c_0, inputs.weights)
    expected = native.recurrent_forward(cell, inputs.x, *arguments, reset=inputs.reset)[0]
    wide = torch.full((B, 2 * T, I + 4), float("nan"))
    x = wide[:, ::2, 2 : 2 + I].transpose(0, 1)
    x.copy_(inputs.x)
    reset = torch.zeros(B, 3 * T, dtype=torch.bool)[:, ::3].T
    reset.copy_(inputs.reset)
    y = torch.full((B, T, 2 * H), float("nan")).transpose(0, 1)[..., H:]
    native.recurrent_forward(cell, x, *arguments, reset=reset, y=y)
    assert torch.equal(y, expected)


def test_a_wrong_result_is_seen(monkeypatch):
    """The comparison is not blind: one weight gradient off by a thousandth fails."""
    sound = native.recurrent_backward

    def damaged(*arguments, **options):
        gradients = sound(*arguments, **options)
        gradients[4][3, 2] += 1e-3
        return gradients

    monkeypatch.setattr(native, "recurrent_backward", damaged)
    with pytest.raises(AssertionError, match="training, .*: Verdict"):
        check(FAMILIES["lstm"], native, Case(5, 3, 7, 9), torch.float32)


def test_shapes_are_odd_on_purpose():
    assert {1, 7, 63, 65, 129} <= {size for shape in SHAPES for size in shape}
    assert all(shape.T == 2000 for shape in LONG_SHAPES)
    assert Shape(1, 1, 1, 1) in SHAPES

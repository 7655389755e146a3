"""Every kernel against the reference by the error rule: verify's comparison, over more shapes, threads and layouts."""

import numpy as np
import pytest
import torch
from cases import CELLS, LONG_SHAPES, SHAPES, Shape, error_rule

from fastseq import backends
from fastseq.verify import judge
from fastseq.verify.recurrent import Case, kernel_results, make_inputs, reference_results, torch_results

native = backends.select()
if native is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

DTYPES = ("float32", "float64", "bfloat16")
# The reference runs without BLAS in longdouble; beyond this size a case of it takes seconds.
LONGDOUBLE_ELEMENTS = 20_000


@pytest.fixture(params=[1, 3], ids=lambda n: f"threads{n}")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(cell: str, case: Case, dtype: str, isas=None, rule=judge) -> None:
    inputs = make_inputs(cell, case, getattr(torch, dtype))
    exact = np.longdouble if dtype == "float64" else np.float64
    reference, yardstick = reference_results(cell, case, inputs, exact), torch_results(cell, case, inputs)
    for isa in isas or native.isas():
        for kernel, results in kernel_results(native, cell, case, inputs, isa):
            verdict = rule(results, {name: yardstick[name] for name in results}, reference, dtype)
            assert verdict.ok, f"{kernel}, {isa}, {case}: {verdict}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("cell", CELLS)
def test_plain(cell, shape, dtype, threads):
    if dtype == "float64" and shape.I * shape.H > LONGDOUBLE_ELEMENTS:
        dtype = "float32"  # longdouble would take seconds; the same code serves both
    check(cell, Case(shape.T, shape.B, shape.I, shape.H), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{"lengths": True}, {"packed": True}, {"reset": True}, {"lengths": True, "reset": True}]
)
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_variable_length_and_resets(cell, reverse, options, dtype, threads):
    for T, B, I, H in ((7, 5, 9, 33), (13, 17, 3, 65), (2, 65, 1, 7)):  # noqa: E741
        check(cell, Case(T, B, I, H, reverse=reverse, **options), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("cell", CELLS)
def test_long(cell, shape, dtype):
    """By the bare rule: over 2000 steps torch sums bfloat16 gradients in bfloat16, and its error there (66 of 5000 for
    the relu cell, where ours is 3) is what `judge` would take for a broken comparison.
    """
    check(cell, Case(shape.T, shape.B, shape.I, shape.H), dtype, [native.active_isa()], error_rule)


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


def test_a_wrong_result_is_seen():
    """The comparison is not blind: one weight gradient off by a thousandth fails."""
    case, cell = Case(5, 3, 7, 9), "lstm"
    inputs = make_inputs(cell, case, torch.float32)
    reference = reference_results(cell, case, inputs, np.float64)
    yardstick = torch_results(cell, case, inputs)
    *_, (_, results) = kernel_results(native, cell, case, inputs, native.active_isa())
    assert judge(results, yardstick, reference, "float32").ok
    results["dw_hh"] = results["dw_hh"].copy()
    results["dw_hh"][3, 2] += 1e-3
    assert not judge(results, yardstick, reference, "float32").ok


def test_shapes_are_odd_on_purpose():
    assert {1, 7, 63, 65, 129} <= {size for shape in SHAPES for size in shape}
    assert all(shape.T == 2000 for shape in LONG_SHAPES)
    assert Shape(1, 1, 1, 1) in SHAPES

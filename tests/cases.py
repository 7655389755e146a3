"""What is tested and how exactly: shapes, variants, random inputs, tolerances.

Arrays are NumPy's, in torch's layouts: T steps, B rows, I inputs, H units, G gates.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fastseq.reference import COMPUTATIONS, EPS, error_rule
from fastseq.reference.torch_layout import torch_layers
from fastseq.tools.verify import Comparison, Family, compare
from fastseq.tools.verify.equivalent import permutations

__all__ = [
    "COMPUTATIONS",
    "CUDA_DTYPES",
    "DTYPES",
    "EPS",
    "LENGTHS",
    "LONG",
    "LONG_SHAPES",
    "RESET",
    "SHAPES",
    "SMALL_SHAPES",
    "TOLERANCES",
    "VARIANTS",
    "Shape",
    "Tolerance",
    "Variant",
    "assert_close",
    "central_differences",
    "check",
    "each_cuda_dtype",
    "each_dtype",
    "error_rule",
    "permutations",
    "random_inputs",
    "random_lengths",
    "random_reset",
    "units",
]

LONG = bool(os.environ.get("FASTSEQ_LONG"))  # set by `make test-long`: all of what `make test` takes a sample of

DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # of the kernels on the CPU
CUDA_DTYPES = (*DTYPES, torch.float16)

# Of T = 4 steps and B = 3 rows, for gradcheck.
LENGTHS = [2, 0, 4]
RESET = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)


def _each(dtypes: tuple[torch.dtype, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


each_dtype, each_cuda_dtype = _each(DTYPES), _each(CUDA_DTYPES)


class Shape(NamedTuple):
    """Sizes of one recurrent layer."""

    B: int
    T: int
    I: int  # noqa: E741  the house's letter for the input size
    H: int

    @property
    def id(self) -> str:
        return f"B{self.B}-T{self.T}-I{self.I}-H{self.H}"


SMALL_SHAPES = (Shape(1, 1, 1, 1), Shape(1, 7, 7, 1), Shape(7, 1, 1, 7), Shape(4, 6, 2, 8), Shape(7, 7, 5, 9))

SHAPES = (
    *SMALL_SHAPES,
    Shape(1, 7, 63, 65),
    Shape(7, 1, 65, 63),
    Shape(63, 7, 1, 129),
    Shape(65, 3, 129, 7),
    Shape(129, 2, 63, 65),
    Shape(1, 65, 129, 63),
    Shape(7, 63, 65, 129),
    Shape(1, 16, 128, 128),
    Shape(8, 16, 64, 64),
    Shape(32, 8, 128, 64),
    # More than one block of 256 in the sums over I and over H.
    Shape(1, 3, 257, 300),
    Shape(7, 3, 513, 257),
    Shape(16, 2, 256, 512),
)

LONG_SHAPES = (Shape(1, 2000, 7, 65), Shape(8, 2000, 63, 64))


class Variant(NamedTuple):
    """Which of the options of a sequence a case uses."""

    lengths: bool = False
    reset: bool = False
    reverse: bool = False

    @property
    def id(self) -> str:
        return "-".join(name for name, used in zip(self._fields, self, strict=True) if used) or "plain"


VARIANTS = tuple(Variant(lengths, reset, reverse) for lengths in (0, 1) for reset in (0, 1) for reverse in (0, 1))


class Tolerance(NamedTuple):
    """|result - expected| <= atol + rtol |expected|, as in numpy.testing.assert_allclose."""

    rtol: float
    atol: float


TOLERANCES = {
    "float32": Tolerance(rtol=1e-5, atol=1e-5),
    # Two computations in float64 that sum in different orders.
    "float64": Tolerance(rtol=1e-11, atol=1e-12),
    # Two kernels of ours in float64, whose sums are nearly the same.
    "float64, the same sums": Tolerance(rtol=1e-12, atol=1e-12),
    # Storage types: results rounded to 11 and 8 bits, here and there.
    "float16": Tolerance(rtol=4e-3, atol=4e-3),
    "bfloat16": Tolerance(rtol=2e-2, atol=2e-2),
    # Central differences in float64 with a step of 1e-5: the step's square, and eps over the step.
    "finite difference": Tolerance(rtol=1e-7, atol=1e-8),
    # The fuzz of malformed calls: inputs of any scale, so that much cancels.
    "fuzz float32": Tolerance(rtol=1e-4, atol=1e-4),
    "fuzz float64": Tolerance(rtol=1e-9, atol=1e-9),
    "fuzz float16": Tolerance(rtol=2e-2, atol=2e-2),
    "fuzz bfloat16": Tolerance(rtol=6e-2, atol=6e-2),
    # Hugging Face's small models in float32, with our attention and with theirs.
    "whole models": Tolerance(rtol=0, atol=1e-4),
    # Printed losses have four decimals; the rest is float32 sums in another order, over a few updates.
    "printed losses": Tolerance(rtol=0, atol=2e-4),
    # Before a time is taken: each tensor divided by its largest value, against torch in float32.
    "benchmark float32": Tolerance(rtol=0, atol=1e-5),
    "benchmark bfloat16": Tolerance(rtol=0, atol=1e-2),
}


def units(count: int, dtype: torch.dtype) -> Tolerance:
    """So many units in the last place of a dtype."""
    return Tolerance(*[count * torch.finfo(dtype).eps] * 2)


def assert_close(result: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: str = "float64") -> None:
    """Both have the same names, and every array agrees within the row `tolerance` of the table."""
    assert result.keys() == expected.keys()
    rtol, atol = TOLERANCES[tolerance]
    for name in expected:
        np.testing.assert_allclose(result[name], expected[name], rtol=rtol, atol=atol, err_msg=str(name))


def check(
    family: Family, backend, case, dtype: torch.dtype, isas=None, seed: int = 0, *, trust_torch=False, **options
) -> list[Comparison]:
    """Every kernel of `isas`, else of the backend, passes the error rule on a case. Where the first of its five
    computations takes half of what is allowed at most, the other four are left out, unless all is wanted. trust_torch:
    however much torch errs. options: those of `compare`, and inputs to replace.
    """
    found = list(
        compare(family, backend, case, dtype, isas or backend.isas(), seed, **{"first_may_settle": not LONG} | options)
    )
    for one in found:
        assert one.ok or (trust_torch and one.verdict.ok), f"{one.kernel}, {one.isa}, {case}: {one.verdict}"
    return found


def central_differences(f: Callable[[], float], array: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of f, which reads `array`, by it."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = f()
        array[index] = value - step
        below = f()
        array[index] = value
        gradient[index] = (above - below) / (2 * step)
    return gradient


def random_inputs(cell: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """The inputs of one layer in float64: x, h_0, c_0, the weights as torch initializes them, and the gradients of all
    outputs. To test another dtype, round these to it first, then give the rounded values to everyone.
    """
    B, T, I, H = shape  # noqa: E741
    rng = np.random.default_rng([seed, *shape])
    layer, k = torch_layers()[cell], H**-0.5
    G = layer.gates
    inputs = {
        "x": rng.standard_normal((T, B, I)),
        "h_0": rng.standard_normal((B, H)),
        "w_ih": rng.uniform(-k, k, (G * H, I)),
        "w_hh": rng.uniform(-k, k, (G * H, H)),
        "b_ih": rng.uniform(-k, k, G * H),
        "b_hh": rng.uniform(-k, k, G * H),
        "dy": rng.standard_normal((T, B, H)),
        "dh_n": rng.standard_normal((B, H)),
    }
    if "c" in layer.states:
        inputs |= {
            "c_0": rng.standard_normal((B, H)),
            "dc_n": rng.standard_normal((B, H)),
            "dc_all": rng.standard_normal((T, B, H)),
        }
    return inputs


def random_lengths(shape: Shape, seed: int = 0, shortest: int = 0) -> np.ndarray:
    """Lengths (B,) in [shortest, T], unsorted; both ends occur where there are rows enough."""
    rng = np.random.default_rng([seed, *shape])
    lengths = rng.integers(shortest, shape.T, shape.B, endpoint=True)
    lengths[0] = shape.T
    if shape.B > 2:
        lengths[1] = shortest
    return lengths


def random_reset(shape: Shape, seed: int = 0) -> np.ndarray:
    """A reset mask (T, B): a quarter of the places, the first step of the last row among them."""
    rng = np.random.default_rng([seed, *shape])
    reset = rng.random((shape.T, shape.B)) < 0.25
    reset[0, -1] = True
    return reset

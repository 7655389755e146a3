"""Linear kernels: the cases, and the results of the reference, of torch and of every kernel for one.

Straight at the backend, so that nothing can fall back to torch unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.reference import temporal_affine_forward
from fastseq.tools.verify.comparison import Family
from fastseq.tools.verify.tensors import array

AXES = {"x": "K", "weight": "NK", "bias": "N", "y": "N"}


@dataclass(frozen=True)
class Case:
    """Sizes and options of one run."""

    steps: int
    batch: int
    inputs: int
    outputs: int
    bias: bool = True
    strided: bool = False  # batch first in memory, in rows wider than the inputs

    def __str__(self) -> str:
        options = [name for name in ("strided",) if getattr(self, name)] + ([] if self.bias else ["no bias"])
        return ", ".join([f"T={self.steps} B={self.batch} K={self.inputs} N={self.outputs}", *options])


# Below and above a vector, a panel, a block of rows and one of the inputs; one row; several items for each thread.
SHAPES = (
    (1, 1, 1, 1),
    (1, 1, 64, 65),
    (3, 5, 7, 9),
    (2, 24, 63, 129),
    (7, 7, 257, 31),
    (1, 129, 65, 63),
    (5, 40, 513, 96),
)


def cases(dtype: str) -> Iterator[Case]:
    """The default set for a dtype."""
    for shape in SHAPES:
        plain = Case(*shape)
        yield plain
        yield replace(plain, bias=False)
        yield replace(plain, strided=True)


@dataclass
class Inputs:
    """What a run takes. Every value is representable in the kernels' dtype, so that all sides see the same numbers."""

    x: Tensor  # (T, B, K)
    weight: Tensor  # (N, K)
    bias: Tensor | None


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs of a case, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Inputs(
        normal(case.steps, case.batch, case.inputs),
        normal(case.outputs, case.inputs),
        normal(case.outputs) if case.bias else None,
    )


def reference_results(case: Case, inputs: Inputs, dtype: type) -> dict[str, np.ndarray]:
    """Outputs by name, computed in `dtype`."""
    x, weight = (a.double().numpy().astype(dtype) for a in (inputs.x, inputs.weight))
    bias = np.zeros(len(weight), dtype) if inputs.bias is None else inputs.bias.double().numpy().astype(dtype)
    return {"y": temporal_affine_forward(x, weight.T, bias)[0]}


def torch_results(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """The same by torch."""
    return {"y": array(F.linear(inputs.x, inputs.weight, inputs.bias))}


def kernel_results(native, case: Case, inputs: Inputs, isa: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(kernel, results). What is allocated holds NaN."""
    x = inputs.x
    if case.strided:
        x = F.pad(x.transpose(0, 1), (0, 3), value=float("nan")).transpose(0, 1)[..., : case.inputs]
    threads = torch.get_num_threads()
    with native.use_isa(isa), native.filled_with_nan():
        panels = native.pack_linear(inputs.weight, inputs.bias, threads)
        yield "inference", {"y": array(native.linear_forward(x, panels, threads))}


def free_axes(case: Case) -> dict[str, int]:
    """The axes along which the order does not matter, and their sizes."""
    return {"K": case.inputs, "N": case.outputs}


FAMILY = Family("linear", cases, make_inputs, reference_results, torch_results, kernel_results, AXES, free_axes)

"""Layer normalization kernels: the cases, and the results of the reference, of torch and of every kernel for one.

Straight at the backend, so that nothing can fall back to torch unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.reference import layernorm_backward, layernorm_forward
from fastseq.tools.verify.comparison import Family
from fastseq.tools.verify.tensors import array

EPS = 1e-5
AXES = dict.fromkeys(("x", "residual", "dy", "dz", "y", "z", "dx"), "TBN")
AXES |= dict.fromkeys(("weight", "bias", "dweight", "dbias"), "N")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one run."""

    steps: int
    batch: int
    features: int
    residual: bool = False
    affine: bool = True
    offset: float = 0.0  # the mean of the rows, beside a deviation of about 1
    strided: bool = False  # batch first in memory, in rows wider than the features

    def __str__(self) -> str:
        options = [name for name in ("residual", "strided") if getattr(self, name)]
        options += [] if self.affine else ["no weight"]
        options += [f"offset={self.offset:g}"] if self.offset else []
        return ", ".join([f"T={self.steps} B={self.batch} N={self.features}", *options])


# Below and above the widest vector and four of them, one row, more rows than a block of the sums has; for two threads.
SHAPES = ((1, 1, 1), (3, 5, 7), (2, 9, 63), (7, 1, 64), (3, 7, 65), (1, 33, 129), (5, 13, 1000), (2, 3, 4096))


def cases(dtype: str) -> Iterator[Case]:
    """The default set for a dtype."""
    for shape in (*SHAPES, (16, 129, 65)):
        plain = Case(*shape)
        yield plain
        yield replace(plain, residual=True)
        yield replace(plain, residual=True, strided=True)
        if plain.features == 1:  # zeros only, with which no error can be compared
            continue
        yield replace(plain, affine=False)
        if dtype != "bfloat16":  # whose torch loses most digits of such rows
            yield replace(plain, offset=100.0)


@dataclass
class Inputs:
    """What a run takes. Every value is representable in the kernels' dtype, so that all sides see the same numbers."""

    x: Tensor  # (T, B, N)
    residual: Tensor | None
    weight: Tensor | None  # (N,)
    bias: Tensor | None
    dy: Tensor
    dz: Tensor | None


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs of a case, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, offset: float = 0.0) -> Tensor:
        return (offset + torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    rows, features = (case.steps, case.batch, case.features), case.features
    x = normal(*rows, offset=case.offset)
    residual = None
    if case.residual:  # the sum is rounded to dtype by all but the reference: quarters add exactly
        x, residual = (normal(*rows).mul(4).round().div(4) for _ in range(2))
    return Inputs(
        x,
        residual,
        normal(features) if case.affine else None,
        normal(features) if case.affine else None,
        normal(*rows),
        normal(*rows) if case.residual else None,
    )


def reference_results(case: Case, inputs: Inputs, dtype: type) -> dict[str, np.ndarray]:
    """Outputs and gradients by name, computed in `dtype`."""

    def exact(a: Tensor) -> np.ndarray:
        return a.double().numpy().astype(dtype)

    z = exact(inputs.x) if inputs.residual is None else exact(inputs.x) + exact(inputs.residual)
    features = z.shape[-1:]
    affine = inputs.weight is not None
    gamma = exact(inputs.weight) if affine else np.ones(features, dtype)
    beta = exact(inputs.bias) if affine else np.zeros(features, dtype)
    y, cache = layernorm_forward(z, gamma, beta, EPS)
    dx, dweight, dbias = layernorm_backward(exact(inputs.dy), cache)
    if inputs.dz is not None:
        dx = dx + exact(inputs.dz)
    results = {"y": y, "dx": dx} | ({} if inputs.residual is None else {"z": z})
    return results | ({"dweight": dweight, "dbias": dbias} if affine else {})


def torch_results(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """The same by torch."""
    given = {"x": inputs.x, "weight": inputs.weight, "bias": inputs.bias}
    leaves = {name: a.clone().requires_grad_() for name, a in given.items() if a is not None}
    z = leaves["x"] if inputs.residual is None else leaves["x"] + inputs.residual
    y = F.layer_norm(z, z.shape[-1:], leaves.get("weight"), leaves.get("bias"), EPS)
    outputs, gradients = ([y], [inputs.dy]) if inputs.dz is None else ([y, z], [inputs.dy, inputs.dz])
    torch.autograd.backward(outputs, gradients)
    results = {"y": array(y)} | ({} if inputs.residual is None else {"z": array(z)})
    return results | {f"d{name}": array(leaf.grad) for name, leaf in leaves.items()}


def kernel_results(native, case: Case, inputs: Inputs, isa: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(kernel, results) of the forward alone, and of the forward and the backward. What is allocated holds NaN."""
    x, residual, dy, dz = (_laid_out(a, case) for a in (inputs.x, inputs.residual, inputs.dy, inputs.dz))
    weight, bias = inputs.weight, inputs.bias
    with native.use_isa(isa), native.filled_with_nan():
        y, _, _, _ = native.layer_norm_forward(x, residual, weight, bias, EPS, return_sum=False)
        yield "inference", {"y": array(y)}
        y, z, mean, rstd = native.layer_norm_forward(x, residual, weight, bias, EPS, save=True)
        results = {"y": y} if z is None else {"y": y, "z": z}
        needs = (True, case.affine, case.affine)
        dx, dweight, dbias = native.layer_norm_backward(dy, dz, x if z is None else z, weight, mean, rstd, needs=needs)
        results |= {"dx": dx, "dweight": dweight, "dbias": dbias}
        yield "training", {name: array(a) for name, a in results.items() if a is not None}


def _laid_out(a: Tensor | None, case: Case) -> Tensor | None:
    if a is None or not case.strided:
        return a
    return F.pad(a.transpose(0, 1), (0, 3), value=float("nan")).transpose(0, 1)[..., : case.features]


def free_axes(case: Case) -> dict[str, int]:
    """The axes along which the order does not matter, and their sizes."""
    return {"T": case.steps, "B": case.batch, "N": case.features}


FAMILY = Family("layer_norm", cases, make_inputs, reference_results, torch_results, kernel_results, AXES, free_axes)

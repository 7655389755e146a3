"""How a case is compared: both sides compute it in five equivalent forms, against the reference.

A family of kernels says what its cases are, how the reference, torch and the kernels compute one, and along which axes
it may be permuted. All else is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastseq.reference.verdict import EPS, Verdict, error_rule
from fastseq.tools.verify.equivalent import permutations

FIRST_SETTLES = 0.5  # of what the rule allows
FURTHER_SEED = 1_000_003  # of other inputs for a case: far from the seeds of other cases

Results = Mapping[str, np.ndarray]


class Family(NamedTuple):
    """The kernels of an op."""

    op: str  # of a backend's SERVES
    cases: Callable[[str], Iterator[Any]]  # of a dtype: the default set
    make_inputs: Callable[..., Any]  # (case, dtype, seed), a dataclass of tensors; lengths stay on the CPU
    reference_results: Callable[[Any, Any, type], Results]  # (case, inputs, what it is computed in)
    torch_results: Callable[[Any, Any], Results]  # (case, inputs)
    kernel_results: Callable[..., Iterator[tuple[str, Results]]]  # (backend, case, inputs, isa) -> (kernel, results)
    axes: Mapping[str, str]  # of inputs and results by name: a letter for each of the last axes
    free_axes: Callable[[Any], Mapping[str, int]]  # of a case: along which its order does not matter, and their sizes


class Comparison(NamedTuple):
    """What one kernel gives."""

    isa: str
    kernel: str
    verdict: Verdict
    trusted: bool  # an absurd result of torch's must not widen the bound: then the comparison itself is broken
    results: Results  # of the case as it is

    @property
    def ok(self) -> bool:
        """Whether the results are accepted."""
        return self.verdict.ok and self.trusted


def exact_dtype(dtype: torch.dtype) -> type:
    """What the reference runs in for kernels of `dtype`."""
    return np.longdouble if dtype == torch.float64 else np.float64


def compare(
    family: Family,
    backend,
    case: Any,
    dtype: torch.dtype,
    isas: Sequence[str],
    seed: int = 0,
    *,
    device: str = "cpu",
    first_may_settle: bool = False,
    **replaced: Any,
) -> Iterator[Comparison]:
    """Every kernel of every instruction set in a case, some of whose inputs may be `replaced`.

    first_may_settle: where the first computation of each side alone takes at most half of what the rule allows, that is
    the verdict, and the other four are left out.
    """
    sizes = family.free_axes(case)
    forms = list(permutations(sizes))
    alone = all(size == 1 for size in sizes.values())  # nothing to permute: other inputs instead, drawn alike

    @cache
    def drawn(n: int) -> Any:
        return replace(family.make_inputs(case, dtype, seed + n * FURTHER_SEED), **replaced)

    @cache
    def reference_of(n: int) -> Results:
        return family.reference_results(case, drawn(n), exact_dtype(dtype)) if alone or not n else reference_of(0)

    @cache
    def inputs_of(n: int) -> Any:
        if alone:
            return _on(device, drawn(n))
        return replace(_on(device, drawn(0)), **forms[n].apply(vars(_on(device, drawn(0))), family.axes))

    @cache
    def by_torch(n: int) -> Results:
        return forms[n].undo(family.torch_results(case, inputs_of(n)), family.axes)

    def by_kernels(n: int, isa: str) -> dict[str, Results]:
        kernels = family.kernel_results(backend, case, inputs_of(n), isa)
        return {kernel: forms[n].undo(results, family.axes) for kernel, results in kernels}

    def judged(ours: Sequence[Results]) -> Verdict:
        theirs = [{name: by_torch(n)[name] for name in results} for n, results in enumerate(ours)]
        return error_rule(ours, theirs, [reference_of(n) for n in range(len(ours))], dtype)

    for isa in isas:
        first = by_kernels(0, isa)
        verdicts = {kernel: judged([results]) for kernel, results in first.items()}
        if not first_may_settle or any(verdict.share > FIRST_SETTLES for verdict in verdicts.values()):
            forms_of = [first, *(by_kernels(n, isa) for n in range(1, len(forms)))]
            verdicts = {kernel: judged([results[kernel] for results in forms_of]) for kernel in first}
        for kernel, results in first.items():
            verdict = verdicts[kernel]
            # sqrt(eps) of the largest value, of which the slack is 4 eps.
            trusted = verdict.torch_error <= verdict.slack / (4 * math.sqrt(EPS[str(dtype).removeprefix("torch.")]))
            yield Comparison(isa, kernel, verdict, trusted, results)


def _on(device: str, inputs: Any) -> Any:
    """The inputs on a device, but for the lengths."""
    if device == "cpu":
        return inputs
    moved = {f.name: getattr(inputs, f.name) for f in fields(inputs) if not f.name.startswith("lengths")}
    return replace(inputs, **{name: a.to(device) for name, a in moved.items() if isinstance(a, Tensor)})

"""Every kernel of this machine against the float64 reference: what `fastseq verify` runs.

The rule is that of `fastseq.reference.error_rule`: as exact as torch's own result up to a factor of two and the last
bits. float64 kernels are held against the reference run in longdouble.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from fastseq.info import load_cuda_kernels, load_kernels
from fastseq.reference.verdict import EPS, Verdict, error_rule
from fastseq.verify import attention, layer_norm, linear, recurrent
from fastseq.verify.tensors import Comparison

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
SHOWN_FAILURES = 4  # per row of the table


class Family(NamedTuple):
    """The cases of an op, and what is to be compared in one of them."""

    cases: Callable[[str], Iterator[Any]]  # of a dtype
    compare: Callable[..., Iterator[Comparison]]  # (native, case, dtype, isas, seed)


FAMILIES = {cell: Family(recurrent.cases, partial(recurrent.compare, cell)) for cell in recurrent.CELLS}
FAMILIES["attention"] = Family(attention.cases, attention.compare)
FAMILIES["layer_norm"] = Family(layer_norm.cases, layer_norm.compare)
FAMILIES["linear"] = Family(linear.cases, linear.compare)


class NothingToVerify(RuntimeError):
    """This machine has no kernel of the kind that was asked for."""


@dataclass
class Row:
    """The outcome for one op, ISA and dtype."""

    op: str
    isa: str
    dtype: str
    verdicts: list[Verdict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def closest(self) -> Verdict:
        """The verdict that comes closest to its bound, or lies farthest beyond it."""

        def closeness(verdict: Verdict) -> float:
            if not verdict.worst_ours <= verdict.bound:  # NaN too
                return math.inf
            return verdict.worst_ours / verdict.bound if verdict.bound else 0.0

        return max(self.verdicts, key=closeness)


def judge(ours: Mapping, torch_: Mapping, reference: Mapping, dtype: str) -> Verdict:
    """The error rule, for the tensors that `ours` has. An absurd result of torch's must not widen the bound: then the
    comparison itself is broken, and that is a failure too.
    """
    torch_, reference = ({name: results[name] for name in ours} for results in (torch_, reference))
    verdict = error_rule(ours, torch_, reference, dtype)
    largest = max(np.max(np.abs(a)) for a in reference.values())
    return verdict._replace(ok=verdict.ok and verdict.worst_torch <= math.sqrt(EPS[dtype]) * largest)


def verify(
    native,
    ops: Sequence[str],
    dtypes: Sequence[str],
    isas: Sequence[str],
    case_done: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Run every case of every combination with the kernels of `native`, a module like `fastseq.backends.native` or, for
    all ops but layer_norm and the one ISA "cuda", `fastseq.backends.cuda`.
    """
    rows = {key: Row(*key) for key in product(ops, isas, dtypes)}
    for op, dtype in product(ops, dtypes):
        for seed, case in enumerate(FAMILIES[op].cases(dtype)):
            for isa, kernel, *results in FAMILIES[op].compare(native, case, DTYPES[dtype], isas, seed):
                row, verdict = rows[op, isa, dtype], judge(*results, dtype)
                row.verdicts.append(verdict)
                if not verdict.ok:
                    row.failures.append(f"{kernel}, {case}: error {verdict.worst_ours:.2e}, bound {verdict.bound:.2e}")
            case_done()
    return list(rows.values())


def run(
    ops: Sequence[str] | None = None, dtypes: Sequence[str] | None = None, isas: Sequence[str] | None = None
) -> int:
    """`fastseq verify`: all that is available where None is given. Prints the table; 0 if every case passes, else 1."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    native, reason = load_kernels()
    if native is None:
        raise NothingToVerify(f"the kernels are not built: {reason}")
    cuda, _ = load_cuda_kernels()
    available = (*native.isas(), *(() if cuda is None else cuda.isas()))
    if missing := [isa for isa in isas or () if isa not in available]:
        raise NothingToVerify(f"{', '.join(missing)}: not available here, only {', '.join(available)}")
    ops, dtypes, isas = ops or tuple(FAMILIES), dtypes or tuple(DTYPES), isas or available
    runs = [(native, ops, [isa for isa in isas if isa != "cuda"])]
    if "cuda" in isas:
        runs.append((cuda, [op for op in ops if op != "layer_norm"], ["cuda"]))
    runs = [(backend, names, sets) for backend, names, sets in runs if names and sets]

    console = Console(highlight=False)
    columns = TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        total = sum(
            1 for _, names, _ in runs for op, dtype in product(names, dtypes) for _ in FAMILIES[op].cases(dtype)
        )
        task = progress.add_task("", total=total)
        rows = []
        for backend, names, sets in runs:
            rows += verify(backend, names, dtypes, sets, lambda: progress.advance(task))

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("op", "ISA", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("cases", "error", "torch's", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        _, ours, torch_, bound = row.closest
        verdict = f"[red]{len(row.failures)} FAILED[/]" if row.failures else "[green]ok[/]"
        errors = (f"{error:.1e}" for error in (ours, torch_, bound))
        table.add_row(row.op, row.isa, row.dtype, str(len(row.verdicts)), *errors, verdict)
    console.print(table)
    console.print(
        "\nerror    max|kernel - reference| over outputs and gradients, in the case closest to its bound"
        "\ntorch's  the same of torch's own result; the reference runs in float64, for float64 in longdouble"
        "\nbound    2 max|torch - reference| + 4 eps max|reference|",
        soft_wrap=True,
    )
    for row in rows:
        for failure in row.failures[:SHOWN_FAILURES]:
            console.print(f"[red]FAILED[/] {row.op} {row.isa} {row.dtype}: {failure}", soft_wrap=True)
        if unseen := len(row.failures[SHOWN_FAILURES:]):
            console.print(f"[red]FAILED[/] {row.op} {row.isa} {row.dtype}: {unseen} more", soft_wrap=True)
    return 1 if any(row.failures for row in rows) else 0

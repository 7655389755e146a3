"""Every kernel of this machine against the float64 reference: what `fastseq verify` runs.

The rule is that of `fastseq.reference.error_rule`, over five equivalent computations of every case: as exact as torch's
own results up to a factor of two and the last bits. float64 kernels are held against the reference run in longdouble.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch

from fastseq.reference.verdict import Verdict
from fastseq.tools.info import load_cuda_kernels, load_kernels
from fastseq.tools.verify import attention, layer_norm, linear, recurrent
from fastseq.tools.verify.comparison import compare

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
SHOWN_FAILURES = 4  # per row of the table


FAMILIES = {cell: recurrent.family(cell) for cell in recurrent.CELLS} | {
    "attention": attention.FAMILY,
    "layer_norm": layer_norm.FAMILY,
    "linear": linear.FAMILY,
}


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
        return max(self.verdicts, key=lambda verdict: verdict.share)


def verify(
    native,
    ops: Sequence[str],
    dtypes: Sequence[str],
    isas: Sequence[str],
    case_done: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Run every case of every combination with the kernels of `native`, a module like `fastseq.backends.native` or,
    with the one ISA "cuda", `fastseq.backends.cuda`. NothingToVerify names the ops that it has no kernels for.
    """
    if missing := _unserved(native, ops):
        raise NothingToVerify(f"{', '.join(missing)}: no kernels in {native.__name__}")
    rows = {key: Row(*key) for key in product(ops, isas, dtypes)}
    device = "cuda" if "cuda" in isas else "cpu"
    for op, dtype in product(ops, dtypes):
        for seed, case in enumerate(FAMILIES[op].cases(dtype)):
            for found in compare(FAMILIES[op], native, case, DTYPES[dtype], isas, seed, device=device):
                row = rows[op, found.isa, dtype]
                row.verdicts.append(found.verdict)
                if not found.ok:
                    row.failures.append(f"{found.kernel}, {case}: {found.verdict}")
            case_done()
    return list(rows.values())


def _unserved(backend, ops: Sequence[str]) -> list[str]:
    return [op for op in ops if FAMILIES[op].op not in backend.SERVES]


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
    unserved = _unserved(cuda, ops) if "cuda" in isas else []
    if "cuda" in isas:
        runs.append((cuda, [op for op in ops if op not in unserved], ["cuda"]))
    runs = [(backend, names, sets) for backend, names, sets in runs if names and sets]
    if not runs:
        raise NothingToVerify(f"{', '.join(unserved)}: no kernels in {cuda.__name__}")

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
        closest = row.closest
        verdict = f"[red]{len(row.failures)} FAILED[/]" if row.failures else "[green]ok[/]"
        errors = (f"{error:.1e}" for error in (closest.error, closest.torch_error, closest.bound))
        table.add_row(row.op, row.isa, row.dtype, str(len(row.verdicts)), *errors, verdict)
    console.print(table)
    console.print(
        "\nerror    max|kernel - reference| over outputs and gradients, in the case closest to its bound: the median of"
        "\n         five equivalent computations, in other orders of the keys, units or features"
        "\ntorch's  the same of torch's own result; the reference runs in float64, for float64 in longdouble"
        "\nbound    2 torch's + 4 eps max|reference|; no single computation may err by more than 4 torch's + the same",
        soft_wrap=True,
    )
    if unserved:
        console.print(f"no kernels in {cuda.__name__} for {', '.join(unserved)}", soft_wrap=True)
    for row in rows:
        for failure in row.failures[:SHOWN_FAILURES]:
            console.print(f"[red]FAILED[/] {row.op} {row.isa} {row.dtype}: {failure}", soft_wrap=True)
        if unseen := len(row.failures[SHOWN_FAILURES:]):
            console.print(f"[red]FAILED[/] {row.op} {row.isa} {row.dtype}: {unseen} more", soft_wrap=True)
    return 1 if any(row.failures for row in rows) else 0

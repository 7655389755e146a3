"""A page about a run of the benchmarks: what `fastseq report` writes.

The input is what `pytest bench --benchmark-json=FILE` records; floors and ceilings come with each case.
"""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import jinja2
from matplotlib.figure import Figure

from fastseq.ops import CELLS

TEMPLATE = Path(__file__).with_name("report.html.jinja")

COMPUTE_BOUND = 0.75  # of the FMA peak
CALL_BOUND = 10e-6  # seconds of arithmetic, at the peak
BUSY = 1.1  # load average per processor: more than this run can cause itself
_KINDS = tuple(dict.fromkeys(cell.mode for cell in CELLS.values()))
MODULES = (
    *_KINDS,
    *(f"{kind}Cell" for kind in _KINDS),
    "scaled_dot_product_attention",
    "MultiheadAttention",
    "LayerNorm",
)
MODES = ("forward", "forward with grad", "training")


class RecordError(ValueError):
    """The file is no record of these benchmarks."""


@dataclass(frozen=True)
class Row:
    """One case of the record. Times are medians in seconds, ratios are torch's time over ours.

    weight_bytes: of the weights that every step reads, all steps together. load: the load average per processor. held:
    what else the case is held to, by name: its value and the floor of that.
    """

    module: str
    mode: str
    shape: str
    dtype: str
    threads: int
    isa: str
    batch: int
    flops: float
    fma_peak: float
    weight_bytes: int
    median: float
    torch_median: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    rounds: int
    load: float
    share_of_peak: float
    ratio_floor: float | None = None
    share_floor: float | None = None
    packed_over_padded: float | None = None
    packed_over_padded_ceiling: float | None = None
    read_bandwidth: float | None = None
    share_of_bandwidth: float | None = None
    held: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def below_floor(self) -> bool:
        """Whether torch's time over ours is less than it should be."""
        return self.ratio_floor is not None and self.ratio < self.ratio_floor

    @property
    def above_ceiling(self) -> bool:
        """Whether a token of packed input takes longer, against one of padded input, than it should."""
        ceiling = self.packed_over_padded_ceiling
        return self.packed_over_padded is not None and ceiling is not None and self.packed_over_padded > ceiling

    @property
    def missed(self) -> bool:
        """Whether the case falls short of anything that it is held to by itself."""
        return self.below_floor or self.above_ceiling or bool(self.short_of)

    @property
    def short_of(self) -> dict[str, tuple[float, float]]:
        """What of `held` is below its floor."""
        return {name: (value, floor) for name, (value, floor) in self.held.items() if value < floor}

    @property
    def is_held(self) -> bool:
        """Whether there is anything that the case has to reach."""
        return bool(self.held) or self.ratio_floor is not None or self.packed_over_padded_ceiling is not None

    @property
    def doubt(self) -> str:
        """Why the numbers cannot be trusted, whether good or bad; empty if nothing speaks against them."""
        if self.load > BUSY:
            return f"doubtful: others used the machine, load {self.load:.1f} per processor"
        if self.share_of_peak > 1:
            return "doubtful: faster than the FMA peak, so the peak was disturbed"
        return ""

    @property
    def limit(self) -> str:
        """What our time goes into, as far as the numbers tell."""
        if self.share_of_peak >= COMPUTE_BOUND:
            return "the arithmetic is the limit"
        arithmetic = self.flops / self.fma_peak
        if arithmetic < CALL_BOUND:
            return f"the call is the limit: {arithmetic * 1e6:.2g} us of {self.median * 1e6:.3g} us are arithmetic"
        if self.share_of_bandwidth is not None:
            return f"keys and values are read at {self.share_of_bandwidth:.0%} of the memory's bandwidth"
        if self.batch == 1 and self.weight_bytes:
            rate = self.weight_bytes / self.median / 1e9
            return f"every step reads its weights for one row: {rate:.3g} GB/s of them"
        return f"{1 - self.share_of_peak:.0%} of the time is not arithmetic at the peak"

    @property
    def note(self) -> str:
        """Why the case is in doubt, or else why it falls short; empty if it is neither."""
        if self.doubt:
            return self.doubt
        notes = []
        if self.below_floor:
            at_peak = self.ratio / self.share_of_peak
            notes.append(f"{self.limit}; at the peak the ratio would be {at_peak:.3g}")
            if at_peak < self.ratio_floor:
                torch_share = self.share_of_peak / self.ratio
                notes.append(f"out of reach: torch is at {torch_share:.0%} of the peak")
            if self.ratio_quartiles[1] >= self.ratio_floor:
                notes.append("within the noise: the upper quartile reaches the floor")
        if self.above_ceiling:
            notes.append(f"packed takes {self.packed_over_padded:.2f} of padded per token")
        notes += [f"{name} is {value:.2f}" for name, (value, _) in self.short_of.items()]
        return "; ".join(notes)


@dataclass(frozen=True)
class Share:
    """The median share of the FMA peak over the cases that are held to one together."""

    threads: int
    floor: float
    median: float
    cases: int

    @property
    def missed(self) -> bool:
        """Whether the median is below its floor."""
        return self.median < self.floor


_RECORD = {
    "benchmarks": list[dict[str, Any]],
    "machine_info": {"fastseq": {"processor": str, "processors_usable": int, "torch": str}},
    "commit_info": {"id": str | None, "dirty": bool},
    "datetime": str,
}
_POSITIVE = ("threads", "batch", "fma_peak", "median", "torch_median", "ratio", "rounds", "share_of_peak")


def check(value: Any, wanted: Any, name: str = "the record") -> None:
    """`value`, out of JSON, must be of a type, or a dict with the entries that `wanted` has. ValueError says what is
    not."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {value!r:.80}")
        for key, kind in wanted.items():
            if key not in value:
                raise ValueError(f"{name} has no {key!r}")
            check(value[key], kind, key)
    elif not _is(value, wanted):
        raise ValueError(f"{name} must be {getattr(wanted, '__name__', wanted)}, got {value!r:.80}")


def _is(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind is float:  # a finite one, and not an integer too large for one
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if origin is UnionType:
        return any(_is(value, a) for a in arguments)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_is, value, arguments))
    if origin is list:
        return isinstance(value, list) and all(_is(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(v, arguments[1]) for v in value.values())
    return type(value) is kind


def row_of(facts: dict[str, Any]) -> Row:
    """A case of the record out of its facts. ValueError says what is wrong with them."""
    kinds = get_type_hints(Row)
    if unknown := facts.keys() - kinds.keys():
        raise ValueError(f"unknown facts of a case: {', '.join(sorted(unknown))}")
    optional = {f.name for f in fields(Row) if f.default is not MISSING or f.default_factory is not MISSING}
    check(facts, {name: kind for name, kind in kinds.items() if name in facts or name not in optional}, "a case")
    row = Row(**facts)
    for name in _POSITIVE:
        if not getattr(row, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(row, name)!r}")
    for name, known in (("module", MODULES), ("mode", MODES)):
        if getattr(row, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(row, name)!r:.80}")
    return row


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The record as it is and its cases in the order of the page. Raises RecordError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check(record, _RECORD)
        for bench in record["benchmarks"]:
            check(bench, {"extra_info": dict[str, Any]}, "a benchmark")
        rows = [row_of(bench["extra_info"]) for bench in record["benchmarks"]]
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is no record of `pytest bench --benchmark-json=FILE`: {error}") from error
    if not rows:
        raise RecordError(f"{path} has no benchmarks")

    def place(row: Row) -> tuple:
        return row.threads, row.dtype != "float32", MODULES.index(row.module), MODES.index(row.mode)

    return record, sorted(rows, key=place)


def shares(rows: list[Row]) -> list[Share]:
    """The median shares of the FMA peak, by threads, over the cases that are not in doubt."""
    groups: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        if row.share_floor is not None and not row.doubt:
            groups.setdefault((row.threads, row.share_floor), []).append(row.share_of_peak)
    return [Share(*key, statistics.median(group), len(group)) for key, group in groups.items()]


def picture(rows: list[Row]) -> bytes:
    """A PNG: every ratio as a point, on a logarithmic axis, a panel for each number of threads."""
    threads = sorted({row.threads for row in rows})
    labels = sorted(
        {(row.module, row.mode) for row in rows}, key=lambda label: (MODULES.index(label[0]), MODES.index(label[1]))
    )
    figure = Figure(figsize=(2 + 5 * len(threads), 1.5 + 0.35 * len(labels)), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(threads), sharey=True, squeeze=False)[0], threads, strict=True):
        for dtype, color, shift in (("float32", "tab:blue", -0.15), ("bfloat16", "tab:orange", 0.15)):
            for missed, marker in ((False, "o"), (True, "x")):
                points = [
                    (row.ratio, labels.index((row.module, row.mode)) + shift)
                    for row in rows
                    if (row.threads, row.dtype, row.below_floor) == (count, dtype, missed)
                ]
                name = f"{dtype}, short of its floor" if missed else dtype
                if points:
                    axes.scatter(*zip(*points, strict=True), s=22, c=color, marker=marker, alpha=0.8, label=name)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="torch's time / ours", title=f"threads: {count}")
        low, high = axes.get_xlim()
        ticks = [2.0**n for n in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(low, high)
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(labels)), [f"{module} {mode}" for module, mode in labels])
    axes.invert_yaxis()
    markers = {}
    for panel in figure.axes:
        handles, names = panel.get_legend_handles_labels()
        markers |= dict(zip(names, handles, strict=True))
    figure.legend(markers.values(), markers.keys(), loc="outside lower center", ncols=4)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def page(record: dict[str, Any], rows: list[Row]) -> str:
    """The page, with everything that it shows inside."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["time"] = _time
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        rows=rows,
        shares=shares(rows),
        machine=record["machine_info"]["fastseq"],
        commit=record["commit_info"],
        date=record["datetime"],
        isas=sorted({row.isa for row in rows}),
        picture=base64.b64encode(picture(rows)).decode("ascii"),
    )


def run(record: Path, output: Path) -> int:
    """Write the page about `record` to `output` and say how many cases reach what they are held to."""
    contents, rows = read(record)
    output.write_text(page(contents, rows), encoding="utf-8")
    held = [row for row in rows if row.is_held]
    doubtful = sum(bool(row.doubt) for row in held)
    missed = sum(row.missed for row in held if not row.doubt)
    print(f"{len(rows)} cases, {len(held)} held to something: {missed} short of it, {doubtful} in doubt; {output}")
    return 0

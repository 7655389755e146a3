"""What the benchmarks on a GPU share: their options, the race, the table and its record."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch

from fastseq import backends

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def make_parser(description: str, dtypes: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(dtypes))
    parser.add_argument("--tf32", action="store_true", help="TF32 in torch's products of float32")
    parser.add_argument("--seconds", type=float, default=0.2, help="for a row")
    parser.add_argument("--output", help="a JSON file for the rows")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace | None:
    """The options, None where there is no GPU. Switches TF32 as they say."""
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no GPU")
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.tf32
    return arguments


def tabulate(
    rows: Iterable[dict],
    columns: Sequence[str],
    cells: Callable[[dict], Sequence[str]],
    arguments: argparse.Namespace,
    title: str = "",
    **settings: object,
) -> int:
    """Prints the machine and each row as it comes, and records them. The exit code: 1 where a result was wrong."""
    machine = {
        "GPU": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuDNN": torch.backends.cudnn.version(),
        "TF32": arguments.tf32,
        **settings,
        "ours": backends.select("recurrent", "cuda") is not None,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n")
    if title:
        print(f"{title}\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    record = []
    for row in rows:
        record.append(row)
        print(f"| {' | '.join(cells(row))} |", flush=True)
        if arguments.output:
            with open(arguments.output, "w", encoding="utf-8") as file:
                json.dump({"machine": machine, "rows": record}, file, indent=1)
    return 1 if any(row.get("wrong") for row in record) else 0


def race(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The median time of each in milliseconds, turn by turn."""
    times = {name: [] for name in calls}
    for warm_up in (True, True, False):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
        if warm_up:
            times = {name: [] for name in calls}
    rounds = max(5, int(1e3 * seconds / sum(t[0] for t in times.values())))
    for _ in range(min(rounds, 200)):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return {name: statistics.median(t) for name, t in times.items()}


def milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)

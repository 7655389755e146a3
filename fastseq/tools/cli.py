"""The command `fastseq` (also `python -m fastseq`): info, verify, demo, report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

from fastseq.tools import info, verify
from fastseq.tools.char_lm import DEFAULT, LAYERS, TextError

USAGE_ERROR = 2
MOST_THREADS = 1024


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _threads(text: str) -> int:
    count = _count(text)
    if count > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS}, got '{text}'")
    return count


def _parser() -> _Parser:
    parser = _Parser("fastseq", description="Fused RNN, LSTM and GRU kernels behind torch.nn's own interface.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,verify,demo,report}")

    commands.add_parser("info", help="what is installed, which kernels are active, and why the others are not")

    check = commands.add_parser("verify", help="every kernel against the float64 reference; exit code 1 on a failure")
    for name, choices in {"op": verify.FAMILIES, "dtype": verify.DTYPES, "isa": (*info.ISA_FLAGS, "cuda")}.items():
        text = f"only this one, may be given several times: {', '.join(choices)}"
        check.add_argument(f"--{name}", action="append", choices=tuple(choices), metavar=name.upper(), help=text)

    demo = commands.add_parser("demo", help="a language model on real text, by torch.nn and after fuse(): both speeds")
    demo.add_argument("--text", type=Path, metavar="FILE", help="default: the sources of this Python's library")
    demo.add_argument("--cell", choices=tuple(LAYERS), default=DEFAULT, help="default: %(default)s")
    demo.add_argument("--steps", type=_count, default=200, metavar="N", help="training steps, default: %(default)s")
    demo.add_argument(
        "--output", type=Path, default=Path("fastseq-demo.png"), metavar="PNG", help="default: %(default)s"
    )

    report = commands.add_parser("report", help="a page about a run of the benchmarks")
    report.add_argument("record", type=Path, metavar="JSON", help="what `pytest bench --benchmark-json=JSON` wrote")
    report.add_argument(
        "--output", type=Path, default=Path("fastseq-bench.html"), metavar="HTML", help="default: %(default)s"
    )
    for command in (check, demo):
        command.add_argument("--threads", type=_threads, metavar="N", help="default: torch's own choice")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a failed check, or 2 for a wrong call, told in one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return {"info": _info, "verify": _verify, "demo": _demo, "report": _report}[options.command](options)


def _info(options: argparse.Namespace) -> int:
    return info.run()


def _verify(options: argparse.Namespace) -> int:
    if error := _missing("rich"):
        return _refuse("verify", error)
    _use_threads(options.threads)
    try:
        return verify.run(options.op, options.dtype, options.isa)
    except verify.NothingToVerify as error:
        return _refuse("verify", str(error))


def _demo(options: argparse.Namespace) -> int:
    if error := _missing("rich", "matplotlib"):
        return _refuse("demo", error)
    if options.output.suffix.lower() != ".png":
        return _refuse("demo", f"--output must end in .png, got {options.output}")
    if error := _unwritable(options.output):
        return _refuse("demo", error)
    from fastseq.tools import demo  # not at the top: it needs the extra

    _use_threads(options.threads)
    try:
        return demo.run(options.text, options.cell, options.steps, options.output)
    except TextError as error:
        return _refuse("demo", str(error))


def _report(options: argparse.Namespace) -> int:
    if error := _missing("jinja2", "matplotlib") or _unwritable(options.output):
        return _refuse("report", error)
    from fastseq.tools import report  # not at the top: it needs the extra

    try:
        return report.run(options.record, options.output)
    except report.RecordError as error:
        return _refuse("report", str(error))


def _unwritable(path: Path) -> str:
    folder = path.parent
    if path.is_dir():
        return f"cannot write {path}: it is a folder"
    if path.exists() and not os.access(path, os.W_OK):
        return f"cannot write {path}: it is not writable"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return f"cannot write {path}: {folder} is not a writable folder"
    return ""


def _missing(*modules: str) -> str:
    missing = " and ".join(name for name in modules if find_spec(name) is None)
    return missing and f"needs {missing} of the extra `cli`: pip install '.[cli]' in the folder of the clone"


def _refuse(command: str, message: str) -> int:
    print(f"fastseq {command}: error: {message}", file=sys.stderr)
    return USAGE_ERROR


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)

"""What runs here, what does not, and why not: what `fastseq info` prints. Needs nothing beyond the package itself."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy
import torch

import fastseq
from fastseq import backends
from fastseq.ops.routing import SERVICE

# What /proc/cpuinfo must list, best last; csrc/dispatch.cpp asks the processor the same.
_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
ISA_FLAGS = {"baseline": (), "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": (*_AVX512, "avx512_bf16")}

VARIABLES = {
    "FASTSEQ_BACKEND": "native: the kernels (default); torch: always torch's own path",
    "FASTSEQ_CUDA": "on: the CUDA kernels, which have not been tested on a GPU yet; off (default): torch's own path",
    "FASTSEQ_ISA": f"a lower instruction set than the best one: {', '.join(ISA_FLAGS)}; read once, at import",
}

Rows = Iterable[tuple[str, str]]


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def cpu_name() -> str:
    """The processor's name as it gives it."""
    return _cpuinfo("model name") or platform.machine()


def load_kernels() -> tuple[ModuleType | None, str]:
    """The native backend, or None and why it is missing. FASTSEQ_BACKEND has no say here."""
    try:
        from fastseq.backends import native
    except ImportError as error:
        return None, str(error)
    return native, ""


def load_cuda_kernels() -> tuple[ModuleType | None, str]:
    """The CUDA backend where it is on, or None and why it is not."""
    native, reason = load_kernels()
    if native is None:
        return None, f"not built: {reason}"
    from fastseq.backends import cuda

    reason = cuda.why_off()
    with backends.use_backend("native"):
        return backends.select("recurrent", "cuda"), reason


def _versions() -> Rows:
    yield "fastseq", f"{fastseq.__version__} in {Path(fastseq.__file__).parent}"
    yield "torch", torch.__version__
    yield "numpy", numpy.__version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    extra = ("rich", "matplotlib", "jinja2")
    missing = [name for name in extra if find_spec(name) is None]
    yield (
        "extra `cli`",
        f"missing {', '.join(missing)}: pip install '.[cli]'" if missing else ", ".join(extra),
    )


def _machine() -> Rows:
    yield "CPU", f"{cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} processors usable"
    yield "threads", f"{torch.get_num_threads()} (torch.get_num_threads())"
    yield "GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "torch sees none"


def _backends() -> Rows:
    native, reason = load_kernels()
    if native is None:
        yield "native", f"not built: {reason}"
        yield "calls take", "torch's own path"
        return
    yield "native", f"built, {native.__file__}"
    cuda, reason = load_cuda_kernels()
    yield "CUDA", reason or f"on, {cuda.LIBRARY}; not tested on a GPU yet"
    yield "calls take", "the kernels" if backends.select("recurrent") else "torch's own path (FASTSEQ_BACKEND)"


def _isas() -> Rows:
    native, _ = load_kernels()
    flags = set(_cpuinfo("flags").split())
    for isa, needed in ISA_FLAGS.items():
        if native is not None and isa == native.active_isa():
            yield isa, "active"
        elif native is not None and isa in native.isas():
            yield isa, "available"
        elif missing := [flag for flag in needed if flag not in flags]:
            yield isa, f"no: this processor lacks {', '.join(missing)}"
        else:
            yield isa, "no: not built"


def _variables() -> Rows:
    for name, meaning in VARIABLES.items():
        value = os.environ.get(name)
        yield name, f"{'not set' if value is None else repr(value)}. {meaning}"


def _print_section(title: str, rows: Rows, width: int = 16) -> None:
    print(f"{title}")
    for name, text in rows:
        head = f"  {name:<{width}}"
        # A path is not broken: it must survive being copied.
        print(textwrap.fill(text, 110, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False))
    print()


def run() -> int:
    """Print everything; returns 0."""
    _print_section("Versions", _versions())
    _print_section("Machine", _machine())
    _print_section("Kernels", _backends())
    _print_section("Instruction sets", _isas())
    _print_section("Environment variables", _variables())
    rows = [(row.case, f"{row.served_by}: {row.reason}") for row in SERVICE]
    _print_section("Who computes what", rows, width=2 + max(len(case) for case, _ in rows))
    return 0

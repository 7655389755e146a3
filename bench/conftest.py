"""Options of the benchmarks, and the race that each of them is."""

import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from fastseq.backends import native

SMALL = os.environ.get("FASTSEQ_BENCH_SMALL", "") not in ("", "0")  # a smoke test: tiny shapes, one round
SECONDS = float(os.environ.get("FASTSEQ_BENCH_SECONDS", "2"))


@pytest.fixture(params=sorted({1, torch.get_num_threads()}), ids=lambda n: f"threads{n}")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture
def race(benchmark, threads):
    """Times ours and torch's turn by turn in one process, with the FMA peak of a core between them.

    Machines are shared: a ratio is the median of the ratios of neighbours, and a share of peak is of what the core gave
    at about the same time. pytest-benchmark records our times; the rest is in extra_info.
    """

    def run(ours, theirs, flops: float, dtype: torch.dtype = torch.float32) -> None:
        for _ in range(2):
            ours(), theirs()
        ratios, shares, torch_times = [], [], []

        def turn():
            peak = native.fma_peak(dtype, min(0.02, max(1e-4, torch_times[-1] if torch_times else 1e-3)))
            torch_times.append(seconds(theirs))
            return (peak,), {}

        def timed(peak):
            taken = seconds(ours)
            ratios.append(torch_times[-1] / taken)
            shares.append(flops / taken / (peak * threads))

        rounds = 1 if SMALL else max(5, min(500, int(SECONDS / max(1e-6, seconds(ours) + seconds(theirs)))))
        benchmark.pedantic(timed, setup=turn, rounds=rounds)
        benchmark.extra_info.update(
            isa=native.active_isa(),
            threads=threads,
            dtype=str(dtype).removeprefix("torch."),
            torch_median=statistics.median(torch_times),
            ratio=statistics.median(ratios),
            share_of_peak=statistics.median(shares),
        )

    return run

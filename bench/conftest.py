"""Options of the benchmarks, and the race that each of them is."""

import os
import statistics
import time
from collections.abc import Callable, Mapping

import pytest
import torch
from peers import grad_mode
from shapes import SMALL

from fastseq.backends import native
from fastseq.tools.info import cpu_name

SECONDS = float(os.environ.get("FASTSEQ_BENCH_SECONDS", "2"))  # per case
TURN_SECONDS = 2e-3  # short calls are repeated for so long in each turn
PEAK_SECONDS = 5e-3
# A shorter call is made once untimed at the start of each turn: it finds the caches and the sleeping threads that the
# measurement of the peak or the other contender left.
SETTLED_SECONDS = 20e-3
ROUNDS = range(3, 500)
# A round that takes longer is the only one: oneDNN's LSTM in bfloat16 takes minutes where the processor has no
# instructions for it.
SLOW_SECONDS = 10.0


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastseq"] = {
        "processor": cpu_name(),
        "processors_usable": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }


@pytest.fixture(params=sorted({1, torch.get_num_threads()}), ids=lambda n: f"threads{n}")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seconds(call: Callable[[], object], number: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


@pytest.fixture
def race(benchmark, threads):
    """Times ours and its peers turn by turn in one process, with the FMA peak of a core in every round.

    Machines are shared: a ratio is the median of the ratios within the rounds, and a share of peak is of what a core
    gave in the same round; with bytes_read, those from memory, so is a share of bandwidth: of the rate at which the
    threads read other memory of the same size, as the caches keep the same part of it. Who begins alternates.
    pytest-benchmark records our times, all else is in extra_info. Returns the median ratio of every peer.
    """

    def run(
        ours: Callable[[], object],
        peers: Mapping[str, Callable[[], object]],
        flops: float,
        dtype: torch.dtype,
        mode: str,
        bytes_read: int = 0,
        **facts: object,
    ) -> Mapping[str, float]:
        with grad_mode(mode):
            calls = {**peers, "ours": ours}
            once = {name: seconds(call) for name, call in calls.items()}  # warm-up
            slow = sum(once.values()) > SLOW_SECONDS
            if not slow:
                once = {name: seconds(call) for name, call in calls.items()}
            number = 1 if SMALL else max(1, int(TURN_SECONDS / max(once.values())))
            settle = max(once.values()) < SETTLED_SECONDS
            wanted = int(SECONDS / (PEAK_SECONDS + (number + settle) * sum(once.values())))
            rounds = 1 if SMALL or slow else min(max(wanted, ROUNDS.start), ROUNDS.stop)
            memory = torch.ones(bytes_read, dtype=torch.uint8) if bytes_read else None

            peaks, bandwidths, times = [], [], {name: [] for name in calls}
            order = list(calls)
            for _ in range(rounds):
                peaks.append(threads * native.fma_peak(dtype, PEAK_SECONDS))
                if memory is not None:
                    bandwidths.append(native.read_rate(memory, PEAK_SECONDS))
                for name in order:
                    if settle:
                        calls[name]()
                    times[name].append(seconds(calls[name], number))
                order.reverse()
            benchmark.pedantic(ours, rounds=min(rounds, ROUNDS.start), iterations=number)
        ratios = {name: [other / own for other, own in zip(times[name], times["ours"], strict=True)] for name in peers}
        shares = [flops / (own * peak) for own, peak in zip(times["ours"], peaks, strict=True)]

        if bandwidths:
            rates = [bytes_read / (own * rate) for own, rate in zip(times["ours"], bandwidths, strict=True)]
            facts |= {"read_bandwidth": statistics.median(bandwidths), "share_of_bandwidth": statistics.median(rates)}
        benchmark.extra_info.update(
            facts,
            mode=mode,
            isa=native.active_isa(),
            threads=threads,
            dtype=str(dtype).removeprefix("torch."),
            median=statistics.median(times["ours"]),
            torch_median=statistics.median(times["torch"]),
            ratio=statistics.median(ratios["torch"]),
            ratio_quartiles=quartiles(ratios["torch"]),
            rounds=rounds,
            load=os.getloadavg()[0] / os.cpu_count(),
            flops=flops,
            fma_peak=statistics.median(peaks),
            share_of_peak=statistics.median(shares),
        )
        return {name: statistics.median(ratios[name]) for name in peers}

    return run


def quartiles(values: list[float]) -> tuple[float, float]:
    """The lower and the upper one."""
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return cuts[0], cuts[2]

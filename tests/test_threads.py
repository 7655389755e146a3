"""Threads: teams smaller than asked for, several callers, fork, and torch's own setting."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from interpreter import run

native = pytest.importorskip("fastseq.backends.native", reason="the extension is not built")

# Work enough for a team, and a digest of its results that tells any two bits apart.
WORK = """
    import torch
    from fastseq.backends import native

    torch.manual_seed(0)
    x = torch.randn(12, 24, 128)
    weights = torch.randn(512, 128) / 16, torch.randn(512, 128) / 16, torch.randn(512), torch.randn(512)

    def work():
        y, h, c, _, saved = native.recurrent_forward("lstm", x, None, None, weights, save=True)
        gradients = native.recurrent_backward(
            "lstm", x, None, None, weights, y, saved, native.active_isa(),
            dy=y, dh_n=h, dc_n=c, dc_all=None, needs=[True] * 7,
        )
        return [native.checksum(t) for t in (y, h, c, *gradients)]
"""


def work(cell="lstm"):
    torch.manual_seed(0)
    rows = {"lstm": 512, "gru": 384}[cell]
    x = torch.randn(12, 24, 128)
    weights = torch.randn(rows, 128) / 16, torch.randn(rows, 128) / 16, torch.randn(rows), torch.randn(rows)

    def call():
        y, h, c, _, saved = native.recurrent_forward(cell, x, None, None, weights, save=True)
        gradients = native.recurrent_backward(
            cell, x, None, None, weights, y, saved, native.active_isa(),
            dy=y, dh_n=h, dc_n=c, dc_all=None, needs=[True] * 7,
        )  # fmt: skip
        return [native.checksum(t) for t in (y, h, c, *gradients) if t is not None]

    return call


@pytest.fixture
def threads():
    """Sets torch's number of threads, for the test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checker(build_check):
    return build_check("threads_check")


@pytest.mark.parametrize(
    "variable",
    [
        "OMP_THREAD_LIMIT=1",
        "OMP_THREAD_LIMIT=2",
        "OMP_THREAD_LIMIT=3",
        "OMP_THREAD_LIMIT=16",
        "OMP_DYNAMIC=true",
        "OMP_MAX_ACTIVE_LEVELS=4",
        "OMP_WAIT_POLICY=passive",
    ],
)
def test_teams(checker, variable):
    name, value = variable.split("=")
    assert run_checker(checker, value if name == "OMP_THREAD_LIMIT" else "16", **{name: value}) == (0, "")


def test_waiting_takes_little_time_of_a_processor(checker):
    assert run_checker(checker) == (0, "")


def run_checker(checker, *arguments, **variables):
    environment = {key: text for key, text in os.environ.items() if not key.startswith(("OMP_", "LD_PRELOAD"))}
    result = subprocess.run(
        [checker, *arguments], env=environment | variables, capture_output=True, text=True, timeout=120, check=False
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize("variable", ["OMP_THREAD_LIMIT=2", "OMP_THREAD_LIMIT=3", "OMP_DYNAMIC=true"])
def test_a_team_smaller_than_asked_for(variable):
    code = (
        WORK
        + """
    torch.set_num_threads(4)
    many = work()
    torch.set_num_threads(1)
    assert work() == many
    print("done")
    """
    )
    assert run(code, **dict([variable.split("=")])) == "done"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_results_do_not_depend_on_threads(cell, threads):
    call = work(cell)
    results = []
    for count in (1, 2, 3, 4, 7):
        threads(count)
        results.append(call())
    assert all(result == results[0] for result in results)


def test_each_thread_of_a_team_works():
    """With few units and many rows, where the units alone would not do for four threads. Of the seconds on a processor,
    in forward and in backward, the idlest has at least half of what the busiest has.
    """
    report = run(
        """
    import os, time
    import torch
    from fastseq.backends import native
    from fastseq.ops import CELLS

    def seconds():
        return {tid: time.clock_gettime(~tid << 3 | 6) for tid in map(int, os.listdir("/proc/self/task"))}

    def share(call):
        call()
        before = seconds()
        for _ in range(4):
            call()
        used = sorted(after - before[tid] for tid, after in seconds().items())[-4:]
        return used[0] / used[-1]

    torch.manual_seed(0)
    torch.set_num_threads(4)
    for cell, T, B, H in ("rnn_tanh", 20, 2048, 32), ("lstm", 10, 4096, 8), ("gru", 10, 4096, 16):
        gates = len(CELLS[cell].gates)
        x = torch.randn(T, B, H)
        weights = [torch.randn(gates * H, H) / 8 for _ in range(2)] + [torch.randn(gates * H) for _ in range(2)]
        states = None, torch.zeros(B, H) if cell == "lstm" else None
        forward = lambda: native.recurrent_forward(cell, x, *states, weights, save=True)
        y, h, c, _, saved = forward()
        copies = [saved.clone() for _ in range(5)]  # backward works in place
        backward = lambda: native.recurrent_backward(
            cell, x, *states, weights, y, copies.pop(), native.active_isa(), dy=y, dh_n=h, dc_n=c, dc_all=None,
            needs=[True] * 7,
        )
        for call in forward, backward:
            print(cell, call is forward, share(call))
    """,
        OMP_WAIT_POLICY="passive",  # a thread that has nothing to do sleeps
    )
    shares = {tuple(line.split()[:2]): float(line.split()[2]) for line in report.splitlines()}
    assert len(shares) == 6
    assert min(shares.values()) > 0.5, shares


def test_concurrent_callers(threads):
    threads(2)
    calls = [work("lstm"), work("gru")]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: calls[i % 2](), range(60)))
    assert results == [expected[i % 2] for i in range(60)]


def test_a_new_thread_obeys_torch():
    # OpenMP's own setting is per thread and knows nothing of it: a new thread would get as many as there are cores.
    report = run(
        WORK
        + """
    import os, threading
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/task"))
    seen = []
    def other():
        work()
        seen.append(len(os.listdir("/proc/self/task")))
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    print(seen[0] - before)
    """
    )
    assert report == "1"  # the new thread itself


@pytest.mark.parametrize("count", [1, 2, 3])
def test_torch_sets_the_number_of_threads(count):
    report = run(
        WORK
        + f"""
    import os
    torch.set_num_threads({count})
    before = len(os.listdir("/proc/self/task"))
    work()
    print(len(os.listdir("/proc/self/task")) - before)
    """,
        OMP_NUM_THREADS="1",  # so that nothing has made threads before
    )
    assert int(report) == count - 1


def test_use_after_fork():
    report = run(
        WORK
        + """
    import os, signal, threading
    torch.set_num_threads(4)
    expected = work()
    for _ in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            results = [work()]
            thread = threading.Thread(target=lambda: results.append(work()))
            thread.start()
            thread.join()
            os._exit(0 if results == [expected, expected] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert work() == expected
    print("done")
    """
    )
    assert report == "done"


def test_fork_while_a_team_runs():
    report = run(
        WORK
        + """
    import os, signal, threading, warnings
    torch.set_num_threads(2)
    expected = work()
    stop = threading.Event()
    def keep_working():
        while not stop.is_set():
            work()
    worker = threading.Thread(target=keep_working)
    worker.start()
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 advises against it
    for _ in range(5):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if work() == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
    worker.join()
    print("done")
    """
    )
    assert report == "done"


def test_in_worker_processes():
    report = run(
        WORK
        + """
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return native.recurrent_step("lstm", x[index], None, None, *weights, 4)[0]

    torch.set_num_threads(4)
    work()
    alone = [Rows()[i] for i in range(4)]
    loaded = [batch[0] for batch in DataLoader(Rows(), num_workers=2, batch_size=1)]
    assert all(torch.equal(a, b) for a, b in zip(alone, loaded))
    print("done")
    """
    )
    assert report == "done"

"""The benchmarks run, with tiny shapes; no time is judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq import backends

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(backends.select() is None, reason="the kernels are not built")
def test_benchmarks_run(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark comes with the extra `bench`")
    record = tmp_path / "record.json"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "bench", f"--benchmark-json={record}", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"FASTSEQ_BENCH_SMALL": "1"},
        check=True,
        timeout=300,
    )
    benchmarks = json.loads(record.read_text())["benchmarks"]
    assert {bench["fullname"].split("::")[0] for bench in benchmarks} == {
        f"bench/bench_{name}.py" for name in ("rnn", "lstm", "gru", "cells")
    }
    for bench in benchmarks:
        assert {"isa", "threads", "dtype", "torch_median", "ratio", "share_of_peak"} <= bench["extra_info"].keys()
        assert bench["extra_info"]["ratio"] > 0

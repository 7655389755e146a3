"""The benchmarks run, with tiny shapes, and `fastseq report` makes a page of their record; no time is judged here."""

import base64
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastseq import backends
from fastseq.tools.cli import main
from fastseq.tools.report import RecordError, Row, page, read, shares

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    if backends.select("recurrent") is None:
        pytest.skip("the kernels are not built")
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark comes with the extra `bench`")
    path = tmp_path_factory.mktemp("bench") / "record.json"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "bench", f"--benchmark-json={path}", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"FASTSEQ_BENCH_SMALL": "1"},
        check=True,
        timeout=300,
    )
    return path


def row(**changes):
    """A case that reaches its floor."""
    facts = {
        "module": "LSTM",
        "mode": "forward",
        "shape": "B8-T64-I256-H256",
        "dtype": "float32",
        "threads": 1,
        "isa": "avx2",
        "batch": 8,
        "flops": 5e8,
        "fma_peak": 1e11,
        "weight_bytes": 67_108_864,
        "median": 6.25e-3,
        "torch_median": 1.25e-2,
        "ratio": 2.0,
        "ratio_quartiles": (1.9, 2.1),
        "rounds": 100,
        "load": 1.0,
        "share_of_peak": 0.8,
        "ratio_floor": 1.35,
    }
    return Row(**facts | changes)


def test_benchmarks_run(record):
    benchmarks = json.loads(record.read_text())["benchmarks"]
    assert {bench["fullname"].split("::")[0] for bench in benchmarks} == {
        f"bench/bench_{name}.py"
        for name in ("rnn", "lstm", "gru", "recurrent", "steps", "cells", "attention", "layer_norm")
    }
    facts = [bench["extra_info"] for bench in benchmarks]
    assert {fact["threads"] for fact in facts} == {1, torch.get_num_threads()}
    for fact in facts:
        assert {"isa", "torch_median", "fma_peak"} <= fact.keys()
        assert fact["ratio"] > 0
        assert fact["share_of_peak"] == pytest.approx(fact["flops"] / fact["median"] / fact["fma_peak"])
        assert ("packed_over_padded" in fact) == ("packed" in fact["shape"])
        assert ("share_of_bandwidth" in fact) == ("-L1-" in fact["shape"])
    assert sum("share_floor" in fact for fact in facts) >= 2  # LSTM and GRU with B = 9


def test_report(record, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert main(["report", str(record), "--output", str(output)]) == 0
    rows = read(record)[1]
    assert f"{len(rows)} cases" in capsys.readouterr().out
    html = output.read_text()
    summary = shares(rows)
    assert html.count("<tr") == len(rows) + 1 + len(summary) + bool(summary)
    (png,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert base64.b64decode(png).startswith(b"\x89PNG\r\n")
    assert not re.findall(r'(?:src|href)="(?!data:)', html)


def test_page_marks_what_falls_short():
    record = {
        "machine_info": {"fastseq": {"processor": "A <fast> one", "processors_usable": 4, "torch": "2.13.0"}},
        "commit_info": {"id": None, "dirty": False},
        "datetime": "2026-01-01",
    }
    html = page(record, [row(), row(ratio=1.2, ratio_quartiles=(1.1, 1.3)), row(share_floor=0.9), row(load=2.0)])
    assert "A &lt;fast&gt; one" in html
    assert html.count('class="missed"') == 2  # a case, and the median share
    assert html.count('class="doubtful"') == 1


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, ""),
        ({"ratio": 1.3}, "the arithmetic is the limit; at the peak the ratio would be 1.62"),
        ({"ratio": 1.0}, "out of reach: torch is at 80% of the peak"),
        ({"ratio": 1.3, "ratio_quartiles": (1.2, 1.4)}, "within the noise"),
        ({"ratio": 1.0, "share_of_peak": 0.5}, "50% of the time is not arithmetic at the peak"),
        ({"ratio": 1.0, "share_of_peak": 0.3, "batch": 1}, "10.7 GB/s"),
        ({"ratio": 1.0, "share_of_peak": 0.1, "flops": 1e5, "median": 1e-5}, "1 us of 10 us are arithmetic"),
        ({"packed_over_padded": 1.4, "packed_over_padded_ceiling": 1.15}, "packed takes 1.40 of padded per token"),
        ({"packed_over_padded": 1.1, "packed_over_padded_ceiling": 1.15}, ""),
        ({"held": {"share of the read bandwidth": (0.7, 0.85)}}, "share of the read bandwidth is 0.70"),
        ({"held": {"share of the read bandwidth": (0.9, 0.85)}}, ""),
        ({"ratio": 1.0, "share_of_peak": 0.1, "share_of_bandwidth": 0.6}, "read at 60% of the memory's bandwidth"),
    ],
)
def test_note(changes, note):
    case = row(**changes)
    assert note in case.note
    assert bool(case.note) == case.missed == bool(note)


@pytest.mark.parametrize("changes", [{"load": 1.8}, {"share_of_peak": 1.2}])
@pytest.mark.parametrize("ratio", [1.0, 20.0])
def test_doubt(ratio, changes):
    case = row(ratio=ratio, share_floor=0.8, **changes)
    assert case.note.startswith("doubtful: ")
    assert shares([case]) == []


def test_shares_are_medians_of_their_threads():
    rows = [row(share_floor=0.8, share_of_peak=share) for share in (0.5, 0.85, 0.9)]
    (one, four) = shares([*rows, row(share_floor=0.75, share_of_peak=0.7, threads=4), row(share_of_peak=0.1)])
    assert (one.median, one.cases, one.missed) == (0.85, 3, False)
    assert (four.threads, four.median, four.missed) == (4, 0.7, True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": [{"extra_info": {"ratio": 1}}]}'])
def test_no_record(text, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="is no record of"):
        read(path)
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 2
    assert "fastseq report: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({}, "a benchmark has no 'extra_info'"),
        ({"extra_info": 3}, "extra_info must be"),
        ({"extra_info": {}}, "a case has no"),
        ({"extra_info": {"colour": "red"}}, "unknown facts of a case: colour"),
        ({"extra_info": dataclasses.asdict(row(module="Elman"))}, "module must be one of"),
    ],
)
def test_cases_that_cannot_be_read(case, message, tmp_path):
    machine = {"fastseq": {"processor": "one", "processors_usable": 2, "torch": "2.13"}}
    head = {"machine_info": machine, "commit_info": {"id": None, "dirty": False}, "datetime": "2026-01-01"}
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"benchmarks": [case], **head}))
    with pytest.raises(RecordError, match=message):
        read(path)


def test_report_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none.json"), "--output", str(tmp_path / "page.html")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none.json"), "--output", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_report_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", "record.json"]) == 2
    assert "needs jinja2 of the extra `cli`" in capsys.readouterr().err

"""Results and gradients are bit by bit what tests/result_hashes.txt says: a change of an order of summation is seen."""

import platform

import pytest

pytest.importorskip("fastseq.backends.native", reason="the extension is not built")

import result_hashes

from fastseq import backends, ops

REGENERATE = (
    "an order of summation changed: regenerate with `python tests/result_hashes.py --write` and say so in the commit"
)


def test_hashes_of_the_table():
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):  # elsewhere the baseline may fuse a multiply and an add
        pytest.skip(f"tests/result_hashes.txt is of x86_64, this machine is {machine}")
    with backends.use_backend("native"):
        different = result_hashes.differences(result_hashes.listing(), result_hashes.read(result_hashes.TABLE))
    assert not different, "\n".join([REGENERATE, *different])


def test_every_cell_has_hashes():
    assert set(result_hashes.CELLS) == set(ops.CELLS)


def test_a_change_of_one_bit_is_named():
    case = ("lstm/cell/1/inference", backends.native.isas()[0], "float32")
    assert result_hashes.differences({case: "1"}, {case: "0"}) == [f"{' '.join(case)}: 0 -> 1"]
    assert result_hashes.differences({}, {case: "0"}) == [f"{' '.join(case)}: 0 -> no such case"]
    assert result_hashes.differences({case: "0"}, {case: "0", (case[0], "none", case[2]): "1"}) == []


def test_kernels_compute_the_hashed(monkeypatch):
    """Torch's own operators give other bits: none of the hashes is theirs, but for what bfloat16 rounds to the same."""
    monkeypatch.setattr(backends.native, "isas", lambda: ("baseline",))
    monkeypatch.setattr(result_hashes, "from_kernels", lambda outputs: True)
    with backends.use_backend("torch"):
        torchs = result_hashes.listing()
    kernels = result_hashes.read(result_hashes.TABLE)
    assert [key for key in torchs if torchs[key] == kernels[key] and key[2] != "bfloat16"] == []

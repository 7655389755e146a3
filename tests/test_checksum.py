"""The checksum that tells whether packed weights are stale: what it sees, and what it does not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastseq.backends.contract import Refused

native = pytest.importorskip("fastseq.backends.native", reason="the extension is not built")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


SIZES = (1, 2, 15, 16, 17, 31, 33, 127, 129, 32767, 32768, 32769, 200_001)


@pytest.mark.parametrize("size", SIZES)
def test_sees_every_place(size):
    tensor = torch.randn(size)
    before = native.checksum(tensor)
    assert native.checksum(tensor.clone()) == before
    for place in {0, size // 2, size - 1, *torch.randint(size, (20,)).tolist()}:
        changed = tensor.clone()
        changed[place] = torch.nextafter(changed[place], torch.tensor(torch.inf))
        after = native.checksum(changed)
        assert after[0] != before[0]
        assert after[1] != before[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (512, 128), (1024, 256)])
@pytest.mark.parametrize("values", ["normal", "signs"])
def test_sees_regular_changes(dtype, shape, values):
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    if values == "signs":
        tensor = tensor.sign()
    changes = {
        "negated": -tensor,
        "doubled": 2 * tensor,
        "halved": tensor / 2,
        "rolled": tensor.roll(1, 0),
        "rolled columns": tensor.roll(1, 1),
        "flipped": tensor.flip(0),
        "transposed": tensor.T.contiguous(),
        "rows swapped": torch.cat([tensor[1:2], tensor[:1], tensor[2:]]),
        "even columns negated": tensor * torch.tensor([-1, 1], dtype=dtype).repeat(shape[1] // 2),
        "zeroed": torch.zeros_like(tensor),
        "negative zeros": -torch.zeros_like(tensor),
        "ones": torch.ones_like(tensor),
        "one more row": torch.cat([tensor, torch.zeros(1, shape[1], dtype=dtype)]),
        "one row less": tensor[:-1],
    }
    sums = {name: native.checksum(changed) for name, changed in changes.items()} | {"same": native.checksum(tensor)}
    assert len(set(sums.values())) == len(sums)


def test_of_swapped_chunks():
    # Two chunks of 128 KB, and four of a vector's words, change places.
    tensor = torch.randn(4 * 32768)
    for step in (32768, 4, 32):
        swapped = torch.cat([tensor[step : 2 * step], tensor[:step], tensor[2 * step :]])
        assert native.checksum(swapped) != native.checksum(tensor)


def test_does_not_depend_on_threads():
    tensor = torch.randn(1_000_003)
    before = torch.get_num_threads()
    try:
        sums = set()
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            sums.add(native.checksum(tensor))
    finally:
        torch.set_num_threads(before)
    assert len(sums) == 1


def test_reads_the_bytes_only():
    tensor = torch.randn(33)
    assert native.checksum(tensor) == native.checksum(nn.Parameter(tensor)) == native.checksum(tensor.view(3, 11))
    shifted = torch.empty(34)[1:].copy_(tensor)  # another alignment
    assert native.checksum(shifted) == native.checksum(tensor)
    assert native.checksum(torch.empty(0)) != native.checksum(torch.zeros(1))
    with pytest.raises(Refused, match="contiguous"):
        native.checksum(torch.randn(4, 4).T)
    with pytest.raises(Refused, match="dtypes"):
        native.checksum(torch.zeros(3, dtype=torch.complex64))

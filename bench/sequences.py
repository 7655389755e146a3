"""Sequence modules beside torch's: what bench_rnn, bench_lstm and bench_gru run."""

import pytest
import torch
from floors import floors
from peers import Job, peers
from shapes import SEQUENCES, Shape
from torch.nn.utils.rnn import pack_padded_sequence

over_shapes = pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.id)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def run(benchmark, race, name: str, shape: Shape, dtype: torch.dtype, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(shape.T, shape.B, shape.I, generator=generator), shape.T * shape.B
    sequence = x
    if shape.packed:
        lengths = torch.randint(1, shape.T + 1, (shape.B,), generator=generator)
        lengths[0] = shape.T
        sequence, tokens = pack_padded_sequence(x, lengths, enforce_sorted=False), int(lengths.sum())
    sizes = (shape.I, shape.H, shape.layers)
    ours, theirs = peers(name, sizes, (sequence,), mode, dtype, bidirectional=shape.bidirectional)

    contenders = {"torch": theirs.call}
    if shape.packed:
        contenders["padded"] = Job(ours.module, (x.to(dtype),), mode).call
    passes = 3 if mode == "training" else 1
    ratios = race(
        ours.call,
        contenders,
        passes * shape.flops(name, tokens),
        dtype,
        mode,
        module=name,
        shape=shape.id,
        batch=shape.B,
        weight_bytes=(1 + (mode == "training")) * shape.weights_read(name) * dtype.itemsize,
    )
    info = benchmark.extra_info
    info.update(floors(name, mode, shape, info["dtype"], info["threads"]))
    if shape.packed:
        info["packed_over_padded"] = shape.T * shape.B / (ratios["padded"] * tokens)

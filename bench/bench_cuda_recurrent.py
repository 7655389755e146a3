"""RNN, LSTM and GRU on a GPU: torch's modules (cuDNN), and ours beside them where they are switched on.

    FASTSEQ_CUDA=on PYTHONPATH=tests python bench/bench_cuda_recurrent.py --output cuda.json

Times are medians in milliseconds of the whole call, input projection included, measured with CUDA events, turn by
turn. As many inputs as units, one layer. Packed: lengths from T / 2 to T. Ours is first held against torch in float64;
no time is taken of a wrong result.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from itertools import product

import torch
from gpu import DTYPES, begin, make_parser, race, tabulate
from peers import Job, converted, flat, grad_mode
from shapes import SMALL, Shape
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import backends

SIZES = ((16, 1024, 768), (64, 100, 512), (1, 256, 256), (20, 300, 800), (64, 1600, 384), (128, 128, 256),
         (32, 512, 1024), (16, 256, 2048))  # B, T, H  # fmt: skip
if SMALL:
    SIZES = ((3, 5, 8),)
KINDS = {"one direction": {}, "packed": {"packed": True}, "two directions": {"bidirectional": True}}
MODULES = ("LSTM", "GRU", "RNN")
MODES = ("forward", "training")
# Of the largest value of each output and gradient: that of the state's dtype, over long sums.
LARGEST_ERROR = {"float16": 2e-2, "bfloat16": 5e-2, "float32": 1e-4, "tf32": 2e-2}


def jobs(name: str, shape: Shape, dtype: torch.dtype, mode: str) -> dict[str, Job]:
    """By who runs it: torch, torch in float64 to compare with, and ours if they are on."""
    torch.manual_seed(0)
    sequence = torch.randn(shape.T, shape.B, shape.I)
    if shape.packed:
        lengths = torch.randint((shape.T + 1) // 2, shape.T + 1, (shape.B,))
        lengths[0] = shape.T
        sequence = pack_padded_sequence(sequence, lengths, enforce_sorted=False)
    sequence = sequence.to("cuda")
    theirs = getattr(nn, name)(shape.I, shape.H, bidirectional=shape.bidirectional).to("cuda", dtype)
    torch_job = Job(copy.deepcopy(theirs), (converted(sequence, dtype),), mode)
    found = {"torch": torch_job, "exact": Job(theirs.double(), (converted(sequence, torch.float64),), mode)}
    if backends.select("recurrent", "cuda") is not None:
        ours = getattr(fastseq, name)(shape.I, shape.H, bidirectional=shape.bidirectional).to("cuda", dtype)
        ours.load_state_dict(torch_job.module.state_dict())
        found["ours"] = Job(ours, (converted(sequence, dtype),), mode)
    for job in found.values():
        with torch.no_grad():
            job.dy = torch.ones_like(flat(job.module(*job.arguments))[0])
    return found


def error(job: Job, exact: dict[str, torch.Tensor]) -> float:
    """The largest error of an output or gradient, as a fraction of its largest value."""
    results = job.results()
    return max(float((results[n] - e).abs().max() / e.abs().max().clamp(min=1e-30)) for n, e in exact.items())


def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    for name, (B, T, H), (kind, options), dtype, mode in product(
        arguments.module, SIZES, KINDS.items(), arguments.dtype, MODES
    ):
        shape = Shape(B, T, H, H, **options)
        row = {"module": name, "B": B, "T": T, "H": H, "kind": kind, "dtype": dtype, "mode": mode}
        contenders = jobs(name, shape, DTYPES[dtype], mode)
        if "ours" in contenders:
            exact = contenders["exact"].results()
            found = error(contenders["ours"], exact), error(contenders["torch"], exact)
            bound = LARGEST_ERROR["tf32" if arguments.tf32 and dtype == "float32" else dtype]
            row |= {"error": found[0], "torch_error": found[1]}
            if not found[0] <= max(bound, 2 * found[1]):
                yield row | {"wrong": True}
                continue
        del contenders["exact"]
        with grad_mode(mode):
            yield row | race({who: job.call for who, job in contenders.items()}, arguments.seconds)


def cells(row: dict) -> tuple[str, ...]:
    times = f"{row['torch']:.3f}" if "torch" in row else "", f"{row['ours']:.3f}" if "ours" in row else ""
    ratio = f"{row['torch'] / row['ours']:.2f}" if "ours" in row else "WRONG" if row.get("wrong") else ""
    sizes = f"{row['B']}, {row['T']}, {row['H']}"
    return row["module"], sizes, row["kind"], row["dtype"], row["mode"], *times, ratio


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0], tuple(DTYPES))
    parser.add_argument("--module", nargs="+", choices=MODULES, default=MODULES)
    arguments = begin(parser)
    if arguments is None:
        return 0
    columns = "module", "B, T, H", "", "dtype", "mode", "torch, ms", "ours, ms", "ratio"
    return tabulate(measure(arguments), columns, cells, arguments)


if __name__ == "__main__":
    sys.exit(main())

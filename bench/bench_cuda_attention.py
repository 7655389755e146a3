"""Attention on a GPU: torch's backends one by one, and ours beside them where it is switched on.

    FASTSEQ_CUDA=on python bench/bench_cuda_attention.py --output cuda_attention.json

TFLOP/s of medians, measured with CUDA events, turn by turn. Of a forward pass 4 B N L S D flops count, half of them if
causal; of a backward pass 2.5 times as many. Sequences of S tokens with B S = 16384 and N D = 2048, as in Dao 2023
("FlashAttention-2"); grouped heads, 64 to 8; decoding, one query against a cache, in GB/s of the cache as well; and a
bias with a gradient. Ours is first held against torch in float64, at no more than 512 tokens; no time is taken of a
wrong result. A backend that refuses a call, or runs out of memory, has no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu import DTYPES, begin, make_parser, race, tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastseq
from fastseq import backends

TOKENS, WIDTH = 16384, 2048
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = (*PEERS, "ours")
# Of the largest value of the output and of each gradient.
LARGEST_ERROR = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-5}


class Shape(NamedTuple):
    """Sizes and options of a call."""

    kind: str
    B: int
    N: int
    kv_heads: int
    L: int
    S: int
    D: int
    causal: bool = False
    bias: bool = False

    @property
    def flops(self) -> float:
        """Of a forward pass."""
        return 4.0 * self.B * self.N * self.L * self.S * self.D * (0.5 if self.causal else 1)

    @property
    def small(self) -> Shape:
        """What is compared."""
        return self._replace(B=min(self.B, 2), L=min(self.L, 512), S=min(self.S, 512))


def shapes(longest: int) -> Iterator[Shape]:
    for D in (64, 128):
        for causal in (False, True):
            for S in (512, 1024, 2048, 4096, 8192, 16384):
                if longest >= S:
                    kind = "causal" if causal else "full"
                    yield Shape(kind, TOKENS // S, WIDTH // D, WIDTH // D, S, S, D, causal)
    for S in (2048, 8192):
        if longest >= S:
            yield Shape("grouped", TOKENS // S, 64, 8, S, S, 128, True)
    for B, N, kv_heads, S in ((1, 32, 32, 8192), (1, 64, 8, 16384), (16, 64, 8, 8192), (128, 32, 8, 2048)):
        if longest >= S:
            yield Shape("decode", B, N, kv_heads, 1, S, 128)
    for S, D in ((512, 64), (2048, 64), (2048, 128)):
        if longest >= S:
            yield Shape("bias", TOKENS // S, WIDTH // D, WIDTH // D, S, S, D, bias=True)


class Call:
    """The tensors of a call and what is timed."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device="cuda", generator=generator).to(dtype)

        B, N, L, S, D = shape.B, shape.N, shape.L, shape.S, shape.D
        self.leaves = [normal(B, N, L, D), normal(B, shape.kv_heads, S, D), normal(B, shape.kv_heads, S, D)]
        self.leaves += [normal(1, N, L, S)] if shape.bias else []
        self.dout = normal(B, N, L, D)
        self.options = {"is_causal": shape.causal, "enable_gqa": shape.kv_heads != N}

    def to(self, dtype: torch.dtype) -> Call:
        call = object.__new__(Call)
        call.leaves, call.dout = [t.detach().to(dtype) for t in self.leaves], self.dout.to(dtype)
        call.options = self.options
        return call

    def forward(self, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        q, k, v, *mask = self.leaves
        return lambda: function(q, k, v, *mask, **self.options)

    def backward(self, function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """The backward pass alone, of a forward that has run."""
        leaves = [t.detach().requires_grad_() for t in self.leaves]
        with torch.enable_grad():
            out = function(*leaves, **self.options)
        return lambda: torch.autograd.grad(out, leaves, self.dout, retain_graph=True)

    def results(self, function: Callable[..., Tensor]) -> list[Tensor]:
        return [self.forward(function)(), *self.backward(function)()]


def only(backend: SDPBackend) -> Callable[..., Tensor]:
    """torch's function on one of its backends."""

    def run(*arguments: Tensor, **options: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*arguments, **options)

    return run


def error(shape: Shape, dtype: torch.dtype) -> float:
    """The largest error of an output or gradient of ours, as a fraction of its largest value."""
    call = Call(shape.small, dtype)
    exact = call.to(torch.float64).results(only(SDPBackend.MATH))
    ours = call.results(fastseq.scaled_dot_product_attention)
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in zip(ours, exact, strict=True))


def served(call: Call, function: Callable[..., Tensor], mode: str) -> Callable[[], object] | None:
    """What is timed, None where the backend refuses."""
    try:
        timed = getattr(call, mode)(function)
        timed()
        torch.cuda.synchronize()
    except (RuntimeError, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return None
    return timed


def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    functions = {name: only(backend) for name, backend in PEERS.items()}
    if backends.select("attention", "cuda") is not None:
        functions["ours"] = fastseq.scaled_dot_product_attention
    for shape in shapes(arguments.longest):
        for dtype in arguments.dtype:
            found = error(shape, DTYPES[dtype]) if "ours" in functions else 0.0
            wrong = not found <= LARGEST_ERROR[dtype]
            for mode in ("forward",) if shape.kind == "decode" else ("forward", "backward"):
                row = {**shape._asdict(), "dtype": dtype, "mode": mode, "error": found, "wrong": wrong}
                if not wrong:
                    call = Call(shape, DTYPES[dtype])
                    calls = {name: served(call, function, mode) for name, function in functions.items()}
                    calls = {name: timed for name, timed in calls.items() if timed is not None}
                    row["milliseconds"] = race(calls, arguments.seconds)
                    flops = shape.flops * (2.5 if mode == "backward" else 1)
                    row["tflops"] = {name: flops / ms / 1e9 for name, ms in row["milliseconds"].items()}
                    if shape.kind == "decode":
                        cache = 2 * shape.B * shape.kv_heads * shape.S * shape.D * DTYPES[dtype].itemsize
                        row["gigabytes"] = {name: cache / ms / 1e6 for name, ms in row["milliseconds"].items()}
                yield row


def cells(row: dict) -> list[str]:
    rates = row.get("gigabytes") or row.get("tflops", {})
    heads = f"{row['N']}/{row['kv_heads']}" if row["N"] != row["kv_heads"] else str(row["N"])
    sizes = f"{row['B']}, {heads}, {row['L']}, {row['S']}, {row['D']}"
    numbers = [f"{rates[name]:.1f}" if name in rates else "" for name in NAMES]
    numbers[-1] = "WRONG" if row["wrong"] else numbers[-1]
    return [row["kind"], sizes, row["dtype"], row["mode"], *numbers]


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0], ("bfloat16", "float32"))
    parser.add_argument("--longest", type=int, default=TOKENS, help="no longer sequences")
    parser.add_argument("--deterministic", action="store_true", help="torch's deterministic backward")
    arguments = begin(parser)
    if arguments is None:
        return 0
    torch.use_deterministic_algorithms(arguments.deterministic, warn_only=True)
    columns = "", "B, N, L, S, D", "dtype", "mode", *NAMES
    title = "TFLOP/s; decoding: GB/s"
    return tabulate(measure(arguments), columns, cells, arguments, title, deterministic=arguments.deterministic)


if __name__ == "__main__":
    sys.exit(main())

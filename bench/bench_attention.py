"""fastseq.scaled_dot_product_attention and fastseq.MultiheadAttention beside torch's."""

from dataclasses import replace

import attention
import pytest
import torch
from floors import BANDWIDTH, CAUSAL_OVER_WINDOW, FASTEST_PEER, FMA_PEAK, attention_share, ratio_floor
from peers import checked
from shapes import DECODES, MULTIHEADS, PREFILLS, AttentionShape
from torch import nn

import fastseq

by_id = {"ids": lambda shape: shape.id}
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
MODULE = "scaled_dot_product_attention"
# The passes over the scores: two products forward, five more backward.
TRAINING_FLOPS = 3.5


@pytest.mark.parametrize("variant", attention.FORWARD)
@pytest.mark.parametrize("shape", PREFILLS, **by_id)
def test_forward(benchmark, race, threads, shape, variant):
    run(benchmark, race, threads, shape, variant, "forward", torch.float32)


@pytest.mark.parametrize("variant", ["full", "causal"])
@pytest.mark.parametrize("shape", PREFILLS, **by_id)
def test_forward_bfloat16(benchmark, race, threads, shape, variant):
    run(benchmark, race, threads, shape, variant, "forward", torch.bfloat16)


@pytest.mark.parametrize("variant", attention.TRAINING)
@pytest.mark.parametrize("shape", attention.training_shapes(), **by_id)
def test_training(benchmark, race, threads, shape, variant):
    run(benchmark, race, threads, shape, variant, "training", torch.float32)


@over_dtypes
@pytest.mark.parametrize("variant", attention.DECODE)
@pytest.mark.parametrize("shape", DECODES, **by_id)
def test_decode(benchmark, race, threads, shape, variant, dtype):
    run(benchmark, race, threads, shape, variant, "forward", dtype)


@pytest.mark.parametrize("shape", [shape for shape in PREFILLS if shape.S in (7, 1024)], **by_id)
def test_window(benchmark, race, threads, shape):
    run(benchmark, race, threads, shape, "window", "forward", torch.float32)


def run(benchmark, race, threads: int, shape: AttentionShape, variant: str, mode: str, dtype: torch.dtype) -> None:
    ours, theirs, pairs = attention.jobs(shape, variant, mode, dtype)
    others = attention.openvino(ours, threads) if variant != "window" else {}
    contenders = {"torch": theirs.call, **others}
    if variant == "window":
        contenders["full causal"] = replace(ours, options={"is_causal": True}).call
    ratios = race(
        ours.call,
        contenders,
        shape.flops(pairs) * (TRAINING_FLOPS if mode == "training" else 1),
        dtype,
        mode,
        bytes_read=shape.cache_elements * dtype.itemsize * shape.decode,
        module=MODULE,
        shape=f"{shape.id}-{variant}",
        batch=shape.B,
        weight_bytes=0,
    )

    info = benchmark.extra_info
    kind = variant
    if shape.decode and variant == "full":
        kind = "grouped_decode" if shape.grouped else "decode"
    shares = {FMA_PEAK: info["share_of_peak"], BANDWIDTH: info.get("share_of_bandwidth")}
    floors = attention_share(shape, kind, mode, info["dtype"], threads)
    held = {name: (shares[name], floor) for name, floor in floors.items()}
    if BANDWIDTH not in held:  # which is then the limit, whoever reads
        info.update(ratio_floor(kind, mode, shape.S, info["dtype"], threads))
        held |= {f"{name}'s time over ours": (ratios[name], FASTEST_PEER) for name in others}
    if variant == "window":
        held["full causal over window"] = (ratios["full causal"], CAUSAL_OVER_WINDOW)
    info.update(held=held)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, without its weights."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("shape", MULTIHEADS, **by_id)
def test_multihead_attention(benchmark, race, threads, shape, mode):
    torch.manual_seed(0)
    ours, theirs = (
        SelfAttention(source.MultiheadAttention(shape.E, shape.heads, batch_first=True)) for source in (fastseq, nn)
    )
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        module.train(mode == "training")
    x = torch.randn(shape.B, shape.S, shape.E, generator=torch.Generator().manual_seed(0))
    ours, theirs = checked(ours, theirs, (x,), mode, torch.float32)
    race(
        ours.call,
        {"torch": theirs.call},
        shape.flops * (3 if mode == "training" else 1),
        torch.float32,
        mode,
        module="MultiheadAttention",
        shape=shape.id,
        batch=shape.B,
        weight_bytes=0,
    )
    benchmark.extra_info.update(ratio_floor("MultiheadAttention", mode, shape.S, "float32", threads))

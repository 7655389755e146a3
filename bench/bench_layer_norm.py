"""fastseq.LayerNorm beside torch's, alone and with the residual addition before it."""

import pytest
import torch
from peers import checked
from shapes import NORMS
from torch import Tensor, nn

import fastseq

FLOPS = {"forward": 8, "training": 20}  # of an element, about; memory is the limit


class SumAndNorm(nn.Module):
    """The norm of a sum and the sum itself, as a sublayer of a Transformer needs them."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.norm, fastseq.LayerNorm):
            return self.norm(x, residual=residual)
        z = x + residual
        return self.norm(z), z


@pytest.mark.parametrize("mode", FLOPS)
@pytest.mark.parametrize("variant", ["plain", "residual"])
@pytest.mark.parametrize("shape", NORMS, ids=lambda shape: shape.id)
def test_layer_norm(benchmark, race, threads, shape, variant, mode):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = fastseq.LayerNorm(shape.features), nn.LayerNorm(shape.features)
    arguments = tuple(torch.randn(shape.rows, shape.features, generator=generator) for _ in range(2))
    if variant == "plain":
        arguments = arguments[:1]
    else:
        ours, theirs = SumAndNorm(ours), SumAndNorm(theirs)
    ours, theirs = checked(ours, theirs, arguments, mode, torch.float32)
    race(
        ours.call,
        {"torch": theirs.call},
        FLOPS[mode] * shape.rows * shape.features,
        torch.float32,
        mode,
        module="LayerNorm",
        shape=f"{shape.id}-{variant}",
        batch=shape.rows,
        weight_bytes=0,
    )

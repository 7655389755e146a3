"""A layer as one opaque op in the graphs of torch.compile, with the kernels inside."""

from __future__ import annotations

from torch import Tensor

from fastseq.ops import composite
from fastseq.ops.cell import Layer, Results, Weights


def layer(call: Layer, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Weights) -> Results:
    return composite.layer(call, x, h_0, c_0, weights)

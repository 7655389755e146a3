"""The minimal gated unit: n = tanh(W_in x + b_in + f (W_hn h + b_hn)), h' = (1 - f) h + f n, gates in the order f, n.

The gate acts after the matrix product, as the reset gate of torch's GRU, so that one product serves both gates. Torch
has no such cell: `fastseq.nn.Recurrent(fastseq.cells.mgu, ...)` makes a module of it.

Source: Zhou et al., "Minimal gated unit for recurrent neural networks", 2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.ops.recurrent.spec import Cell


def _mgu(x: Any, r: Any, h: Tensor) -> tuple[Tensor]:
    f = torch.sigmoid(x.f + r.f)
    n = torch.tanh(x.n + f * r.n)
    return (n + (1 - f) * (h - n),)


MGU = Cell("mgu", "MGU", gates=("f", "n"), formula=_mgu)

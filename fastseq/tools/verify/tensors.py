"""Tensors as arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def array(a: Tensor) -> np.ndarray:
    """The values of a tensor, exactly; of bfloat16 in float32."""
    return (a.float() if a.dtype == torch.bfloat16 else a).detach().cpu().numpy()

"""LayerNorm as a drop-in module."""

from __future__ import annotations

from torch import Tensor, nn

from fastseq.nn.drop_in import DropIn
from fastseq.ops import routing
from fastseq.ops.normalization import layer_norm


class LayerNorm(DropIn, nn.LayerNorm):
    """A drop-in `torch.nn.LayerNorm`: same arguments, parameters, initialization, state_dict and results.

    Args:
        input: (*, *normalized_shape).
        residual: shaped as the input, to which it is added before the normalization, in the same pass. torch's module
            has no such argument.

    Returns:
        The normalized tensor, shaped as the input. With a residual, a pair: that and the sum.

    Raises: the errors of `fastseq.layer_norm`.

    Sources: Ba et al., "Layer normalization", 2016;
        https://pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html

    Example:
        >>> import torch, fastseq
        >>> norm, x = fastseq.LayerNorm(16), torch.randn(2, 5, 16)
        >>> y, z = norm(torch.ones(2, 5, 16), residual=x)
        >>> torch.equal(z, x + 1), torch.equal(y, norm(z))
        (True, True)
    """

    _torch_class = nn.LayerNorm

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """See the class."""
        if routing.symbolic():  # where it is the root, each argument is there, without a value
            node = self._node(input, residual)
            return self._torchs(input) if node is None else node
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual)

"""TransformerEncoderLayer and TransformerDecoderLayer as drop-in modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastseq.nn.attention import MultiheadAttention


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """A drop-in `torch.nn.TransformerEncoderLayer`: same arguments, parameters, initialization, state_dict and results.

    Its self-attention is `fastseq.MultiheadAttention`, in evaluation too, where torch's class has a path of its own
    with another attention inside. That path is taken by calls that the kernels do not serve, such as those with the
    nested tensors that `nn.TransformerEncoder` makes of padded batches.

    Args:
        src: (L, B, E), (B, L, E) with batch_first, (L, E) unbatched.
        src_mask: (L, L) or (B * nhead, L, L), as attn_mask of `MultiheadAttention`.
        src_key_padding_mask: (B, L), or (L) unbatched.
        is_causal: a hint that src_mask is the causal one.

    Returns:
        Shaped as src.

    Raises:
        What `fastseq.MultiheadAttention` raises.

    Sources: Vaswani et al., "Attention is all you need", 2017; Xiong et al., "On layer normalization in the Transformer
        architecture" (norm_first), 2020;
        https://pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> torch.nn.TransformerEncoder(layer, 2)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention  # a second one would draw other weights

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """See the class."""
        attention = self.self_attn
        if not (
            isinstance(attention, MultiheadAttention)
            and attention._backend(src, src, src, src_key_padding_mask, src_mask, is_causal)
        ):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(src + self._ff_block(src))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """A drop-in `torch.nn.TransformerDecoderLayer`: same arguments, parameters, initialization, state_dict and results.

    Both of its attentions are `fastseq.MultiheadAttention`.

    Args:
        tgt: (L, B, E), (B, L, E) with batch_first, (L, E) unbatched.
        memory: (S, B, E), or as tgt lies.
        tgt_mask, memory_mask: (L, L) and (L, S), or with B * nhead in front.
        tgt_key_padding_mask, memory_key_padding_mask: (B, L) and (B, S).
        tgt_is_causal, memory_is_causal: hints that the masks are causal ones.

    Returns:
        Shaped as tgt.

    Raises:
        What `fastseq.MultiheadAttention` raises.

    Sources: Vaswani et al., "Attention is all you need", 2017;
        https://pytorch.org/docs/stable/generated/torch.nn.TransformerDecoderLayer.html

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.TransformerDecoderLayer(16, 4, 32, batch_first=True)
        >>> layer(torch.randn(2, 5, 16), torch.randn(2, 7, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention
        self.multihead_attn.__class__ = MultiheadAttention

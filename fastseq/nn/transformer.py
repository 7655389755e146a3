"""TransformerEncoderLayer and TransformerDecoderLayer as drop-in modules."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.drop_in import DropIn
from fastseq.nn.layer_norm import LayerNorm
from fastseq.ops import routing
from fastseq.ops.normalization import add_layer_norm
from fastseq.ops.recurrent import checks

# A version of torch without it cannot tell whether there are hooks; then norms are called as torch calls them.
_has_any_global_hook = getattr(torch_module, "_has_any_global_hook", lambda: True)


def _is_plain(module: DropIn) -> bool:
    """True where no hook waits for the module's calls, and its forward is ours."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not module._has_our_forward()
        or _has_any_global_hook()
    )


def _fuses(norm: nn.Module) -> bool:
    """True where a norm may take over the addition before it."""
    return type(norm) is LayerNorm and _is_plain(norm)


def _check_feed_forward(layer: DropIn, x: object) -> None:
    """Refuses parameters on the meta device, of which torch's linear layers would compute something. Where a hook or a
    replaced forward may load them before they are used, nothing is refused.
    """
    for name in ("linear1", "linear2"):
        linear = layer._modules.get(name)
        if type(linear) is nn.Linear:
            for parameter in linear._parameters.values():
                if parameter is not None and parameter.is_meta and isinstance(x, Tensor):
                    hooked = linear._forward_pre_hooks or "forward" in linear.__dict__
                    checks.check_devices((x, None if hooked else parameter))


def _norm_of_sum(norm: nn.Module, x: Tensor, sublayer: Tensor) -> Tensor:
    """norm(x + sublayer), where a layer ends in its norm."""
    if _fuses(norm):
        return add_layer_norm(sublayer, x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return norm(x + sublayer)


def _sum_and_norm(norm: nn.Module, x: Tensor, sublayer: Tensor) -> tuple[Tensor, Tensor]:
    """x + sublayer and its norm, where the next sublayer begins with one."""
    if _fuses(norm):
        normalized, x = norm.forward(sublayer, residual=x)
        return x, normalized
    x = x + sublayer
    return x, norm(x)


class TransformerEncoderLayer(DropIn, nn.TransformerEncoderLayer):
    """A drop-in `torch.nn.TransformerEncoderLayer`: same arguments, parameters, initialization, state_dict and results.

    Its norms are `fastseq.LayerNorm`, which also compute the sums before them, unless they have hooks. Its
    self-attention is `fastseq.MultiheadAttention`, also in evaluation, where torch's class has a fast path with another
    attention inside. A call that the kernels do not serve takes that fast path, such as one with the nested tensors
    that `nn.TransformerEncoder` makes of padded batches.

    Args:
        src: (L, B, E), (B, L, E) with batch_first, (L, E) unbatched.
        src_mask: (L, L) or (B * nhead, L, L), as attn_mask of `MultiheadAttention`.
        src_key_padding_mask: (B, L), or (L) unbatched.
        is_causal: a hint that src_mask is the causal one.

    Returns:
        A tensor shaped as src.

    Raises: the errors of `fastseq.MultiheadAttention`.

    Sources: Vaswani et al., "Attention is all you need", 2017; Xiong et al., "On layer normalization in the Transformer
        architecture" (norm_first), 2020;
        https://pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> torch.nn.TransformerEncoder(layer, 2)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    _torch_class = nn.TransformerEncoderLayer
    _torch_calls = ("_sa_block", "_ff_block")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention  # a second one would draw other weights
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """See the class."""
        attention, call = self.self_attn, None
        _check_feed_forward(self, src)
        # Replaced parts and hooks must see the calls that torch's forward makes.
        if isinstance(attention, MultiheadAttention) and not self._replaced() and _is_plain(attention):
            call = attention._call(src, src, src, src_key_padding_mask, src_mask, is_causal)
        if call is None:
            ours = isinstance(attention, MultiheadAttention)
            with attention._checked(src, src, src, src_key_padding_mask, src_mask) if ours else nullcontext():
                return self._torchs(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x: Tensor) -> Tensor:
            # `_call` is asked once and not again by the attention: it takes a fifth of the time of a tiny call.
            out = attention._attend(call, x, x, x, src_key_padding_mask, False, src_mask, True, is_causal)[0]
            return self.dropout1(out)

        if self.norm_first:
            src, normalized = _sum_and_norm(self.norm2, src, attend(self.norm1(src)))
            return src + self._ff_block(normalized)
        attended = attend(src)
        src = _norm_of_sum(self.norm1, src, attended)
        return _norm_of_sum(self.norm2, src, self._ff_block(src))


class TransformerDecoderLayer(DropIn, nn.TransformerDecoderLayer):
    """A drop-in `torch.nn.TransformerDecoderLayer`: same arguments, parameters, initialization, state_dict and results.

    Both of its attentions are `fastseq.MultiheadAttention`. Its norms are `fastseq.LayerNorm`, which also compute the
    sums before them, unless they have hooks.

    Args:
        tgt: (L, B, E), (B, L, E) with batch_first, (L, E) unbatched.
        memory: (S, B, E), or with its axes in the order of tgt's.
        tgt_mask, memory_mask: (L, L) and (L, S), or with B * nhead in front.
        tgt_key_padding_mask, memory_key_padding_mask: (B, L) and (B, S).
        tgt_is_causal, memory_is_causal: hints that the masks are causal ones.

    Returns:
        A tensor shaped as tgt.

    Raises: the errors of `fastseq.MultiheadAttention`.

    Sources: Vaswani et al., "Attention is all you need", 2017;
        https://pytorch.org/docs/stable/generated/torch.nn.TransformerDecoderLayer.html

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.TransformerDecoderLayer(16, 4, 32, batch_first=True)
        >>> layer(torch.randn(2, 5, 16), torch.randn(2, 7, 16)).shape
        torch.Size([2, 5, 16])
    """

    _torch_class = nn.TransformerDecoderLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention
        self.multihead_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = self.norm3.__class__ = LayerNorm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """See the class."""
        if routing.symbolic():
            return self._torchs(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip

        _check_feed_forward(self, tgt)

        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def look(x: Tensor) -> Tensor:
            return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        if self.norm_first:
            tgt, normalized = _sum_and_norm(self.norm2, tgt, attend(self.norm1(tgt)))
            tgt, normalized = _sum_and_norm(self.norm3, tgt, look(normalized))
            return tgt + self._ff_block(normalized)
        tgt = _norm_of_sum(self.norm1, tgt, attend(tgt))
        tgt = _norm_of_sum(self.norm2, tgt, look(tgt))
        return _norm_of_sum(self.norm3, tgt, self._ff_block(tgt))

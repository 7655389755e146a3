"""Attention for models of the transformers library, under the name "fastseq" of its own registry.

Example:
    >>> from importlib.util import find_spec
    >>> import fastseq.hugging_face
    >>> if find_spec("transformers"):
    ...     fastseq.hugging_face.register()  # then AutoModel.from_pretrained(name, attn_implementation="fastseq")
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastseq.ops import scaled_dot_product_attention
from fastseq.sdpa_patch import sdpa_kernels

__all__ = ["register"]


def register() -> None:
    """Makes `attn_implementation="fastseq"` known to transformers, with the masks that its "sdpa" gets.

    Raises:
        ImportError: transformers is not installed, or older than 4.53, which has no registry of masks.
    """
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(f"fastseq.hugging_face.register needs transformers 4.53 or later: {error}") from error
    AttentionInterface.register("fastseq", attention_forward)
    AttentionMaskInterface.register("fastseq", sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, N, L, E), key and value (B, Nk, S, E) to (B, L, N, E), and no weights.

    Heads of key and value are not repeated in memory, and `softcap` is served, unlike by "sdpa".

    Raises:
        ValueError: attention sinks, which are not served.
    """
    if others.get("s_aux") is not None:
        raise ValueError("attn_implementation='fastseq' has no attention sinks (s_aux): choose another one")
    if others.get("position_bias") is not None or others.get("cache") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        with sdpa_kernels():
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap=softcap, **others
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # In this order: under a compiler with dynamic shapes the first term is no bool.
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        None if attention_mask is None else attention_mask[..., : key.shape[2]],
        dropout,
        is_causal,
        scale=scaling,
        softcap=softcap,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None

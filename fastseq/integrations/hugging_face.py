"""Attention for models of the transformers library, under the name "fastseq" of its own registry.

Example:
    >>> from importlib.util import find_spec
    >>> from fastseq.integrations import hugging_face
    >>> if find_spec("transformers"):
    ...     hugging_face.register()  # then AutoModel.from_pretrained(name, attn_implementation="fastseq")
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.ops import scaled_dot_product_attention
from fastseq.sdpa_patch import sdpa_kernels

__all__ = ["register"]

NAME = "fastseq"
# Keywords that do not change the result. Some are arguments of the models, which the masks hold already (windows,
# positions, packed sequences); others tell other kernels how to run. The "sdpa" of transformers ignores them, too.
# Every other keyword is refused.
WITHOUT_EFFECT = frozenset(
    (
        "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "logits_to_keep", "max_length_k",
        "max_length_q", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
        "position_ids", "return_dict", "seq_idx", "sliding_window", "use_cache",
    )
)  # fmt: skip


def register() -> None:
    """Makes `attn_implementation="fastseq"` known to transformers, with the masks that its "sdpa" gets.

    Building a model raises ValueError where transformers refuses it "sdpa", unless the model hands everything that its
    attention needs to the function, as Gemma 2 does. It also raises where the model looks the name up in a table of its
    own. A call raises ValueError for keywords that would change the result and are not served, such as attention sinks.

    Raises:
        ImportError: transformers is not installed, or older than 4.56.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface

        choose = PreTrainedModel.get_correct_attn_implementation
    except (ImportError, AttributeError) as error:
        raise ImportError(f"hugging_face.register needs transformers 4.56 or later: {error}") from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)

    # The registry asks no model whether it can take a function; what a model asks about "sdpa" is here.
    @functools.wraps(choose)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention == NAME:
            check_model(type(self))
        return choose(self, requested_attention, *args, **kwargs)

    if not hasattr(choose, "__wrapped__"):
        PreTrainedModel.get_correct_attn_implementation = checked


def check_model(model: type) -> None:
    """Raises ValueError for a class of models whose attention cannot be `attention_forward`."""
    instead = f"build {model.__name__} with another attn_implementation, such as 'eager'"
    if not (model._supports_sdpa or model._supports_attention_backend):
        raise ValueError(f"attn_implementation={NAME!r} and 'sdpa' are not served by this model: {instead}")
    for module in {sys.modules[base.__module__] for base in model.__mro__ if base.__module__ in sys.modules}:
        for name, table in vars(module).items():
            if isinstance(table, dict) and {"eager", "sdpa"} <= table.keys() and NAME not in table:
                raise ValueError(
                    f"attn_implementation={NAME!r} is not in {module.__name__}.{name}, where this model looks for its "
                    f"attention: {instead}"
                )


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

    Unlike "sdpa", this function does not repeat the heads of key and value in memory, and it serves `softcap`. A call
    with further arguments that the installed "sdpa" knows goes to it, with the kernels inside.

    Raises:
        ValueError: a keyword that changes the result and is not served, such as attention sinks.
    """
    given = {name for name, other in others.items() if other is not None}
    if others.get("output_attentions"):
        _warn_of_weights()
    if not given <= WITHOUT_EFFECT:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        unknown = given - WITHOUT_EFFECT - inspect.signature(sdpa_attention_forward).parameters.keys()
        if unknown:
            raise ValueError(
                f"attn_implementation={NAME!r} does not serve {', '.join(sorted(unknown))}, with which "
                f"{type(module).__name__} calls it: choose another one, such as 'eager'"
            )
        with sdpa_kernels():
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap=softcap, **others
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # In this order: under a compiler with dynamic shapes the first term is no bool.
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    enable_gqa = key.shape[1] != query.shape[1]
    if torch.jit.is_tracing():  # sizes are tensors
        is_causal, enable_gqa = bool(is_causal), bool(enable_gqa)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        None if attention_mask is None else attention_mask[..., : key.shape[2]],
        dropout,
        is_causal,
        scale=scaling,
        softcap=softcap,
        enable_gqa=enable_gqa,
    )
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def _warn_of_weights() -> None:
    from transformers.utils import logging

    logging.get_logger("transformers.integrations.fastseq").warning(
        f"attn_implementation={NAME!r} gives no attention weights, as output_attentions=True asks for: "
        "choose 'eager' for them."
    )

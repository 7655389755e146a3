"""Models of the transformers library in small: a config, inputs, outputs to compare."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TABLES = {
    "base": modeling_auto.MODEL_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "sequences": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
LENGTH, PADDING = 9, 4

# What a config may be told, by how its attributes are called: for widths, numbers of layers and heads, and so on.
SMALL: dict[str, Any] = dict.fromkeys(("attention_dropout", "dropout", "hidden_dropout"), 0.0)
for size, names in {
    0: "num_nextn_predict_layers pad_token_id",
    1: "bos_token_id decoder_start_token_id dense_attention_every_n_layers first_k_dense_replace n_group "
    "n_shared_experts topk_group",
    2: "decoder_layers decoder_num_hidden_layers decoder_num_layers depth encoder_layers encoder_num_layers "
    "eos_token_id index_n_heads linear_num_key_heads mamba_expand n_layer n_layers num_codebooks "
    "num_conv_pos_embedding_groups num_decoder_layers num_encoder_layers num_experts_per_tok num_feat_extract_layers "
    "num_hidden_layers num_key_value_heads num_kv_heads num_layer num_layers o_groups",
    3: "num_channels",
    4: "attention_window decoder_attention_heads decoder_num_attention_heads encoder_attention_heads index_topk "
    "linear_num_value_heads rotary_dim n_head n_heads n_routed_experts num_attention_heads num_experts num_heads "
    "num_local_experts num_query_tokens qk_nope_head_dim qk_rope_head_dim sliding_window",
    8: "d_kv global_head_dim head_dim hidden_size_per_layer_input index_head_dim linear_key_head_dim "
    "linear_value_head_dim mamba_d_head mamba_d_state mamba_n_heads num_conv_pos_embeddings num_queries o_lora_rank "
    "patch_size qk_head_dim state_size v_head_dim",
    16: "encoder_seq_length kv_lora_rank num_mel_bins q_lora_rank",
    32: "adapter_hidden_size codevector_dim cross_attention_hidden_size d_model decoder_hidden_size dim embed_dim "
    "embedding_size encoder_hidden_size expert_intermediate_size hidden_size image_size mm_hidden_size "
    "moe_intermediate_size n_embd out_hidden_size proj_codevector_dim projection_dim qformer_hidden_size "
    "shared_expert_intermediate_size text_hidden_size vision_hidden_size",
    64: "d_ff decoder_ffn_dim decoder_intermediate_size encoder_ffn_dim ffn_dim ffn_hidden_size "
    "ffn_intermediate_size hidden_dim intermediate_dim intermediate_size max_position_embeddings "
    "max_source_positions max_target_positions mlp_hidden_size n_ctx n_inner n_positions",
    128: "vocab_size vocab_size_per_layer_input",
    (4, 4): "conv_kernel conv_stride",
    (32, 32): "conv_dim",
}.items():
    SMALL |= dict.fromkeys(names.split(), size)

HEADS = dict.fromkeys(("d_kv", "global_head_dim", "head_dim", "kv_lora_rank", "q_lora_rank", "qk_head_dim"))
HEADS |= dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
LATENT = {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16}
# Other numbers, for what refuses those above; None leaves the default.
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    HEADS,
    LATENT | {"index_head_dim": 16},
    {"num_hidden_layers": 8, "n_layer": 8},  # where attention is in every eighth layer
    HEADS | {"head_dim": 64, "hidden_size": 256, "d_model": 256, "out_hidden_size": 256},
    HEADS | {"head_dim": 128, "hidden_size": 512, "d_model": 512, "out_hidden_size": 512},
    {name: None for name, size in SMALL.items() if size in (3, 16, 64) or name in ("image_size", "patch_size")},
    {name: None for name in SMALL if "layer" not in name and "size" not in name and name != "d_model"},
)
# What numbers cannot say.
SPECIAL = {
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {"intermediate_size": 64, "num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
}


def small_config(config_class: type, sizes: dict[str, Any]) -> Any:
    """The default config with small numbers, in its parts too."""
    default, arguments = config_class(), inspect.signature(config_class.__init__).parameters
    given, special = {}, SPECIAL.get(config_class.model_type, {})
    for name, size in sizes.items():
        known = name in arguments or name in vars(default)
        value = vars(default).get(name) if known and name not in config_class.attribute_map else None
        if value is None or size is None:
            continue
        if isinstance(value, list | tuple):
            if isinstance(size, tuple):
                given[name] = type(value)(size)
            elif value and isinstance(value[0], int):
                given[name] = type(value)([size] * len(value))
        elif not isinstance(size, tuple):
            given[name] = size
    for name in config_class.sub_configs:
        part = vars(default).get(name)
        if isinstance(part, transformers.PretrainedConfig):
            given[name] = {**small_config(type(part), sizes).to_dict(), "model_type": part.model_type}
    layers = vars(default).get("num_hidden_layers")
    for name, value in vars(default).items():  # lists with something for each layer
        told = name in given or name.endswith("layer_types")  # the latter are made from the number of layers
        if name in arguments and not told and isinstance(value, list | tuple) and len(value) == layers:
            given[name] = value[: sizes["num_hidden_layers"]]
    return config_class(**given | special)


def build(model_class: type, config: Any, name: str) -> nn.Module:
    """A model with weights that are the same for every `name` and large enough for attention to matter."""
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=name).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() >= 2 and weight.numel():
                weight.copy_(noise * (1.2 / weight[0].numel() ** 0.5))
            else:
                weight.add_(0.05 * noise)
    return model


def inputs_of(model: nn.Module, config: Any, images: bool = False) -> dict[str, Tensor]:
    """Arguments of the forward pass; {} where it takes others. `images`: also beside text."""
    generator = torch.Generator().manual_seed(0)
    names = inspect.signature(model.forward).parameters
    text = config.get_text_config()
    vocabulary = max(6, min(getattr(text, "vocab_size", None) or 128, 120))

    def ids(length: int) -> Tensor:
        return torch.randint(5, vocabulary, (2, length), generator=generator)

    given = {}
    if "input_ids" in names:
        given["input_ids"] = ids(LENGTH)
    elif "input_features" in names:
        bins = getattr(config, "num_mel_bins", None) or 16
        given["input_features"] = torch.randn(2, bins, 128, generator=generator)
    elif "input_values" in names:
        given["input_values"] = torch.randn(2, 800, generator=generator)
    if "pixel_values" in names and (images or not given):
        parts = [getattr(config, name, None) for name in ("backbone_config", "vision_config")]
        part = next((p for p in parts if p is not None), config)
        size = getattr(part, "image_size", None) or 32
        size = size if isinstance(size, int) else size[0]
        channels = getattr(part, "num_channels", None) or 3
        given["pixel_values"] = torch.randn(2, channels, size, size, generator=generator)
    if "decoder_input_ids" in names:
        given["decoder_input_ids"] = ids(6)
    return given


def small_model(model_type: str, kind: str) -> tuple[Any, nn.Module, dict[str, Tensor]]:
    """A config of a type, an eager model of a kind (a key of `TABLES`), and inputs with which it runs.

    Raises:
        Exception: what the model said to the last attempt.
    """
    model_class, said = class_of(model_type, kind), None
    for changes in CHANGES:
        for images in (False, True):
            try:
                config = small_config(CONFIG_MAPPING[model_type], SMALL | changes)
                with torch.device("meta"):
                    size = sum(weight.numel() for weight in model_class(copy.deepcopy(config)).parameters())
                if size > 3e7:
                    raise MemoryError(f"{size} weights")
                model = build(model_class, config, "eager")
                given = inputs_of(model, config, images)
                with torch.no_grad():
                    model(**given)
            except Exception as error:  # of any kind: it is the library that speaks
                said = said or error
            else:
                return config, model, given
    raise said


def class_of(model_type: str, kind: str) -> type:
    """The class of models of a type and kind."""
    names = TABLES[kind][model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def left_padded(ids: Tensor) -> Tensor:
    """A mask that takes the first tokens of the first row for padding."""
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return mask


def results(output: Any) -> list[Tensor]:
    """The floats of an output, in order, but for attention weights, caches and losses."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        hidden = ("past_key_values", "loss")
        return [t for name, o in output.items() if "attention" not in name and name not in hidden for t in results(o)]
    return [t for o in output for t in results(o)] if isinstance(output, list | tuple) else []


def distance(wanted: Any, got: Any, padded: bool = False) -> float:
    """The largest difference of two outputs, over the largest number of each tensor. `padded`: not at the padding."""
    furthest = 0.0
    wanted, got = results(wanted), results(got)
    assert [t.shape for t in wanted] == [t.shape for t in got]
    for a, b in zip(wanted, got, strict=True):
        a, b = a.double(), b.double()
        if padded and a.shape[:2] == (2, LENGTH):
            a[0, :PADDING] = b[0, :PADDING] = 0
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs())
        if apart.numel():
            sizes = a.abs()[a.isfinite() & (a.abs() < 1e30)]
            furthest = max(furthest, apart.max().item() / (sizes.max().item() if sizes.numel() else 1.0))
    return furthest


@torch.no_grad()
def distances(eager: nn.Module, make: Callable[[], nn.Module], given: dict[str, Tensor], kind: str) -> dict[str, float]:
    """How far the model that `make` builds is from the eager one, in all that the eager one does: plain, left padded,
    generating."""
    model = make()
    found = {"plain": distance(eager(**given), model(**given))}
    ids = given.get("input_ids")
    if ids is None or "attention_mask" not in inspect.signature(model.forward).parameters:
        return found
    mask = left_padded(ids)
    wanted = attempt(eager, **given, attention_mask=mask)
    if wanted is not None:
        found["left"] = distance(wanted, model(**given, attention_mask=mask), padded=True)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": mask}
    wanted = attempt(eager.generate, ids, **options) if kind == "causal" else None
    if wanted is not None:
        got = model.generate(ids, **options)
        same = (wanted.sequences == got.sequences)[:, LENGTH:].all(0).tolist() + [False]
        steps = same.index(False) + 1  # beyond the first other token nothing compares
        found["generate"] = distance(list(wanted.logits[:steps]), list(got.logits[:steps]))
    return found


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result, None where the eager model itself fails."""
    try:
        return function(*args, **kwargs)
    except Exception:  # of any kind: it is the library that speaks
        return None

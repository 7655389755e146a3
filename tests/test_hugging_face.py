"""attn_implementation="fastseq": models of the transformers library are right, or refused by name."""

import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import LONG, TOLERANCES
from models import assert_close
from torch import nn

import fastseq
from fastseq.integrations import hugging_face

FARTHEST = TOLERANCES["whole models"].atol
TORCHS = F.scaled_dot_product_attention
WHY = "transformers is not installed"
try:
    import transformers
    import transformers_models as small
except ImportError:
    transformers = None
needs_transformers = pytest.mark.skipif(transformers is None, reason=WHY)

# What a model says when it is built or called; None: it runs.
SAMPLE = {
    ("llama", "causal"): None,
    ("bert", "base"): None,
    ("gemma2", "causal"): None,
    ("t5", "sequences"): None,
    ("whisper", "base"): None,
    ("bloom", "causal"): "are not served by this model",
    ("falcon", "causal"): "not in transformers.models.falcon.modeling_falcon.FALCON_ATTENTION_CLASSES",
    ("gpt_oss", "base"): "does not serve s_aux, with which GptOssAttention calls it",
    ("glm_moe_dsa", "base"): "does not serve indices",
    ("inkling2_text", "base"): "are not served by this model",
}


def every_model():
    """The types and kinds of all models of the installed version."""
    if transformers is None:
        return []
    return [(model_type, kind) for kind, table in small.TABLES.items() for model_type in table]


@pytest.fixture(autouse=True)
def registered():
    if transformers is not None:
        hugging_face.register()


def examine(model_type, kind):
    """What a refused model says, and the distances from eager of one that runs."""
    try:
        config, eager, given = small.small_model(model_type, kind)
    except Exception as error:  # a config of its own kind, a missing package: nothing to compare with
        pytest.skip(f"no small model: {type(error).__name__}: {str(error)[:100]}")

    def far(name):
        return small.distances(eager, lambda: small.build(type(eager), config, name), given, kind)

    try:
        found = far("fastseq")
    except ValueError as error:
        if "attn_implementation='fastseq'" not in str(error):
            raise
        return str(error), {}
    if max(found.values()) > FARTHEST:  # routers and other decisions may turn with the last bit
        others = far("sdpa")
        found = {name: distance - 5 * others[name] for name, distance in found.items()}
    return None, found


@needs_transformers
@pytest.mark.parametrize(("model_type", "kind"), every_model() if LONG else SAMPLE)
def test_models(model_type, kind, record_property):
    """As with attn_implementation="eager": plain, left padded and generating; or refused by name."""
    said, found = examine(model_type, kind)
    record_property("outcome", "right" if said is None else "refused")
    assert all(distance < FARTHEST for distance in found.values()), found
    expected = SAMPLE.get((model_type, kind), said)
    assert (said is None) == (expected is None), said
    assert said is None or expected in said


@needs_transformers
def test_classes():
    """Only what "sdpa" is refused, too, or what looks the name up in a table; Gemma 2 and its like are served."""
    refuse = pytest.raises(ValueError, match="attn_implementation='fastseq'")
    for model_class in (transformers.BloomModel, transformers.BloomForCausalLM, transformers.FalconModel):
        with refuse:
            hugging_face.check_model(model_class)
    for model_class in (transformers.Gemma2Model, transformers.LlamaModel, transformers.T5Model):
        hugging_face.check_model(model_class)

    class Mine(transformers.FalconForCausalLM):
        """A model of the user's own: the tables of all its bases count."""

    with refuse:
        hugging_face.check_model(Mine)
    model = small.small_model("llama", "base")[1]
    model.set_attn_implementation("fastseq")
    assert model.config._attn_implementation == "fastseq"
    method = transformers.PreTrainedModel.get_correct_attn_implementation
    hugging_face.register()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is method


def fastseq_model(model_type, kind):
    config, eager, given = small.small_model(model_type, kind)
    return small.build(type(eager), config, "fastseq"), given["input_ids"]


@needs_transformers
def test_traces():
    """Sizes are tensors in torch.jit.trace."""
    for model_type, kind in (("bert", "base"), ("llama", "base")):
        model, tokens = fastseq_model(model_type, kind)
        model.config.return_dict, model.config.use_cache = False, False
        traced = torch.jit.trace(model, (tokens, small.left_padded(tokens)))
        with torch.no_grad():
            wanted = model(tokens, small.left_padded(tokens))[0]
            assert_close([traced(tokens, small.left_padded(tokens))[0]], [wanted], "float32")


@needs_transformers
def test_compiles_whole_graph():
    torch._dynamo.reset()
    model, tokens = fastseq_model("llama", "base")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        out = compiled(tokens, use_cache=False).last_hidden_state
        assert_close([out], [model(tokens, use_cache=False).last_hidden_state], "float32")


@needs_transformers
def test_warns_that_there_are_no_weights():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    model, tokens = fastseq_model("llama", "base")
    hugging_face._warn_of_weights.cache_clear()
    logger.addHandler(handler)
    try:
        model(tokens)
        assert not records
        assert not model(tokens, output_attentions=True).attentions
    finally:
        logger.removeHandler(handler)
    assert [r.levelname for r in records] == ["WARNING"]
    assert "gives no attention weights" in records[0].getMessage()


@needs_transformers
def test_position_bias():
    """What the installed "sdpa" takes itself is left to it, with the kernels inside."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module, (q, k, v) = nn.Module(), torch.randn(3, 2, 4, 5, 8)
    options = {"position_bias": torch.randn(1, 4, 5, 5), "scaling": 1.0}
    for mask in (None, torch.rand(2, 1, 5, 5) < 0.7):
        out, _ = hugging_face.attention_forward(module, q, k, v, mask, **options)
        assert_close([out], [sdpa_attention_forward(module, q, k, v, mask, **options)[0]], "float32")


def test_keywords():
    """None says nothing, nor do those that the masks hold already; every other one is refused by name."""
    module, (q, k, v) = nn.Module(), torch.randn(3, 2, 4, 5, 8)
    wanted, _ = hugging_face.attention_forward(module, q, k, v, None)
    harmless = {name: torch.ones(2) for name in hugging_face.WITHOUT_EFFECT - {"output_attentions"}}
    harmless |= {"s_aux": None, "sinks": None, "anything": None, "output_attentions": False}
    assert torch.equal(hugging_face.attention_forward(module, q, k, v, None, **harmless)[0], wanted)
    if transformers is None:
        pytest.skip(f"{WHY}: refusals look at it")
    for name in ("s_aux", "sinks", "indices", "block_indices", "cache", "block_table", "anything"):
        for value in (torch.ones(4), False, 0):
            with pytest.raises(ValueError, match=f"does not serve {name}, with which Module calls it"):
                hugging_face.attention_forward(module, q, k, v, None, use_cache=True, **{name: value})
    with pytest.raises(ValueError, match="does not serve indices, sinks, with"):
        hugging_face.attention_forward(module, q, k, v, None, sinks=1, indices=2)


def test_attention():
    module, q = nn.Module(), torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    out, weights = hugging_face.attention_forward(module, q, k, v, None, scaling=0.3, softcap=2.0)
    assert weights is None
    options = {"scale": 0.3, "softcap": 2.0, "enable_gqa": True, "is_causal": True}
    assert_close(out, fastseq.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2), "float32")
    assert out.is_contiguous()
    out, _ = hugging_face.attention_forward(module, q[:, :, :1], k, v, None)  # one query sees the whole cache
    assert_close(out, TORCHS(q[:, :, :1], k, v, enable_gqa=True).transpose(1, 2), "float32")
    module.is_causal = False
    out, _ = hugging_face.attention_forward(module, q, k, v, torch.ones(2, 1, 5, 9, dtype=torch.bool))
    assert_close(out, TORCHS(q, k, v, enable_gqa=True).transpose(1, 2), "float32")
    learned, _ = hugging_face.attention_forward(module, q[:1], k, v, None)  # learned queries serve a whole batch
    assert_close(learned, TORCHS(q[:1].expand(2, -1, -1, -1), k, v, enable_gqa=True).transpose(1, 2), "float32")


def test_without_transformers(monkeypatch):
    for name in ("transformers", "transformers.masking_utils", "transformers.modeling_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs transformers 4.56 or later"):
        hugging_face.register()

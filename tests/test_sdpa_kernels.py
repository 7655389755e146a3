"""sdpa_kernels(): a model's own calls of torch's function."""

import sys
import threading
from contextvars import copy_context

import pytest
import torch
import torch.nn.functional as F
from models import assert_close
from torch import nn

import fastseq
from fastseq import hugging_face, sdpa_patch

sdpa_kernels = fastseq.sdpa_kernels
TORCHS = F.scaled_dot_product_attention


class Attention(nn.Module):
    """A model that calls the function itself."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.fixture
def seen(monkeypatch):
    """The calls that reach fastseq."""
    calls = []
    function = sdpa_patch.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa_patch, "scaled_dot_product_attention", lambda *a, **k: (calls.append(a), function(*a, **k))[1]
    )
    return calls


@pytest.fixture
def x():
    return torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)


def test_routes_calls_inside_the_block(seen, x):
    model = Attention()
    wanted = model(x)
    with sdpa_kernels():
        out = model(x)
    assert len(seen) == 1
    assert_close(out, wanted)
    assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(wanted.sum(), x))
    model(x)
    assert len(seen) == 1
    assert F.scaled_dot_product_attention is TORCHS


def test_blocks_within_blocks_and_errors(seen, x):
    with sdpa_kernels():
        with sdpa_kernels():
            Attention()(x)
        Attention()(x)
        assert len(seen) == 2
        with pytest.raises(RuntimeError, match="must match"):
            with sdpa_kernels():
                F.scaled_dot_product_attention(x, x[:, :2], x)
        assert F.scaled_dot_product_attention is not TORCHS
    assert F.scaled_dot_product_attention is TORCHS


def test_other_threads_keep_torchs(seen, x):
    inside, leave = threading.Event(), threading.Event()
    outs = []

    def other():
        with sdpa_kernels():
            inside.set()
            leave.wait(10)
            outs.append(Attention()(x))

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    Attention()(x)  # here the name is replaced, but this thread is in no block
    assert not seen
    with sdpa_kernels():
        Attention()(x)
        assert len(seen) == 1
    leave.set()
    thread.join()
    assert len(seen) == 2
    assert len(outs) == 1
    assert F.scaled_dot_product_attention is TORCHS


def test_a_task_that_outlives_the_block(x):
    with sdpa_kernels():
        context = copy_context()
    assert_close(context.run(Attention(), x), Attention()(x))


def test_what_others_put_there_stays(monkeypatch, seen, x):
    theirs = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (theirs.append(a), TORCHS(*a, **k))[1])
    kept = F.scaled_dot_product_attention
    with sdpa_kernels():
        inside = F.scaled_dot_product_attention
        Attention()(x)
        assert (len(seen), len(theirs)) == (1, 0)
    assert F.scaled_dot_product_attention is kept
    inside(x, x, x)  # a name taken inside the block is what it was outside
    assert (len(seen), len(theirs)) == (1, 1)


def test_modules_of_torch(seen):
    """nn.MultiheadAttention calls the function too."""
    attention, q = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    wanted, _ = attention(q, q, q, need_weights=False)
    with sdpa_kernels():
        out, _ = attention(q, q, q, need_weights=False)
    assert len(seen) == 1
    assert_close(out, wanted, "float32")


@pytest.mark.parametrize("inside", ["compile", "call"])
def test_compile_whole_graph(inside, x):
    torch._dynamo.reset()
    model = Attention()
    with sdpa_kernels():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        if inside == "compile":
            out = compiled(x)
    if inside == "call":
        out = compiled(x)
    assert_close(out, model(x))
    assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(model(x).sum(), x))


def test_subclasses_see_torchs_function(x):
    names = []

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            names.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    with sdpa_kernels():
        Attention()(x.detach().as_subclass(Marked))
    assert TORCHS in names


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    hugging_face.register()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    outs = []
    tokens, mask = torch.randint(64, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    for name in ("sdpa", "fastseq"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=name).eval()
        with torch.no_grad():
            outs.append([model(tokens).logits, model(tokens, attention_mask=mask).logits[:, 3:]])
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            outs[-1].append(model.generate(tokens, attention_mask=mask, **options))
    assert_close(*outs, "float32")


def test_hugging_face_attention():
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
    with pytest.raises(ValueError, match="no attention sinks"):
        hugging_face.attention_forward(module, q, k, v, None, s_aux=torch.ones(4))


def test_hugging_face_is_missing(monkeypatch):
    for name in ("transformers", "transformers.masking_utils", "transformers.modeling_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs transformers 4.53 or later"):
        hugging_face.register()

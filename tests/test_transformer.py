"""The Transformer layers beside torch's, alone and inside torch's stacks."""

import copy
import math

import pytest
import torch
from models import assert_close
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch_samples import build, leaves

import fastseq
from fastseq.nn.attention import MultiheadAttention

pytestmark = pytest.mark.usefixtures("route")
LAYERS = [
    (fastseq.TransformerEncoderLayer, nn.TransformerEncoderLayer),
    (fastseq.TransformerDecoderLayer, nn.TransformerDecoderLayer),
]
each = pytest.mark.parametrize(("ours", "torchs"), LAYERS, ids=["encoder", "decoder"])


def make(ours, torchs, *args, dtype=torch.float64, **kwargs):
    modules = []
    for cls in (ours, torchs):
        torch.manual_seed(0)
        modules.append(cls(*args, **{"dropout": 0.0, "dtype": dtype, **kwargs}))
    with torch.no_grad():
        for p, q in zip(*(m.parameters() for m in modules), strict=True):
            assert torch.equal(p, q)
            q.copy_(p.add_(torch.randn_like(p) / 8))
    return modules


def results(module, arguments, options):
    out = module(*arguments, **options)
    tensors = [*arguments, *module.parameters()]
    return [out, *torch.autograd.grad(out.sin().sum(), tensors)]


@each
@pytest.mark.parametrize("training", [True, False])
def test_torchs_samples(ours, torchs, training):
    info = next(info for info in module_db if info.module_cls is torchs)
    count = 0
    for sample in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training):
        modules = [build(cls, sample).train(training) for cls in (ours, torchs)]
        forward, found = sample.forward_input, []
        for module in modules:
            out = module(*forward.args, **forward.kwargs)
            tensors = [t for t in leaves([*forward.args, *forward.kwargs.values()]) if t.requires_grad]
            found.append([out, *torch.autograd.grad(out.sin().sum(), [*tensors, *module.parameters()])])
        assert_close(*found)
        with torch.no_grad():
            assert_close(*(module(*forward.args, **forward.kwargs) for module in modules))
        count += 1
    assert count > 10


@each
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
def test_layers(ours, torchs, batch_first, norm_first, activation):
    modules = make(ours, torchs, 8, 2, 16, batch_first=batch_first, norm_first=norm_first, activation=activation)
    encoder = ours is fastseq.TransformerEncoderLayer
    for layout in ("batched", "unbatched"):
        shapes = [(5, 8), (7, 8)] if layout == "unbatched" else [(3, 5, 8), (3, 7, 8)]
        if layout == "batched" and not batch_first:
            shapes = [(5, 3, 8), (7, 3, 8)]
        x, memory = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
        arguments = (x,) if encoder else (x, memory)
        causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        padding = torch.zeros((5,) if layout == "unbatched" else (3, 5), dtype=torch.bool)
        padding[..., 4:] = True
        name = "src" if encoder else "tgt"
        hint = "is_causal" if encoder else "tgt_is_causal"
        floats = torch.zeros(5, 5, dtype=torch.float64).masked_fill(causal, -math.inf)
        for options in (
            {},
            {f"{name}_mask": causal},
            {f"{name}_mask": floats, hint: True},
            {f"{name}_key_padding_mask": padding},
            {f"{name}_mask": causal, f"{name}_key_padding_mask": padding},
        ):
            for module in modules:
                module.train()
            assert_close(*(results(module, arguments, options) for module in modules))
            with torch.no_grad():
                assert_close(*(module.eval()(*arguments, **options) for module in modules))


@each
def test_their_attention_is_ours(ours, torchs, monkeypatch, route):
    """In evaluation too, where torch's encoder layer would go around it."""
    module = ours(8, 2, 16, batch_first=True).eval()
    assert isinstance(module, torchs)
    assert all(type(m) is MultiheadAttention for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    calls = []
    attend = MultiheadAttention._attend
    monkeypatch.setattr(MultiheadAttention, "_attend", lambda *a: (calls.append(a[0]), attend(*a))[1])
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        module(*((x,) if ours is fastseq.TransformerEncoderLayer else (x, x)))
    if route == "native":
        assert len(calls) == sum(isinstance(m, MultiheadAttention) for m in module.modules())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_encoder_stack(padded, causal):
    """In evaluation torch's stack makes nested tensors of padded batches."""
    layers = make(*LAYERS[0], 8, 2, 16, batch_first=True)
    stacks = [nn.TransformerEncoder(layer, 2) for layer in layers]
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1]]) if padded else None
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
    if padded and causal:
        padding = torch.zeros(3, 5, dtype=torch.float64).masked_fill(padding, -math.inf)
    options = {"mask": mask, "src_key_padding_mask": padding}
    assert_close(*(results(stack, (x,), options) for stack in stacks))
    with torch.no_grad():
        assert_close(*(stack.eval()(x, **options) for stack in stacks))


def test_decoder_stack():
    layers = make(*LAYERS[1], 8, 2, 16)
    stacks = [nn.TransformerDecoder(layer, 2, nn.LayerNorm(8, dtype=torch.float64)) for layer in layers]
    x, memory = torch.randn(5, 3, 8).double().requires_grad_(), torch.randn(7, 3, 8).double().requires_grad_()
    options = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)}
    assert_close(*(results(stack, (x, memory), options) for stack in stacks))
    with torch.no_grad():
        assert_close(*(stack.eval()(x, memory, **options) for stack in stacks))


@each
def test_copies_and_states(ours, torchs):
    module, reference = make(ours, torchs, 8, 2, 16)
    assert repr(module) == repr(reference)
    assert list(module.state_dict()) == list(reference.state_dict())
    clone = copy.deepcopy(module)
    clone.load_state_dict(reference.state_dict())
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    arguments = (x,) if ours is fastseq.TransformerEncoderLayer else (x, x)
    assert_close(clone(*arguments), reference(*arguments))
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not foo"):
        ours(8, 2, activation="foo")


@each
def test_dropout_is_repeatable(ours, torchs):
    module = ours(8, 2, 16, dropout=0.3)
    x = torch.randn(5, 3, 8)
    arguments = (x,) if ours is fastseq.TransformerEncoderLayer else (x, x)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(module(*arguments))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])

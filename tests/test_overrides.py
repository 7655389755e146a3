"""What is put on a fused layer, or waits at it, is called as by torch's class: methods, hooks, other submodules."""

import copy

import pytest
import torch
from models import assert_close, flat
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations

import fastseq

pytestmark = pytest.mark.usefixtures("route")

LAYERS = {
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16), 1),
    "encoder_norm_first": (lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True), 1),
    "decoder": (lambda: nn.TransformerDecoderLayer(8, 2, 16), 2),
    "attention": (lambda: nn.MultiheadAttention(8, 2), 3),
    "lstm": (lambda: nn.LSTM(8, 8, 2), 1),
    "gru": (lambda: nn.GRU(8, 8), 1),
}


def make(name):
    """The layer fused, torch's, and arguments: without dropout, so that runs agree."""
    layer, count = LAYERS[name]
    torch.manual_seed(0)
    torchs = layer()
    for module in torchs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return fastseq.fuse(copy.deepcopy(torchs)), torchs, [torch.randn(5, 3, 8) for _ in range(count)]


def masks(name):
    """A boolean mask: the methods of torch's encoder layer are handed one of floats."""
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    key = {"encoder": "src_mask", "decoder": "tgt_mask", "attention": "attn_mask"}.get(name.split("_")[0])
    if name == "encoder_norm_first":
        mask = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
    return {} if key is None else {key: mask}


def described(value):
    """What a call was given, to be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, tuple | list):
        return [described(v) for v in value]
    return {k: described(v) for k, v in value.items()} if isinstance(value, dict) else value


METHODS = {
    "encoder": ["_sa_block", "_ff_block"],
    "encoder_norm_first": ["_sa_block", "_ff_block"],
    "decoder": ["_sa_block", "_mha_block", "_ff_block"],
    "lstm": ["check_forward_args", "check_input", "get_expected_hidden_size", "get_expected_cell_size"],
    "gru": ["check_forward_args", "check_input", "check_hidden_size"],
}


def replace(layer, method, place, seen):
    """A method of others, which tells what it was given."""
    old = getattr(type(layer), method)

    def mine(self, *args, **kwargs):
        seen.append(described((args, kwargs)))
        result = old(self, *args, **kwargs)
        return result * 2 if isinstance(result, torch.Tensor) else result

    if place == "instance":
        setattr(layer, method, mine.__get__(layer))
    else:
        layer.__class__ = type("Mine", (type(layer),), {method: mine})


@pytest.mark.parametrize("place", ["instance", "subclass"])
@pytest.mark.parametrize(("name", "method"), [(name, m) for name, methods in METHODS.items() for m in methods])
@pytest.mark.parametrize("training", [True, False])
def test_methods(name, method, place, training):
    *layers, arguments = make(name)
    results, seen = [], []
    for layer in layers:
        calls = []
        replace(layer.train(training), method, place, calls)
        with torch.set_grad_enabled(training):
            results.append(flat(layer(*arguments, **masks(name))))
        seen.append(calls)
    assert seen[0] == seen[1]
    assert seen[0] or not training
    assert_close(*results, "float32")


def test_a_method_of_before_fuse():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0)
    layer._sa_block = lambda x, *_, **__: x * 3
    x = torch.randn(5, 3, 8)
    wanted = layer(x)
    assert_close(fastseq.fuse(layer)(x), wanted, "float32")


def test_methods_do_not_hinder_what_torch_lacks():
    gru = fastseq.GRU(8, 8)
    gru.check_input = lambda *_: None
    x = torch.randn(5, 3, 8)
    assert_close(gru(x, lengths=[5, 5, 5]), gru(x), "float32")


PARTS = {
    "encoder": ["self_attn", "norm1", "norm2", "linear1", "linear2", "dropout", "dropout1", "dropout2"],
    "encoder_norm_first": ["self_attn", "norm1", "norm2", "linear1", "dropout1"],
    "decoder": ["self_attn", "multihead_attn", "norm1", "norm2", "norm3", "linear1", "dropout1", "dropout3"],
    "attention": ["out_proj"],
}
parts = pytest.mark.parametrize(("name", "part"), [(name, p) for name, ps in PARTS.items() for p in ps])


@parts
def test_hooks(name, part):
    *layers, arguments = make(name)
    seen = []
    for layer in layers:
        calls = []
        module = getattr(layer, part)

        def before(module, args, kwargs, calls=calls):
            calls.append(("before", type(module).__name__, described((args, kwargs))))

        def after(module, args, output, calls=calls):
            calls.append(("after", described(args), described(output)))
            return output if isinstance(output, tuple) else output * 2

        def back(module, dx, dy, calls=calls):
            calls.append(("back", described(dx), described(dy)))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
        module.register_full_backward_hook(back)
        out = layer(*[t.clone().requires_grad_() for t in arguments], **masks(name))
        flat(out[0] if name == "attention" else out)[0].sin().sum().backward()
        layer.eval()
        with torch.no_grad():
            results = layer(*arguments, **masks(name))
        seen.append((calls, flat(results), [p.grad for p in layer.parameters()]))
    assert seen[0][0] == seen[1][0]
    assert seen[0][0] or part == "out_proj"  # of which torch's attention takes the parameters alone
    assert_close(seen[0][1:], seen[1][1:], "float32")


@pytest.mark.parametrize("name", LAYERS)
def test_global_hooks(name):
    *layers, arguments = make(name)
    seen = []
    for layer in layers:
        calls = []
        handles = [
            register_module_forward_pre_hook(lambda m, args, calls=calls: calls.append((m._get_name(), "before"))),
            register_module_forward_hook(lambda m, args, out, calls=calls: calls.append((m._get_name(), "after"))),
        ]
        layer(*arguments, **masks(name))
        for handle in handles:
            handle.remove()
        seen.append(calls)
    assert seen[0] == seen[1]


class Doubled(nn.Module):
    """In place of a part, with the attributes that are read of it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs):
        out = self.module(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


def put_another(layer, part):
    setattr(layer, part, Doubled(getattr(layer, part)))


def put_a_forward(layer, part):
    module = getattr(layer, part)
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


def put_a_subclass(layer, part):
    module = getattr(layer, part)

    def forward(self, *args, **kwargs):
        out = super(type(self), self).forward(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    module.__class__ = type("Subclass", (type(module),), {"forward": forward})


def parametrize(layer, part):
    module = getattr(layer, part)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dim() == 2:
            parametrizations.weight_norm(module, name)


@parts
@pytest.mark.parametrize("put", [put_another, put_a_forward, put_a_subclass, parametrize])
def test_other_parts(name, part, put):
    *layers, arguments = make(name)
    results = []
    for layer in layers:
        put(layer, part)
        results.append(flat(layer(*arguments, **masks(name)))[0])
        layer.eval()
        results.append(flat(layer(*arguments, **masks(name)))[0])
    assert_close(results[:2], results[2:], "float32")


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_another_activation(name):
    *layers, arguments = make(name)
    for layer in layers:
        layer.activation = torch.sin
    assert_close(*(layer(*arguments) for layer in layers), "float32")


@pytest.mark.parametrize("cls", [nn.GRU, nn.LayerNorm, nn.TransformerEncoderLayer])
def test_a_forward_put_on_torchs_class(cls, monkeypatch):
    monkeypatch.setattr(cls, "forward", lambda self, x: (x, None))
    layer = cls(8, *(() if cls is nn.LayerNorm else (8,)))
    assert type(fastseq.fuse(layer)) is cls
    assert fastseq.fuse_report(layer).left[0].reason == f"the forward of torch.nn.{cls.__name__} was replaced"

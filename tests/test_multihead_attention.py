"""MultiheadAttention beside torch's."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from models import assert_close, pair
from torch import nn
from torch.func import grad, jvp, vmap
from torch.testing._internal.common_modules import module_db
from torch_samples import build, leaves

import fastseq
from fastseq import backends

both_routes = pytest.mark.usefixtures("route")
INFO = next(info for info in module_db if info.module_cls is nn.MultiheadAttention)
KWARGS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10},
    {"kdim": 6, "batch_first": True, "bias": False},
    {"vdim": 10},
]


def make(*args, dtype=torch.float64, **kwargs):
    """Ours and torch's from one seed, with biases that are not zero."""
    ours, torchs = pair(fastseq.MultiheadAttention, nn.MultiheadAttention, *args, dtype=dtype, **kwargs)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
            assert torch.equal(p, q)
            if p.dim() == 1:
                q.copy_(p.normal_())
    return ours, torchs


def inputs(module, layout, batch=3, queries=5, keys=7, dtype=torch.float64):
    def tensor(rows, size):
        if layout == "unbatched":
            shape = (rows, size)
        else:
            shape = (batch, rows, size) if module.batch_first else (rows, batch, size)
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    return tensor(queries, module.embed_dim), tensor(keys, module.kdim), tensor(keys, module.vdim)


def results(module, arguments, options):
    outputs = [o for o in module(*arguments, **options) if o is not None]
    tensors = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    tensors = list({id(t): t for t in (*tensors, *module.parameters())}.values())
    weights = [torch.arange(1, o.numel() + 1, dtype=o.dtype).view(o.shape).sin() for o in outputs]
    grads = torch.autograd.grad(outputs, tensors, weights, allow_unused=True)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True))]


def check(ours, torchs, arguments, options):
    assert_close(results(ours, arguments, options), results(torchs, arguments, options))


@both_routes
@pytest.mark.parametrize("training", [True, False])
def test_torchs_samples(training):
    count = 0
    for sample in INFO.module_inputs_func(INFO, "cpu", torch.float64, requires_grad=True, training=training):
        modules = [build(cls, sample).train(training) for cls in (fastseq.MultiheadAttention, nn.MultiheadAttention)]
        assert repr(modules[0]) == repr(modules[1])
        forward, found = sample.forward_input, []
        for module in modules:
            args, kwargs = copy.deepcopy(forward.args), copy.deepcopy(forward.kwargs)
            outputs = [o for o in module(*args, **kwargs) if o is not None]
            sum(o.sum() for o in outputs).backward()
            tensors = [t for t in leaves([*args, *kwargs.values()]) if t.requires_grad]
            found.append([*outputs, *(t.grad for t in tensors), *(p.grad for p in module.parameters())])
        assert_close(*found)
        with torch.no_grad():
            assert_close(*(module(*forward.args, **forward.kwargs) for module in modules))
        count += 1
    assert count > 0


@both_routes
@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
@pytest.mark.parametrize("layout", ["batched", "unbatched"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_arguments(kwargs, layout, need_weights):
    ours, torchs = make(8, 2, **kwargs)
    arguments = inputs(ours, layout)
    batch = () if layout == "unbatched" else (3,)
    allowed = torch.rand(5, 7) < 0.7
    allowed[:, 0] = True
    per_head = torch.randn(2 * math.prod(batch), 5, 7, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(*batch, 7, dtype=torch.bool)
    padding[..., 5:] = True
    for options in (
        {},
        {"attn_mask": ~allowed},
        {"attn_mask": torch.randn(5, 7, dtype=torch.float64)},
        {"attn_mask": per_head},
        {"attn_mask": per_head > 1},
        {"key_padding_mask": padding},
        {"key_padding_mask": torch.randn(*batch, 7, dtype=torch.float64)},
        {"key_padding_mask": padding, "attn_mask": ~allowed},
        {"key_padding_mask": padding.double() * -2, "attn_mask": per_head},
        {"attn_mask": torch.triu(torch.ones(5, 7, dtype=torch.bool), 1), "is_causal": True},
        {"average_attn_weights": False},
    ):
        check(ours, torchs, arguments, {**options, "need_weights": need_weights})
        with torch.no_grad():
            for ours_out, torchs_out in zip(
                *(m.eval()(*arguments, **options, need_weights=need_weights) for m in (ours, torchs)), strict=True
            ):
                assert_close(ours_out, torchs_out)


@pytest.fixture
def masks_of_kernels(native, monkeypatch):
    """The masks that reach the kernels."""
    seen, forward = [], native.attention_forward

    def watched(call, q, k, v, *masks, **options):
        seen.extend(mask for mask in masks if mask is not None)
        return forward(call, q, k, v, *masks, **options)

    monkeypatch.setattr(native, "attention_forward", watched)
    return seen


HIDDEN = torch.arange(7) >= torch.tensor([[7], [5], [2]])
ADDED = torch.zeros(3, 7, dtype=torch.float64).masked_fill(HIDDEN, -math.inf)
LATER = torch.triu(torch.ones(5, 7, dtype=torch.bool), 3)
TWO_MASKS = {
    "bool": (LATER, HIDDEN),
    "float": (torch.randn(5, 7, dtype=torch.float64, requires_grad=True), ADDED),
    "float, bool": (torch.randn(6, 5, 7, dtype=torch.float64, requires_grad=True), HIDDEN),
    "bool, float": (LATER, ADDED - 1),
    "bool, gradient": (LATER, torch.randn(3, 7, dtype=torch.float64, requires_grad=True)),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("kind", TWO_MASKS)
@pytest.mark.parametrize("kwargs", [{}, {"add_zero_attn": True}], ids=str)
def test_two_masks_are_not_joined(kind, kwargs, masks_of_kernels):
    ours, torchs = make(8, 2, **kwargs)
    attn_mask, padding = TWO_MASKS[kind]
    options = {"attn_mask": attn_mask, "key_padding_mask": padding, "need_weights": False}
    check(ours, torchs, inputs(ours, "batched"), options)
    sizes = sorted(m.untyped_storage().nbytes() // m.element_size() for m in masks_of_kernels)
    keys = 7 + len(kwargs)
    assert sizes == sorted([3 * keys, attn_mask.numel() // 7 * keys])


@pytest.mark.parametrize("values", ["any", "gradient"])
def test_two_float_masks_are_added(values, masks_of_kernels):
    """Where the padding is more than a bool mask."""
    ours, torchs = make(8, 2)
    padding = ADDED - torch.arange(7) if values == "any" else ADDED.clone().requires_grad_()
    options = {"attn_mask": torch.randn(5, 7, dtype=torch.float64), "key_padding_mask": padding, "need_weights": False}
    check(ours, torchs, inputs(ours, "batched"), options)
    (mask,) = masks_of_kernels
    assert mask.shape == (3, 1, 5, 7)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_jvp(training, is_causal, need_weights):
    """torch's own has none without weights."""
    if backends.select("attention") is None:
        pytest.skip("torch's own path")
    attention = make(8, 2)[0].train(training)
    x, tangent = torch.randn(2, 5, 3, 8, dtype=torch.float64)

    options = {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), "is_causal": True} if is_causal else {}

    def call(x):
        return attention(x, x, x, need_weights=need_weights, **options)[0]

    out, found = jvp(call, (x,), (tangent,))
    assert_close(out, call(x))
    step = 1e-5
    assert_close(found, (call(x + step * tangent) - call(x - step * tangent)) / (2 * step), "finite difference")


@pytest.mark.parametrize("need_weights", [True, False])
def test_hooks_of_the_output_projection(need_weights):
    """torch reads its parameters and does not call it."""
    calls = []
    for module in make(8, 2):
        module.out_proj.register_forward_hook(lambda *_: calls.append(1))
        module(*inputs(module, "batched"), need_weights=need_weights)
    assert not calls


@both_routes
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_same_tensor_thrice(batch_first):
    """Self-attention, and attention to one memory; in evaluation torch's takes a path of its own."""
    ours, torchs = make(8, 2, batch_first=batch_first)
    x = inputs(ours, "batched")[0]
    memory = inputs(ours, "batched")[1]
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    for options in ({}, {"attn_mask": causal}, {"attn_mask": causal, "is_causal": True}):
        for need_weights in (True, False):
            check(ours, torchs, (x, x, x), {**options, "need_weights": need_weights})
            with torch.no_grad():
                found, wanted = (m.eval()(x, x, x, need_weights=need_weights, **options) for m in (ours, torchs))
                assert_close(found[0], wanted[0])
                if need_weights:
                    assert_close(found[1], wanted[1])
    for module in (ours, torchs):
        module.train()
    check(ours, torchs, (x, memory, memory), {})
    check(ours, torchs, (x, x, memory[:5] if not batch_first else memory[:, :5]), {})


@both_routes
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_keys(kind, need_weights, route):
    """Weights of zero and the bias of the output projection, where torch gives NaN in some modes."""
    if route == "torch":
        pytest.skip("torch's own path")
    for training, same, mode in itertools.product((True, False), (True, False), (torch.enable_grad, torch.no_grad)):
        attention = make(8, 2, batch_first=True)[0].train(training)
        x, memory, _ = inputs(attention, "batched", keys=5)
        x, memory = x.detach(), x.detach() if same else memory.detach()
        padding, masked = torch.zeros(3, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
        padding[1], masked[2] = True, True
        if kind == "float":
            padding, masked = (torch.zeros(m.shape).double().masked_fill(m, -math.inf) for m in (padding, masked))
        with mode():
            out, weights = attention(
                x, memory, memory, attn_mask=masked, key_padding_mask=padding, need_weights=need_weights
            )
            for part in (out[1], out[:, 2]):
                assert_close(part, attention.out_proj.bias.expand(part.shape))
            assert out.isfinite().all()
            if need_weights:
                assert (weights[1] == 0).all()
                assert (weights[:, 2] == 0).all()
                assert_close(weights[0, 0].sum(), torch.ones(()).double())
        if mode is torch.enable_grad:
            out.sum().backward()
            assert all(p.grad.isfinite().all() for p in attention.parameters())


def _dead(attention, x, kind, need_weights):
    """Self-attention in which no query of the second sequence sees a key."""
    padding = torch.zeros(3, 5, dtype=torch.bool, device=x.device)
    padding[1] = True
    masked = torch.zeros(5, 5, dtype=torch.bool, device=x.device)
    if kind != "bool":
        masked = torch.zeros(5, 5, device=x.device).to(x.dtype)
    if kind == "float":
        padding = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -math.inf)
    return attention(x, x, x, key_padding_mask=padding, attn_mask=masked, need_weights=need_weights)


def _autocast(call, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return call(x)


def _compiled(call, x):
    torch.compiler.reset()  # or all modules of the test count against one limit
    return torch.compile(call, backend="eager", fullgraph=True)(x)


ELSEWHERE = {
    "create_graph": lambda call, x: (call(x)[0], *torch.autograd.grad(call(x)[0].sum(), x, create_graph=True)),
    "jvp": lambda call, x: jvp(lambda x: call(x)[0], (x,), (x,)),
    "grad": lambda call, x: (call(x)[0], grad(lambda x: call(x)[0].sum())(x)),
    "vmap": lambda call, x: (vmap(lambda x: call(x)[0])(x.expand(2, *x.shape))[1],),
    "compile": _compiled,
    "autocast": _autocast,
    "float16": lambda call, x: call(x.half()),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float", "mixed"])
@pytest.mark.parametrize("mode", ELSEWHERE)
@pytest.mark.parametrize("training", [True, False])
def test_rows_without_keys_where_the_kernels_do_not_serve(mode, kind, need_weights, training):
    if backends.select("attention") is None:
        pytest.skip("torch's own path")
    attention = make(8, 2, batch_first=True, dtype=torch.float16 if mode == "float16" else torch.float32)[0]
    attention.train(training)
    x = torch.randn(3, 5, 8, requires_grad=True)
    out, *others = (t for t in ELSEWHERE[mode](lambda x: _dead(attention, x, kind, need_weights), x) if t is not None)
    assert_close(out[1], attention.out_proj.bias.to(out.dtype).expand(5, 8))
    assert all(t.isfinite().all() for t in (out, *others))
    assert (out[0] - out[2]).abs().max() > 0


@both_routes
def test_dropout(route):
    ours, torchs = make(8, 2, dropout=0.4, batch_first=True)
    arguments = inputs(ours, "batched")
    found = []
    for module in (ours, torchs):  # with weights the stream is torch's
        torch.manual_seed(3)
        found.append(results(module, arguments, {}))
    assert_close(*found)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(ours(*arguments, need_weights=False)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert_close(ours.eval()(*arguments)[0], torchs.eval()(*arguments)[0])
    ours.train().dropout = 0.0  # read on each call
    assert_close(ours(*arguments, need_weights=False)[0], torchs(*arguments, need_weights=False)[0])


@both_routes
def test_bfloat16():
    ours, torchs = make(16, 2, dtype=torch.bfloat16)
    x = torch.randn(5, 3, 16, dtype=torch.bfloat16)
    for need_weights in (True, False):
        found, wanted = (m(x, x, x, need_weights=need_weights)[0] for m in (ours, torchs))
        assert found.dtype is torch.bfloat16
        assert_close(found, wanted, "bfloat16")


def wrong_calls(module):
    q, k, v = (t.detach() for t in inputs(module, "batched", dtype=torch.float32))
    yield (q[None], k, v), {}
    yield (q[0, 0], k, v), {}
    yield (q, k[0], v), {}
    yield (q[0], k, v), {}
    yield (q[..., :4], k, v), {}
    yield (q, k[..., :4], v), {}
    yield (q, k, v[..., :4]), {}
    yield (q, k, v[:, :2]), {}
    yield (q, k[:, :2], v[:, :2]), {}
    yield (q.double(), k, v), {}
    yield (q, k.double(), v.double()), {}
    yield (None, k, v), {}
    yield (q, k, v), {"is_causal": True}
    yield (q, k, v), {"attn_mask": torch.zeros(5, 6)}
    yield (q, k, v), {"attn_mask": torch.zeros(4, 5, 7)}
    yield (q, k, v), {"attn_mask": torch.zeros(7)}
    yield (q, k, v), {"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}
    yield (q, k, v), {"key_padding_mask": torch.zeros(2, 7)}
    yield (q, k, v), {"key_padding_mask": torch.zeros(3, 6)}
    yield (q, k, v), {"key_padding_mask": torch.zeros(7)}
    yield (q, k, v), {"key_padding_mask": torch.zeros(3, 7, dtype=torch.int64)}
    yield (q[:, 0], k[:, 0], v[:, 0]), {"attn_mask": torch.zeros(3, 5, 7)}
    yield (q[:, 0], k[:, 0], v[:, 0]), {"key_padding_mask": torch.zeros(3, 7)}


def error_of(module, arguments, options):
    try:
        module(*arguments, **options)
    except Exception as error:
        return error
    return None


@both_routes
@pytest.mark.parametrize("kwargs", [{}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("training", [True, False])
def test_wrong_arguments(kwargs, training):
    ours, torchs = (m.train(training) for m in make(8, 2, dtype=torch.float32, **kwargs))
    for arguments, options in wrong_calls(ours):
        wanted, error = error_of(torchs, arguments, options), error_of(ours, arguments, options)
        assert wanted is not None, options
        assert type(error) is type(wanted), options
        assert str(error) == str(wanted)


@pytest.mark.parametrize("args", [(0, 1), (4, 0), (-4, 2), (5, 2)])
def test_wrong_sizes(args):
    with pytest.raises((ValueError, AssertionError)) as wanted:
        nn.MultiheadAttention(*args)
    with pytest.raises(wanted.type) as error:
        fastseq.MultiheadAttention(*args)
    assert str(error.value) == str(wanted.value)


@both_routes
def test_masks_of_two_kinds_warn_as_torchs():
    ours, torchs = make(8, 2)
    q, k, v = inputs(ours, "batched")
    options = {"attn_mask": torch.zeros(5, 7).double(), "key_padding_mask": torch.zeros(3, 7, dtype=torch.bool)}
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        out, _ = ours(q, k, v, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(out, torchs(q, k, v, **options)[0])


@both_routes
def test_empty():
    ours, torchs = make(8, 2)
    for batch, queries, keys in ((0, 5, 7), (3, 0, 7)):
        arguments = inputs(ours, "batched", batch, queries, keys)
        check(ours, torchs, arguments, {"need_weights": False})


@both_routes
def test_nested_tensors():
    """torch's own path takes them in evaluation."""
    ours, torchs = (m.eval() for m in make(8, 2, batch_first=True, dtype=torch.float32))
    x = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)])
    with torch.no_grad():
        found, wanted = (m(x, x, x, need_weights=False)[0] for m in (ours, torchs))
    assert_close(list(found.unbind()), list(wanted.unbind()), "float32")


@both_routes
def test_state_and_attributes():
    ours, torchs = make(8, 2, add_bias_kv=True)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    ours.load_state_dict(torchs.state_dict())
    clone = copy.deepcopy(ours)
    x, k, v = inputs(ours, "batched")
    assert_close(clone(x, k, v)[0], torchs(x, k, v)[0])
    nn.utils.parametrizations.weight_norm(ours, "in_proj_weight")
    nn.utils.parametrizations.weight_norm(torchs, "in_proj_weight")
    check(ours, torchs, (x, k, v), {"need_weights": False})


@pytest.mark.parametrize("kwargs", [{}, {"add_bias_kv": True, "kdim": 6}])
def test_gradcheck(kwargs):
    attention = make(4, 2, **kwargs)[0]
    mask = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for need_weights in (True, False):

        def call(q, k, v, mask, *_, need_weights=need_weights):
            return tuple(o for o in attention(q, k, v, attn_mask=mask, need_weights=need_weights) if o is not None)

        arguments = inputs(attention, "batched", 2, 3, 4)
        assert torch.autograd.gradcheck(call, (*arguments, mask, *attention.parameters()), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, (*arguments, mask), fast_mode=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_gradcheck_of_self_attention(is_causal, batch_first):
    attention = make(4, 2, batch_first=batch_first)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64) if is_causal else None

    def call(x, *_):
        return attention(x, x, x, attn_mask=mask, is_causal=is_causal, need_weights=False)[0]

    x = inputs(attention, "batched", 2, 3)[0]
    assert torch.autograd.gradcheck(call, (x, *attention.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x,), fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (2, 65, 16, 2), (3, 7, 96, 4)])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_self_attention(is_causal, batch_first, shape):
    batch, length, size, heads = shape
    ours, torchs = make(size, heads, batch_first=batch_first)
    x = inputs(ours, "batched", batch, length)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
    options = {"need_weights": False} | ({"attn_mask": mask, "is_causal": True} if is_causal else {})
    check(ours, torchs, (x, x, x), options)
    with torch.no_grad():
        assert_close(*([m(x, x, x, **options)[0]] for m in (ours, torchs)))
    out = ours(x, x, x, **options)[0]
    dense = out.detach().clone()
    expanded = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]  # a gradient without memory of its own
    assert_close([expanded], [torch.autograd.grad(out, x, torch.ones_like(dense))[0]])

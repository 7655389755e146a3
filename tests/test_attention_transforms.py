"""Never less than torch: what torch's attention can do beside a plain call, ours can too."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import assert_close
from observers import Functions, Marked, Ops
from sdpa_calls import SLOPES, make
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastseq

sdpa = fastseq.scaled_dot_product_attention
pytestmark = pytest.mark.usefixtures("route")

BEYOND = [
    {"causal": "lower_right", "window": (2, 0), "return_lse": True},
    {"softcap": 1.5, "alibi_slopes": SLOPES, "lengths_k": [3, 7], "lengths_q": [5, 2], "return_lse": True},
    {"enable_gqa": True, "is_causal": True, "scale": 0.4, "return_lse": True},
]
PACKED = {"cu_seqlens_q": [0, 2, 5], "cu_seqlens_k": [0, 3, 7], "causal": "lower_right", "return_lse": True}


def operands(requires_grad=True, batch=2, heads=4):
    return tuple(make(batch, heads, n, 4, requires_grad=requires_grad) for n in (5, 7, 7))


def finite(results):
    """Without the -inf of rows that see no key."""
    return tuple(torch.where(r.isfinite(), r, 0) for r in (results if isinstance(results, tuple) else (results,)))


# ---- gradients


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, *BEYOND], ids=lambda o: " ".join(o) or "plain")
def test_gradcheck(options, route):
    mask = None if options.get("is_causal") else make(4, 1, 7)

    def call(q, k, v, *masks):
        return finite(sdpa(q, k, v, *masks, **options))

    inputs = (*operands(), *(() if mask is None else (mask,)))
    assert gradcheck(call, inputs, fast_mode=True)
    if "return_lse" in options or route == "native":  # torch's own op has no second derivative
        assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("options", BEYOND, ids=" ".join)
def test_create_graph_changes_no_gradient(options):
    """gradgradcheck asks only whether the second derivative is that of the first."""
    mask = None if options.get("is_causal") else make(4, 1, 7)
    inputs = (*operands(), *(() if mask is None else (mask,)))
    loss = sum(r.sin().sum() for r in finite(sdpa(*inputs, **options)))
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_close(torch.autograd.grad(loss, inputs, create_graph=True), plain)


def test_gradcheck_packed():
    inputs = tuple(make(4, n, 4) for n in (5, 7, 7))
    assert gradcheck(lambda *t: finite(sdpa(*t, **PACKED)), inputs, fast_mode=True)
    assert gradgradcheck(lambda *t: finite(sdpa(*t, **PACKED)), inputs, fast_mode=True)


def test_gradcheck_dropout():
    """The same numbers fall in the forward, the backward and the backward's backward."""

    def call(*inputs):
        torch.manual_seed(7)
        return sdpa(*inputs, dropout_p=0.4, return_lse=True)

    assert gradcheck(call, operands(), fast_mode=True)
    assert gradgradcheck(call, operands(), fast_mode=True)


def test_create_graph_where_inputs_depend_on_each_other(route):
    if route == "torch":
        pytest.skip("torch's own op has no second derivative")
    x = make(2, 3, 5, 4)

    def loss(function):
        (g,) = torch.autograd.grad(function(x, x.tanh(), 2 * x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.sin().sum(), x)

    def formula(q, k, v):
        return torch.softmax(q @ k.mT / 2, -1) @ v

    assert_close(loss(sdpa), loss(formula))


def test_which_gradients():
    """Some inputs frozen, only the lse used, twice through one graph, changed inputs."""
    for frozen in range(4):
        q, k, v, mask = (*operands(), make(5, 7))
        inputs = [t for i, t in enumerate((q, k, v, mask)) if i != frozen]
        (q, k, v, mask)[frozen].requires_grad_(False)
        results = [function(q, k, v, mask) for function in (sdpa, F.scaled_dot_product_attention)]
        grads = [torch.autograd.grad(out.sin().sum(), inputs, retain_graph=True) for out in results]
        assert_close(*grads)
        assert_close(torch.autograd.grad(results[0].sin().sum(), inputs), grads[0])
    q, k, v = operands()
    out, lse = sdpa(q, k, v, return_lse=True)
    assert_close(
        torch.autograd.grad(lse.sin().sum(), (q, k)),
        torch.autograd.grad(torch.logsumexp(q @ k.mT / 2, -1).sin().sum(), (q, k)),
    )
    with torch.no_grad():
        assert not sdpa(q, k, v).requires_grad
    out = sdpa(q, k, v)
    with torch.no_grad():
        q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_output_may_be_changed_in_place():
    for shape in ((2, 3, 5, 4), (3, 5, 4), (2, 5, 3, 4)):
        x = make(*shape)
        out = sdpa(x.transpose(1, 2), x.transpose(1, 2), x.transpose(1, 2)) if shape[1] == 5 else sdpa(x, x, x)
        out += 1  # no view, so autograd allows it; what the backward needs of it is gone, as with torch's
        assert out.requires_grad


# ---- modes and transforms


def test_jvp():
    inputs = operands(False)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    for options in ({}, {"is_causal": True}, *BEYOND[:2]):
        out, tangent = jvp(lambda *t, o=options: finite(sdpa(*t, **o)), inputs, tangents)
        step = 1e-5
        ahead, behind = (
            finite(sdpa(*(t + s * d for t, d in zip(inputs, tangents, strict=True)), **options)) for s in (step, -step)
        )
        for found, a, b in zip(tangent, ahead, behind, strict=True):
            assert_close(found, (a - b) / (2 * step), "finite difference")
        assert_close(out, finite(sdpa(*inputs, **options)))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
            found = finite(sdpa(*duals, **options))
            assert_close([forward_ad.unpack_dual(f).tangent for f in found], list(tangent))


@pytest.mark.parametrize("options", [{}, *BEYOND[:2]], ids=["plain", "band", "more"])
def test_vmap_and_gradients_per_sample(options):
    inputs = [torch.stack([t.detach(), t.detach() * 2, -t.detach()]) for t in operands()]
    found = vmap(lambda *t: finite(sdpa(*t, **options)))(*inputs)
    alone = [finite(sdpa(*t, **options)) for t in zip(*inputs, strict=True)]
    wanted = [torch.stack(r) for r in zip(*alone, strict=True)]
    assert_close(list(found), wanted)

    def loss(q, k, v):
        return sum(r.sin().sum() for r in finite(sdpa(q, k, v, **options)))

    per_sample = vmap(grad(loss, (0, 1, 2)))(*inputs)
    for i, row in enumerate(zip(*inputs, strict=True)):
        leaves = [t.clone().requires_grad_() for t in row]
        assert_close([g[i] for g in per_sample], list(torch.autograd.grad(loss(*leaves), leaves)))


def test_hessian():
    q, k, v = (t[:1, :1, :2, :2] for t in operands(False))
    found = hessian(lambda q: sdpa(q, k, v).sin().sum())(q)
    wanted = hessian(lambda q: (torch.softmax(q @ k.mT / 2**0.5, -1) @ v).sin().sum())(q)
    assert_close(found, wanted)


def test_vmap_of_dropout():
    x = torch.randn(3, 2, 5, 4)
    outs = vmap(lambda t: sdpa(t, t, t, dropout_p=0.5), randomness="different")(x[:1].expand(3, 2, 5, 4))
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("options", [{}, *BEYOND], ids=["plain", "band", "more", "grouped"])
def test_compile_whole_graph(options):
    torch._dynamo.reset()
    options = {name: torch.tensor(o) if name.startswith("lengths") else o for name, o in options.items()}
    compiled = torch.compile(lambda *t: sdpa(*t, **options), backend="aot_eager", fullgraph=True)
    inputs = operands()
    results = []
    for function in (compiled, lambda *t: sdpa(*t, **options)):
        found = finite(function(*inputs))
        results.append([*found, *torch.autograd.grad(sum(f.sin().sum() for f in found), inputs)])
    assert_close(*results)
    with torch.no_grad():
        assert_close(finite(compiled(*inputs)), finite(sdpa(*inputs, **options)))


def test_compile_packed_and_modules():
    torch._dynamo.reset()
    q, k, v = (make(4, n, 4) for n in (5, 7, 7))
    cu = {name: torch.tensor(o) if name.startswith("cu") else o for name, o in PACKED.items()}
    compiled = torch.compile(lambda *t: sdpa(*t, **cu), backend="aot_eager", fullgraph=True)
    assert_close(finite(compiled(q, k, v)), finite(sdpa(q, k, v, **cu)))
    for module in (fastseq.MultiheadAttention(8, 2), fastseq.TransformerEncoderLayer(8, 2, 16, 0.0)):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        x = torch.randn(5, 3, 8)
        arguments = (x,) if isinstance(module, nn.TransformerEncoderLayer) else (x, x, x)
        found, wanted = compiled(*arguments), module(*arguments)
        assert_close(*([r[0] if isinstance(r, tuple) else r for r in (found, wanted)]), "float32")


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = operands()
        for options in ({}, *BEYOND, {"dropout_p": 0.5, "softcap": 1.0}):
            out = sdpa(q, k, v, **options)
            out = out[0] if isinstance(out, tuple) else out
            assert out.shape == q.shape
            out.sum().backward()
        out, lse = sdpa(q[0], k[0], v[0], **{**PACKED, "cu_seqlens_q": torch.tensor([0, 2, 5])})
        assert (out.shape, lse.shape) == ((4, 5, 4), (4, 5))
        attention = fastseq.MultiheadAttention(8, 2)
        assert attention(*torch.randn(3, 5, 2, 8))[0].shape == (5, 2, 8)


def test_meta():
    q, k, v = (t.to("meta") for t in operands(False))
    for options in ({}, *BEYOND):
        out = sdpa(q, k, v, **{name: o.to("meta") if isinstance(o, torch.Tensor) else o for name, o in options.items()})
        out = out[0] if isinstance(out, tuple) else out
        assert out.is_meta
        assert out.shape == q.shape


def test_traces():
    inputs = operands(False)
    for options in ({}, {"is_causal": True}):
        graph = make_fx(lambda *t, o=options: sdpa(*t, **o))(*inputs)
        assert not any("fastseq" in str(node.target) for node in graph.graph.nodes)
        assert_close(graph(*inputs), sdpa(*inputs, **options))
    module = fastseq.MultiheadAttention(8, 2).double().eval()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (x, x, x))
        assert_close(traced(x, x, x)[0], module(x, x, x)[0])
        program = torch.export.export(module, (x, x, x), strict=False)
        assert "fastseq" not in str(program.graph)
        assert_close(program.module()(x, x, x)[0], module(x, x, x)[0])


def test_modes_and_subclasses():
    inputs = operands(False)
    wanted = F.scaled_dot_product_attention(*inputs)

    for mode in (Functions(), Ops()):
        with mode:
            assert_close(sdpa(*inputs), wanted)
        assert any("scaled_dot_product" in str(func) for func in mode.seen)
    marked = [t.as_subclass(Marked) for t in inputs]
    assert type(sdpa(*marked)) is Marked
    assert type(sdpa(*marked, causal="lower_right")) is Marked
    with torch.device("meta"):  # touches factory functions only
        assert_close(sdpa(*inputs), wanted)
        assert sdpa(*inputs, dropout_p=0.5).shape == wanted.shape


def test_autocast():
    inputs = tuple(t.float() for t in operands(False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wanted = sdpa(*inputs), F.scaled_dot_product_attention(*inputs)
        assert torch.equal(out, wanted)
        beyond, lse = sdpa(*inputs, causal="lower_right", return_lse=True)
        assert beyond.dtype is wanted.dtype
        assert lse.dtype is torch.float32
        mixed = sdpa(inputs[0], inputs[1].bfloat16(), inputs[2])
        assert mixed.dtype is torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    """Run again, it drops the same numbers."""
    inputs = operands()
    results = []
    for call in (lambda f, *t: f(*t), lambda f, *t: checkpoint(f, *t, use_reentrant=use_reentrant)):
        for t in inputs:
            t.grad = None
        torch.manual_seed(3)
        out = call(lambda q, k, v: sdpa(q, k, v, dropout_p=0.4, causal="upper_left"), *inputs)
        out.sin().sum().backward()
        results.append([out.detach(), *(t.grad.clone() for t in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_saved_tensor_hooks():
    inputs = operands()
    with torch.autograd.graph.save_on_cpu():
        out = sdpa(*inputs, torch.rand(5, 7) < 0.8)
    out.sum().backward()


def test_inference_mode():
    inputs = operands(False)
    wanted = sdpa(*inputs)
    with torch.inference_mode():
        assert_close(sdpa(*inputs), wanted)
        assert_close(sdpa(*(t.clone() for t in inputs)), wanted)


def test_modules_under_functional_call_and_copies():
    attention = fastseq.MultiheadAttention(8, 2).double()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    weights = {name: 2 * p.detach() for name, p in attention.named_parameters()}
    found = functional_call(attention, weights, (x, x, x))[0]
    twice = copy.deepcopy(attention)
    with torch.no_grad():
        for p in twice.parameters():
            p.mul_(2)
    assert_close(found, twice(x, x, x)[0])
    per_sample = vmap(grad(lambda w, t: functional_call(attention, w, (t, t, t))[0].sum()), (None, 1))(weights, x)
    assert per_sample["in_proj_weight"].shape == (3, 24, 8)

"""torch.compile: the opaque op of the recurrent layers, and the transforms of torch.func inside a graph."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LONG
from models import MODULES, assert_close, flat, gradients, make
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import backends
from fastseq.ops import CELLS, routing
from fastseq.ops.recurrent import graph

if backends.select("recurrent") is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

T, B, I, H = 3, 2, 3, 2  # noqa: E741


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


# ---- the opaque op

NEEDS = ("everything", "input", "state", "weights", "one weight", "nothing")
OPTIONS = ("plain", "lengths", "no step", "reset", "lengths and reset")
CASES = list(itertools.product(CELLS, (True, False), (1, 2), NEEDS, OPTIONS, (False, True)))


@pytest.mark.parametrize(("cell", "bias", "directions", "needs", "options", "states"), CASES if LONG else CASES[5::61])
def test_opaque_op(cell, bias, directions, needs, options, states):
    """torch's own checks of a custom op: its schema, fake results, autograd, dynamic shapes."""
    spec, x = CELLS[cell], random(T, B, I)
    rows = len(spec.gates) * H
    initial = [random(directions, B, H) for _ in ("h", *spec.states)] if states else []
    shapes = [(rows, I), (rows, H), (rows,), (rows,)][: 4 if bias else 2] * directions
    weights = [random(*shape) for shape in shapes]
    needed = {
        "everything": (x, *initial, *weights), "input": (x,), "state": initial[:1], "weights": weights,
        "one weight": weights[-1:], "nothing": (),
    }  # fmt: skip
    for tensor in needed[needs]:
        tensor.requires_grad_()
    lengths = torch.tensor([0, 0] if options == "no step" else [1, 3]) if options not in ("plain", "reset") else None
    reset = torch.rand(T, B) < 0.5 if "reset" in options else None
    reverse = [False, True][:directions]
    arguments = (x, initial, weights, lengths, reset, cell, reverse, bool(spec.states), False)
    torch.library.opcheck(graph.recurrent_layer, arguments)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", MODULES)
def test_every_weight_gets_a_gradient(cell, bias):
    module = make(cell, I, H, bias=bias, bidirectional=cell == "lstm")
    x = random(T, B, I).requires_grad_()
    leaves = [x, *module.parameters()]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(gradients(flat(compiled(x)), leaves), gradients(flat(module(x)), leaves))
    outputs = sum(o.sum() for o in flat(compiled(x)))
    assert all(g is not None for g in torch.autograd.grad(outputs, leaves, allow_unused=True))


# ---- transforms


def sequence(make, **options):
    module = make(I, H, dtype=torch.float64)
    return lambda x: module(x, **options)[0], random(T, B, I)


def cell(make):
    module = make(I, H, dtype=torch.float64)
    return lambda x: flat(module(x))[0], random(B, I)


def function(name):
    rows, (h, c) = len(CELLS[name].gates) * H, random(2, B, H)
    weights = random(rows, I), random(rows, H), random(rows), random(rows)
    hx = (h, c) if CELLS[name].states else h
    return lambda x: getattr(fastseq, name)(x, hx, *weights)[0], random(T, B, I)


def step():
    module = fastseq.GRU(I, H, dtype=torch.float64)
    return lambda x: module.step(x)[0], random(B, I)


def attention(**options):
    return lambda x: fastseq.scaled_dot_product_attention(x, x, x, **options), random(1, 2, 3, 4)


def multihead():
    module = fastseq.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    return lambda x: module(x, x, x, need_weights=False)[0], random(1, 3, 4)


MASK = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool()
CALLS = {
    "RNN": lambda: sequence(fastseq.RNN),
    "LSTM": lambda: sequence(fastseq.LSTM),
    "GRU": lambda: sequence(fastseq.GRU),
    "GRU, lengths and reset": lambda: sequence(fastseq.GRU, lengths=torch.tensor([2, 3]), reset=MASK[:, :2]),
    "RNNCell": lambda: cell(fastseq.RNNCell),
    "LSTMCell": lambda: cell(fastseq.LSTMCell),
    "GRUCell": lambda: cell(fastseq.GRUCell),
    "lstm": lambda: function("lstm"),
    "gru": lambda: function("gru"),
    "step": step,
    "attention": attention,
    "causal": lambda: attention(is_causal=True),
    "masked": lambda: attention(attn_mask=MASK),
    "window": lambda: attention(window=(1, 0), softcap=2.0),
    "multihead": multihead,
}


def loss(call):
    return lambda x: call(x).sin().sum()


TRANSFORMS = {
    "jvp": lambda call: lambda x: jvp(call, (x,), (torch.ones_like(x),))[1],
    "grad": lambda call: grad(loss(call)),
    "vmap": lambda call: lambda x: vmap(call)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda call: lambda x: vmap(grad(loss(call)))(torch.stack([x, 2 * x])),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda call: hessian(loss(call)),
}
PAIRS = list(itertools.product(CALLS, TRANSFORMS))


@pytest.mark.parametrize(("name", "transform"), PAIRS if LONG else PAIRS[::6])
def test_transforms_inside_a_graph(name, transform):
    call, x = CALLS[name]()
    transformed = TRANSFORMS[transform](call)
    found = torch.compile(transformed, backend="eager", fullgraph=True)(x)
    assert_close(found, transformed(x))


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
@pytest.mark.parametrize("name", ["LSTM", "window"])
def test_transforms_around_a_graph(name, transform):
    call, x = CALLS[name]()
    transformed = TRANSFORMS[transform]
    assert_close(transformed(torch.compile(call, backend="eager"))(x), transformed(call)(x))


# ---- outside the graph


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@torch._dynamo.config.patch(allow_rnn=True)
def test_fused_layers_inside_the_graph(name):
    """Where Dynamo is told to take torch's."""
    module = fastseq.fuse(getattr(nn, name)(I, H, 2, bidirectional=True, dtype=torch.float64))
    x = random(T, B, I).requires_grad_()
    compiled = torch.compile(lambda x: module(x), backend="aot_eager", fullgraph=True)
    found, wanted = flat(compiled(x)), flat(module(x))
    leaves = [x, *module.parameters()]
    assert_close([*found, *gradients(found, leaves)], [*wanted, *gradients(wanted, leaves)])


OUTSIDE = {
    "plain": {},
    "lengths and reset": {"lengths": torch.tensor([2, 3]), "reset": MASK[:, :2], "return_states": True},
}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OUTSIDE)
def test_no_decision_for_a_graph_is_used_outside_it(options, packed):
    """The layer runs outside the graph, and what it calls is compiled each on its own."""
    options = OUTSIDE[options]
    module, x = fastseq.GRU(I, H, dtype=torch.float64), random(T, B, I)
    if packed:
        x, options = pack_padded_sequence(x, [3, 2]), {}
    wanted = flat(module(x, **options))
    module.forward = torch.compiler.disable(module.forward, recursive=False)
    assert_close(flat(torch.compile(lambda x: module(x, **options), backend="eager")(x)), wanted)


def test_who_computes_outside_a_graph():
    ask = torch.compiler.disable(lambda x: routing.route("recurrent", (x,)), recursive=False)
    route, backend = torch.compile(lambda x: ask(x + 1), backend="eager")(random(T))
    assert (route, backend) == (routing.Route.KERNELS, backends.select("recurrent"))

"""torch.autograd.gradcheck in float64 of the real kernels, through the functions and the modules."""

import pytest
import torch
from cases import LENGTHS, RESET
from models import FUNCTIONS, flat
from torch.autograd import gradcheck, gradgradcheck

import fastseq
from fastseq import backends

if backends.select("recurrent") is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

T, B, I, H = 4, 3, 2, 5  # noqa: E741


def random(*shape):
    return (0.5 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def arguments(cell, *leading):
    torch.manual_seed(0)
    spec = FUNCTIONS[cell]
    gates = len(spec.gates) * H
    states = [random(B, H) for _ in ("h", *spec.states)]
    return random(*leading, B, I), *states, random(gates, I), random(gates, H), random(gates), random(gates)


def function_of(cell, name, **options):
    def call(x, h, *rest):
        state, weights = ((h, rest[0]), rest[1:]) if cell == "lstm" else (h, rest)
        return flat(getattr(fastseq, name)(x, state, *weights, **options))

    return call


@pytest.mark.parametrize("options", [{}, {"lengths": LENGTHS}, {"reset": RESET}, {"lengths": LENGTHS, "reset": RESET}],
                         ids=["plain", "lengths", "reset", "both"])  # fmt: skip
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_functions(cell, reverse, options):
    call = function_of(cell, cell, reverse=reverse, return_states=True, **options)
    assert gradcheck(call, arguments(cell, T))


def test_relu():
    assert gradcheck(function_of("rnn", "rnn", nonlinearity="relu"), arguments("rnn", T))


@pytest.mark.parametrize("cell", FUNCTIONS)
def test_cells(cell):
    assert gradcheck(function_of(cell, f"{cell}_cell"), arguments(cell))


@pytest.mark.parametrize("cell", FUNCTIONS)
def test_second_derivatives(cell):
    """They take torch's path, from the same call."""
    assert gradgradcheck(function_of(cell, cell), arguments(cell, 2))


@pytest.mark.parametrize("options", [{}, {"lengths": LENGTHS}, {"reset": RESET}], ids=["plain", "lengths", "reset"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_modules(name, options):
    torch.manual_seed(0)
    module = getattr(fastseq, name)(I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    names, weights = zip(*module.named_parameters(), strict=True)
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]

    def call(x, *parameters):
        return flat(torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x, options))

    assert gradcheck(call, (random(T, B, I), *leaves))


@pytest.mark.parametrize("cell", FUNCTIONS)
def test_backward_twice(cell):
    """The first backward turns the saved gates into gradients; the second has to see gates again."""
    inputs = arguments(cell, T)
    outputs = function_of(cell, cell, reset=RESET)(*inputs)
    first = torch.autograd.grad(outputs, inputs, [torch.ones_like(a) for a in outputs], retain_graph=True)
    second = torch.autograd.grad(outputs, inputs, [torch.ones_like(a) for a in outputs])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("hidden", [7, 65])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_infinities_spread_no_further_than_in_torch(name, hidden, where):
    """Units beyond H, which complete a vector, have weights of zero: zero times infinity must stay there."""

    def finite(namespace):
        torch.manual_seed(0)
        module = getattr(namespace, name)(3, hidden)
        x, dy = torch.randn(5, 9, 3), torch.randn(5, 9, hidden)
        (x if where == "x" else dy)[2, 4, 1] = float("inf")
        x.requires_grad_()
        output = module(x)[0]
        output.backward(dy)
        return [tensor.isfinite() for tensor in (output, x.grad, *(weight.grad for weight in module.parameters()))]

    assert all(ours[theirs].all() for ours, theirs in zip(finite(fastseq), finite(torch.nn), strict=True))

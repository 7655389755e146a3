"""Lengths and bounds that do not fit are refused wherever a call is observed: what only eager calls looked at once."""

import numpy as np
import pytest
import torch
from cases import LONG
from torch._dynamo.exc import Unsupported
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fastseq
from fastseq.ops import limits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

GRU = fastseq.GRU(4, 3).requires_grad_(False)
WEIGHTS = tuple(GRU.parameters())


def keys(x, n):
    return fastseq.scaled_dot_product_attention(x[:, :, :5], x, x, lengths_k=n)


def queries(x, n):
    return fastseq.scaled_dot_product_attention(x, x, x, lengths_q=n, is_causal=True)


def bounds(x, n):
    return fastseq.scaled_dot_product_attention(x[:, :5], x, x, cu_seqlens_q=[0, 3, 5], cu_seqlens_k=n)


def layer(x, n):
    return GRU(x, lengths=n)[0]


def function(x, n):
    return fastseq.gru(x, None, *WEIGHTS, lengths=n)[0]


OF_ROWS = r"must lie in \[0, 6\], the number of .*, got -2"
OF_BOUNDS = r"cu_seqlens_k must rise from 0 to 6, the total length, got \[0, 7, 6\]"
RECORDED = r"must lie in \[0, the number of |must rise from 0 to the total length"
CASES = {
    "lengths_k": (keys, (3, 2, 6, 4), [6, 2, 3], [3, -2, 9], OF_ROWS),
    "lengths_q": (queries, (3, 2, 6, 4), [6, 2, 3], [3, -2, 9], OF_ROWS),
    "cu_seqlens": (bounds, (2, 6, 4), [0, 2, 6], [0, 7, 6], OF_BOUNDS),
    "layer": (layer, (6, 3, 4), [6, 2, 3], [3, -2, 9], OF_ROWS),
    "function": (function, (6, 3, 4), [6, 2, 3], [3, -2, 9], OF_ROWS),
}


class Model(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.gru = f, GRU

    def forward(self, x, n):
        return self.f(x, n)


@pytest.fixture(params=CASES if LONG else ("lengths_k", "cu_seqlens", "layer"))
def case(request):
    f, shape, fits, wrong, message = CASES[request.param]
    return f, torch.randn(shape), fits, wrong, message


def test_eager(case):
    f, x, _, wrong, message = case
    for kind in (list, tuple, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)):
        with pytest.raises(ValueError, match=message):
            f(x, kind(wrong))


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
def test_compiled(case, kind):
    """The graph checks its input, each time."""
    f, x, fits, wrong, message = case
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, kind(fits)), f(x, fits))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            compiled(x, kind(wrong))


def test_compiled_lists(case):
    """Dynamo sees the numbers: a call is refused before there is a graph, and in a full graph by Dynamo's name."""
    f, x, fits, wrong, message = case
    others = [0, 3, 6] if f is bounds else [1, 0, 5]
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for numbers in (fits, others, fits):  # of the second Dynamo makes symbols
        torch.testing.assert_close(compiled(x, numbers), f(x, numbers))
    for dynamic in (True, False):
        torch.compiler.reset()
        with pytest.raises(Unsupported, match="raised exception ValueError"):
            torch.compile(f, fullgraph=True, backend="eager", dynamic=dynamic)(x, wrong)
        with pytest.raises(ValueError, match=message):
            torch.compile(f, backend="eager", dynamic=dynamic)(x, wrong)


@pytest.mark.parametrize("wrong", [[1.0, 2.0, 3.0], [True, False, True], [None] * 3, "abc", None])
def test_compiled_types(case, wrong):
    f, x, *_ = case
    if wrong is None:
        wrong = torch.zeros(3)
    with pytest.raises(TypeError, match="must be integers, got"):
        torch.compile(f, backend="eager")(x, wrong)


def test_compiled_ranks():
    for wrong in (torch.zeros(2, 3, dtype=torch.int64), torch.tensor(6), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"cu_seqlens_k must have shape \(B \+ 1,\), got"):
            torch.compile(bounds, backend="eager")(torch.randn(2, 6, 4), wrong)


def test_compiled_by_inductor():
    x = torch.randn(3, 2, 6, 4)
    compiled = torch.compile(keys, fullgraph=True)
    torch.testing.assert_close(compiled(x, torch.tensor([6, 2, 3])), keys(x, [6, 2, 3]))
    with pytest.raises(ValueError, match=OF_ROWS):
        compiled(x, torch.tensor([3, -2, 9]))


def test_transformed(case):
    """Behind what torch.func wraps, whatever axis vmap takes."""
    f, x, fits, wrong, message = case
    both = torch.tensor([fits, wrong])
    total = lambda x, n: f(x, n).sum()  # noqa: E731
    calls = (
        lambda n: vmap(f, (None, 0))(x, n),
        lambda n: vmap(f, (None, 1))(x, n.T.contiguous()),
        lambda n: vmap(vmap(f, (None, 1)), (None, 0))(x, torch.stack((n, n)).mT),
        lambda n: vmap(f, (0, None))(x[None], n[1]),
        lambda n: grad(total)(x, n[1]),
        lambda n: grad(lambda x, n: vmap(total, (None, 1))(x, n).sum())(x, n.T),
        lambda n: vmap(grad(total), (None, 0))(x, n),
        lambda n: jvp(lambda x: f(x, n[1]), (x,), (x,)),
        lambda n: vmap(lambda x: f(x, n[1].tolist()))(x[None]),
    )
    for call in calls:
        call(torch.tensor([fits, fits]))
        with pytest.raises(ValueError, match=message):
            call(both)


def test_compiled_transforms(case):
    f, x, fits, wrong, message = case
    over_lengths = torch.compile(lambda x, n: vmap(f, (None, 0))(x, n), fullgraph=True, backend="aot_eager")
    over_lengths(x, torch.tensor([fits, fits]))
    with pytest.raises(ValueError, match=message):
        over_lengths(x, torch.tensor([fits, wrong]))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(case, mode):
    """The graph follows its lengths, and checks them."""
    f, x, fits, wrong, message = case
    graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(x, torch.tensor(fits))
    others = [0, 3, 6] if f is bounds else [1, 0, 5]
    torch.testing.assert_close(graph(x, torch.tensor(others)), f(x, others))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with pytest.raises(RuntimeError, match=RECORDED):
        graph(x, torch.tensor(wrong))
    if mode == "real":
        with pytest.raises(ValueError, match=message):
            make_fx(f)(x, torch.tensor(wrong))
        graph = make_fx(vmap(f, (None, 1)))(x, torch.tensor([fits, fits]).T)
        with pytest.raises(RuntimeError, match=RECORDED):
            graph(x, torch.tensor([fits, wrong]).T)


@pytest.mark.parametrize("strict", [True, False])
def test_export(case, strict):
    f, x, fits, wrong, message = case
    program = torch.export.export(Model(f), (x, torch.tensor(fits)), strict=strict)
    for module in (program.module(), program.run_decompositions().module()):
        torch.testing.assert_close(module(x, torch.tensor(fits)), f(x, fits))
        with pytest.raises(RuntimeError, match=RECORDED):
            module(x, torch.tensor(wrong))
    with pytest.raises((ValueError, Unsupported), match=r"raised exception ValueError|" + message):
        torch.export.export(Model(f), (x, wrong), strict=strict)


def test_exported_sizes_stay_dynamic():
    """The message of the assertion names no size, as printing one would make it a constant."""
    dynamic = {"x": {2: torch.export.Dim("S", min=6, max=9)}, "n": None}
    for strict in (True, False):
        program = torch.export.export(
            Model(keys), (torch.randn(3, 2, 7, 4), torch.tensor([7, 2, 3])), dynamic_shapes=dynamic, strict=strict
        )
        with pytest.raises(RuntimeError, match=RECORDED):
            program.module()(torch.randn(3, 2, 6, 4), torch.tensor([7, 2, 3]))


def test_traced(case):
    f, x, fits, wrong, message = case
    traced = torch.jit.trace(Model(f), (x, torch.tensor(fits)), check_trace=False)
    torch.testing.assert_close(traced(x, torch.tensor(fits)), f(x, fits))
    with pytest.raises(RuntimeError, match=RECORDED):
        traced(x, torch.tensor(wrong))
    for kind in (torch.tensor, list):
        with pytest.raises(ValueError, match=message):
            torch.jit.trace(lambda x, kind=kind: f(x, kind(wrong)), (x,), check_trace=False)


def test_packed_sequences_while_traced():
    """Their batch sizes are checked while a trace is made, too."""
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(4, 3, 4), [4, 3, 1])
    wrong = packed._replace(batch_sizes=packed.batch_sizes.flip(0))

    def call(data):
        return GRU(input._replace(data=data))[0].data

    input = packed
    torch.jit.trace(call, packed.data, check_trace=False)
    input = wrong
    for trace in (lambda: make_fx(call)(packed.data), lambda: torch.jit.trace(call, packed.data, check_trace=False)):
        with pytest.raises(RuntimeError, match="batch_sizes must be positive and never rise"):
            trace()


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_key_value_cache(kind):
    """In the parts of a graph that its growing breaks."""

    def append(cache, x, n):
        cache.append(x, x, lengths=n)
        return cache.keys * 1

    x, cache = torch.randn(2, 3, 4, 8), fastseq.KVCache(2, 3, 8, capacity=16)
    compiled = torch.compile(append, backend="eager")
    compiled(cache, x, kind([4, 1]))
    for wrong in ([5, 1], [1, -1]):
        with pytest.raises(ValueError, match=r"lengths must lie in \[0, 4\], the number of tokens appended"):
            compiled(cache, x, kind(wrong))
    assert cache.lengths.tolist() == [4, 1]


def test_op():
    checked = (limits.checked_integers, (torch.tensor([3, 1]), "lengths", 3, "keys"))
    torch.library.opcheck(*checked)
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 2\], the number of keys, got 3"):
        limits.checked_integers(torch.tensor([3, 1]), "lengths", 2, "keys")

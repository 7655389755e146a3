"""sdpa_kernels(): a model's own calls of torch's function."""

import copy
import functools
import pickle
import threading
from contextlib import ExitStack, nullcontext
from contextvars import copy_context
from unittest import mock

import pytest
import torch
import torch.nn.attention.bias
import torch.nn.functional as F
from models import assert_close
from torch import nn

import fastseq
from fastseq import sdpa_patch

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


def recorder():
    """A tensor subclass and a mode that note the functions they see, and of each whether it is what the name gives."""
    seen = []

    def note(func):
        seen.append((func, func is F.scaled_dot_product_attention, TABLE.get(func)))

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            note(func)
            return super().__torch_function__(func, types, args, kwargs)

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            note(func)
            return func(*args, **(kwargs or {}))

    return seen, Marked, Mode


TABLE = {TORCHS: "theirs"}  # as libraries keep, made at their import


@pytest.mark.parametrize("what", ["mode", "query", "value", "mask", "mask by name"])
def test_overrides_see_torchs_function(what, x):
    """torch's own function object, once, while the name stands for it: as without the block."""
    x, mask = x.detach(), torch.ones(5, 5, dtype=torch.bool)

    def look():
        seen, marked, mode = recorder()
        given = {"query": x, "key": x, "value": x, "attn_mask": mask}
        name = {"mask": "attn_mask", "mask by name": "attn_mask"}.get(what, what)
        given = {n: t.as_subclass(marked) if n == name else t for n, t in given.items()}
        with mode() if what == "mode" else nullcontext():
            if what == "mask by name":
                out = F.scaled_dot_product_attention(**given)
            else:
                out = F.scaled_dot_product_attention(*given.values())
        return out, seen

    wanted, calls = look()
    with sdpa_kernels():
        out, found = look()
        assert F.scaled_dot_product_attention is not TORCHS
    assert type(out).__name__ == type(wanted).__name__
    assert torch.equal(out.as_subclass(torch.Tensor), wanted.as_subclass(torch.Tensor))
    assert found == calls == [(TORCHS, True, "theirs")]


@pytest.mark.parametrize("function", ["name", "imported", "fastseq"])
def test_overrides_that_compare_with_the_name(function, x):
    """As torch's causal bias does: one that missed its function would go on with what its memory holds."""

    class Twice(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                return "found"
            return super().__torch_function__(func, types, args, kwargs)

    mask = torch.ones(5, 5, dtype=torch.bool).as_subclass(Twice)
    with sdpa_kernels():
        call = {"name": F.scaled_dot_product_attention, "imported": TORCHS}.get(
            function, fastseq.scaled_dot_product_attention
        )
        assert call(x, x, x, mask) == "found"


@pytest.mark.parametrize("function", ["name", "imported", "fastseq"])
@pytest.mark.parametrize("variant", ["causal_upper_left", "causal_lower_right"])
@pytest.mark.parametrize("size", [(5, 9), (4, 4), (5, 64)])
def test_causal_biases(function, variant, size, x, seen):
    bias = getattr(torch.nn.attention.bias, variant)(*size)
    key = x.detach().repeat(1, 1, 2, 1)[:, :, :9].requires_grad_()
    if variant == "causal_lower_right" and size == (5, 64):
        with sdpa_kernels(), pytest.raises(RuntimeError, match="must match the size of tensor"):
            F.scaled_dot_product_attention(x, key, key, bias)
        return
    wanted = TORCHS(x, key, key, bias)
    with sdpa_kernels():
        call = {"name": F.scaled_dot_product_attention, "imported": TORCHS}.get(
            function, fastseq.scaled_dot_product_attention
        )
        out = call(x, key, key, bias)
        with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
            call(x, key, key, bias, is_causal=True)
        dropped = call(x, key, key, bias, dropout_p=1.0)
        halves = call(x.half(), key.half(), key.half(), bias)
    assert_close(out, wanted)
    assert out.grad_fn.name() != "ScaledDotProductFlashAttentionForCpuBackward0"
    assert_close(torch.autograd.grad(out.sum(), (x, key)), torch.autograd.grad(wanted.sum(), (x, key)))
    assert not dropped.any()
    assert_close(halves.float(), wanted.float(), "bfloat16")
    compiled = torch.compile(fastseq.scaled_dot_product_attention, backend="eager", fullgraph=True)
    if function == "fastseq" and size == (4, 4):
        assert_close(compiled(x, x, x, bias), TORCHS(x, x, x, bias))


def test_tables_of_overrides(x):
    """torch.overrides keeps what it finds first."""
    torch.overrides.get_testing_overrides.cache_clear()
    torch.overrides._get_overridable_functions.cache_clear()
    with sdpa_kernels():
        assert TORCHS in torch.overrides.get_testing_overrides()
        assert TORCHS in torch.overrides.get_overridable_functions()[F]


def test_default_device(seen, x):
    """Its mode touches factory functions only."""
    with torch.device("cpu"), sdpa_kernels():
        Attention()(x)
    assert len(seen) == 1


def test_threads_see_torchs_name(x):
    with sdpa_kernels():
        names = []
        thread = threading.Thread(target=lambda: names.append(F.scaled_dot_product_attention))
        thread.start()
        thread.join()
    assert names == [TORCHS]


def theirs(below, calls):
    """A patch by others, over what the name gives."""

    @functools.wraps(below)
    def function(*args, **kwargs):
        calls.append(args)
        return below(*args, **kwargs)

    return function


@pytest.mark.parametrize("undone", ["inside", "after", "in the next block", "in a thread", "never"])
@pytest.mark.parametrize("by", [pytest.MonkeyPatch, mock.patch])
def test_patches_made_inside(by, undone, seen, x):
    """They hold to their own end, over the kernels inside and over torch's op outside, and leave nothing behind."""
    calls = []
    with sdpa_kernels():
        function = theirs(F.scaled_dot_product_attention, calls)
        if by is pytest.MonkeyPatch:
            patch = pytest.MonkeyPatch()
            patch.setattr(F, "scaled_dot_product_attention", function)
            undo = patch.undo
        else:
            patch = mock.patch.object(F, "scaled_dot_product_attention", function)
            patch.start()
            undo = patch.stop
        Attention()(x)
        assert (len(calls), len(seen)) == (1, 1)
        with sdpa_kernels():
            Attention()(x)
            assert (len(calls), len(seen)) == (2, 2)
        if undone == "inside":
            undo()
            Attention()(x)
            assert (len(calls), len(seen)) == (2, 3)
        if undone == "in a thread":
            thread = threading.Thread(target=undo)
            thread.start()
            thread.join()
    count, kernels = len(calls), len(seen)
    if undone in ("after", "never", "in the next block"):
        assert F.scaled_dot_product_attention is function
        Attention()(x)
        assert (len(calls), len(seen)) == (count + 1, kernels)
        with sdpa_kernels():
            Attention()(x)  # a new block is over it
            assert (len(calls), len(seen)) == (count + 1, kernels + 1)
            if undone == "in the next block":
                undo()
        if undone == "after":
            undo()
        if undone == "never":
            assert F.scaled_dot_product_attention is function
            F.scaled_dot_product_attention = TORCHS
    assert F.scaled_dot_product_attention is F.__dict__["scaled_dot_product_attention"] is TORCHS
    with sdpa_kernels():
        kernels = len(seen)
        Attention()(x)
        assert len(seen) == kernels + 1
    assert F.scaled_dot_product_attention is TORCHS
    assert type(F) is type(torch)


def test_interleaved_blocks(seen, x):
    one, two = sdpa_kernels(), sdpa_kernels()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    Attention()(x)
    assert len(seen) == 1
    two.__exit__(None, None, None)
    thread = threading.Thread(target=lambda: enter.enter_context(sdpa_kernels()))
    with ExitStack() as enter:
        thread.start()
        thread.join()
        Attention()(x)  # in no block of this thread's
        assert len(seen) == 1
    assert F.scaled_dot_product_attention is TORCHS


def test_pickles_and_copies():
    """A model may keep what the name gave."""
    with sdpa_kernels():
        kept = F.scaled_dot_product_attention
        assert pickle.loads(pickle.dumps(kept)) is copy.deepcopy(kept) is kept
    assert kept.__name__ == TORCHS.__name__

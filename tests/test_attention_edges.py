"""scaled_dot_product_attention at the edges: nothing to compute, numbers and tensors of unusual kinds."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import assert_close
from observers import Marked
from sdpa_calls import SLOPES, check, gradients, make

import fastseq
from fastseq.ops.attention import formula

sdpa = fastseq.scaled_dot_product_attention
both_routes = pytest.mark.usefixtures("route")


@both_routes
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
        ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
        ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0)),
        ((0, 8), (7, 8), (7, 8)),
    ],
)
def test_empty(query, key, value):
    arguments = make(*query), make(*key), make(*value)
    for options in ({}, {"is_causal": True}):
        check(arguments, options)
    out, lse = sdpa(*arguments, return_lse=True)
    assert_close(out, F.scaled_dot_product_attention(*arguments))
    assert lse.shape == query[:-1]
    assert torch.equal(lse == -math.inf, torch.full(query[:-1], not key[-2]))
    out.sum().backward()


@both_routes
@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        ((0, 2, 3, 5, 8), (0, 2, 3, 7, 8), (0, 2, 1, 1, 1)),
        ((2, 0, 3, 5, 8), (2, 0, 3, 7, 8), (1, 0, 3, 5, 7)),
        ((2, 0, 3, 5, 8), (2, 0, 3, 7, 8), (1, 1, 3, 5, 7)),
        ((0, 3, 5, 8), (0, 1, 7, 8), (0, 3, 1, 7)),
        ((0, 3, 5, 8), (1, 3, 7, 8), (1, 3, 1, 7)),
    ],
)
def test_empty_batches_with_masks(query, key, mask):
    check((make(*query), make(*key), make(*key), make(*mask, requires_grad=False)), {})
    check((make(*query), make(*key), make(*key), torch.ones(mask, dtype=torch.bool)), {})


@pytest.mark.parametrize(("size", "value_size"), [(8, 0), (0, 3), (0, 0)])
@pytest.mark.usefixtures("native")
def test_no_features(size, value_size, monkeypatch):
    """The kernels keep the scores out of memory."""
    q, k, v = make(2, 4, 5, size), make(2, 2, 7, size), make(2, 2, 7, value_size)
    options = {"window": (2, 1), "enable_gqa": True, "return_lse": True}
    with fastseq.backends.use_backend("torch"):
        wanted = sdpa(q, k, v, **options)
        grads = gradients(wanted, (q, k, v))
    monkeypatch.delattr(formula, "attention")
    found = sdpa(q, k, v, **options)
    assert_close([*found, *gradients(found, (q, k, v))], [*wanted, *grads])


@both_routes
def test_what_is_not_finite(route):
    """What a query sees reaches its results. Of the rest only finite numbers are promised to stay out."""
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(3):
            tensors = [torch.randn(2, 3, 70, 8) for _ in range(3)]
            tensors[place][1, 2, 66, 3] = bad
            for options in ({}, {"is_causal": True}):
                found, wanted = (f(*tensors, **options) for f in (sdpa, F.scaled_dot_product_attention))
                sees = slice(66, 67) if place == 0 else slice(66 if options else 0, None)
                assert torch.equal(found[1, 2, sees].isfinite(), wanted[1, 2, sees].isfinite())
                others = torch.ones(2, 3, dtype=torch.bool)
                others[1, 2] = False
                assert found[others].isfinite().all()
    mask = torch.randn(5, 7).masked_fill(torch.rand(5, 7) < 0.5, -math.inf)
    for size in (1.0, 1e3, 1e15):  # scores up to 1e31
        q, k, v = (size * make(2, 3, n, 8, dtype=torch.float32, requires_grad=False) for n in (5, 7, 7))
        inputs = [t.requires_grad_() for t in (q, k, v)]
        for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask > 0}):
            out = sdpa(*inputs, **options)
            assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), inputs)))


@both_routes
@pytest.mark.parametrize("reach", [2**62, 2**63 - 2, 2**63, 2**64])
def test_windows_of_any_size(reach):
    q, k = make(2, 3, 5, 8), make(2, 3, 7, 8)
    for window, same in (((reach, 0), (None, 0)), ((1, reach), (1, None))):
        assert torch.equal(sdpa(q, k, k, window=window), sdpa(q, k, k, window=same))


@both_routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_softcaps_of_any_size(dtype):
    """Also those that the dtype has no numbers for."""
    q, k, v = make(2, 3, 5, 8, dtype=dtype), make(2, 3, 7, 8, dtype=dtype), make(2, 3, 7, 8, dtype=dtype)
    with torch.no_grad():
        q[:, :, 0] = 0
    for softcap, wanted in ((1e40, sdpa(q, k, v)), (1e307, sdpa(q, k, v)), (1e-320, sdpa(q, k, v, scale=0.0))):
        out = sdpa(q, k, v, softcap=softcap)
        assert_close(out, wanted, str(dtype).removeprefix("torch."))
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@both_routes
@pytest.mark.parametrize("kind", ["negated", "subclass", "float64", "bfloat16", "strided"])
def test_slopes_of_any_kind(kind):
    q, k = make(2, 4, 5, 8), make(2, 4, 7, 8)
    slopes = {
        "negated": torch.complex(SLOPES, -SLOPES).conj().imag,
        "subclass": SLOPES.as_subclass(Marked),
        "float64": SLOPES.double(),
        "bfloat16": SLOPES.bfloat16(),
        "strided": SLOPES.repeat_interleave(2)[::2],
    }[kind]
    exact = SLOPES.bfloat16().float() if kind == "bfloat16" else SLOPES
    out = sdpa(q, k, k, alibi_slopes=slopes)
    assert_close(out.as_subclass(torch.Tensor), sdpa(q, k, k, alibi_slopes=exact))


@both_routes
@pytest.mark.parametrize("place", range(4))
def test_negated_inputs(place):
    """Views whose bytes are not their values, as the imaginary part of a conjugate is."""
    tensors = [
        torch.randn(shape, dtype=torch.complex128) for shape in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (5, 7))
    ]
    given = [t.conj().imag if i == place else -t.imag for i, t in enumerate(tensors)]
    assert given[place].is_neg()
    for options in ({}, {"window": (3, 1)}):
        assert_close(sdpa(*given, **options), sdpa(*(-t.imag for t in tensors), **options))
    assert_close(sdpa(*given[:3]), sdpa(*(-t.imag for t in tensors[:3])))


@pytest.mark.parametrize("rows", [3, 5, 7, 12])
@pytest.mark.parametrize("lead", [(2, 4), (4,), ()], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"dropout_p": 0.5}, {"enable_gqa": True}, {"softcap": 3.0}]
)
def test_keys_and_values_of_different_lengths(route, rows, lead, options):
    """Torch's op does not ask: it reads past the values, and its backward writes past them."""
    query, key = torch.randn(*lead, 3, 8), torch.randn(*lead, 6, 8)
    value = torch.randn(*lead, rows, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"same number of rows, got a key of shape .*6, 8.* of shape .*{rows}, 8"):
        fastseq.scaled_dot_product_attention(query, key, value, **options)

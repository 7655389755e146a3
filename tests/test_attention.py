"""scaled_dot_product_attention: torch's function to the letter, and what it has beyond."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import assert_close
from sdpa_calls import OPINFO, SLOPES, check, given, gradients, make

import fastseq
from fastseq.ops.attention import formula
from fastseq.reference import philox4x32, scaled_dot_product_attention_backward, scaled_dot_product_attention_forward

sdpa = fastseq.scaled_dot_product_attention
both_routes = pytest.mark.usefixtures("route")


# ---- as torch


@both_routes
def test_torchs_samples():
    count = 0
    for sample in OPINFO.sample_inputs("cpu", torch.float64, requires_grad=True):
        if sample.kwargs.get("dropout_p"):
            continue  # another random stream, see test_dropout
        check((sample.input, *sample.args), sample.kwargs)
        count += 1
    assert count > 10


@both_routes
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((5, 8), (7, 8), (7, 8)),
        ((5, 8), (7, 8), (7, 3)),
        ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
        ((3, 5, 8), (1, 7, 8), (1, 7, 4)),
        ((1, 5, 8), (3, 7, 8), (3, 7, 8)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
        ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
        ((2, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 8)),
        ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
        ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((1, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 8)),
        ((2, 3, 5, 8), (3, 7, 8), (7, 8)),
        ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
        ((2, 1, 3, 5, 8), (1, 2, 1, 7, 8), (1, 2, 1, 7, 8)),
        ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
        ((2, 3, 1, 8), (2, 3, 65, 8), (2, 3, 65, 8)),
    ],
)
def test_shapes(query, key, value):
    arguments = make(*query), make(*key), make(*value)
    for options in ({}, {"is_causal": True}, {"scale": -0.3}, {"scale": 0.0}):
        check(arguments, options)


@both_routes
@pytest.mark.parametrize(
    "mask",
    [(5, 7), (1, 7), (5, 1), (1, 1), (3, 5, 7), (1, 5, 7), (2, 1, 5, 7), (1, 3, 1, 7), (2, 3, 5, 7), (2, 1, 1, 7)],
)
def test_masks(mask):
    arguments = make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8)
    check((*arguments, make(*mask)), {})
    allowed = torch.rand(mask) < 0.7
    check((*arguments, allowed), {})
    check((*arguments, torch.zeros(mask, dtype=torch.float64).masked_fill(~allowed, -math.inf)), {"scale": 0.2})


@both_routes
def test_masks_of_other_ranks():
    check((make(5, 8), make(7, 8), make(7, 8), make(5, 7)), {})
    check((make(3, 5, 8), make(3, 7, 8), make(3, 7, 8), make(3, 1, 7)), {})
    check((make(2, 2, 3, 5, 8), make(2, 2, 3, 7, 8), make(2, 2, 3, 7, 8), make(2, 1, 3, 5, 7)), {})
    check((make(2, 2, 3, 5, 8), make(2, 2, 3, 7, 8), make(2, 2, 3, 7, 8), make(1, 1, 5, 7)), {})


@both_routes
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_grouped_heads(mask):
    masks = {None: None, "bool": torch.rand(2, 1, 5, 7) < 0.7, "float": make(1, 6, 5, 7)}
    for heads in (1, 2, 3, 6):
        arguments = make(2, 6, 5, 8), make(2, heads, 7, 8), make(2, heads, 7, 4), masks[mask]
        check(arguments, {"enable_gqa": True, "is_causal": mask is None})
    check((make(6, 5, 8), make(2, 7, 8), make(2, 7, 8)), {"enable_gqa": True})
    check((make(2, 1, 6, 5, 8), make(2, 1, 3, 7, 8), make(2, 1, 3, 7, 8)), {"enable_gqa": True})


def test_layouts(route):
    """Strided inputs; of 4-D ones the query's layout comes back."""
    q, k, v = make(2, 5, 3, 8).transpose(1, 2), make(7, 2, 3, 8).permute(1, 2, 0, 3), make(2, 3, 8, 7).mT
    check((q, k, k), {}, layout=True)
    check((make(5, 2, 3, 8).permute(1, 2, 0, 3), k, k), {}, layout=True)
    check((q, k, v), {})
    check((make(2, 3, 8, 5).mT, k, v), {})
    check((make(1, 3, 5, 8).expand(2, 3, 5, 8), k, make(2, 1, 7, 8).expand(2, 3, 7, 8)), {})
    check((make(2, 3, 10, 16)[:, :, ::2, 1::2], k, v), {})
    check((make(2, 3, 5, 24).chunk(3, -1)[1], k, v, make(7, 5).mT), {})
    x = make(2, 5, 3, 1).transpose(1, 3).transpose(2, 3)  # an axis of size 1 with another stride
    check((x.transpose(1, 3), x.transpose(1, 3), x.transpose(1, 3)), {})
    for shape in ((5, 3, 8), (3, 5, 8)):
        q3 = make(*shape).transpose(0, 1)
        assert route == "torch" or sdpa(q3, q3, q3).is_contiguous()  # versions of torch differ
    assert sdpa(q, k, make(2, 3, 7, 4)).shape == (2, 3, 5, 4)


@both_routes
def test_rows_without_keys():
    """They give zeros, and zeros as gradients."""
    arguments = make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8)
    allowed = torch.rand(2, 1, 5, 7) < 0.7
    allowed[0, 0, 2] = False
    allowed[1, 0, :] = False
    added = torch.zeros(2, 1, 5, 7, dtype=torch.float64).masked_fill(~allowed, -math.inf).requires_grad_()
    for mask in (allowed, added):
        out, lse = sdpa(*arguments, mask, return_lse=True)
        assert (out[0, :, 2] == 0).all()
        assert (out[1] == 0).all()
        assert (lse[1] == -math.inf).all()
        grads = gradients([out, lse], [a for a in (*arguments, mask) if a.requires_grad])
        assert all(g.isfinite().all() for g in grads)
        check((*arguments, mask), {})


@both_routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = (make(2, 3, n, 8, dtype=dtype, requires_grad=False) for n in (5, 7, 7))
    for options in (
        {},
        {"is_causal": True},
        {"attn_mask": torch.randn(5, 7).to(dtype)},
        {"attn_mask": torch.randn(5, 7)},
    ):
        out = sdpa(q, k, v, **options)
        assert out.dtype is dtype
        wide = {name: o.double() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
        wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **wide)
        assert_close(out.double(), wanted, str(dtype).removeprefix("torch."))
    _, lse = sdpa(q, k, v, return_lse=True)
    assert lse.dtype is torch.float32


def wrong_calls():
    r = torch.randn
    q, k = r(2, 3, 5, 8), r(2, 3, 7, 8)
    yield (q, None, k), {}
    yield (q, [1.0], k), {}
    yield (r(8), r(8), r(8)), {}
    yield (q, k.double(), k), {}
    yield (q, k.to("meta"), k), {}
    yield (q, k[..., :4], k), {}
    yield (q, r(4, 3, 7, 8), k), {}
    yield (r(1, 4, 5, 8), r(1, 2, 7, 8), r(1, 2, 7, 8)), {}
    yield (r(1, 4, 5, 8), r(1, 3, 7, 8), r(1, 3, 7, 8)), {"enable_gqa": True}
    yield (r(5, 8), r(7, 8), r(7, 8)), {"enable_gqa": True}
    yield (q.int(), k.int(), k.int()), {}
    yield (q, k, k, r(7)), {}
    yield (q, k, k, r(5, 6)), {}
    yield (q, k, k, r(1, 2, 3, 5, 7)), {}
    yield (q[:1], k[:1], k[:1], r(2, 3, 5, 7)), {}
    yield (q, k, k, torch.ones(5, 7, dtype=torch.int32)), {}
    yield (q, k, k, r(5, 7).double()), {}
    yield (q, k, k, [[1.0]]), {}
    yield (q, k, k), {"dropout_p": -0.1}
    yield (q, k, k), {"dropout_p": 1.1}
    yield (q, k, k), {"dropout_p": math.nan}
    yield (q, k, k), {"dropout_p": "a"}
    yield (q, k, k), {"scale": "a"}
    yield (q, k, k), {"is_causal": 1}
    yield (q, k, k), {"scale": torch.ones((), requires_grad=True)}
    yield (q, k, k), {"dropout_p": torch.ones(1)}
    for enable_gqa in (0, 1, None, "a"):
        yield (q, k, k), {"enable_gqa": enable_gqa}
    yield (q[:1], k[:1, :1], r(2, 3, 7, 8), r(2, 3, 5, 7)), {}  # scores are of query and key
    yield (q[:1, :1], k[:1, :1], k[:1], torch.ones(1, 3, 5, 7, dtype=torch.bool)), {}
    yield (q[0, :1], k[0, :1], k[0], r(3, 5, 7)), {}
    yield (q[0], k[0], k, r(1, 3, 5, 7)), {}
    yield (q[0], k[0], k[0], r(5, 7)), {"is_causal": True}  # in four dimensions torch applies both


def error_of(function, arguments, options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return error
    return None


@both_routes
def test_wrong_arguments():
    for arguments, options in wrong_calls():
        wanted = error_of(F.scaled_dot_product_attention, arguments, options)
        assert wanted is not None
        for more in ({}, {"causal": "upper_left"}, {"softcap": 2.0, "return_lse": True}):
            error = error_of(sdpa, arguments, {**options, **more})
            assert type(error) is type(wanted), (options, more)
            assert re.sub(r" \(position \d\)", "", str(error)) == re.sub(r" \(position \d\)", "", str(wanted))


@both_routes
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"causal": "lower"}, ValueError, "causal must be None, 'upper_left' or 'lower_right', got 'lower'"),
        ({"causal": True}, ValueError, "causal must be"),
        ({"is_causal": True, "causal": "lower_right"}, ValueError, "is_causal=True aligns the upper left corner"),
        ({"window": 3}, TypeError, r"window must be a pair \(left, right\), got 3"),
        ({"window": (1, 2, 3)}, TypeError, "window must be a pair"),
        ({"window": (1.0, 2)}, TypeError, "window must hold integers or None, got 1.0 on the left"),
        ({"window": (1, -2)}, ValueError, "got -2 on the right"),
        ({"softcap": "a"}, TypeError, "softcap must be a number or None, got str"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"softcap": math.nan}, ValueError, "softcap must be positive"),
        ({"alibi_slopes": 1.0}, TypeError, "alibi_slopes must be a Tensor, got float"),
        ({"alibi_slopes": torch.ones(3, dtype=torch.int64)}, TypeError, "alibi_slopes must be floats"),
        ({"alibi_slopes": torch.ones(4)}, ValueError, r"shape \(3,\) or \(2, 3\), N or \(B, N\), got \(4,\)"),
        ({"alibi_slopes": torch.ones(3, requires_grad=True)}, RuntimeError, "must not require grad"),
        ({"alibi_slopes": torch.ones(3, device="meta")}, RuntimeError, "not at the same device"),
        ({"lengths_q": [1]}, ValueError, r"lengths_q must have one entry per sequence, shape \(2,\), got shape \(1,\)"),
        ({"lengths_q": [1, 6]}, ValueError, r"lengths_q must lie in \[0, 5\], the number of queries, got 6"),
        ({"lengths_k": [-1, 6]}, ValueError, r"lengths_k must lie in \[0, 7\], the number of keys, got -1"),
        ({"lengths_k": [1.0, 6]}, TypeError, "lengths_k must be integers"),
        (
            {"lengths_k": [2**63, 1]},
            ValueError,
            r"lengths_k must be integers of 64 bits, got \[9223372036854775808, 1\]",
        ),
        ({"softcap": True}, TypeError, "softcap must be a number or None, got bool"),
        ({"cu_seqlens_q": [0, 5]}, ValueError, "must both be given or both be None, got cu_seqlens_k=None"),
        ({"cu_seqlens_q": [0, 5], "cu_seqlens_k": [0, 7]}, ValueError, "with a batch axis of 1"),
        ({"cu_seqlens_k": [0, 5], "lengths_k": [1, 2]}, ValueError, "lengths_q and lengths_k cannot be given"),
    ],
)
def test_wrong_arguments_beyond_torch(options, error, message):
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with pytest.raises(error, match=message):
        sdpa(q, k, k, **options)


@both_routes
def test_wrong_packed_arguments():
    q, k = torch.randn(3, 5, 8), torch.randn(3, 7, 8)

    def call(cu_q, cu_k, **options):
        return sdpa(q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)

    for cu_q, error, message in [
        ([0, 2, 4], ValueError, r"cu_seqlens_q must rise from 0 to 5, the total length, got \[0, 2, 4\]"),
        ([1, 2, 5], ValueError, "must rise from 0"),
        ([0, 3, 2, 5], ValueError, "must rise from 0"),
        ([0, 5], ValueError, "the same number of sequences, got 1 and 2"),
        ([[0, 5]], ValueError, r"cu_seqlens_q must have shape \(B \+ 1,\), got \(1, 2\)"),
        ([], ValueError, "must have shape"),
        ([0.0, 5.0], TypeError, "cu_seqlens_q must be integers"),
        ([0, 2**64], ValueError, "cu_seqlens_q must be integers of 64 bits"),
    ]:
        with pytest.raises(error, match=message):
            call(cu_q, [0, 3, 7])
    with pytest.raises(ValueError, match="attn_mask cannot be given with cu_seqlens"):
        call([0, 2, 5], [0, 3, 7], attn_mask=torch.ones(5, 7))
    with pytest.raises(ValueError, match=r"with a batch axis of 1, got a query of shape \(5, 8\)"):
        sdpa(q[0], k[0], k[0], cu_seqlens_q=[0, 5], cu_seqlens_k=[0, 7])
    with pytest.raises(ValueError, match="need 4-D query, key and value"):
        sdpa(q, k, k, lengths_k=[1])


# ---- beyond torch, against the reference


def by_reference(q, k, v, mask=None, **options):
    """out, lse and the gradients of all that has one, for the weights of `gradients`."""
    arrays = [t if t is None else t.detach().numpy() for t in (q, k, v, mask)]
    out, cache = scaled_dot_product_attention_forward(*arrays, **options)
    results = out, cache.lse
    dout, dlse = (weight.numpy() for weight in given(results))
    wants_mask = mask is not None and mask.requires_grad
    results += scaled_dot_product_attention_backward(dout, cache, dlse, return_dmask=wants_mask)
    return [torch.from_numpy(a) for a in results]


ALLOWED = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.8
LOWER_RIGHT = {"is_causal": True, "lower_right": True}
BEYOND = [
    ({"causal": "upper_left"}, {"is_causal": True}),
    ({"causal": "lower_right"}, LOWER_RIGHT),
    ({"window": (2, 1)}, {"window": (2, 1)}),
    ({"window": (None, 1)}, {"window": (None, 1)}),
    ({"window": (0, -1)}, {"window": (0, None)}),
    ({"window": (2, 3), "is_causal": True}, {"window": (2, 0)}),
    ({"window": (2, 3), "causal": "lower_right"}, {"window": (2, 3), **LOWER_RIGHT}),
    ({"softcap": 0.7}, {"softcap": 0.7}),
    ({"softcap": 0.0}, {}),
    ({"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES}),
    ({"alibi_slopes": torch.stack([SLOPES, -SLOPES])}, {"alibi_slopes": torch.stack([SLOPES, -SLOPES])}),
    ({"alibi_slopes": SLOPES, "causal": "lower_right"}, {"alibi_slopes": SLOPES, **LOWER_RIGHT}),
    ({"lengths_k": [3, 7]}, {"lengths_k": [3, 7]}),
    ({"lengths_q": [5, 0], "lengths_k": [0, 4]}, {"lengths_q": [5, 0], "lengths_k": [0, 4]}),
    ({"lengths_q": torch.tensor([2, 5]), "lengths_k": [6, 1], "causal": "lower_right"},
     {"lengths_q": [2, 5], "lengths_k": [6, 1], **LOWER_RIGHT}),
    ({"attn_mask": ALLOWED, "causal": "lower_right"}, {"mask": ALLOWED, **LOWER_RIGHT}),
    ({"softcap": 0.7, "scale": 1.3, "window": (4, 1), "lengths_k": [3, 7], "alibi_slopes": SLOPES},
     {"softcap": 0.7, "scale": 1.3, "window": (4, 1), "lengths_k": [3, 7], "alibi_slopes": SLOPES}),
]  # fmt: skip


@both_routes
@pytest.mark.parametrize(
    ("options", "specified"), BEYOND, ids=[" ".join(o) + f" {i}" for i, (o, _) in enumerate(BEYOND)]
)
@pytest.mark.parametrize("heads", [4, 2])
def test_beyond_torch(options, specified, heads):
    q, k, v = make(2, 4, 5, 8), make(2, heads, 7, 8), make(2, heads, 7, 3)
    specified = {name: o.double().numpy() if name == "alibi_slopes" else o for name, o in specified.items()}
    found = sdpa(q, k, v, enable_gqa=True, return_lse=True, **options)
    assert_close([*found, *gradients(found, (q, k, v))], by_reference(q, k, v, **specified))
    if "attn_mask" not in options:
        mask = make(1, 4, 1, 7)
        found = sdpa(q, k, v, mask, enable_gqa=True, return_lse=True, **_without_is_causal(options))
        assert_close([*found, *gradients(found, (q, k, v, mask))], by_reference(q, k, v, mask, **specified))


def _without_is_causal(options):
    return {**options, "causal": "upper_left"} | {"is_causal": False} if options.get("is_causal") else options


@both_routes
def test_lengths_read_no_padding():
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    q[0, :, 3:], k[1, :, 2:], v[1, :, 2:] = math.nan, math.nan, math.inf
    for t in (q, k, v):
        t.requires_grad_()
    out, lse = sdpa(q, k, v, lengths_q=[3, 5], lengths_k=[7, 2], return_lse=True)
    assert out.isfinite().all()
    assert (out[0, :, 3:] == 0).all()
    assert (lse[0, :, 3:] == -math.inf).all()
    dq, dk, dv = gradients([out, lse], (q, k, v))
    assert all(g.isfinite().all() for g in (dq, dk, dv))
    for padding in (dq[0, :, 3:], dk[1, :, 2:], dv[1, :, 2:]):
        assert (padding == 0).all()


@both_routes
@pytest.mark.parametrize("options", [{}, {"causal": "lower_right"}, {"window": (1, 1)}, {"alibi_slopes": SLOPES}])
@pytest.mark.parametrize("batched", [False, True])
def test_packed(options, batched):
    """Each sequence as if it were alone."""
    lengths_q, lengths_k = [3, 0, 5, 1, 2], [4, 2, 5, 0, 1]
    q, k, v = make(4, sum(lengths_q), 8), make(2, sum(lengths_k), 8), make(2, sum(lengths_k), 3)
    cu_q, cu_k = ([0, *itertools.accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    inputs = [t.unsqueeze(0) for t in (q, k, v)] if batched else (q, k, v)
    options = {**options, "enable_gqa": True, "return_lse": True}
    out, lse = sdpa(*inputs, cu_seqlens_q=cu_q, cu_seqlens_k=torch.tensor(cu_k), **options)
    parts = [
        sdpa(q[None, :, a:b], k[None, :, c:d], v[None, :, c:d], **options)
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)
    ]
    wanted = [torch.cat(part, 2) for part in zip(*parts, strict=True)]
    if not batched:
        wanted = [part.squeeze(0) for part in wanted]
    assert_close([out, lse], wanted)
    assert_close(gradients([out, lse], (q, k, v)), gradients(wanted, (q, k, v)))


# ---- dropout


def test_philox_in_torch():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        counter = [int(c) for c in torch.randint(2**32, (3,), generator=generator)]
        found = formula.philox(torch.tensor(seed), *map(torch.tensor, counter))
        wanted = philox4x32(np.array([*counter, 0]), (seed & 0xFFFFFFFF, seed >> 32))
        assert list(map(int, found)) == wanted.tolist()


@both_routes
def test_dropout():
    q, k, v, mask = make(2, 4, 5, 8), make(2, 2, 7, 8), make(2, 2, 7, 3), make(5, 1)
    options = {"dropout_p": 0.3, "enable_gqa": True, "return_lse": True}
    torch.manual_seed(5)
    found = sdpa(q, k, v, mask, **options)
    torch.manual_seed(5)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    wanted = by_reference(q, k, v, mask, dropout_p=0.3, seed=seed)
    assert_close([*found, *gradients(found, (q, k, v, mask))], wanted)
    torch.manual_seed(5)
    assert torch.equal(sdpa(q, k, v, mask, **options)[0], found[0])
    assert not torch.equal(sdpa(q, k, v, mask, **options)[0], found[0])


@both_routes
def test_dropout_of_packed_and_padded_batches_is_the_same():
    q, k, v = make(3, 7, 8), make(3, 9, 8), make(3, 9, 8)
    padded = [torch.zeros(2, 3, n, 8, dtype=torch.float64) for n in (4, 6, 6)]
    for whole, part, (cut, end) in zip(padded, (q, k, v), ((4, 7), (3, 9), (3, 9)), strict=True):
        whole[0, :, :cut], whole[1, :, : end - cut] = part[:, :cut].detach(), part[:, cut:].detach()
    torch.manual_seed(5)
    out = sdpa(*padded, dropout_p=0.4, lengths_q=[4, 3], lengths_k=[3, 6])
    torch.manual_seed(5)
    packed = sdpa(q, k, v, dropout_p=0.4, cu_seqlens_q=[0, 4, 7], cu_seqlens_k=[0, 3, 9])
    assert_close(packed, torch.cat((out[0], out[1, :, :3]), 1))


@both_routes
def test_dropout_of_everything_and_of_nothing():
    q, k, v = make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8)
    for options in ({}, {"return_lse": True}):
        out = sdpa(q, k, v, dropout_p=1.0, **options)
        out = out[0] if options else out
        assert (out == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    torch.manual_seed(3)
    out = sdpa(q, k, v, dropout_p=0.5)
    for same in (torch.tensor(0.5), np.float32(0.5)):
        torch.manual_seed(3)
        assert torch.equal(sdpa(q, k, v, dropout_p=same), out)
    assert_close(sdpa(q, k, v, scale=torch.tensor(2), causal="upper_left"), sdpa(q, k, v, scale=2.0, is_causal=True))
    before = torch.get_rng_state()
    assert_close(sdpa(q, k, v, dropout_p=0), sdpa(q, k, v))
    assert torch.equal(torch.get_rng_state(), before)


@both_routes
def test_dropout_keeps_the_mean():
    q = torch.zeros(8, 4, 63, 1)
    k, v = torch.zeros(8, 4, 65, 1), torch.ones(8, 4, 65, 1)
    torch.manual_seed(0)
    out = sdpa(q, k, v, dropout_p=0.25, causal="upper_left", window=(None, None))
    count = torch.arange(1, 64) * 32
    error = (out.mean((0, 1, 3)) - 1).abs() * count.sqrt() / (0.25 / 0.75) ** 0.5
    assert error.max() < 5  # standard deviations

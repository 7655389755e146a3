"""The attention kernels against the formula in float64 (longdouble for float64), with torch's SDPA as the yardstick."""

from __future__ import annotations

import itertools

import attention_formula
import pytest
import torch
from attention_formula import DTYPES, NAMES, check, heads, make, ours, philox
from torch.nn.functional import scaled_dot_product_attention

native = pytest.importorskip("fastseq.backends.native", reason="the extension is not built")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- sizes

SIZES = (1, 7, 63, 65, 127, 129, 1000)
DIMS = (1, 8, 40, 64, 80, 96, 128, 256)


@each_dtype
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("S", SIZES)
def test_self_attention(S, D, dtype):
    if dtype == torch.float64 and S * D > 127 * 128:
        pytest.skip("longdouble would take seconds; the same code serves float32")
    for right in (None, 0):
        check(*make(1, 2, 2, S, S, D, D, dtype, right=right))


@each_dtype
@pytest.mark.parametrize("lower_right", [False, True], ids=["upper_left", "lower_right"])
@pytest.mark.parametrize(("L", "S"), [(1, 65), (3, 1000), (7, 3), (63, 129), (129, 63), (200, 7), (20, 600)])
def test_cross_attention(L, S, lower_right, dtype):
    check(*make(2, 2, 1, L, S, 24, 40, dtype))
    check(*make(2, 2, 1, L, S, 24, 40, dtype, right=0, lower_right=lower_right))


@each_dtype
@pytest.mark.parametrize(("D", "E"), [(8, 64), (65, 7), (40, 1), (17, 33)])
def test_values_of_another_width(D, E, dtype):
    for L in (2, 70):
        check(*make(2, 3, 3, L, 65, D, E, dtype))


@each_dtype
@pytest.mark.parametrize(("N", "Nk"), [(4, 1), (6, 2), (32, 2)])
def test_grouped_queries(N, Nk, dtype):
    for L in (1, 3, 65):
        check(*make(2, N, Nk, L, 129, 16, 16, dtype, right=0, lower_right=True))


# ---- masks


@each_dtype
@pytest.mark.parametrize("window", [(0, 0), (5, 3), (64, 0), (None, 7), (100, None), (-2, 9), (3, -3)])
def test_window(window, dtype):
    left, right = window
    for L, S, lower_right in ((2, 300, True), (129, 129, False), (65, 200, True), (200, 65, False)):
        check(*make(1, 2, 2, L, S, 16, 16, dtype, left=left, right=right, lower_right=lower_right))


@each_dtype
def test_lengths(dtype):
    q_lengths, k_lengths = torch.tensor([129, 0, 64, 7]), torch.tensor([0, 300, 129, 65])
    for options in ({}, {"right": 0, "lower_right": True}, {"left": 20, "right": 4}):
        check(*make(4, 2, 1, 129, 300, 16, 24, dtype, q_lengths=q_lengths, k_lengths=k_lengths, **options))
        few = torch.tensor([1, 0, 3, 2])
        check(*make(4, 2, 1, 3, 300, 16, 24, dtype, q_lengths=few, k_lengths=k_lengths, **options))


@each_dtype
def test_boolean_mask(dtype):
    for L in (3, 129):
        for shape in ((2, 2, L, 65), (1, 1, L, 65), (2, 1, 1, 65), (1, 2, L, 1)):
            allowed = (torch.rand(shape) < 0.7).expand(2, 2, L, 65)
            check(*make(2, 2, 2, L, 65, 16, 16, dtype, allowed=allowed))
        strided = (torch.rand(65, L, 2, 2) < 0.7).permute(3, 2, 1, 0)
        check(*make(2, 2, 2, L, 65, 16, 16, dtype, allowed=strided))


@each_dtype
@pytest.mark.parametrize("shape", [(b, n, i, j) for b, n, i, j in itertools.product((0, 1), repeat=4)], ids=str)
def test_bias_and_its_gradient(shape, dtype):
    for sizes in ((3, 4, 3, 250), (2, 4, 110, 65)):
        bias_shape = tuple(size if whole else 1 for size, whole in zip(sizes, shape, strict=True))
        B, N, L, S = sizes
        inputs, options = make(B, N, 2, L, S, 16, 16, dtype, bias_shape=bias_shape)
        check(inputs, options, bias_shape)


@each_dtype
def test_alibi(dtype):
    slopes = torch.rand(2, 4)[:, :2]
    for L, lower_right in ((3, True), (129, False)):
        check(*make(2, 2, 2, L, 200, 16, 16, dtype, alibi_slopes=slopes, lower_right=lower_right))


@each_dtype
def test_softcap(dtype):
    for L in (3, 129):
        check(*make(2, 8, 2, L, 65, 16, 16, dtype, softcap=2.0, scale=1.0))
        inputs, options = make(2, 8, 2, L, 65, 16, 16, dtype, bias_shape=(1, 8, L, 65), softcap=0.7, scale=0.5, right=0)
        check(inputs, options, (1, 8, L, 65))


# ---- dropout


def test_philox_of_the_test():
    """The first and the second known answer of the paper's test vectors."""
    assert [int(word) for word in philox([0, 0, 0, 0], (0, 0))] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = 0xFFFFFFFF
    assert [int(word) for word in philox([ones] * 4, (ones, ones))] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@each_dtype
def test_dropout(dtype):
    for L, S in ((2, 300), (129, 65), (100, 1000)):
        for options in ({}, {"left": 30, "right": 11, "lower_right": True}):
            check(*make(1, 2, 1, L, S, 16, 16, dtype, dropout_p=0.3, seed=0x123456789ABCDEF0, **options))


def test_everything_at_once():
    B, N, L, S = 3, 4, 130, 150
    options = {
        "softcap": 3.0,
        "left": 70,
        "right": 20,
        "lower_right": True,
        "q_lengths": torch.tensor([130, 61, 0]),
        "k_lengths": torch.tensor([149, 150, 3]),
        "alibi_slopes": torch.rand(B, N) / 8,
        "dropout_p": 0.2,
        "seed": 2**63 - 5,
        "allowed": (torch.rand(B, 1, L, S) < 0.8).expand(B, N, L, S),
    }
    for dtype in DTYPES:
        inputs, keywords = make(B, N, 2, L, S, 20, 12, dtype, bias_shape=(1, N, L, S), **options)
        check(inputs, keywords, (1, N, L, S))


def test_a_wrong_result_is_seen(monkeypatch):
    """The comparison is not blind: a gradient off by 1e-5 fails, and so does a window of one key less."""
    inputs, options = make(1, 1, 1, 65, 65, 16, 16, torch.float32, right=0)
    original, results = ours, ours(inputs, options)
    results["dk"][0, 0, 3, 2] += 1e-5
    monkeypatch.setattr(attention_formula, "ours", lambda *_: results)
    with pytest.raises(AssertionError, match="Verdict"):
        check(inputs, options)
    results = original(inputs, options | {"left": 63})
    with pytest.raises(AssertionError, match="Verdict"):
        check(inputs, options)


# ---- values that are not ordinary


@each_dtype
@pytest.mark.parametrize("L", [2, 65])
def test_large_scores(L, dtype):
    """exp of a score far below the largest is 0, not a small number: 1000 keys of it would weigh."""
    q, k, v = (heads(1, 2, rows, 16, dtype) for rows in (L, 1000, 1000))
    k = k * 0
    k[:, :, 500, 0], q[..., 0] = 1, 1
    out, lse = native.attention_forward(q, k, v, scale=1000.0, return_lse=True)
    assert torch.equal(out, v[:, :, 500:501].expand_as(out))
    assert (lse == 1000).all()
    check(*make(3, 8, 8, L, 300, 16, 16, dtype, scale=4.0))


@each_dtype
@pytest.mark.parametrize("L", [2, 65])
def test_masked_rows(L, dtype):
    """A query that sees nothing: 0, -inf, no gradient."""
    inputs, options = make(1, 1, 1, L, 129, 16, 16, dtype)
    allowed = torch.ones(1, 1, L, 129, dtype=torch.bool)
    allowed[:, :, 1] = False
    bias = torch.zeros(1, 1, L, 129, dtype=dtype).masked_fill(~allowed, -torch.inf)
    for mask in ({"allowed": allowed}, {"bias": bias}):
        results = ours(inputs, options | mask, bias.shape if "bias" in mask else None)
        assert (results["out"][:, :, 1] == 0).all()
        assert (results["lse"][:, :, 1] == -torch.inf).all()
        assert (results["dq"][:, :, 1] == 0).all()
        assert all(t.isfinite().all() for name, t in results.items() if name != "lse")


@pytest.mark.parametrize("L", [2, 65])
@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(L, name, value):
    """NaN and inf come out where torch has them."""
    (q, k, v, dout, _), options = make(1, 1, 1, L, 129, 16, 16, torch.float32, bias_shape=(1, 1, L, 129))
    tensors = {"q": q, "k": k, "v": v, "bias": options.pop("bias").clone()}
    tensors[name][0, 0, 1, 3] = value
    bias = tensors.pop("bias")
    inputs = *tensors.values(), dout, torch.zeros(1, 1, L)
    results = ours(inputs, options | {"bias": bias}, bias.shape)
    leaves = [t.requires_grad_() for t in (*tensors.values(), bias)]
    expected = scaled_dot_product_attention(*leaves[:3], attn_mask=leaves[3])
    gradients = torch.autograd.grad(expected, leaves, dout)
    assert torch.equal(results["out"].isnan(), expected.isnan())
    if value is not torch.inf:  # torch's backward of an infinite score depends on the kernel it takes
        for n, g in zip(NAMES, gradients, strict=True):
            assert torch.equal(results[n].isnan(), g.isnan()), n


@pytest.mark.parametrize("L", [2, 129])
def test_padding_is_not_read(L):
    lengths = torch.tensor([3, 40])
    inputs, options = make(2, 2, 2, L, 129, 16, 16, torch.float32, k_lengths=lengths)
    expected = ours(inputs, options)
    for b, length in enumerate(lengths):
        inputs[1][b, :, length:] = inputs[2][b, :, length:] = torch.nan
    for name, result in ours(inputs, options).items():
        assert torch.equal(result, expected[name]), name


# ---- the same bits


@pytest.mark.parametrize(
    "sizes", [(1, 2, 2, 300, 300), (3, 5, 5, 130, 70), (2, 32, 8, 1, 2000), (1, 4, 1, 4, 3000), (9, 4, 2, 33, 33)]
)
def test_any_number_of_threads(sizes, threads):
    bias_shape = 1, sizes[1], 1, sizes[4]
    for dtype in DTYPES:
        inputs, options = make(*sizes, 64, 64, dtype, bias_shape=bias_shape, right=0, lower_right=True, dropout_p=0.1)
        threads(1)
        expected = ours(inputs, options, bias_shape)
        for count in (2, 3, 4):
            threads(count)
            for name, result in ours(inputs, options, bias_shape).items():
                assert torch.equal(result, expected[name]), (name, count)

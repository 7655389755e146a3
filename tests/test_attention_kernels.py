"""The attention kernels by the error rule: verify's comparison, over more shapes; and what no comparison sees."""

from __future__ import annotations

import functools
import itertools
import subprocess
from dataclasses import replace

import attention_checks
import cases
import pytest
import torch
from attention_calls import bias_of, each_bias, heads, make, run
from cases import DTYPES, each_dtype

from fastseq.ops import Attention
from fastseq.tools.verify import attention
from fastseq.tools.verify.attention import Case, kernel_results

native = pytest.importorskip("fastseq.backends.native", reason="the extension is not built")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


check = functools.partial(attention_checks.check, native)


# ---- sizes

SIZES = (1, 7, 63, 65, 127, 129, 193, 1000)
DIMS = (1, 8, 40, 64, 80, 96, 128, 256)


# In float64 the small ones only: for the large ones longdouble would take seconds, and the same code serves float32.
SELF_ATTENTION = {
    f"{S}-{D}-{str(dtype).removeprefix('torch.')}": (S, D, dtype)
    for S, D, dtype in itertools.product(SIZES, DIMS, DTYPES)
    if dtype != torch.float64 or S * D <= 127 * 128
}


@pytest.mark.parametrize(("S", "D", "dtype"), SELF_ATTENTION.values(), ids=SELF_ATTENTION)
def test_self_attention(S, D, dtype):
    for options in ({}, {"is_causal": True, "lse": True}):
        check(Case(1, 2, 2, S, S, D, D, **options), dtype)


@each_dtype
@pytest.mark.parametrize("lower_right", [False, True], ids=["upper_left", "lower_right"])
@pytest.mark.parametrize(("L", "S"), [(1, 65), (3, 1000), (7, 3), (63, 129), (129, 63), (200, 7), (20, 600)])
def test_cross_attention(L, S, lower_right, dtype):
    check(Case(2, 2, 1, L, S, 24, 40), dtype)
    check(Case(2, 2, 1, L, S, 24, 40, is_causal=True, lower_right=lower_right), dtype)


@each_dtype
@pytest.mark.parametrize(("D", "E"), [(8, 64), (65, 7), (40, 1), (17, 33)])
def test_values_of_another_width(D, E, dtype):
    for L in (2, 70):
        check(Case(2, 3, 3, L, 65, D, E), dtype)


@each_dtype
@pytest.mark.parametrize(("N", "Nk"), [(4, 1), (6, 2), (32, 2)])
def test_grouped_queries(N, Nk, dtype):
    for L in (1, 3, 65):
        check(Case(2, N, Nk, L, 129, 16, 16, is_causal=True, lower_right=True), dtype)


# ---- masks


@each_dtype
@pytest.mark.parametrize("window", [(0, 0), (5, 3), (64, 0), (None, 7), (100, None), (-2, 9), (3, -3)])
def test_window(window, dtype):
    for L, S, lower_right in ((2, 300, True), (129, 129, False), (65, 200, True), (200, 65, False)):
        check(Case(1, 2, 2, L, S, 16, 16, window=window, lower_right=lower_right), dtype)


@each_dtype
def test_lengths(dtype):
    keys = torch.tensor([0, 300, 129, 65])
    for queries in ([129, 0, 64, 7], [1, 0, 3, 2]):
        plain = Case(4, 2, 1, max(queries), 300, 16, 24, lengths="qk")
        lengths = {"lengths_q": torch.tensor(queries), "lengths_k": keys}
        check(plain, dtype, **lengths)
        check(replace(plain, is_causal=True, lower_right=True, lse=True), dtype, **lengths)
        check(replace(plain, window=(20, 4)), dtype, **lengths)


@each_dtype
def test_boolean_mask(dtype):
    for L in (3, 129):
        for axes in ("BNLS", "LS", "BS", "NL"):
            check(Case(2, 2, 2, L, 65, 16, 16, bool_mask=axes), dtype)
        strided = (torch.rand(65, L, 2, 2) < 0.7).permute(3, 2, 1, 0)
        check(Case(2, 2, 2, L, 65, 16, 16, bool_mask="BNLS"), dtype, allowed=strided)


@each_dtype
@each_bias
def test_bias_and_its_gradient(whole, dtype):
    for sizes in ((3, 4, 3, 250), (2, 4, 110, 65)):
        B, N, L, S = sizes
        bias = bias_of(whole, sizes).to(dtype)
        check(Case(B, N, 2, L, S, 16, 16, float_mask="BNLS"), dtype, bias=bias)


@each_bias
def test_gradient_of_a_bias_where_little_is_seen(whole):
    """Tiles that begin and end anywhere, rows and keys that nothing is seen of: 0 there, whatever was in memory."""
    sizes = 3, 4, 110, 430
    plain = Case(3, 4, 2, 110, 430, 16, 16, float_mask="BNLS", lengths="qk")
    lengths = {"lengths_q": torch.tensor([110, 0, 65]), "lengths_k": torch.tensor([0, 430, 250])}
    for options in ({}, {"window": (60, 10), "lower_right": True}, {"is_causal": True, "softcap": 2.0, "lse": True}):
        check(replace(plain, **options), torch.float32, bias=bias_of(whole, sizes), **lengths)


@each_dtype
def test_alibi(dtype):
    slopes = torch.rand(2, 4)[:, :2]
    for L, lower_right in ((3, True), (129, False)):
        check(Case(2, 2, 2, L, 200, 16, 16, alibi=True, lower_right=lower_right), dtype, alibi_slopes=slopes)


@each_dtype
def test_softcap(dtype):
    for L in (3, 129):
        check(Case(2, 8, 2, L, 65, 16, 16, softcap=2.0, logits=4.0), dtype)
        check(Case(2, 8, 2, L, 65, 16, 16, float_mask="NLS", softcap=0.7, logits=2.0, is_causal=True), dtype)


@each_dtype
def test_dropout(dtype):
    for L, S in ((2, 300), (129, 65), (100, 1000)):
        for options in ({}, {"window": (30, 11), "lower_right": True}):
            check(Case(1, 2, 1, L, S, 16, 16, dropout_p=0.3, **options), dtype)


@each_dtype
def test_everything_at_once(dtype):
    case = Case(
        3, 4, 2, 130, 150, 20, 12, bool_mask="BLS", float_mask="NLS", lower_right=True, window=(70, 20), lengths="qk",
        softcap=3.0, alibi=True, dropout_p=0.2, lse=True,
    )  # fmt: skip
    check(case, dtype, lengths_q=torch.tensor([130, 61, 0]), lengths_k=torch.tensor([149, 150, 3]))


def test_a_wrong_result_is_seen(monkeypatch):
    """The comparison is not blind: a gradient off by 1e-5 fails, and so does a window of one key less."""
    case = Case(1, 1, 1, 65, 65, 16, 16, is_causal=True)
    sound = native.attention_backward

    def damaged(*arguments, **options):
        gradients = sound(*arguments, **options)
        gradients[1][0, 0, 3, 2] += 1e-5
        return gradients

    with monkeypatch.context() as patch:
        patch.setattr(native, "attention_backward", damaged)
        with pytest.raises(AssertionError, match="training, .*: Verdict"):
            check(case, torch.float32)
    narrower = attention.FAMILY._replace(
        kernel_results=lambda native, case, *rest: kernel_results(native, replace(case, window=(63, None)), *rest)
    )
    with pytest.raises(AssertionError, match="inference, .*: Verdict"):
        cases.check(narrower, native, case, torch.float32)


# ---- values that are not ordinary


@each_dtype
@pytest.mark.parametrize("L", [2, 65])
def test_large_scores(L, dtype):
    """exp of a score far below the largest is 0, not a small number: 1000 keys of it would weigh."""
    q, k, v = (heads(1, 2, rows, 16, dtype) for rows in (L, 1000, 1000))
    k = k * 0
    k[:, :, 500, 0], q[..., 0] = 1, 1
    out, lse = native.attention_forward(Attention(1000.0), q, k, v, return_lse=True)
    assert torch.equal(out, v[:, :, 500:501].expand_as(out))
    assert (lse == 1000).all()
    check(Case(3, 8, 8, L, 300, 16, 16, logits=16.0), dtype)


@each_dtype
@pytest.mark.parametrize("L", [2, 65])
def test_masked_rows(L, dtype):
    attention_checks.masked_rows(native, L, dtype)


@pytest.mark.parametrize("L", [2, 65])
@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(L, name, value):
    attention_checks.not_finite(native, L, name, value)


@each_dtype
@pytest.mark.parametrize("L", [2, 65, 150])
@pytest.mark.parametrize("options", [{}, {"right": 0}, {"left": 20, "right": 3}], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scratch_memory_is_not_read(softcap, options, L, dtype):
    """It comes back from call to call, so a call full of NaN must leave no trace in the next."""
    bias_shape = 1, 2, L, 129
    inputs, options = make(2, 2, 2, L, 129, 16, 16, dtype, bias_shape=bias_shape, softcap=softcap, **options)
    for isa in native.isas():
        with native.use_isa(isa):
            results = []
            for value in (0.0, torch.nan):
                run([torch.full_like(t, value) for t in inputs], options)
                results.append(run(inputs, options))
            for name, result in results[1].items():
                assert torch.equal(result, results[0][name]), (isa, name)


# ---- pairs of bfloat16, which not every machine multiplies


def test_pairs_agree_with_float32(build_check):
    result = subprocess.run([build_check("pairs_check")], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "")


# ---- the same bits


@pytest.mark.parametrize(
    "sizes", [(1, 2, 2, 300, 300), (3, 5, 5, 130, 70), (2, 32, 8, 1, 2000), (1, 4, 1, 4, 3000), (9, 4, 2, 33, 33)]
)
def test_any_number_of_threads(sizes, threads):
    bias_shape = 1, sizes[1], 1, sizes[4]
    for dtype in DTYPES:
        inputs, options = make(*sizes, 64, 64, dtype, bias_shape=bias_shape, right=0, lower_right=True, dropout_p=0.1)
        threads(1)
        expected = run(inputs, options)
        for count in (2, 3, 4):
            threads(count)
            for name, result in run(inputs, options).items():
                assert torch.equal(result, expected[name]), (name, count)


@each_bias
@pytest.mark.parametrize("sizes", [(2, 4, 1, 200, 400), (1, 6, 3, 300, 200), (6, 4, 4, 130, 70), (9, 4, 2, 33, 33)])
def test_gradient_of_a_bias_on_any_number_of_threads(sizes, whole, threads):
    """Items of one head and of many, that meet in the same rows of the gradient; more threads than cores as well."""
    B, N, _, L, S = sizes
    bias_shape = bias_of(whole, (B, N, L, S)).shape
    inputs, options = make(*sizes, 32, 32, torch.float32, bias_shape=bias_shape, left=150, lower_right=True)
    threads(1)
    expected = run(inputs, options)
    for count in (2, 3, 4, 16):
        threads(count)
        for _ in range(3):
            for name, result in run(inputs, options).items():
                assert torch.equal(result, expected[name]), (name, count)

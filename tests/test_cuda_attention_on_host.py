"""The attention kernels of csrc/cuda, compiled by g++ and run on the CPU as in test_cuda_on_host.py: the comparison of
`fastseq verify`, and what must hold of every backend.
"""

from dataclasses import replace
from functools import partial

import attention_checks
import pytest
import torch
from attention_calls import NAMES, arguments, bias_of, each_bias, each_option, make, run
from cases import CUDA_DTYPES, each_cuda_dtype
from models import assert_close
from sdpa_calls import decoding_agrees, multihead_agrees, samples_agree

from fastseq import backends
from fastseq.ops import Attention
from fastseq.ops.attention.function import attend
from fastseq.tools.verify.attention import Case

if backends.select("attention") is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

from fastseq.backends import cuda

check = partial(attention_checks.check, cuda)

# Within a tile and beyond it, one and many, groups of heads, values of another size.
SHAPES = {
    torch.float32: ((1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 7, 33, 8, 8), (1, 2, 1, 65, 7, 33, 65), (2, 4, 2, 33, 65, 20, 12)),
    torch.float64: ((2, 2, 1, 33, 35, 5, 7),),
    torch.bfloat16: ((2, 2, 1, 33, 65, 5, 7),),
    torch.float16: ((2, 2, 2, 65, 7, 7, 5),),
}


@pytest.fixture(autouse=True)
def on_host(cuda_on_host):
    torch.manual_seed(0)
    with cuda.use_emulation(cuda_on_host):
        yield


@each_cuda_dtype
@each_option
def test_every_option(options, dtype):
    for shape in SHAPES[dtype]:
        check(Case(*shape, **options), dtype)


@each_cuda_dtype
def test_sizes_about_a_tile(dtype):
    for S in (15, 16, 31, 32, 33, 63, 64):
        check(Case(1, 1, 1, S, S + 1, 3, 2), dtype)


@pytest.mark.parametrize(("D", "E"), [(31, 33), (64, 128), (129, 63), (65, 257)])
def test_widths(D, E):
    """Below and above the columns that a thread block holds, and a block of columns with little to do."""
    for dtype in (torch.float32, torch.float64):
        check(Case(1, 1, 1, 7, 9, D, E), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@each_bias
def test_bias_and_its_gradient(whole, dtype):
    sizes = (2, 2, 33, 35) if dtype == torch.float64 else (3, 4, 3, 66) if len(whole) % 2 else (2, 4, 66, 7)
    bias = bias_of(whole, sizes).to(dtype)
    B, N, L, S = sizes
    check(Case(B, N, 2, L, S, 5, 3, float_mask="BNLS", lengths="qk", lse=True), dtype, bias=bias)


@pytest.mark.parametrize("window", [(0, 0), (5, 3), (None, 7), (20, None), (-2, 9), (3, -3)])
def test_window(window):
    for L, S, lower_right in ((2, 70, True), (33, 65, False), (65, 33, True)):
        check(Case(1, 4, 2, L, S, 4, 4, window=window, lower_right=lower_right), torch.float32)


@each_cuda_dtype
@pytest.mark.parametrize(("N", "L", "S"), [(1, 1, 1000), (8, 1, 515), (2, 5, 600), (1, 33, 600)])
def test_parts_of_the_keys(N, L, S, dtype):
    """Few rows against many keys: the results of several blocks are merged."""
    plain = Case(2, N, 1, L, S, 5, 7)
    options = ({}, {"float_mask": "BS", "lengths": "k", "is_causal": True, "lower_right": True}, {"dropout_p": 0.3})
    for option in options if dtype == torch.float32 else options[1:2]:
        check(replace(plain, **option), dtype)


def test_lengths():
    keys = torch.tensor([0, 70, 33, 65])
    for queries in ([33, 0, 31, 7], [1, 0, 3, 2]):
        plain = Case(4, 2, 1, max(queries), 70, 5, 3, lengths="qk")
        lengths = {"lengths_q": torch.tensor(queries), "lengths_k": keys}
        for options in ({}, {"is_causal": True, "lower_right": True, "lse": True}, {"window": (20, 4)}):
            check(replace(plain, **options), torch.float32, **lengths)


def test_large_scores():
    for logits in (16.0, 60.0):
        for dtype in CUDA_DTYPES:
            check(Case(1, 2, 1, 33, 130, 16, 16, logits=logits), dtype)


@pytest.mark.parametrize("L", [2, 65])
def test_rows_out_of_the_ordinary(L):
    attention_checks.masked_rows(cuda, L, torch.float32)
    for name in ("q", "k", "v", "bias"):
        for value in (torch.nan, torch.inf):
            attention_checks.not_finite(cuda, L, name, value)
    attention_checks.lse_of_padding(cuda, L)


def test_layouts():
    for L in (2, 65):
        attention_checks.strides(cuda, L, torch.float32)
    attention_checks.output_into_a_view(cuda)
    attention_checks.packed_batch(cuda, 3, torch.float16)
    attention_checks.packed_batch(cuda, 129, torch.bfloat16)
    attention_checks.rows_of_no_sequence_are_zero(cuda)
    attention_checks.only_the_gradients_that_are_needed(cuda)


def test_what_must_not_reach_a_kernel():
    for name in attention_checks.BAD_ARGUMENTS:
        if name != "q dtype":  # float16, which these kernels have
            attention_checks.bad_arguments(cuda, name)
    for name in attention_checks.BAD_GRADIENTS:
        if name != "out shape":  # these kernels do not read it
            attention_checks.bad_gradients(cuda, name)
    attention_checks.options_of_another_type(cuda)


def test_any_order_of_threads(monkeypatch):
    """A race between two barriers that shows in the results shows as a difference."""
    for sizes in ((1, 4, 2, 34, 66, 5, 70), (1, 4, 1, 2, 600, 5, 7)):
        for dtype in (torch.float32, torch.float64):
            bias_shape = 1, sizes[1], 1, sizes[4]
            inputs, options = make(*sizes, dtype, bias_shape=bias_shape, right=0, lower_right=True, dropout_p=0.1)
            results = []
            for order in ("rising", "falling"):
                monkeypatch.setenv("EMULATION_ORDER", order)
                results.append(run(inputs, options, cuda))
            for name, result in results[1].items():
                assert torch.equal(result, results[0][name]), name


def test_behind_autograd():
    """The function that calls go through: its gradients are the CPU kernels', to the last bits."""
    (q, k, v, dout, dlse), _ = make(2, 4, 2, 9, 11, 6, 5, torch.float64)
    bias, slopes = torch.randn(4, 9, 11, dtype=torch.float64)[None], torch.rand(2, 4)
    call = Attention(0.4, softcap=3.0, right=0, lengths_k=torch.tensor([11, 4]), alibi_slopes=slopes)
    results = []
    for backend in (cuda, backends.select("attention")):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, bias)]
        out, lse = attend(call, backend, *leaves, None, want_lse=True)
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))])
    assert_close(*results, "float64, the same sums")


# ---- what people call


@pytest.fixture
def called(monkeypatch):
    """Sends calls on tensors of the CPU to the emulation. Returns the names of the functions that were called."""
    for select in ("select", "select_for"):
        monkeypatch.setattr(backends, select, lambda op, *_: cuda if op in cuda.SERVES else None)
    names = []

    def record(name):
        run = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *args, **kwargs: names.append(name) or run(*args, **kwargs))

    record("attention_forward")
    record("attention_backward")
    return names


def test_samples_of_torch(called):
    samples_agree("cpu")
    assert called.count("attention_backward") > 10


@each_cuda_dtype
def test_decoding_with_a_cache(called, dtype):
    decoding_agrees(dtype, "cpu")
    assert called == ["attention_forward"] * 7


def test_multihead_attention(called):
    multihead_agrees("cpu")
    assert called.count("attention_backward") == 3


def test_a_wrong_result_is_seen(monkeypatch):
    sound = cuda.attention_backward

    def damaged(*arguments, **options):
        gradients = sound(*arguments, **options)
        gradients[NAMES.index("dk")][0, 0, 3, 2] += 1e-5
        return gradients

    monkeypatch.setattr(cuda, "attention_backward", damaged)
    with pytest.raises(AssertionError, match="Verdict"):
        check(Case(1, 1, 1, 33, 33, 5, 5, is_causal=True), torch.float32)


def test_unknown_keywords():
    (q, *inputs), options = make(1, 1, 1, 2, 3, 4, 4, torch.float32)
    call = arguments((q, *inputs), options)
    out, lse = cuda.attention_forward(*call, return_lse=True)
    for unknown in ({"is_causal": True}, {"delta": None}, {"dq": q}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(unknown))}'"):
            cuda.attention_forward(*call, **unknown)
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(unknown))}'"):
            cuda.attention_backward(*call, out, lse, q, None, (True,) * 4, **unknown)

"""The attention kernels on a GPU: the comparison of `fastseq verify` with torch's own attention on the GPU beside them,
and what only a GPU has: streams, devices, graphs, TF32. Where there is none, test_cuda_attention_on_host.py is what can
be shown.
"""

import cases
import numpy as np
import pytest
import torch
from attention_calls import arguments, bias_of, each_bias, each_option, make
from cases import CUDA_DTYPES, each_cuda_dtype
from cuda_device import DEVICE, cuda, ignore_first_use, tf32
from sdpa_calls import decoding_agrees, multihead_agrees, samples_agree
from torch.autograd import gradcheck

import fastseq
from fastseq import backends
from fastseq.tools.verify import attention
from fastseq.tools.verify.attention import Case

sdpa = fastseq.scaled_dot_product_attention
pytestmark = ignore_first_use
# What a call may ask for, none of which waits for the GPU or copies to it.
CALLS = (
    {"is_causal": True},
    {"causal": "lower_right", "window": (20, None), "softcap": 3.0, "return_lse": True},
    {"dropout_p": 0.2},
    {"attn_mask": (1, 4, 1, 70), "enable_gqa": True},
)


@pytest.fixture(autouse=True)
def exact_products():
    """Without TF32 in what torch computes, whatever ran before."""
    assert backends.select("attention", "cuda") is cuda
    torch.manual_seed(0)
    with tf32(False):
        yield


def check(case, dtype, seed=0, **replaced):
    inference, training = cases.check(
        attention.FAMILY, cuda, case, dtype, seed=seed, device=DEVICE, trust_torch=True, **replaced
    )
    assert np.array_equal(inference.results["out"], training.results["out"]), str(case)


@each_cuda_dtype
def test_every_case(dtype):
    for seed, case in enumerate(attention.cases(str(dtype).removeprefix("torch."))):
        check(case, dtype, seed)


@each_cuda_dtype
@each_option
def test_odd_sizes(options, dtype):
    """Also what bench/cuda_check.sh runs under compute-sanitizer."""
    for shape in ((1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 33, 65, 20, 12), (1, 2, 1, 65, 7, 33, 65), (1, 8, 1, 2, 600, 5, 7)):
        check(Case(*shape, **options), dtype)


@each_cuda_dtype
@pytest.mark.parametrize("D", [1, 8, 16, 40, 64, 80, 96, 128, 129, 192, 256, 300])
def test_widths(D, dtype):
    for S in (1, 63, 129):
        check(Case(1, 2, 2, S, S, D, D, is_causal=True), dtype)
    check(Case(1, 2, 1, 65, 70, D, 24), dtype)
    check(Case(1, 2, 1, 65, 70, 24, D), dtype)


@each_cuda_dtype
def test_long(dtype):
    if dtype is torch.float64:
        pytest.skip("longdouble would take minutes; the same code serves float32")
    for options in ({}, {"is_causal": True}, {"float_mask": "NLS", "dropout_p": 0.1}):
        check(Case(1, 2, 1, 2048, 2048, 64, 128, **options), dtype)
    check(Case(1, 8, 1, 1, 16384, 128, 128, lengths="k"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_bias
def test_bias_and_its_gradient(whole, dtype):
    B, N, L, S = sizes = (3, 4, 130, 150)
    bias = bias_of(whole, sizes).to(dtype)
    check(Case(B, N, 2, L, S, 16, 16, float_mask="BNLS"), dtype, bias=bias)


def test_tf32_changes_nothing():
    q, k, v = (torch.randn(2, 4, 130, 64, device=DEVICE) for _ in range(3))
    expected = results_of(q, k, v)
    torch.backends.cuda.matmul.allow_tf32 = True  # the fixture puts it back
    assert_equal(results_of(q, k, v), expected)


# ---- through the public function


def call_of(options, dtype=torch.float32):
    """(arguments, leaves, options) of a call on the GPU."""
    inputs, _ = make(2, 4, 4 if "enable_gqa" not in options else 2, 65, 70, 33, 40, dtype)
    leaves = [t.to(DEVICE).requires_grad_() for t in inputs[:3]]
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.randn(options["attn_mask"], device=DEVICE, dtype=dtype, requires_grad=True)
        leaves.append(options["attn_mask"])
    return leaves[:3], leaves, options


def results_of(*arguments, leaves=None, **options):
    """Outputs and all gradients."""
    leaves = [t.detach().requires_grad_() for t in arguments] if leaves is None else leaves
    torch.default_generator.manual_seed(1)  # the CPU's, which dropout is seeded from; that of the GPU a capture forbids
    outputs = sdpa(*leaves[:3], **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [o.detach().cos() for o in outputs])]


def assert_equal(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", CALLS, ids=lambda options: "-".join(options))
def test_calls_take_the_kernels(options, monkeypatch):
    called = []

    def record(name):
        run = getattr(cuda, name)

        def recorded(*args, **kwargs):
            results = run(*args, **kwargs)
            called.append(name)
            return results

        monkeypatch.setattr(cuda, name, recorded)

    record("attention_forward")
    record("attention_backward")
    for dtype in CUDA_DTYPES:
        _, leaves, call = call_of(options, dtype)
        results_of(leaves=leaves, **call)
    assert called == ["attention_forward", "attention_backward"] * len(CUDA_DTYPES)


def test_samples_of_torch():
    samples_agree(DEVICE)


def test_gradcheck():
    inputs, _ = make(2, 4, 2, 5, 7, 3, 2, torch.float64)
    q, k, v = (t.to(DEVICE).requires_grad_() for t in inputs[:3])
    bias = torch.randn(4, 5, 7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    options = {"enable_gqa": True, "softcap": 2.0, "causal": "lower_right", "lengths_k": [7, 4], "return_lse": True}

    def finite(*leaves):
        out, lse = sdpa(*leaves, **options)
        return out, lse[lse.isfinite()]

    assert gradcheck(finite, (q, k, v, bias))


def test_lengths_and_packed_batches_agree():
    lengths = [5, 65, 0, 33]
    q, k, v = (torch.randn(4, 2, 65, 24, device=DEVICE) for _ in range(3))
    padded = sdpa(q, k, v, is_causal=True, lengths_q=lengths, lengths_k=torch.tensor(lengths, device=DEVICE))

    def pack(t):
        return torch.cat([row[:, :length] for row, length in zip(t, lengths, strict=True)], dim=1)

    bounds = [0, 5, 70, 70, 103]
    packed = sdpa(pack(q), pack(k), pack(v), is_causal=True, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    assert torch.equal(packed, pack(padded))


@each_cuda_dtype
def test_decoding_with_a_cache(dtype):
    decoding_agrees(dtype, DEVICE)


def test_multihead_attention():
    multihead_agrees(DEVICE)


def test_what_torch_serves():
    """Autocast, double backward and a mix of devices."""
    _, (q, k, v), _ = call_of({})
    with torch.autocast("cuda", dtype=torch.float16):
        assert sdpa(q, k, v).dtype is torch.float16
    (dq,) = torch.autograd.grad(sdpa(q, k, v).sum(), q, create_graph=True)
    assert torch.autograd.grad(dq.square().sum(), q)[0].isfinite().all()
    with pytest.raises((RuntimeError, ValueError), match="device"):
        sdpa(q, k.cpu(), v)


# ---- the same bits, streams, devices, graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_thousand_backward_passes_in_bits(dtype):
    inputs, _ = make(2, 4, 2, 200, 333, 64, 64, dtype)
    *_, dout, dlse = inputs = [t.to(DEVICE) for t in inputs]
    bias = torch.randn(1, 4, 1, 333, device=DEVICE).to(dtype)
    options = {"scale": 0.125, "bias": bias, "right": 0, "lower_right": True, "dropout_p": 0.1, "seed": 7}
    call = arguments(inputs, options)
    out, lse = cuda.attention_forward(*call, return_lse=True)

    def backward():
        return cuda.attention_backward(*call, out, lse, dout, dlse, (True,) * 4)

    expected = backward()
    for _ in range(1000):
        assert_equal(backward(), expected)


@pytest.mark.parametrize("options", CALLS, ids=lambda options: "-".join(options))
def test_another_stream(options):
    """The input is written late, on the same stream: a launch or an allocation elsewhere would see the old one."""
    _, leaves, call = call_of(options)
    expected = results_of(leaves=leaves, **call)
    q = leaves[0].detach().clone()
    stream = torch.cuda.Stream()
    for _ in range(3):
        leaves[0].data.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            leaves[0].data.copy_(q)
            results = results_of(leaves=leaves, **call)
        stream.synchronize()
        assert_equal(results, expected)


def test_nothing_waits(monkeypatch):
    """Queued behind a long sleep, all calls return before it ends."""
    calls = [call_of(options) for options in CALLS]
    for _, leaves, call in calls:
        results_of(leaves=leaves, **call)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    done.record()
    for _, leaves, call in calls:
        results_of(leaves=leaves, **call)
    assert not done.query()


def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    _, leaves, _ = call_of({})
    expected = [a.cpu() for a in results_of(leaves=leaves)]
    other = torch.device("cuda", 1)
    results = results_of(*(t.detach().to(other) for t in leaves))
    assert torch.cuda.current_device() == 0
    assert {a.device for a in results} == {other}
    assert_equal([a.cpu() for a in results], expected)


@pytest.mark.parametrize("options", CALLS, ids=lambda options: "-".join(options))
def test_graph(options):
    """Captured once, replayed on other inputs; the draws of dropout are those of the capture."""
    _, leaves, call = call_of(options)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            results_of(leaves=leaves, **call)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results_of(leaves=leaves, **call)
    for seed in range(3):
        torch.manual_seed(seed)
        for leaf in leaves:
            leaf.data.copy_(torch.randn_like(leaf))
        graph.replay()
        expected = results_of(leaves=leaves, **call)
        torch.cuda.synchronize()
        assert_equal(captured, expected)

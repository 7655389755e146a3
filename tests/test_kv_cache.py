"""KVCache, and decoding with it."""

import pytest
import torch
from models import assert_close

import fastseq

sdpa = fastseq.scaled_dot_product_attention
pytestmark = pytest.mark.usefixtures("route")


def rows(tokens, size=8, batch=3, heads=2):
    return torch.randn(batch, heads, tokens, size, dtype=torch.float64)


def make(**options):
    return fastseq.KVCache(3, 2, 8, **{"value_dim": 5, "capacity": 4, "dtype": torch.float64, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decoding_is_the_whole_sequence(dtype):
    """Token by token, and in chunks, what causal attention gives at once."""
    q, k, v = torch.randn(3, 4, 11, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 5)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    whole = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    for chunks in ([1] * 11, [4, 1, 1, 5], [11]):
        cache, outs = make(dtype=dtype), []
        for q_t, k_t, v_t in zip(*(t.split(chunks, 2) for t in (q, k, v)), strict=True):
            cache.append(k_t, v_t)
            options = {"lengths_k": cache.lengths, "causal": "lower_right", "enable_gqa": True}
            outs.append(sdpa(q_t, cache.keys, cache.values, **options))
        assert_close(torch.cat(outs, 2), whole, str(dtype).removeprefix("torch."))


def test_rows_of_their_own_lengths():
    """A batch of prompts, then tokens for some of them: each as if it were alone."""
    prompts, lengths = (rows(6), rows(6, 5)), [6, 0, 4]
    cache = make()
    cache.append(*prompts, lengths=lengths)
    assert cache.lengths.tolist() == lengths
    tokens, q = (rows(2), rows(2, 5)), rows(2, heads=4)
    cache.append(*tokens, lengths=torch.tensor([2, 1, 0]))
    assert cache.lengths.tolist() == [8, 1, 4]
    options = {"causal": "lower_right", "enable_gqa": True}
    out = sdpa(q, cache.keys, cache.values, lengths_q=[2, 1, 0], lengths_k=cache.lengths, **options)
    for b, (old, new) in enumerate(zip(lengths, [2, 1, 0], strict=True)):
        k, v = (
            torch.cat((p[b : b + 1, :, :old], t[b : b + 1, :, :new]), 2) for p, t in zip(prompts, tokens, strict=True)
        )
        assert torch.equal(cache.keys[b, :, : old + new], k[0])
        assert torch.equal(cache.values[b, :, : old + new], v[0])
        assert_close(out[b : b + 1, :, :new], sdpa(q[b : b + 1, :, :new], k, v, **options))
        assert (out[b, :, new:] == 0).all()


def test_growth():
    cache, k, v = make(), rows(9), rows(9, 5)
    for t in range(9):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert cache.capacity == 16  # 4, doubled twice
    assert torch.equal(cache.keys, k)
    assert torch.equal(cache.values, v)
    cache.grow(3)
    assert cache.capacity == 16
    cache.grow(100)
    assert cache.capacity == 100
    assert torch.equal(cache.keys, k)
    cache.append(rows(200), rows(200, 5))
    assert cache.capacity == 209


def test_reset():
    cache = make()
    empty = cache.lengths
    cache.append(rows(4), rows(4, 5))
    full = cache.lengths
    cache.reset([1])
    assert cache.lengths.tolist() == [4, 0, 4]
    assert (empty.tolist(), full.tolist()) == ([0, 0, 0], [4, 4, 4])  # who holds the lengths keeps them
    k, v = rows(1), rows(1, 5)
    cache.append(k, v)
    assert cache.lengths.tolist() == [5, 1, 5]
    assert torch.equal(cache.keys[1, :, :1], k[1])
    cache.reset(torch.tensor([0, 2]))
    assert cache.lengths.tolist() == [0, 1, 0]
    cache.reset()
    assert cache.keys.shape == (3, 2, 0, 8)
    assert (sdpa(rows(1, heads=4), cache.keys, cache.values, enable_gqa=True) == 0).all()


def test_no_gradient_passes():
    cache, k = make(value_dim=8), rows(2).requires_grad_()
    cache.append(k, k)
    assert not cache.keys.requires_grad
    with torch.inference_mode():
        cache.append(k, k)
    assert cache.lengths.tolist() == [4, 4, 4]


@pytest.mark.parametrize("capacity", [4, 8])
@pytest.mark.parametrize(("made", "grown"), [(False, True), (True, False), (True, True)])
def test_room_from_inference_mode(made, grown, capacity):
    """It is written to outside as well."""
    with torch.inference_mode(made):
        cache = make(capacity=capacity)
    with torch.inference_mode(grown):
        cache.append(rows(5), rows(5, 5))
        cache.reset([2])
    k, v = rows(1), rows(1, 5)
    cache.append(k, v)
    assert cache.capacity == 8
    assert cache.lengths.tolist() == [6, 6, 1]
    assert torch.equal(cache.keys[2, :, :1], k[2])
    q = rows(1, heads=4).requires_grad_()
    options = {"lengths_k": cache.lengths, "enable_gqa": True, "causal": "lower_right"}
    sdpa(q, cache.keys, cache.values, **options).sum().backward()


def test_wrong_arguments():
    cache = make()
    for error, message, call in [
        (TypeError, "batch must be an integer, got str", lambda: fastseq.KVCache("a", 2, 8)),
        (TypeError, "capacity must be an integer, got float", lambda: make(capacity=4.0)),
        (TypeError, "capacity must be an integer, got NoneType", lambda: cache.grow(None)),
        (TypeError, r"rows must be integers, got \[0.5\]", lambda: cache.reset([0.5])),
        (TypeError, "rows must be integers, got torch.bool", lambda: cache.reset(torch.ones(3, dtype=torch.bool))),
        (IndexError, r"rows must lie in \[-3, 2\], got \[1, 3\]", lambda: cache.reset([1, 3])),
    ]:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(ValueError, match="capacity must be greater than 0, got 0"):
        make(capacity=0)
    with pytest.raises(TypeError, match="key must be a Tensor, got list"):
        cache.append([1.0], rows(1, 5))
    with pytest.raises(TypeError, match="value must be a Tensor, got NoneType"):
        cache.append(rows(1), None)
    for k, v, message in [
        (rows(1, 7), rows(1, 5), r"key must have shape \(3, 2, 1, 8\), \(B, Nk, L, E\), got \(3, 2, 1, 7\)"),
        (rows(1)[0], rows(1, 5), "key must have shape"),
        (rows(1), rows(2, 5), r"value must have shape \(3, 2, 1, 5\)"),
        (rows(1, batch=2), rows(1, 5), "key must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.append(k, v)
    with pytest.raises(RuntimeError, match="key and cache differ, expected torch.float64 on cpu, got torch.float32"):
        cache.append(rows(1).float(), rows(1, 5))
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 2\], the number of tokens appended, got 3"):
        cache.append(rows(2), rows(2, 5), lengths=[1, 2, 3])
    assert cache.lengths.tolist() == [0, 0, 0]
    assert repr(cache) == (
        "KVCache(batch=3, heads=2, head_dim=8, value_dim=5, lengths=[0, 0, 0], capacity=4, dtype=torch.float64)"
    )

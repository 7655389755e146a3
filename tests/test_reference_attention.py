"""The attention of the NumPy reference against torch in float64, against finite differences, and its dropout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, central_differences

from fastseq import reference

forward = reference.scaled_dot_product_attention_forward
backward = reference.scaled_dot_product_attention_backward


def random_qkv(B=2, N=4, L=7, S=9, D=5, E=5, kv_heads=None, seed=0):
    rng = np.random.default_rng([seed, B, N, L, S, D, E])
    kv_heads = kv_heads or N
    return [rng.standard_normal(shape) for shape in ((B, N, L, D), (B, kv_heads, S, D), (B, kv_heads, S, E))]


def leaf(array):
    return torch.tensor(array, requires_grad=np.asarray(array).dtype.kind == "f")


def results(q, k, v, mask=None, dlse=None, **options):
    """Everything by name, the gradients for a dout of its own."""
    out, cache = forward(q, k, v, mask, **options)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    wants_mask = mask is not None and mask.dtype != bool
    names = ("dq", "dk", "dv", "dmask")[: 3 + wants_mask]
    gradients = backward(dout, cache, dlse, return_dmask=wants_mask)
    return {"out": out, "lse": cache.lse, **dict(zip(names, gradients, strict=True))}, dout


def torch_gradients(out, dout, q, k, v, mask=None):
    out.backward(torch.from_numpy(dout))
    leaves = {"dq": q, "dk": k, "dv": v} | ({"dmask": mask} if mask is not None and mask.requires_grad else {})
    return {"out": out.detach().numpy()} | {name: a.grad.numpy() for name, a in leaves.items()}


# Against torch's own function


def random_mask(kind, shape):
    rng = np.random.default_rng(2)
    if kind == "bool":
        return rng.random(shape) < 0.7
    mask = rng.standard_normal(shape)
    mask[rng.random(shape) < 0.2] = -np.inf
    return mask


def assert_equals_torch(q, k, v, mask=None, **options):
    ours, dout = results(q, k, v, mask, **options)
    del ours["lse"]  # torch's function does not return it
    leaves = [leaf(a) for a in (q, k, v)]
    mask = None if mask is None else leaf(mask)
    out = F.scaled_dot_product_attention(*leaves, mask, enable_gqa=q.shape[-3:-2] != k.shape[-3:-2], **options)
    assert_close(ours, torch_gradients(out, dout, *leaves, mask))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 1), (63, 65, 8), (65, 63, 40), (1, 129, 64), (129, 7, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(sizes, is_causal):
    L, S, D = sizes
    assert_equals_torch(*random_qkv(L=L, S=S, D=D, E=D), is_causal=is_causal)


@pytest.mark.parametrize("axes", [2, 3, 5])
def test_other_numbers_of_axes_equal_torch(axes):
    arrays = random_qkv()
    arrays = [np.stack([a, 2 * a]) for a in arrays] if axes == 5 else [a[(0,) * (4 - axes)] for a in arrays]
    assert_equals_torch(*arrays)


@pytest.mark.parametrize("shape", [(2, 4, 7, 9), (7, 9), (2, 1, 1, 9), (1, 4, 7, 1), (4, 1, 9), (1, 1), (2, 1, 7, 9)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_equal_torch(kind, shape):
    assert_equals_torch(*random_qkv(), random_mask(kind, shape))


def test_grouped_heads_equal_torch():
    assert_equals_torch(*random_qkv(N=6, kv_heads=2), random_mask("float", (6, 7, 9)))
    assert_equals_torch(*random_qkv(N=3, kv_heads=1), is_causal=True)


@pytest.mark.parametrize("E", [1, 3, 8])
def test_another_size_of_values_equals_torch(E):
    assert_equals_torch(*random_qkv(E=E))


@pytest.mark.parametrize("scale", [0.0, -0.7, 30.0])
def test_scales_equal_torch(scale):
    assert_equals_torch(*random_qkv(), scale=scale)


@pytest.mark.parametrize(("L", "S"), [(7, 0), (0, 9), (0, 0)])
def test_nothing_to_attend_to(L, S):
    q, k, v = random_qkv(L=L, S=S)
    ours, _ = results(q, k, v)
    assert ours["out"].shape == (2, 4, L, 5)
    assert all(np.all(ours[name] == 0) for name in ("out", "dq", "dk", "dv"))
    assert np.all(ours["lse"] == -np.inf)
    assert_close({"out": ours["out"]}, {"out": F.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)))})


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_without_keys_gives_zeros(kind):
    q, k, v = random_qkv()
    mask = np.ones((7, 9), dtype=bool)
    mask[3] = False
    mask = mask if kind == "bool" else np.where(mask, 0.0, -np.inf)
    ours, _ = results(q, k, v, mask)
    assert np.all(ours["out"][:, :, 3] == 0)
    assert np.all(ours["dq"][:, :, 3] == 0)
    assert np.all(ours["lse"][:, :, 3] == -np.inf)
    assert all(np.all(np.isfinite(ours[name])) for name in ours.keys() - {"lse"})
    expected = F.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v, mask)))
    assert_close({"out": ours["out"]}, {"out": expected.numpy()})


def test_nan_passes_where_a_query_sees_it():
    q, k, v = random_qkv()
    k[:, :, 5] = np.nan
    out, _ = forward(q, k, v, is_causal=True)
    assert np.all(np.isnan(out) == (np.arange(7) >= 5)[:, None])


# Against the formula, row by row in torch ops


def attention_by_rows(
    q, k, v, mask, is_causal, lower_right, window, lengths_q, lengths_k, softcap, alibi_slopes, dropout_p, seed
):
    """out and lse. Each row of the batch is cut to its length, and softmax is only taken where there are keys."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    B, N, L, D = q.shape
    kept = torch.from_numpy(reference.dropout_kept((B, N, L, k.shape[2]), dropout_p, seed))
    for b in range(B):
        lq = L if lengths_q is None else lengths_q[b]
        lk = k.shape[2] if lengths_k is None else lengths_k[b]
        shift = lk - lq if lower_right else 0
        for n in range(N):
            key, value = (a[b, n // (N // k.shape[1]), :lk] for a in (k, v))
            s = q[b, n, :lq] @ key.T / math.sqrt(D)
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            allowed = torch.ones(lq, lk, dtype=torch.bool)
            if is_causal:
                allowed = allowed.tril(shift)
            if window[0] is not None:
                allowed = allowed.triu(shift - window[0])
            if window[1] is not None:
                allowed = allowed.tril(shift + window[1])
            if mask is not None:
                cut = mask.expand(B, N, L, k.shape[2])[b, n, :lq, :lk]
                s, allowed = (s, allowed & cut) if mask.dtype == torch.bool else (s + cut, allowed & (cut > -math.inf))
            if alibi_slopes is not None:
                distance = torch.arange(lq)[:, None] + shift - torch.arange(lk)
                s = s - alibi_slopes.expand(B, N)[b, n] * distance.abs()
            for i in range(lq):
                seen = allowed[i].nonzero()[:, 0]
                if len(seen):
                    p = s[i, seen].softmax(0) * kept[b, n, i, seen] / (1 - dropout_p)
                    out[b, n, i] = p @ value[seen]
                    lse[b, n, i] = s[i, seen].logsumexp(0)
    return out, lse


PLAIN = {
    "is_causal": False,
    "lower_right": False,
    "window": (None, None),
    "lengths_q": None,
    "lengths_k": None,
    "softcap": None,
    "alibi_slopes": None,
    "dropout_p": 0.0,
    "seed": 0,
}
LENGTHS = {"lengths_q": np.array([7, 3, 0, 5]), "lengths_k": np.array([4, 9, 6, 0])}
OPTIONS = {
    "causal": {"is_causal": True},
    "lower_right": {"is_causal": True, "lower_right": True},
    "window": {"window": (2, 1)},
    "window_left": {"window": (3, None)},
    "window_right": {"window": (None, 2)},
    "window_of_one": {"window": (0, 0)},
    "window_lower_right": {"window": (2, 1), "lower_right": True},
    "causal_window": {"window": (2, 1), "is_causal": True},
    "causal_window_lower_right": {"window": (1, None), "is_causal": True, "lower_right": True},
    "lengths": LENGTHS,
    "lengths_lower_right": {**LENGTHS, "is_causal": True, "lower_right": True},
    "keys": {"lengths_k": LENGTHS["lengths_k"]},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25])},
    "alibi_lower_right": {"alibi_slopes": np.linspace(-1, 1, 8).reshape(4, 2), "lower_right": True, **LENGTHS},
    "dropout": {"dropout_p": 0.4, "seed": -3},
    "everything": {
        **LENGTHS,
        "is_causal": True,
        "lower_right": True,
        "window": (4, 2),
        "softcap": 1.5,
        "alibi_slopes": np.array([0.5, 0.25]),
        "dropout_p": 0.25,
        "seed": 1 << 40,
    },
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def inputs_of_options(L=7, S=9):
    return random_qkv(B=4, N=2, L=L, S=S, D=3, E=2, kv_heads=1)


@over_options
@pytest.mark.parametrize("kind", [None, "bool", "float"])
@pytest.mark.parametrize(("L", "S"), [(7, 9), (9, 7)])
def test_options_equal_the_formula(options, kind, L, S):
    q, k, v = inputs_of_options(L, S)
    options = {name: np.minimum(a, L if name == "lengths_q" else S) if "lengths" in name else a
               for name, a in options.items()}  # fmt: skip
    mask = None if kind is None else random_mask(kind, (4, 1, L, S))
    dlse = np.random.default_rng(3).standard_normal(q.shape[:3])
    ours, dout = results(q, k, v, mask, dlse, **options)

    leaves = [leaf(a) for a in (q, k, v)]
    tensors = {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in (PLAIN | options).items()}
    mask = None if mask is None else leaf(mask)
    out, lse = attention_by_rows(*leaves, mask, **tensors)
    assert_close({"lse": ours.pop("lse")}, {"lse": lse.detach().numpy()})
    total = out + 0 * sum(a.sum() for a in leaves)  # so that each has a gradient
    seen = lse > -math.inf
    (torch.from_numpy(dlse)[seen] * lse[seen]).sum().backward(retain_graph=True)
    assert_close(ours, torch_gradients(total, dout, *leaves, mask))


# Against finite differences


@over_options
def test_gradients_equal_finite_differences(options):
    q, k, v = inputs_of_options()
    mask = np.random.default_rng(4).standard_normal((4, 1, 1, 9))
    dlse = np.random.default_rng(3).standard_normal(q.shape[:3])
    ours, dout = results(q, k, v, mask, dlse, **options)

    def projected():
        out, cache = forward(q, k, v, mask, **options)
        return np.sum(out * dout) + np.sum(np.where(cache.lse == -np.inf, 0, cache.lse) * dlse)

    expected = {
        name: central_differences(projected, array)
        for name, array in (("dq", q), ("dk", k), ("dv", v), ("dmask", mask))
    }
    assert_close({name: ours[name] for name in expected}, expected, "finite difference")


# Padding


def test_padding_is_not_looked_at():
    q, k, v = inputs_of_options()
    dlse = np.random.default_rng(3).standard_normal(q.shape[:3])
    expected, dout = results(q, k, v, None, dlse, **LENGTHS)
    for b, (lq, lk) in enumerate(zip(*LENGTHS.values(), strict=True)):
        q[b, :, lq:], k[b, :, lk:], v[b, :, lk:] = np.nan, np.nan, np.nan
        dout[b, :, lq:], dlse[b, :, lq:] = np.nan, np.nan
    out, cache = forward(q, k, v, **LENGTHS)
    gradients = dict(zip(("dq", "dk", "dv"), backward(dout, cache, dlse), strict=True))
    assert_close({"out": out, "lse": cache.lse, **gradients}, expected)


def test_a_mask_gradient_needs_a_float_mask():
    q, k, v = random_qkv()
    for mask in (None, np.ones((7, 9), dtype=bool)):
        out, cache = forward(q, k, v, mask)
        with pytest.raises(ValueError, match="needs a float attn_mask"):
            backward(out, cache, return_dmask=True)


# Dropout

# The lines `philox4x32` of kat_vectors in Random123: rounds, counter, key, draws.
KNOWN_ANSWERS = """
7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_the_known_answers(line):
    rounds, *words = line.split()
    words = [int(word, 16) for word in words]
    counter = np.array([words[:4], [1, 2, 3, 4], words[:4]], dtype=np.uint32)
    draws = reference.philox4x32(counter, tuple(words[4:6]), int(rounds))
    assert draws.dtype == np.uint32
    assert draws[0].tolist() == draws[2].tolist() == words[6:]
    assert draws[1].tolist() != words[6:]


def test_dropout_draws_by_head_query_and_key():
    B, N, L, S, seed = 2, 3, 5, 11, 0x0123456789ABCDEF
    kept = reference.dropout_kept((B, N, L, S), 0.5, seed)
    for b, n, i, j in ((0, 0, 0, 0), (0, 2, 4, 10), (1, 0, 3, 7), (1, 2, 1, 9)):
        counter = np.array([j // 4, i, b * N + n, 0], dtype=np.uint32)
        word = reference.philox4x32(counter, (0x89ABCDEF, 0x01234567))[j % 4]
        assert kept[b, n, i, j] == (word >= 2**31)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_as_many_as_it_should(dropout_p):
    kept = reference.dropout_kept((4, 8, 65, 129), dropout_p, seed=11)
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / math.sqrt(kept.size)
    for axis in range(4):  # and no two neighbours have to do with each other
        one, other = (np.take(kept, range(a, kept.shape[axis] - 1 + a), axis) for a in (0, 1))
        correlation = np.mean((one - kept.mean()) * (other - kept.mean())) / deviation**2
        assert abs(correlation) < 5 / math.sqrt(one.size)


def test_dropout_is_repeated_by_its_seed():
    shape = (2, 3, 7, 9)
    kept = reference.dropout_kept(shape, 0.5, seed=5)
    assert np.array_equal(kept, reference.dropout_kept(shape, 0.5, seed=5))
    for seed in (6, 5 + (1 << 32)):
        assert not np.array_equal(kept, reference.dropout_kept(shape, 0.5, seed=seed))
    # A negative seed is the 64 bits of its two's complement.
    assert np.array_equal(reference.dropout_kept(shape, 0.5, -1), reference.dropout_kept(shape, 0.5, (1 << 64) - 1))
    # Longer sequences begin with the same draws.
    assert np.array_equal(kept, reference.dropout_kept((2, 3, 65, 63), 0.5, seed=5)[:, :, :7, :9])


def test_dropout_of_none_and_of_all():
    q, k, v = random_qkv()
    expected, _ = forward(q, k, v)
    assert np.array_equal(forward(q, k, v, dropout_p=0.0, seed=3)[0], expected)
    all_dropped, _ = results(q, k, v, dropout_p=1.0)
    assert all(np.all(all_dropped[name] == 0) for name in ("out", "dq", "dk", "dv"))


def test_dropout_keeps_the_expected_value():
    q, k, v = random_qkv(L=1, S=3, D=2, E=2)
    expected, _ = forward(q, k, v)
    outs = np.stack([forward(q, k, v, dropout_p=0.3, seed=seed)[0] for seed in range(2000)])
    error = outs.std(axis=0) / math.sqrt(len(outs))
    assert np.all(np.abs(outs.mean(axis=0) - expected) < 5 * error)


# The dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble], ids=["float32", "float64", "longdouble"])
@over_options
def test_computes_in_the_dtype_of_its_arguments(dtype, options):
    q, k, v, mask = (a.astype(dtype) for a in (*inputs_of_options(), np.ones((7, 9))))
    options = {name: a.astype(dtype) if name == "alibi_slopes" else a for name, a in options.items()}
    out, cache = forward(q, k, v, mask, **options)
    gradients = backward(out, cache, np.ones_like(cache.lse), return_dmask=True)
    assert {a.dtype for a in (out, cache.lse, cache.weights, *gradients)} == {np.dtype(dtype)}

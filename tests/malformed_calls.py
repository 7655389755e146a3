"""Valid calls of everything public that takes tensors, and what a checked computation makes of the same arguments.

A call is a dict of arguments, nested as they are, and two functions of it. `ours` calls fastseq; `torchs` computes the
same by torch's own functions whose every part looks at what it gets: without oneDNN, flash attention and the fast path
of the Transformer, which do not, and what is beyond torch step by step.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from malformed_call import DTYPES, Call, odds, some, with_parameters
from malformed_recurrent import cell_call, function_call, lengths_of, module_call, track
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence

import fastseq
from fastseq.ops import LinearFunction, linear, normalization

# ---- attention


def attention_call(rng):
    B, N, L, S, E, V = (rng.randint(1, most) for most in (3, 4, 6, 6, 9, 9))
    dtype, trains = some(rng, *DTYPES), odds(rng, 0.5)
    make = torch.Generator().manual_seed(rng.randrange(2**31))
    gqa = odds(rng, 0.2)
    heads = some(rng, *(n for n in range(1, N + 1) if N % n == 0)) if gqa else N
    lead, key_lead = some(rng, ((B, N), (B, heads)), ((B, N), (B, heads)), *([] if gqa else [((B,), (B,)), ((), ())]))

    def normal(*shape):
        return torch.randn(shape, generator=make).to(dtype)

    a = {"query": normal(*lead, L, E), "key": normal(*key_lead, S, E), "value": normal(*key_lead, S, V)}
    if gqa:
        a["enable_gqa"] = True
    kind = some(rng, None, "bool", "float", "causal")
    if kind == "causal":
        a["is_causal"] = True
    elif kind is not None:
        shape = some(rng, (L, S), (*lead, L, S), (*(1,) * len(lead), L, S), (1, S))
        a["attn_mask"] = torch.rand(shape, generator=make) < 0.7 if kind == "bool" else normal(*shape)
    if odds(rng, 0.3):
        a["scale"] = rng.uniform(0.1, 2)
    if odds(rng, 0.1):
        a["dropout_p"] = 0.0

    def torchs(a):
        if not all(a[n].numel() for n in ("query", "key", "value")):
            with sdpa_kernel(list(SDPBackend.__members__.values())):  # torch returns zeros before it chooses one
                return F.scaled_dot_product_attention(**a)
        return unknown_where_drawn(a, F.scaled_dot_product_attention(**a))

    if len(lead) == 2 and odds(rng, 0.5):
        if odds(rng, 0.4):
            a["lengths_k"] = lengths_of(rng, B, S)
        if odds(rng, 0.4):
            a["lengths_q"] = lengths_of(rng, B, L)
        if odds(rng, 0.4):
            a["window"] = (some(rng, None, 0, 1, 3), some(rng, None, 0, 1, 3))
        if odds(rng, 0.4) and kind != "causal":
            a["causal"] = some(rng, "upper_left", "lower_right")
        if odds(rng, 0.4):
            a["softcap"] = rng.uniform(0.5, 3)
        if odds(rng, 0.4):
            a["alibi_slopes"] = torch.rand(some(rng, (N,), (B, N)), generator=make)
        if not a.keys().isdisjoint(BEYOND):

            def torchs(a):
                return unknown_where_drawn(a, all_scores(a))

    def ours(a):
        a = dict(
            a, **dict(zip(("query", "key", "value"), track([a["query"], a["key"], a["value"]], trains), strict=True))
        )
        return fastseq.scaled_dot_product_attention(**a)

    return Call("attention", a, ours, torchs)


BEYOND = ("lengths_k", "lengths_q", "window", "causal", "softcap", "alibi_slopes")


def unknown_where_drawn(a, out):
    """Dropout draws its own numbers; all of them is none."""
    dropout_p = float(a.get("dropout_p", 0))
    return out if dropout_p == 0 else out * 0 if dropout_p == 1 else torch.full_like(out, torch.nan)


def all_scores(a):
    """What is beyond torch, with every score in memory."""
    q, k, v, mask = a["query"], a["key"], a["value"], a.get("attn_mask")
    batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
    q, k, v = (t.expand(*batch, *(t.shape[-3:] if t.dim() > 2 else (1, *t.shape))) for t in (q, k, v))
    if len(batch) > 1:
        flat = {n: t.flatten(0, -4) for n, t in zip(("query", "key", "value"), (q, k, v), strict=True)}
        if mask is not None:
            mask = mask.expand(*batch, q.shape[-3], q.shape[-2], k.shape[-2]).flatten(0, -4)
        return all_scores(a | flat | {"attn_mask": mask}).unflatten(0, batch)
    if a.get("enable_gqa", False):
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    L, S = q.shape[-2], k.shape[-2]
    scale = a.get("scale")
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if a.get("softcap"):
        scores = a["softcap"] * torch.tanh(scores / a["softcap"])
    some_rows = {
        name: torch.full((q.shape[0],), most) if a.get(name) is None else torch.as_tensor(a[name]).reshape(q.shape[0])
        for name, most in (("lengths_q", L), ("lengths_k", S))
    }
    lengths_q, lengths_k = (t[:, None, None, None] for t in some_rows.values())
    rows, columns = torch.arange(L)[:, None], torch.arange(S)
    shift = lengths_k - lengths_q if a.get("causal") == "lower_right" else 0
    away = columns - rows - shift
    left, right = (None if w == -1 else w for w in a.get("window") or (None, None))
    if a.get("causal") or a.get("is_causal", False):
        right = 0
    sees = (rows < lengths_q) & (columns < lengths_k)
    if left is not None:
        sees = sees & (away >= -left)
    if right is not None:
        sees = sees & (away <= right)
    if a.get("alibi_slopes") is not None:
        scores = scores - a["alibi_slopes"].expand(q.shape[0], q.shape[1])[..., None, None].to(q.dtype) * away.abs()
    if mask is not None:
        mask.expand(scores.shape)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    scores = scores.masked_fill(~sees, -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0), -1).masked_fill(dead, 0)
    v = v.masked_fill((torch.arange(S) >= lengths_k[:, 0, 0]).unsqueeze(1).unsqueeze(3), 0)
    return weights.to(v.dtype) @ v


def packed_attention_call(rng):
    N, E = rng.randint(1, 3), rng.randint(1, 8)
    make, dtype = torch.Generator().manual_seed(rng.randrange(2**31)), some(rng, *DTYPES)
    lengths = [[rng.randint(0, 4) for _ in range(3)] for _ in range(2)]
    bounds = [[sum(side[:n]) for n in range(4)] for side in lengths]
    q, k, v = (torch.randn(N, total, E, generator=make).to(dtype) for total in (bounds[0][-1], *[bounds[1][-1]] * 2))
    a = {"query": q, "key": k, "value": v, "cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1]}
    if odds(rng, 0.5):
        a["cu_seqlens_q"], a["cu_seqlens_k"] = (torch.tensor(b) for b in bounds)
    if odds(rng, 0.3):
        a["causal"] = some(rng, "upper_left", "lower_right")

    def torchs(a):
        q, k, v = a["query"], a["key"], a["value"]
        (q0, *q1), (k0, *k1) = ([int(n) for n in a[name]] for name in ("cu_seqlens_q", "cu_seqlens_k"))
        if (q0, k0, q1[-1:], k1[-1:]) != (0, 0, [q.shape[-2]], [k.shape[-2]]):
            raise ValueError("cu_seqlens")
        parts = []
        for qa, qb, ka, kb in zip([q0, *q1], q1, [k0, *k1], k1, strict=False):
            part = {"query": q[..., qa:qb, :], "key": k[..., ka:kb, :], "value": v[..., ka:kb, :]}
            part = {n: t if t.dim() == 4 else t.expand(1, *(1,) * (3 - t.dim()), *t.shape) for n, t in part.items()}
            out = all_scores(part | {n: a[n] for n in a if "cu_" not in n and n not in part})
            parts.append(out if 4 in (q.dim(), k.dim(), v.dim()) else out.squeeze(0))
        return torch.cat(parts, -2)

    return Call("packed attention", a, lambda a: fastseq.scaled_dot_product_attention(**a), torchs)


def mha_call(rng):
    B, L, S, N = (rng.randint(1, most) for most in (3, 5, 5, 3))
    E = N * rng.randint(1, 4)
    dtype = some(rng, *DTYPES)
    options = {"bias": odds(rng, 0.8), "batch_first": odds(rng, 0.5), "dtype": dtype}
    if odds(rng, 0.2):
        options |= {"kdim": rng.randint(1, 6), "vdim": rng.randint(1, 6)}
    options |= {"add_bias_kv": odds(rng, 0.1), "add_zero_attn": odds(rng, 0.1)}
    make = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*shape):
        return torch.randn(shape, generator=make).to(dtype)

    same = odds(rng, 0.5) and "kdim" not in options
    unbatched = odds(rng, 0.2)
    S = L if same else S

    def lay(rows, size):
        return normal(rows, size) if unbatched else normal(*((B, rows) if options["batch_first"] else (rows, B)), size)

    a = {"query": lay(L, E), "key": None, "value": None}
    if not same:
        a |= {"key": lay(S, options.get("kdim", E)), "value": lay(S, options.get("vdim", E))}
    if odds(rng, 0.4):
        shape = (S,) if unbatched else (B, S)
        a["key_padding_mask"] = torch.rand(shape, generator=make) < 0.3 if odds(rng, 0.7) else normal(*shape)
    if odds(rng, 0.4):
        shape = some(rng, (L, S), ((1 if unbatched else B) * N, L, S))
        a["attn_mask"] = torch.rand(shape, generator=make) < 0.3 if odds(rng, 0.5) else normal(*shape)
    a["need_weights"] = odds(rng, 0.3)
    template = nn.MultiheadAttention(E, N, **options)
    a["parameters"] = {n: torch.randn(p.shape, generator=make).to(dtype) for n, p in template.named_parameters()}
    trains, frozen = odds(rng, 0.5), odds(rng, 0.2)

    def run(library, a):
        module = library.MultiheadAttention(E, N, **options).requires_grad_(trains).train(trains)
        if frozen and library is fastseq:
            fastseq.freeze(module)
        with_parameters(module, a["parameters"])
        query = a["query"]
        key, value = (query, query) if same and a["key"] is a["value"] is None else (a["key"], a["value"])
        options_ = {n: a[n] for n in ("key_padding_mask", "attn_mask", "need_weights") if n in a}
        return module(query, key, value, **options_)

    return Call("MultiheadAttention", a, lambda a: run(fastseq, a), lambda a: run(nn, a))


def layer_call(rng):
    B, L, S, N = (rng.randint(1, most) for most in (3, 5, 5, 2))
    E, dtype = N * rng.randint(1, 4), some(rng, torch.float32, torch.float64)
    decoder, trains = odds(rng, 0.5), odds(rng, 0.5)
    options = {"dropout": 0.0, "batch_first": odds(rng, 0.7), "norm_first": odds(rng, 0.5), "dtype": dtype}
    make = torch.Generator().manual_seed(rng.randrange(2**31))
    name = "TransformerDecoderLayer" if decoder else "TransformerEncoderLayer"

    def lay(rows):
        return torch.randn(*((B, rows) if options["batch_first"] else (rows, B)), E, generator=make).to(dtype)

    a = {"x": (lay(L), lay(S)) if decoder else (lay(L),), "masks": {}}
    for mask, shape in {"src_mask": (L, L), "src_key_padding_mask": (B, L)}.items():
        if odds(rng, 0.4):
            mask = mask.replace("src", "tgt") if decoder else mask
            a["masks"][mask] = torch.rand(shape, generator=make) < 0.2
    template = getattr(nn, name)(E, N, 5, **options)
    parameters = {n: torch.randn(p.shape, generator=make).to(dtype) for n, p in template.named_parameters()}
    a["parameters"] = dict(rng.sample(sorted(parameters.items()), 4))
    state = template.state_dict()

    def run(library, a):
        module = getattr(library, name)(E, N, 5, **options).train(trains).requires_grad_(trains)
        module.load_state_dict(state)
        with_parameters(module, a["parameters"])
        return module(*a["x"], **a["masks"])

    return Call(name, a, lambda a: run(fastseq, a), lambda a: run(nn, a))


# ---- the rest


def layer_norm_call(rng):
    shape = [rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
    over = shape[-rng.randint(1, len(shape)) :]
    dtype, trains = some(rng, *DTYPES), odds(rng, 0.5)
    make = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(shape):
        return torch.randn(shape, generator=make).to(dtype)

    a = {"input": normal(shape), "normalized_shape": tuple(over)}
    if odds(rng, 0.7):
        a |= {"weight": normal(over), "bias": normal(over)}
    if odds(rng, 0.5):
        a["eps"] = 1e-3
    if odds(rng, 0.6):
        a["residual"] = normal(shape)

    def ours(a):
        names = [n for n in ("input", "weight", "bias", "residual") if n in a]
        return fastseq.layer_norm(**a | dict(zip(names, track([a[n] for n in names], trains), strict=True)))

    def torchs(a):
        a = dict(a)
        if a.get("residual") is None:
            a.pop("residual", None)
            return F.layer_norm(**a)
        if a["residual"].shape != a["input"].shape:
            raise RuntimeError("residual")
        a["input"] = a["input"] + a.pop("residual")
        return F.layer_norm(**a), a["input"]

    return Call("layer_norm", a, ours, torchs)


def linear_call(rng):
    rows = [rng.randint(1, 5) for _ in range(rng.randint(0, 2))]
    K, N = rng.randint(1, 9), rng.randint(1, 9)
    dtype = some(rng, *DTYPES)
    make = torch.Generator().manual_seed(rng.randrange(2**31))
    a = {"x": torch.randn(*rows, K, generator=make).to(dtype), "weight": torch.randn(N, K, generator=make).to(dtype)}
    a["bias"] = torch.randn(N, generator=make).to(dtype) if odds(rng, 0.6) else None
    trains = odds(rng, 0.5)

    def ours(a):
        from fastseq.backends import native

        return LinearFunction.apply(native, *track([a["x"], a["weight"], a["bias"]], trains))

    return Call("linear", a, ours, lambda a: F.linear(a["x"], a["weight"], a["bias"]))


def cache_call(rng):
    B, N, E, V = (rng.randint(1, 3) for _ in range(4))
    make = torch.Generator().manual_seed(rng.randrange(2**31))
    dtype = some(rng, *DTYPES)
    a = {"batch": B, "heads": N, "head_dim": E, "value_dim": V, "capacity": rng.randint(1, 4), "turns": []}
    for _ in range(rng.randint(1, 3)):
        L = rng.randint(1, 4)
        key, value = (torch.randn(B, N, L, size, generator=make).to(dtype) for size in (E, V))
        a["turns"].append((key, value, lengths_of(rng, B, L) if odds(rng, 0.6) else None))
    if odds(rng, 0.5):
        a["reset"] = [rng.randrange(B)]

    def ours(a):
        sizes = {n: a[n] for n in ("batch", "heads", "head_dim", "value_dim", "capacity")}
        cache = fastseq.KVCache(**sizes, dtype=dtype)
        for turn, (key, value, lengths) in enumerate(a["turns"]):
            cache.append(key, value, lengths=lengths)
            if turn == 0 and "reset" in a:
                cache.reset(a["reset"])
        rows = [slice(int(n)) for n in cache.lengths]
        return [(cache.keys[b, :, s].clone(), cache.values[b, :, s].clone()) for b, s in enumerate(rows)]

    def torchs(a):
        if a["capacity"] < 1:
            raise ValueError("capacity")
        V = a["head_dim"] if a["value_dim"] is None else a["value_dim"]
        rows = [(torch.empty(a["heads"], 0, a["head_dim"]), torch.empty(a["heads"], 0, V)) for _ in range(a["batch"])]
        for turn, (key, value, lengths) in enumerate(a["turns"]):
            every = [key.shape[2]] * key.shape[0]
            lengths = every if lengths is None else torch.as_tensor(lengths).reshape(-1).tolist()
            if key.dtype is not dtype or value.dtype is not dtype or not key.shape[0] == value.shape[0] == len(rows):
                raise RuntimeError("dtype or batch")
            if any(n > key.shape[2] or n < 0 for n in lengths):
                raise ValueError("lengths")
            rows = [
                tuple(torch.cat((old, new[b, :, :n]), 1) for old, new in zip(pair, (key, value), strict=True))
                for (b, n), pair in zip(enumerate(lengths), rows, strict=True)
            ]
            if turn == 0 and "reset" in a:
                emptied = range(len(rows)) if a["reset"] is None else torch.as_tensor(a["reset"]).reshape(-1).tolist()
                for row in emptied:
                    rows[row] = tuple(t[:, :0] for t in rows[row])
        return rows

    return Call("KVCache", a, ours, torchs)


KINDS = (
    *(module_call,) * 5,
    *(function_call,) * 2,
    *(cell_call,) * 3,
    *(attention_call,) * 4,
    packed_attention_call,
    *(mha_call,) * 3,
    *(layer_call,) * 2,
    *(layer_norm_call,) * 2,
    linear_call,
    cache_call,
)


def random_call(rng: random.Random) -> Call:
    if odds(rng, 0.5):  # small calls take the kernels too
        normalization.FEWEST_ELEMENTS = normalization.FEWEST_ELEMENTS_OF_SUMS = linear.FEWEST_PRODUCTS = 1
        linear.FEWEST_ROWS = linear.FEWEST_PRODUCTS_OF_TRAINING = 1
    else:
        normalization.FEWEST_ELEMENTS, normalization.FEWEST_ELEMENTS_OF_SUMS = 2**20, 2**18
        linear.FEWEST_ROWS, linear.FEWEST_PRODUCTS, linear.FEWEST_PRODUCTS_OF_TRAINING = 4, 2**20, 2**27
    return rng.choice(KINDS)(rng)


def is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)

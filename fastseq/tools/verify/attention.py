"""Attention kernels: the cases, and the results of the reference, of torch and of every kernel for one.

Straight at the backend, so that nothing can fall back to torch unseen. Per case: the forward alone, then the forward
that keeps what the backward needs, and all gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastseq.backends.contract import Attention
from fastseq.reference import dropout_kept, scaled_dot_product_attention_backward, scaled_dot_product_attention_forward
from fastseq.tools.verify.comparison import Family
from fastseq.tools.verify.tensors import array

MASK_AXES = "BNLS"
# L queries, S keys, D features of both, E of values.
AXES = {
    "q": "LD", "k": "SD", "v": "SE", "dout": "LE", "dlse": "L", "allowed": "LS", "bias": "LS",
    "out": "LE", "dq": "LD", "dk": "SD", "dv": "SE", "dbias": "LS", "lse": "L", "sees no key": "L",
}  # fmt: skip
NAN = float("nan")
SEED = 0x5EED_0123_4567_89AB


@dataclass(frozen=True)
class Case:
    """Sizes and options of one run."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    bool_mask: str = ""  # the axes that the mask has of BNLS; the others are broadcast
    float_mask: str = ""
    is_causal: bool = False
    lower_right: bool = False
    window: tuple[int | None, int | None] = (None, None)
    lengths: str = ""  # "k" or "qk": which side has lengths, of every size from 0 up, unsorted
    packed: bool = False  # the rows one after another, without padding
    softcap: float = 0.0  # none
    alibi: bool = False
    dropout_p: float = 0.0
    lse: bool = False  # is an output and has a gradient
    heads_inside: bool = False  # (B, L, N, D) in memory, as a projection leaves it
    logits: float = 1.0  # about the size of the scores

    def __str__(self) -> str:
        sizes = f"B={self.batch} N={self.heads}/{self.kv_heads} L={self.queries} S={self.keys}"
        options = [f for f in fields(self)[7:] if getattr(self, f.name) != f.default]
        names = [f.name if f.type == "bool" else f"{f.name}={getattr(self, f.name)}" for f in options]
        return ", ".join([f"{sizes} D={self.head_dim} E={self.value_dim}", *names])

    @property
    def left_right(self) -> tuple[int | None, int | None]:
        """The window, with is_causal in it."""
        left, right = self.window
        return left, (0 if right is None else min(right, 0)) if self.is_causal else right


# Odd and even, one and many, below and above the widest vector and the blocks of queries and of keys; a row of queries
# against a long cache; groups of heads; values of another size.
SHAPES = (
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 7, 63, 8, 8),
    (1, 2, 1, 65, 65, 40, 40),
    (2, 4, 2, 63, 129, 64, 64),
    (1, 2, 2, 129, 127, 80, 96),
    (2, 2, 2, 65, 7, 256, 63),
    (1, 2, 1, 1, 1000, 128, 128),
    (3, 8, 2, 1, 65, 96, 1),
)
# Features beyond a block of 256 of the sums over them, also where keys are streamed.
LONG_SUMS = ((1, 2, 1, 33, 65, 601, 513), (1, 2, 1, 3, 65, 513, 601))


def cases(dtype: str) -> Iterator[Case]:
    """The default set for a dtype."""
    for shape in SHAPES:
        plain = Case(*shape)
        yield plain
        yield replace(plain, is_causal=True, heads_inside=True)
        yield replace(plain, is_causal=True, lower_right=True, lse=True)
        yield replace(plain, bool_mask="BLS")
        yield replace(plain, float_mask="NLS", heads_inside=True)
        yield replace(plain, float_mask="BS", is_causal=True)
        yield replace(plain, float_mask="BNLS", lengths="k")
        yield replace(plain, window=(5, 2))
        yield replace(plain, window=(17, None), is_causal=True, lower_right=True, bool_mask="S")
        yield replace(plain, lengths="qk", lse=True)
        yield replace(plain, lengths="k", is_causal=True, lower_right=True, heads_inside=True)
        yield replace(plain, lengths="qk", packed=True, is_causal=True)
        yield replace(plain, lengths="qk", packed=True, lower_right=True, window=(9, 1), alibi=True, dropout_p=0.5)
        yield replace(plain, softcap=2.0, logits=4.0)
        yield replace(plain, alibi=True, is_causal=True)
        yield replace(plain, dropout_p=0.2)
        yield replace(
            plain, float_mask="BNLS", bool_mask="LS", lengths="qk", is_causal=True, lower_right=True, window=(40, 0),
            softcap=3.0, alibi=True, dropout_p=0.1, lse=True,
        )  # fmt: skip
    for shape in LONG_SUMS:
        yield Case(*shape)
        yield Case(*shape, is_causal=True, heads_inside=True)
    yield Case(2, 4, 2, 63, 129, 64, 64, logits=60.0)
    yield Case(2, 4, 2, 63, 129, 64, 64, logits=60.0, is_causal=True, float_mask="NLS")
    if dtype != "float64":  # large enough for a team of threads, too large for longdouble
        yield Case(2, 8, 8, 300, 300, 64, 64)
        yield Case(2, 8, 4, 257, 513, 64, 64, is_causal=True, dropout_p=0.1, float_mask="NLS")


@dataclass
class Inputs:
    """What a run takes. Every value is representable in the kernels' dtype, so that all sides see the same numbers."""

    q: Tensor  # (B, N, L, D)
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None  # (B, N, L)
    allowed: Tensor | None  # four axes, of size 1 where it is broadcast
    bias: Tensor | None
    lengths_q: Tensor  # (B,), all L where there are none
    lengths_k: Tensor
    alibi_slopes: Tensor | None  # (B, N), up to 0.5 as in the paper
    scale: float

    @property
    def real(self) -> Tensor:
        """(B, 1, L, 1), False where a query is padding."""
        return _within(self.lengths_q, self.q)

    @property
    def real_key(self) -> Tensor:
        """(B, 1, S, 1), False where a key is padding."""
        return _within(self.lengths_k, self.k)


def _within(lengths: Tensor, rows: Tensor) -> Tensor:
    return (torch.arange(rows.shape[2]) < lengths[:, None])[:, None, :, None].to(rows.device)


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs of a case, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    B, N, L, S = case.batch, case.heads, case.queries, case.keys

    def normal(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    def share(part: float, shape: Sequence[int]):
        return torch.rand(*shape, generator=generator) < part

    def mask_shape(axes: str):
        return [size if axis in axes else 1 for axis, size in zip(MASK_AXES, (B, N, L, S), strict=True)]

    def random_lengths(longest: int, wanted: bool):
        lengths = torch.randint(longest + 1, (B,), generator=generator) if wanted else torch.full((B,), longest)
        lengths[torch.randint(B, (1,), generator=generator)] = longest
        return lengths

    allowed = share(0.7, mask_shape(case.bool_mask)) if case.bool_mask else None
    bias = normal(*mask_shape(case.float_mask)) if case.float_mask else None
    if bias is not None:
        bias[share(0.1, bias.shape)] = -math.inf
    return Inputs(
        q=normal(B, N, L, case.head_dim, scale=case.logits),
        k=normal(B, case.kv_heads, S, case.head_dim),
        v=normal(B, case.kv_heads, S, case.value_dim),
        dout=normal(B, N, L, case.value_dim),
        dlse=normal(B, N, L, dtype=torch.float64 if dtype == torch.float64 else torch.float32) if case.lse else None,
        allowed=allowed,
        bias=bias,
        lengths_q=random_lengths(L, "q" in case.lengths),
        lengths_k=random_lengths(S, "k" in case.lengths),
        alibi_slopes=0.5 * torch.rand(B, N, generator=generator) if case.alibi else None,
        scale=1 / math.sqrt(case.head_dim),
    )


def reference_results(case: Case, inputs: Inputs, dtype: type) -> dict[str, np.ndarray]:
    """Outputs and gradients by name, computed in `dtype`."""

    def exact(a: Tensor | None):
        return None if a is None else a.double().numpy().astype(dtype)

    mask = exact(inputs.bias)
    if inputs.allowed is not None:
        mask = inputs.allowed.numpy() if mask is None else np.where(inputs.allowed.numpy(), mask, -np.inf)
    out, cache = scaled_dot_product_attention_forward(
        *map(exact, (inputs.q, inputs.k, inputs.v)),
        mask,
        case.is_causal,
        inputs.scale,
        lower_right=case.lower_right,
        window=case.window,
        lengths_q=inputs.lengths_q.numpy(),
        lengths_k=inputs.lengths_k.numpy(),
        softcap=case.softcap or None,
        alibi_slopes=exact(inputs.alibi_slopes),
        dropout_p=case.dropout_p,
        seed=SEED,
    )
    dlse, wants_mask = exact(inputs.dlse), inputs.bias is not None
    dq, dk, dv, *dmask = scaled_dot_product_attention_backward(exact(inputs.dout), cache, dlse, return_dmask=wants_mask)
    results = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    if wants_mask:
        results["dbias"] = _sum_to(dmask[0], inputs.bias.shape)
    return results | (_lse_results(cache.lse, inputs) if case.lse else {})


def torch_results(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """The same by torch: its own function where that can, else the formula, in float32 for the halves."""
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v} | ({} if inputs.bias is None else {"bias": inputs.bias})
    leaves = {name: a.clone().requires_grad_() for name, a in leaves.items()}
    own = not (case.softcap or case.alibi or case.dropout_p or case.lse)
    out, lse = (_torch_function if own else _torch_formula)(case, inputs, **leaves)
    outputs, gradients = [out * inputs.real], [inputs.dout]
    if case.lse:
        seen = lse > -math.inf
        outputs, gradients = [*outputs, lse[seen]], [*gradients, inputs.dlse[seen]]
    torch.autograd.backward(outputs, gradients)
    results = {"out": array(outputs[0])} | {f"d{name}": array(leaf.grad) for name, leaf in leaves.items()}
    return results | (_lse_results(array(lse), inputs) if case.lse else {})


def _allowed(case: Case, inputs: Inputs) -> Tensor:
    """(B, N, L, S): which keys a query may see."""
    ahead = _ahead(case, inputs)
    left, right = case.left_right
    allowed = inputs.real & inputs.real_key.mT
    if left is not None:
        allowed = allowed & (ahead >= -left)
    if right is not None:
        allowed = allowed & (ahead <= right)
    if inputs.allowed is not None:
        allowed = allowed & inputs.allowed
    return allowed.expand(case.batch, case.heads, case.queries, case.keys)


def _ahead(case: Case, inputs: Inputs) -> Tensor:
    """How far each key is ahead of the place of a query."""
    place = torch.arange(case.queries)[:, None]
    if case.lower_right:
        place = place + (inputs.lengths_k - inputs.lengths_q)[:, None, None, None]
    return (torch.arange(case.keys) - place).to(inputs.q.device)


def _torch_function(case: Case, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
    mask, is_causal = None, case.is_causal
    if (
        bias is not None
        or inputs.allowed is not None
        or case.lengths
        or case.lower_right
        or case.window != (None, None)
    ):
        mask, is_causal = _allowed(case, inputs), False
        mask = mask if bias is None else bias.masked_fill(~mask, -math.inf)
    grouped = case.heads != case.kv_heads
    # On a GPU one backend for all cases: which others serve a case, and what they give where no key is seen, differs.
    with sdpa_kernel(SDPBackend.MATH) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=inputs.scale, enable_gqa=grouped)
    return out, None


def _torch_formula(case: Case, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
    dtype = q.dtype
    q, k, v = (a.float() if dtype.itemsize == 2 else a for a in (q, k, v))
    k, v = (a.repeat_interleave(case.heads // case.kv_heads, 1) for a in (k, v))
    s = inputs.scale * (q @ k.mT)
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    s = s if bias is None else s + bias
    if inputs.alibi_slopes is not None:
        s = s - inputs.alibi_slopes[..., None, None].to(s.dtype) * _ahead(case, inputs).abs()
    s = s.masked_fill(~_allowed(case, inputs), -math.inf)
    sees = s.amax(-1, keepdim=True) > -math.inf
    s = torch.where(sees, s, 0.0)  # where a query sees no key neither softmax nor its gradient is NaN
    p = s.softmax(-1) * sees
    if case.dropout_p:
        kept = torch.from_numpy(dropout_kept(p.shape, case.dropout_p, SEED)).to(p.device)
        p = p * kept / (1 - case.dropout_p)
    return (p @ v).to(dtype), s.logsumexp(-1).masked_fill(~sees[..., 0], -math.inf)


def kernel_results(native, case: Case, inputs: Inputs, isa: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(kernel, results) of every kernel that serves the case. Padding holds NaN, and so does what is allocated, so that
    a value shows which is read where it must not be, or is not written where it must be.
    """
    q, dout = (_laid_out(a, inputs.lengths_q, case) for a in (inputs.q, inputs.dout))
    k, v = (_laid_out(a, inputs.lengths_k, case) for a in (inputs.k, inputs.v))
    dlse = None if inputs.dlse is None else _laid_out(inputs.dlse[..., None], inputs.lengths_q, case)[..., 0]
    left, right = case.left_right
    call = Attention(
        inputs.scale,
        softcap=case.softcap,
        left=left,
        right=right,
        lower_right=case.lower_right,
        dropout_p=case.dropout_p,
        seed=SEED,
        lengths_q=inputs.lengths_q if "q" in case.lengths else None,
        lengths_k=inputs.lengths_k if "k" in case.lengths else None,
        alibi_slopes=inputs.alibi_slopes,
    )
    if case.packed:
        starts_q, starts_k = _starts(inputs.lengths_q), _starts(inputs.lengths_k)
        call = call._replace(starts_q=starts_q, starts_k=starts_k, max_q=case.queries, max_k=case.keys)
    operands = call, q, k, v, inputs.bias, inputs.allowed

    def back(a: Tensor, lengths: Tensor) -> np.ndarray:
        return array(_padded(a, lengths) if case.packed else a)

    with native.use_isa(isa), native.filled_with_nan():
        out, _ = native.attention_forward(*operands)
        yield "inference", {"out": back(out, inputs.lengths_q)}
        out, lse = native.attention_forward(*operands, return_lse=True)
        results = {"out": back(out, inputs.lengths_q)}
        if case.lse:
            results |= _lse_results(array(lse), inputs)
        dlse = None if dlse is None else dlse.double()
        needs = (True, True, True, inputs.bias is not None)
        dq, dk, dv, dbias = native.attention_backward(*operands, out, lse, dout, dlse, needs)
        results["dq"] = back(dq, inputs.lengths_q)
        results |= {"dk": back(dk, inputs.lengths_k), "dv": back(dv, inputs.lengths_k)}
        yield "training", results if dbias is None else results | {"dbias": array(dbias)}


def _laid_out(a: Tensor, lengths: Tensor, case: Case) -> Tensor:
    """(B, N, T, D) as the kernel takes it: padded with NaN, or (1, N, sum of lengths, D)."""
    if case.packed:
        a = torch.cat([row[:, :length] for row, length in zip(a, lengths, strict=True)], dim=1)[None]
    else:
        a = torch.where(_within(lengths, a), a, NAN)
    return a.transpose(1, 2).contiguous().transpose(1, 2) if case.heads_inside else a


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _padded(a: Tensor, lengths: Tensor) -> Tensor:
    """(1, N, sum of lengths, D) -> (B, N, longest, D), 0 at padding."""
    rows = a[0].split(lengths.tolist(), dim=1)
    return torch.stack([F.pad(row, (0, 0, 0, int(lengths.max()) - row.shape[1])) for row in rows])


def _lse_results(lse: np.ndarray, inputs: Inputs) -> dict[str, np.ndarray]:
    """lse, 0 at padding and where it is -inf, and apart from it where that is."""
    real = inputs.real[..., 0].cpu().numpy()
    none = real & (lse == -np.inf)
    return {"lse": np.where(real & ~none, lse, 0), "sees no key": none.astype(lse.dtype)}


def _sum_to(a: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return a.sum(axis=tuple(n for n, size in enumerate(shape) if size == 1), keepdims=True)


def free_axes(case: Case) -> dict[str, int]:
    """The axes along which the order does not matter, and their sizes."""
    sizes = {"D": case.head_dim, "E": case.value_dim}
    placed = case.is_causal or case.window != (None, None) or case.lengths or case.alibi or case.dropout_p
    return sizes if placed else sizes | {"L": case.queries, "S": case.keys}


FAMILY = Family("attention", cases, make_inputs, reference_results, torch_results, kernel_results, AXES, free_axes)

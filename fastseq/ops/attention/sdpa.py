"""Scaled dot product attention: torch's function over kernels that keep no scores in memory, and more than torch's."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import backends
from fastseq.backends.contract import Attention, Refused
from fastseq.ops import routing
from fastseq.ops.attention.function import PLAIN, apply_attention, attend
from fastseq.ops.attention.spec import (
    Integers,
    Operands,
    as_number,
    check_band,
    check_lengths,
    check_packed,
    check_slopes,
    check_softcap,
    fit,
    usual,
)
from fastseq.ops.routing import Route

# The op itself, not its name in torch.nn.functional: inside `fastseq.sdpa_kernels()` that one leads here.
torch_attention = torch._C._nn.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    lengths_q: Integers | None = None,
    lengths_k: Integers | None = None,
    cu_seqlens_q: Integers | None = None,
    cu_seqlens_k: Integers | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key.mT + mask) @ value, with torch's arguments, shapes, results and errors.

    B batch, N heads, Nk heads of key and value, L queries, S keys, E and Ev their sizes. The batch may be any number of
    axes, also none, and N may be missing; they broadcast.

    Args:
        query: (B, N, L, E).
        key: (B, Nk, S, E), where Nk is N or 1, or with `enable_gqa` a divisor of N.
        value: (B, Nk, S, Ev).
        attn_mask: broadcasts to (B, N, L, S) and has two axes or more. bool: True where a query may see a key; of the
            query's dtype: added to the scores, with a gradient in its own shape. Or a causal bias of
            torch.nn.attention.bias, which takes no memory.
        dropout_p: the probability with which a weight becomes zero; the others grow by 1 / (1 - dropout_p). Always
            applied. One number drawn from torch's default generator seeds the call, so `torch.manual_seed` repeats it,
            on any number of threads; the stream is not torch's.
        is_causal: query i sees the keys 0 ... i (upper left). Not with attn_mask.
        scale: 1 / sqrt(E) if None.
        enable_gqa: each head of key and value serves N / Nk heads of the query.

    Beyond torch:
        causal: "upper_left" is is_causal; "lower_right" lets the last query see the last key. Goes with attn_mask.
        window: (left, right), how many keys before and after its own place a query sees; None or -1 for all. The place
            is aligned as `causal` says, upper left without; with causal none after it are seen.
        lengths_q, lengths_k: B integers, for 4-D tensors: rows beyond them are padding, which nothing is read from;
            there the output is 0 and the lse -inf. They shift the lower right corner.
        cu_seqlens_q, cu_seqlens_k: B + 1 integers from 0 to the total length: sequences packed one after the other
            along L and S, without padding. query (N, total, E), or with a batch axis of 1; no attn_mask.
        softcap: a bound c for the scores, c * tanh(scores / c), before masks; None or 0 for none.
        alibi_slopes: (N,) or (B, N): slope times the distance of key and query is subtracted from the scores.
        return_lse: also return the logarithm of the sum of exp(scores), with a gradient.

    Returns:
        The output (B, N, L, Ev), in the memory layout of torch's: that of a 4-D query where Ev is E, nothing is
        broadcast or dropped and a mask needs no gradient, else contiguous. With `return_lse` also the lse (B, N, L), in
        float32 for bfloat16. A query that sees no key gives 0, and -inf for the lse.

    Finite inputs with finite scores give finite results, also with is_causal and a scale of 0 or less, where torch's
    may be NaN: masks come after the scale. NaN and infinities at keys that a query may not see may reach its results or
    not, and such a query the gradients of these keys, in torch as here, but not always alike; those in the padding
    beyond lengths reach nothing.

    Float32, float64 and bfloat16 on the CPU run in kernels, which compute in tiles and keep no scores. Other cases take
    torch's own op, or for the arguments beyond torch torch ops that hold all scores; `fastseq info` prints the table.

    Raises:
        TypeError: arguments of wrong types.
        ValueError: causal, window, lengths, cu_seqlens, softcap or alibi_slopes out of range.
        RuntimeError: what torch raises for shapes, dtypes and devices that do not fit, dropout_p out of [0, 1],
            attn_mask beside is_causal.

    Sources: Vaswani et al., "Attention is all you need", 2017; Milakov and Gimelshein, "Online normalizer calculation
        for softmax", 2018; Dao et al., "FlashAttention", 2022; Ainslie et al., "GQA", 2023; Press et al., "Train short,
        test long" (ALiBi), 2022; Beltagy et al., "Longformer" (window), 2020; Gemma team, "Gemma 2" (softcap), 2024;
        https://pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
        >>> out = fastseq.scaled_dot_product_attention(q, k, v, enable_gqa=True, causal="lower_right", lengths_k=[7, 5])
        >>> out.shape
        torch.Size([2, 8, 5, 16])
    """
    plain = (
        causal is window is lengths_q is lengths_k is cu_seqlens_q is cu_seqlens_k is softcap is alibi_slopes is None
        and not return_lse
    )
    if plain and type(dropout_p) is float and dropout_p == 0:
        out = _plain(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    _check_memory(query, key, value, attn_mask, enable_gqa)
    if plain and not is_causal and _causal_bias(attn_mask):
        alignment = _alignment(query, key, value, attn_mask)
        if alignment is not None:
            is_causal = alignment == "upper_left"
            causal = None if is_causal else alignment
            return scaled_dot_product_attention(
                query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, causal=causal
            )
    beyond = (causal, window, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, softcap, alibi_slopes)
    torchs = partial(
        torch_attention, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    route, backend = _route(query, key, value, attn_mask, alibi_slopes)
    if plain and (route is Route.TORCH or route is Route.GRAPH):
        return torchs()
    operands = None
    dropout_p, scale = as_number(dropout_p), as_number(scale)
    fits = isinstance(dropout_p, float | int) and 0 <= dropout_p <= 1 and isinstance(scale, float | int | None)
    fits = fits and isinstance(is_causal, bool) and isinstance(enable_gqa, bool)
    fits = fits and not (is_causal and attn_mask is not None)
    if fits and (route is Route.KERNELS or _alike(query, key, value, attn_mask)):
        operands = fit(query, key, value, attn_mask, enable_gqa)
    if operands is None:  # torch computes it, or names the mistake
        out = torchs()
        if plain:
            return out
        raise RuntimeError(_misfit(query, key, value, attn_mask, is_causal))
    depth = operands.q.shape[3]
    scale = (1 / math.sqrt(depth) if depth else 0.0) if scale is None else scale
    if plain:
        call = Attention(scale, right=0 if is_causal else None, dropout_p=dropout_p)
    else:
        call = _beyond_torch(scale, dropout_p, operands, attn_mask, is_causal, *beyond)
    q, k, v, mask, _ = operands
    bias, allowed = (None, mask) if mask is None or mask.dtype is torch.bool else (mask, None)
    if route is Route.KERNELS and not (q.numel() and k.numel() and v.numel()):
        if plain:
            return torchs()
        # Scores of no features are 0: one feature, of zeros, keeps them out of memory.
        q, k, v = (t if t.shape[3] else F.pad(t, (0, 1)) for t in (q, k, v))
        if not (q.numel() and k.numel()):
            route = Route.TORCH
    backend = backend if route is Route.KERNELS else None
    keep_layout = _keeps_layout(query, key, value, enable_gqa, dropout_p, bias)
    out, lse = attend(call, backend, q, k, v, bias, allowed, keep_layout=keep_layout, want_lse=return_lse)
    if v is not operands.v:
        out = out[..., :0]
    out = operands.restore(out)
    return (out, operands.restore(lse.to(torch.promote_types(out.dtype, torch.float32)))) if return_lse else out


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """The call as most make it, in four dimensions and without dropout; masks only where no gradient is recorded.

    None where the kernels do not serve it, or the arguments do not fit. The binding checks types, dtypes, devices,
    shapes and strides itself, and tiny calls are as long as their checks, so nothing is checked twice.
    """
    if routing.observed() or not (isinstance(is_causal, bool) and isinstance(enable_gqa, bool)):
        return None
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return None
    backend = backends.select_for("attention", query)
    if backend is None or query.is_nested or key.is_nested:
        return None
    shape, key_shape = query.shape, key.shape
    if len(shape) != 4 or len(key_shape) != 4 or (shape[1] != key_shape[1] and not enable_gqa):
        return None
    if scale is None:
        scale = 1 / math.sqrt(shape[3] or 1)
    elif type(scale) is not float or not scale:
        return None
    call = usual(scale, is_causal)
    differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    out = None if differentiable else torch.empty_like(query)
    try:
        if attn_mask is None:
            if differentiable:
                return apply_attention(call, backend, PLAIN, query, key, value)
            return backend.attention_forward(call, query, key, value, out=out)[0]
        if differentiable or is_causal or type(attn_mask) not in routing.PLAIN_TYPES or attn_mask.dim() < 2:
            return None
        if attn_mask.requires_grad and torch.is_grad_enabled():
            return None
        bias, allowed = (None, attn_mask) if attn_mask.dtype is torch.bool else (attn_mask, None)
        return backend.attention_forward(call, query, key, value, bias, allowed, out=out)[0]
    except Refused:
        return None


def _keeps_layout(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, dropout_p: float, bias: Tensor | None
) -> bool:
    """True where torch's result has the memory layout of the query: where its flash kernel would serve the call. So
    code that views the output finds what it finds in torch."""
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and (query.shape[1] == key.shape[1] or enable_gqa)
        and query.shape[3] == value.shape[3]
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and not dropout_p
        and not (bias is not None and bias.requires_grad and torch.is_grad_enabled())
    )


def _check_memory(query: object, key: object, value: object, mask: object, enable_gqa: object) -> None:
    """What torch's op does not ask: it reads and writes past the memory of the shorter of key and value, takes a mask
    on another device for memory, and divides by the number of heads."""
    for t in (query, key, value):
        if type(t) not in routing.PLAIN_TYPES or t.layout is not torch.strided or t.is_nested or t.dim() < 2:
            return
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            "key and value must have the same number of rows, "
            f"got a key of shape {tuple(key.shape)} and a value of shape {tuple(value.shape)}"
        )
    if enable_gqa and min(key.dim(), value.dim()) >= 3 and not (key.shape[-3] and value.shape[-3]):
        raise RuntimeError(
            "Number of heads in key and value must divide the number of heads in query, "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if type(mask) in routing.PLAIN_TYPES and mask.device != query.device:
        raise RuntimeError(f"query and attn_mask are not at the same device, found {query.device} and {mask.device}")


def _causal_bias(mask: object) -> bool:
    """True for the causal masks of torch.nn.attention.bias, whose import takes a second: it brings the compiler."""
    if mask is None or type(mask) in routing.PLAIN_TYPES or routing.is_compiling():
        return False
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and type(mask) is module.CausalBias


def _alignment(query: object, key: object, value: object, mask: Tensor) -> str | None:
    """What `causal` says as this causal bias does, None where torch has to speak."""
    if _route(query, key, value, None, None)[0] is not Route.KERNELS:
        return None
    if mask.seq_len_q == mask.seq_len_kv or mask.variant.name == "UPPER_LEFT":
        return "upper_left"  # whatever its size, as torch has it
    return "lower_right" if (*query.shape[-2:-1], *key.shape[-2:-1]) == (mask.seq_len_q, mask.seq_len_kv) else None


def overridden(arguments: Iterable[object]) -> bool:
    """True where a mode or a tensor subclass overrides torch's function called with these arguments, but for torch's
    causal biases, which `scaled_dot_product_attention` knows."""
    return routing.foreign_function_modes() or any(
        type(a) not in routing.PLAIN_TYPES and hasattr(type(a), "__torch_function__") and not _causal_bias(a)
        for a in arguments
    )


def _route(query: object, key: object, value: object, mask: object, slopes: object) -> tuple[Route, ModuleType | None]:
    tensors, others = [query, key, value], []
    if mask is not None:
        (others if isinstance(mask, Tensor) and mask.dtype is torch.bool else tensors).append(mask)
    if isinstance(slopes, Tensor):
        others.append(slopes)  # of any dtype
    if not all(isinstance(t, Tensor) for t in tensors):
        return Route.TORCH, None
    route, backend = routing.route("attention", tensors)
    if route is Route.KERNELS and not all(routing.plain(t, t.dtype, query) for t in others):
        return Route.TORCH, None
    return route, backend


def _alike(query: object, key: object, value: object, mask: object) -> bool:
    """True where dtypes and devices are what torch takes, as they are where the kernels serve a call."""
    tensors = (query, key, value)
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors):
        return False
    if any(t.dtype != query.dtype or t.device != query.device for t in tensors):
        return routing.any_autocast()
    return mask is None or (isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.float32, query.dtype))


def _misfit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> str:
    """What is wrong with arguments that torch computes something of."""
    if mask is not None and is_causal:
        return "Explicit attn_mask should not be set when is_causal=True; causal='upper_left' goes with a mask"
    shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (query, key, value, mask) if t is not None)
    return f"query, key, value and attn_mask do not fit together, got {shapes}"


def _beyond_torch(
    scale: float,
    dropout_p: float,
    operands: Operands,
    mask: Tensor | None,
    is_causal: bool,
    causal: str | None,
    window: tuple[int | None, int | None] | None,
    lengths_q: Integers | None,
    lengths_k: Integers | None,
    cu_seqlens_q: Integers | None,
    cu_seqlens_k: Integers | None,
    softcap: float | None,
    slopes: Tensor | None,
) -> Attention:
    left, right, lower_right = check_band(causal, is_causal, window)
    softcap = check_softcap(softcap, operands.q.dtype)
    batch = operands.q.shape[0]
    starts_q = starts_k = max_q = max_k = None
    if cu_seqlens_q is None and cu_seqlens_k is None:
        lengths_q, lengths_k = check_lengths(operands, lengths_q, lengths_k)
    else:
        if lengths_q is not None or lengths_k is not None:
            raise ValueError("lengths_q and lengths_k cannot be given with cu_seqlens, which say the lengths")
        q, k = check_packed(operands, mask, cu_seqlens_q, cu_seqlens_k)
        batch = q.starts.shape[0]
        (starts_q, lengths_q, max_q), (starts_k, lengths_k, max_k) = q, k
    return Attention(
        scale, softcap, left, right, lower_right, dropout_p, 0, lengths_q, lengths_k, starts_q, starts_k, max_q, max_k,
        check_slopes(slopes, operands.q, batch),
    )  # fmt: skip

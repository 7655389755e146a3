"""MultiheadAttention as a drop-in module."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastseq.nn.drop_in import DropIn
from fastseq.nn.packed_weights import PacksWeights
from fastseq.ops import linear, routing
from fastseq.ops.attention.function import attend, self_attend
from fastseq.ops.attention.sdpa import scaled_dot_product_attention
from fastseq.ops.attention.spec import Attention, usual
from fastseq.ops.autograd import needs_grad
from fastseq.ops.recurrent import checks

# Places of packed weights: the output projection; the input projection in one, two or three parts; three of their own.
_OUT, _SELF, _MEMORY, _THREE = range(4)
_EACH = range(1, 4)

_MIXED = (  # torch's text
    "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead."
)


class _Masks(NamedTuple):
    """The caller's masks, which broadcast to (B, N, L, S): added to the scores, and True where a query sees."""

    bias: Tensor | None
    allowed: Tensor | None

    def with_keys(self, count: int) -> _Masks:
        """With `count` more keys at the end, which every query sees."""
        if not count:
            return self
        bias = None if self.bias is None else F.pad(self.bias, (0, count))
        return _Masks(bias, None if self.allowed is None else F.pad(self.allowed, (0, count), value=True))

    def joined(self) -> Tensor | None:
        """Both as one, as torch's function takes them; of the size of both together."""
        if self.bias is None or self.allowed is None:
            return self.allowed if self.bias is None else self.bias
        return torch.where(self.allowed, self.bias, -math.inf)

    def dead(self) -> Tensor | None:
        """True for the queries that see no key, (B|1, N|1, L|1, 1); None if there are none."""
        if self.bias is None and self.allowed is None:
            return None
        joined = self.joined()
        seen = joined if joined.dtype is torch.bool else joined != -math.inf
        dead = ~seen.any(-1, keepdim=True)
        # Under transforms and compilers there are no values to branch on, and a device would have to be waited for.
        return dead if routing.observed() or not dead.is_cpu or dead.any() else None


_NO_MASKS = _Masks(None, None)
_WHOLE = ("in_proj_weight", "in_proj_bias")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """getattr, which nn.Module answers only after a search elsewhere. What is parametrized is no parameter."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


class Call(NamedTuple):
    """What serves a call of MultiheadAttention, and its parameters."""

    backend: ModuleType | None  # of projections and of self-attention in one; None: torch ops around the attention
    in_weights: list[Tensor]  # one for queries, keys and values, or three
    in_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None


class MultiheadAttention(DropIn, PacksWeights, nn.MultiheadAttention):
    """A drop-in `torch.nn.MultiheadAttention`: same arguments, parameters, initialization, state_dict, shapes, errors.

    Args:
        query: (L, B, E), (B, L, E) with batch_first, (L, E) unbatched.
        key, value: (S, B, kdim) and (S, B, vdim), or with their axes in the order of the query's.
        key_padding_mask: (B, S), or (S) unbatched; bool: True where a key is ignored; float: added to the scores.
        need_weights: True also returns the weights. Torch ops then compute L x S numbers for each head.
        attn_mask: (L, S) or (B * num_heads, L, S); bool: True where a query may not see a key; float: added.
        average_attn_weights: True returns the mean of the weights over the heads.
        is_causal: a hint that attn_mask is the causal mask. Where torch does not read the mask then, this does not
            either.

    Returns:
        The output, shaped as the query, and the weights after dropout, (B, L, S), or (B, num_heads, L, S) without
        averaging, without B if unbatched; None without need_weights.

    One result differs from torch's. A query that may see no key has weights of 0, and its output is the bias of the
    output projection. This holds in training and in evaluation, with need_weights and without; torch gives NaN in some
    of these cases. It also holds for calls that the kernels do not serve: other dtypes and devices, autocast,
    torch.compile, torch.func. It does not hold where torch's own forward runs: for nested tensors, tensor subclasses
    and FakeTensors; under modes that see the calls of torch functions (make_fx and torch.export have one); for
    parameters of several dtypes; for a float mask of another dtype than the query's; with FASTSEQ_BACKEND=torch.

    The kernels serve float32, float64 and bfloat16 on the CPU. Other calls run torch's forward, or torch ops where
    there are masks (`fastseq info` prints the table). The kernels also compute the projections where they are faster:
    without gradients from 4 rows and 2**20 multiplications on, with weights that are packed once (see
    `fastseq.freeze`); with gradients from 2**27 multiplications on; in bfloat16 always, where torch has no oneDNN for
    it. Dropout draws from a random stream of its own, seeded from torch's generator; with need_weights it is torch's.

    Raises:
        AssertionError: shapes or mask dtypes that do not fit; an embed_dim that num_heads does not divide.
        ValueError: embed_dim or num_heads not positive.
        RuntimeError: a 2-D or 3-D attn_mask of the wrong size, is_causal without attn_mask, dtypes that do not fit.

    Sources: Vaswani et al., "Attention is all you need", 2017;
        https://pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html

    Example:
        >>> import torch, fastseq
        >>> attention = fastseq.MultiheadAttention(16, 4, batch_first=True)
        >>> x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        >>> out, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)
        >>> out.shape
        torch.Size([2, 5, 16])
    """

    _torch_class = nn.MultiheadAttention
    _torch_calls = ("merge_masks",)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See the class."""
        call = self._call(query, key, value, key_padding_mask, attn_mask, is_causal)
        if call is None:
            with self._checked(query, key, value, key_padding_mask, attn_mask):
                return self._torchs(
                    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                )
        return self._attend(
            call, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _attend(
        self,
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` over the kernels, `call` being what `_call` answered for the same arguments."""
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        if (
            call.backend is not None
            and batched
            and not need_weights
            and self._is_plain(query is key is value, attn_mask, key_padding_mask, is_causal)
        ):
            qkv = self._linear(call.backend, _SELF, (query,), call.in_weights[0], call.in_bias)[0]
            options = usual(self.head_dim**-0.5, is_causal)
            out = self_attend(options, call.backend, self.num_heads, batch_first, qkv)
            return self._linear(call.backend, _OUT, (out,), call.out_weight, call.out_bias)[0], None
        q, k, v = (self._heads(x, batch_first) for x in self._projections(call, query, key, value))
        masks = _NO_MASKS
        # torch's reading of the hint
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if key_padding_mask is not None or not (is_causal or attn_mask is None):
            masks = self._masks(call.backend, None if is_causal else attn_mask, key_padding_mask, q)
        if call.bias_k is not None or self.add_zero_attn:
            k, v = self._with_added_keys(k, call.bias_k), self._with_added_keys(v, call.bias_v)
            masks = masks.with_keys(k.shape[2] - key.shape[-2 if batch_first else 0])
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _weighted(q, k, v, masks, self.head_dim**-0.5, dropout_p)
        elif call.backend is None or masks.bias is None or masks.allowed is None:
            out = scaled_dot_product_attention(q, k, v, masks.joined(), dropout_p, is_causal)
        else:
            out, _ = attend(Attention(self.head_dim**-0.5, dropout_p=dropout_p), call.backend, q, k, v, *masks)
        out = out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)
        (out,) = self._linear(call.backend, _OUT, (out.flatten(2),), call.out_weight, call.out_bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if batched:
            return out, weights
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    def _is_plain(self, same: bool, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool) -> bool:
        """True for a self-attention whose one projection the kernels can take as it is."""
        return (
            same
            and self._qkv_same_embed_dim
            and key_padding_mask is None
            and (is_causal or attn_mask is None)
            and self.bias_k is None
            and not self.add_zero_attn
            and not (self.training and self.dropout)
        )

    def _call(
        self,
        query: object,
        key: object,
        value: object,
        key_padding_mask: object,
        attn_mask: object,
        is_causal: bool,
    ) -> Call | None:
        """How a call is computed; None where torch's forward is to do it, or to name the mistake."""
        if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
            return None
        if self._replaced():
            return None
        masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
        if masks:  # torch's kernels read a mask of another device at an address that may be no memory here
            checks.check_devices((query, *(mask for mask in masks if isinstance(mask, Tensor))))
        if masks and not all(isinstance(m, Tensor) and m.dtype in (torch.bool, query.dtype) for m in masks):
            return None
        names = _WHOLE if self._qkv_same_embed_dim else _SEPARATE
        *weights, in_bias = (_parameter(self, name) for name in names)
        out_proj, bias_k, bias_v = self.out_proj, self.bias_k, self.bias_v
        out_weight, out_bias = _parameter(out_proj, "weight"), _parameter(out_proj, "bias")
        inputs = (query,) if query is key is value else (query, key, value)
        tensors = (*inputs, *weights, in_bias, out_weight, out_bias, bias_k, bias_v)
        _, backend = routing.route("attention", tensors)
        if backend is None:
            if routing.symbolic():
                return None
            checks.check_devices((*tensors, *masks))
            # Without masks torch's forward gives no row another result, but it has no forward-mode AD.
            if not (masks or routing.transformed()) or not routing.composes((*tensors, *masks)):
                return None
        elif not all(routing.plain(m, m.dtype, query) for m in masks):
            return None
        if (is_causal and attn_mask is None) or not self._fits(query, key, value, key_padding_mask, attn_mask):
            return None
        if not self._parameters_fit(weights, in_bias, out_weight, out_bias, bias_k, bias_v):
            return None
        if backend is not None and "linear" not in backend.SERVES:
            backend = None  # the backend of a GPU serves the attention alone, which selects it by itself
        return Call(backend, weights, in_bias, out_weight, out_bias, bias_k, bias_v)

    def _checked(
        self, query: object, key: object, value: object, key_padding_mask: object, attn_mask: object
    ) -> AbstractContextManager[object]:
        """A block for torch's forward, which does not take its fast path with what that one does not look at."""
        masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
        if routing.is_compiling() or not all(isinstance(t, Tensor) for t in (query, key, value, *masks)):
            return nullcontext()
        bias = _parameter(self, "in_proj_bias")
        looked_at = bias is None or bias.dtype is query.dtype
        if looked_at and (not masks or self._fits(query, key, value, key_padding_mask, attn_mask)):
            return nullcontext()
        return _Watched()

    def _fits(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """True where every shape is as it should be and there is something to compute."""
        rank = query.dim()
        if rank not in (2, 3) or not (key.dim() == value.dim() == rank and query.numel() and key.numel()):
            return False
        sizes = query.shape[-1], key.shape[-1], value.shape[-1]
        if sizes != (self.embed_dim, self.kdim, self.vdim) or key.shape[:-1] != value.shape[:-1]:
            return False
        rows = 0 if rank == 2 or not self.batch_first else 1  # the axis of L and S
        batch = () if rank == 2 else (query.shape[1 - rows],)
        queries, keys = query.shape[rows], key.shape[rows]
        if batch and key.shape[1 - rows] != batch[0]:
            return False
        if key_padding_mask is not None and key_padding_mask.shape != (*batch, keys):
            return False
        heads = math.prod(batch) * self.num_heads
        return attn_mask is None or tuple(attn_mask.shape) in ((queries, keys), (heads, queries, keys))

    def _parameters_fit(
        self,
        weights: list[Tensor | None],
        in_bias: Tensor | None,
        out_weight: Tensor | None,
        out_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
    ) -> bool:
        """True where all parameters have the shapes that the module gave them: of others, other heads would be made."""
        size = self.embed_dim
        if out_weight is None or out_weight.shape != (size, size) or any(w is None for w in weights):
            return False
        if self._qkv_same_embed_dim:
            fit = weights[0].shape == (3 * size, size)
        else:
            q, k, v = weights
            fit = q.shape == (size, size) and k.shape == (size, self.kdim) and v.shape == (size, self.vdim)
        fit = (
            fit
            and (in_bias is None or in_bias.shape == (3 * size,))
            and (out_bias is None or out_bias.shape == (size,))
        )
        if bias_k is None and bias_v is None:
            return fit
        return fit and bias_k is not None and bias_v is not None and bias_k.shape == bias_v.shape == (1, 1, size)

    def _projections(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values with all heads side by side, in as few products as their inputs allow."""
        backend, bias, size = call.backend, call.in_bias, self.embed_dim
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            each = zip(_EACH, (query, key, value), call.in_weights, biases, strict=True)
            return tuple(self._linear(backend, place, (x,), w, b)[0] for place, x, w, b in each)
        (weight,) = call.in_weights
        if query is key is value:
            return self._linear(backend, _SELF, (query,), weight, bias)[0].chunk(3, -1)
        if key is value:
            q, kv = self._linear(backend, _MEMORY, (query, key), weight, bias, (size, 2 * size))
            return (q, *kv.chunk(2, -1))
        return tuple(self._linear(backend, _THREE, (query, key, value), weight, bias, (size,) * 3))

    def _linear(
        self,
        backend: ModuleType | None,
        place: int,
        inputs: tuple[Tensor, ...],
        weight: Tensor,
        bias: Tensor | None,
        sizes: tuple[int, ...] = (),
    ) -> list[Tensor]:
        """Each of the inputs times its part of the weight, the rows that `sizes` tells, plus that of the bias."""

        if backend is None or not all(linear.packs(x, weight, bias) for x in inputs):
            if not sizes:
                return [linear.linear(backend, inputs[0], weight, bias)]
            return [linear.linear(backend, x, *p) for x, p in zip(inputs, _parts(weight, bias, sizes), strict=True)]
        threads = torch.get_num_threads()
        (panels,) = self._packed_weights().panels(
            backend,
            place,
            [(weight, bias)],
            lambda whole: [backend.pack_linear(*part, threads) for part in _parts(*whole, sizes)],
        )
        parts = _parts(weight, bias, sizes)
        panels = [None] * len(parts) if panels is None else panels
        each = zip(inputs, parts, panels, strict=True)
        return [linear.linear(backend, x, *part, panels) for x, part, panels in each]

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """(B, N, L, D) as a view of (B, L, E), (L, B, E) or (L, E)."""
        x = x.view(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            x = x.unsqueeze(0)
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _with_added_keys(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values (B, N, S, D) with `add_bias_kv` and `add_zero_attn`."""
        rows = [x]
        shape = (x.shape[0], self.num_heads, 1, self.head_dim)
        if bias is not None:
            rows.append(bias.reshape(1, self.num_heads, 1, self.head_dim).expand(shape))
        if self.add_zero_attn:
            rows.append(x.new_zeros(shape))
        return torch.cat(rows, 2)

    def _masks(self, backend: ModuleType | None, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> _Masks:
        """Both kept in their own sizes; only of two float masks is the sum made, (B, N, L, S)."""
        batch = q.shape[0]
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads)) if per_head else attn_mask[None, None]
        if padding is not None:
            padding = padding.reshape(batch, 1, 1, padding.shape[-1])
        if attn_mask is None or padding is None:
            mask = padding if attn_mask is None else attn_mask
            return _Masks(None, ~mask) if mask.dtype is torch.bool else _Masks(mask, None)
        if attn_mask.dtype is not padding.dtype and not routing.is_compiling():
            warnings.warn(_MIXED, UserWarning, stacklevel=4)
        if attn_mask.dtype is torch.bool:
            if padding.dtype is torch.bool:
                padding = torch.zeros_like(padding, dtype=q.dtype).masked_fill(padding, -math.inf)
            return _Masks(padding, ~attn_mask)
        if padding.dtype is not torch.bool and backend is not None and not needs_grad(padding):
            hidden = padding == -math.inf
            if (hidden | (padding == 0)).all():  # a bool mask in floats, as nn.TransformerEncoder hands it on
                padding = hidden
        return _Masks(attn_mask, ~padding) if padding.dtype is torch.bool else _Masks(attn_mask + padding, None)


def _parts(weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]]:
    """A weight and its bias, cut into rows of these sizes; whole without sizes."""
    if not sizes:
        return [(weight, bias)]
    biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
    return list(zip(weight.split(sizes), biases, strict=True))


def _weighted(q: Tensor, k: Tensor, v: Tensor, masks: _Masks, scale: float, dropout_p: float) -> tuple[Tensor, Tensor]:
    """The output (B, N, L, D) and its weights (B, N, L, S) after dropout."""
    scores = (q * scale) @ k.mT  # out of place from here on, as vmap needs it
    bias, allowed = masks
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    dead = masks.dead()
    if dead is None:
        weights = torch.softmax(scores, -1)
    else:  # filled before the softmax too: its gradient there would be NaN
        weights = torch.softmax(scores.masked_fill(dead, 0), -1).masked_fill(dead, 0)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


class _Watched(TorchFunctionMode):
    """A mode, as torch's modules leave their fast path where there is one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

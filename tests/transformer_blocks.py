"""Transformer blocks put together from the reference, with the parameters of torch's layers: forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from fastseq.reference import (
    layernorm_backward,
    layernorm_forward,
    multi_head_attention_backward,
    multi_head_attention_forward,
    temporal_affine_backward,
    temporal_affine_forward,
)


def array(parameter) -> np.ndarray:
    return parameter.detach().double().numpy()


def projections(attention: nn.MultiheadAttention) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """weights and biases as `multi_head_attention_forward` takes them."""
    if attention._qkv_same_embed_dim:
        weights = list(array(attention.in_proj_weight).reshape(3, attention.embed_dim, attention.embed_dim))
    else:
        weights = [array(getattr(attention, f"{name}_proj_weight")) for name in "qkv"]
    weights = [weight.T for weight in [*weights, array(attention.out_proj.weight)]]
    if attention.in_proj_bias is None:
        return weights, [np.zeros(attention.embed_dim)] * 4
    return weights, [*array(attention.in_proj_bias).reshape(3, -1), array(attention.out_proj.bias)]


@dataclass
class Block:
    """An encoder or a decoder block, batch first, without dropout.

    `layer` is an nn.TransformerEncoderLayer or an nn.TransformerDecoderLayer with relu, normed before or after.
    """

    layer: nn.Module
    caches: list = field(default_factory=list)

    gradients: dict[str, np.ndarray] = field(default_factory=dict)  # of the parameters, by name

    def _norm(self, n: int, x: np.ndarray) -> np.ndarray:
        norm = getattr(self.layer, f"norm{n}")
        out, cache = layernorm_forward(x, array(norm.weight), array(norm.bias), norm.eps)
        self.caches.append(cache)
        return out

    def _attend(self, attention: nn.MultiheadAttention, x: np.ndarray, source: np.ndarray, **options) -> np.ndarray:
        out, cache = multi_head_attention_forward(
            x, source, source, *projections(attention), attention.num_heads, **options
        )
        self.caches.append(cache)
        return out

    def _feed_forward(self, x: np.ndarray) -> np.ndarray:
        for linear in (self.layer.linear1, self.layer.linear2):
            x, cache = temporal_affine_forward(x, array(linear.weight).T, array(linear.bias))
            self.caches.append(cache)
            x = np.maximum(x, 0) if linear is self.layer.linear1 else x
        return x

    @property
    def _parts(self) -> int:
        """How many parts with a residual around them the block has."""
        return 3 if isinstance(self.layer, nn.TransformerDecoderLayer) else 2

    def forward(self, x: np.ndarray, memory: np.ndarray | None = None, is_causal: bool = False) -> np.ndarray:
        """x (N, T, D), memory (N, S, D) of a decoder -> (N, T, D)."""
        self.caches.clear()
        for n in range(1, self._parts + 1):
            inner = self._norm(n, x) if self.layer.norm_first else x
            if n == 1:
                part = self._attend(self.layer.self_attn, inner, inner, is_causal=is_causal)
            elif n < self._parts:
                part = self._attend(self.layer.multihead_attn, inner, memory)
            else:
                part = self._feed_forward(inner)
            x = x + part if self.layer.norm_first else self._norm(n, x + part)
        return x

    def _norm_backward(self, n: int, dout: np.ndarray) -> np.ndarray:
        dx, *affine = layernorm_backward(dout, self.caches.pop())
        self._keep(f"norm{n}", *affine)
        return dx

    def _attend_backward(self, name: str, dout: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        *dinputs, dweights, dbiases = multi_head_attention_backward(dout, self.caches.pop())
        *d_in, d_out = (dweight.T for dweight in dweights)
        self.gradients[f"{name}.in_proj_weight"] = np.concatenate(d_in)
        self.gradients[f"{name}.in_proj_bias"] = np.concatenate(dbiases[:3])
        self._keep(f"{name}.out_proj", d_out, dbiases[3])
        return tuple(dinputs)

    def _feed_forward_backward(self, dout: np.ndarray) -> np.ndarray:
        for name in ("linear2", "linear1"):
            cache = self.caches.pop()
            dx, dweight, dbias = temporal_affine_backward(dout, cache)
            self._keep(name, dweight.T, dbias)
            dout = dx * (cache[0] > 0) if name == "linear2" else dx
        return dout

    def _keep(self, name: str, dweight: np.ndarray, dbias: np.ndarray) -> None:
        self.gradients |= {f"{name}.weight": dweight, f"{name}.bias": dbias}

    def backward(self, dout: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """dout (N, T, D) -> dx (N, T, D) and dmemory (N, S, D) of a decoder; the parameters' are in `gradients`."""
        dmemory = None
        for n in range(self._parts, 0, -1):
            if not self.layer.norm_first:
                dout = self._norm_backward(n, dout)
            if n == self._parts:
                dinner = self._feed_forward_backward(dout)
            elif n == 1:
                dinner = sum(self._attend_backward("self_attn", dout))
            else:
                dinner, dkey, dvalue = self._attend_backward("multihead_attn", dout)
                dmemory = dkey + dvalue
            dout = dout + (self._norm_backward(n, dinner) if self.layer.norm_first else dinner)
        return dout, dmemory

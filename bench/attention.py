"""Calls of scaled dot-product attention beside torch's, and beside other libraries' where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from peers import gate, grad_mode
from shapes import LONGEST_TRAINING, PREFILLS, WINDOW, AttentionShape
from torch import Tensor

import fastseq

# What a case is, beside its shape. For decoding there are masks only: the one query sees the whole cache.
FORWARD = ("full", "causal", "float_mask", "bool_mask")
DECODE = ("full", "float_mask", "bool_mask")
TRAINING = ("full", "causal", "dropout", "mask_gradient")
DROPOUT = 0.1


@dataclass
class AttentionJob:
    """A function and its arguments: what is timed."""

    function: Callable[..., Tensor]
    tensors: dict[str, Tensor]  # query, key, value, and attn_mask if there is one
    options: dict[str, object]
    mode: str
    leaves: list[str] = field(default_factory=lambda: ["query", "key", "value"])  # that have a gradient

    def __post_init__(self):
        for name in self.leaves:
            self.tensors[name].requires_grad_(self.mode == "training")
        q, v = self.tensors["query"], self.tensors["value"]
        shape = (*q.shape[:-1], v.shape[-1])
        self.dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)

    @property
    def call(self) -> Callable[[], object]:
        """What is timed, without a frame of our own where the call is all there is. The caller sets the grad mode."""
        return self.step if self.mode == "training" else partial(self.function, **self.tensors, **self.options)

    def step(self) -> Tensor:
        for name in self.leaves:
            self.tensors[name].grad = None
        out = self.function(**self.tensors, **self.options)
        out.backward(self.dout)
        return out

    def results(self) -> dict[str, Tensor]:
        """The output and, after a training step, all gradients."""
        with grad_mode(self.mode):
            results = {"output": self.call().detach()}
        if self.mode == "training":
            results |= {f"gradient of {name}": self.tensors[name].grad for name in self.leaves}
        return results

    def of(self, function: Callable[..., Tensor], dtype: torch.dtype) -> AttentionJob:
        """The same call to another function, with copies of the tensors."""
        tensors = {
            name: a.detach().clone() if a.dtype == torch.bool else a.detach().to(dtype, copy=True)
            for name, a in self.tensors.items()
        }
        return replace(self, function=function, tensors=tensors)


def jobs(shape: AttentionShape, variant: str, mode: str, dtype: torch.dtype) -> tuple[AttentionJob, AttentionJob, int]:
    """Ours, torch's, and how many pairs of a query and a key are seen.

    Raises AssertionError if the two do not agree: no time is taken of a wrong result. Dropout is left out of that: its
    draws are not torch's.
    """
    generator = torch.Generator().manual_seed(0)
    kv_heads = shape.kv_heads or shape.heads

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype)

    tensors = {
        "query": normal(shape.B, shape.heads, shape.L, shape.D),
        "key": normal(shape.B, kv_heads, shape.S, shape.D),
        "value": normal(shape.B, kv_heads, shape.S, shape.D),
    }
    options: dict[str, object] = {"enable_gqa": True} if shape.grouped else {}
    leaves, seen = ["query", "key", "value"], torch.ones(shape.L, shape.S, dtype=torch.bool)
    if variant == "causal":
        options["is_causal"], seen = True, seen.tril()
    elif variant == "window":
        seen = seen.tril().triu(-WINDOW)
        options |= {"is_causal": True, "window": (WINDOW, 0)}
    elif variant == "bool_mask":
        tensors["attn_mask"] = torch.rand(shape.L, shape.S, generator=generator) < 0.8
    elif variant in ("float_mask", "mask_gradient"):
        tensors["attn_mask"] = normal(shape.L, shape.S)
        leaves += ["attn_mask"] if variant == "mask_gradient" else []
    ours = AttentionJob(fastseq.scaled_dot_product_attention, tensors, options, mode, leaves)
    torch_function = F.scaled_dot_product_attention
    if variant == "window":
        torch_function = partial(_torch_window, seen=seen)
    exact = ours.of(torch_function, torch.float32)
    gate(ours.results(), exact.results(), str(dtype).removeprefix("torch."))
    theirs = ours.of(torch_function, dtype)
    if variant == "dropout":
        ours, theirs = (replace(job, options=job.options | {"dropout_p": DROPOUT}) for job in (ours, theirs))
    return ours, theirs, int(seen.sum())


def _torch_window(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, **beyond_torch: object) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, seen)


def training_shapes() -> list[AttentionShape]:
    return [shape for shape in PREFILLS if shape.S <= LONGEST_TRAINING]


def openvino(job: AttentionJob, threads: int) -> dict[str, Callable[[], object]]:
    """The same forward in float32 by OpenVINO, if it is installed. Grouped heads it has not."""
    served = job.mode == "forward" and job.tensors["query"].dtype == torch.float32 and "enable_gqa" not in job.options
    if not served or find_spec("openvino") is None:
        return {}
    from openvino import Core, Model, opset13

    tensors = {name: a.numpy() for name, a in job.tensors.items()}
    inputs = {name: opset13.parameter(a.shape, a.dtype, name=name) for name, a in tensors.items()}
    attention = opset13.scaled_dot_product_attention(*inputs.values(), causal=job.options.get("is_causal", False))
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = Core().compile_model(Model([attention], list(inputs.values())), "CPU", config).create_infer_request()
    result = request.infer(tensors, share_inputs=True)[0]
    gate({"output": torch.from_numpy(result)}, {"output": job.call()}, "float32")
    return {"openvino": partial(request.infer, tensors, share_inputs=True, share_outputs=True)}

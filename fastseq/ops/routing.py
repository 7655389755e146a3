"""What the kernels serve, and the guards that stand before every kernel call.

`SERVICE` is the whole answer to "which calls are fast": one static table, printed by `fastseq info`. `route()` is the
same table as code. Nothing is tuned or measured at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastseq import backends

Function = TypeVar("Function", bound=Callable[..., Any])
PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))


class Route(Enum):
    """Who computes a call."""

    KERNELS = "kernels"
    TORCH = "torch"  # torch's own op; with lengths, reset or return_states: formula.py
    COMPOSITE = "composite"  # torch ops step by step, which every transform of torch.func understands
    GRAPH = "graph"  # one opaque op in the graph of torch.compile; the kernels run inside


class Service(NamedTuple):
    """One row of `SERVICE`."""

    case: str
    served_by: str
    reason: str


SERVICE: tuple[Service, ...] = (
    Service("CPU tensors in float32, float64 or bfloat16", "kernels", "forward and backward, any sizes"),
    Service("lengths=, reset=, return_states=, step()", "kernels", "same dtypes; other cases: torch ops, step by step"),
    Service(
        "Recurrent, RecurrentCell of a cell of fastseq.cells", "kernels", "a cell without: torch ops, step by step"
    ),
    Service("PackedSequence, sorted or not", "kernels", "rows active at each step, no padding computed"),
    Service("scaled_dot_product_attention, with masks and dropout", "kernels", "same dtypes; no scores in memory"),
    Service("causal=, window=, lengths, cu_seqlens, softcap, ...", "kernels", "other cases: torch ops with all scores"),
    Service(
        "MultiheadAttention, Transformer layers", "kernels", "attention, sums with norms, projections where faster"
    ),
    Service("layer_norm with a residual, LayerNorm", "kernels", "float32, float64, where faster: from 2**18 elements"),
    Service("need_weights=True, dropout_p=1", "torch ops", "all scores in memory"),
    Service("torch.compile, RNN / LSTM / GRU", "kernels", "one opaque op per layer; backward runs forward again"),
    Service("torch.compile, cells, attention, layer norm", "torch", "torch compiles its own op"),
    Service("torch.export, jit.trace, make_fx", "torch", "the graph must run without fastseq"),
    Service("float16, complex and mixed dtypes", "torch", "no kernels for them"),
    Service(
        "CUDA tensors, RNN, LSTM, GRU, cells, attention",
        "torch",
        "kernels with FASTSEQ_CUDA=on; not tested on a GPU yet",
    ),
    Service("other CUDA tensors; MPS, meta and sparse ones", "torch", "no kernels for them yet"),
    Service("proj_size > 0", "torch", "no projection in the kernels; fuse leaves such layers alone"),
    Service("cells: strided last axis, weights not contiguous", "torch", "a copy would cost as much as the step"),
    Service("an axis of size 0", "torch", "nothing to compute"),
    Service("autocast", "torch", "result dtypes are torch's, which differ by cell"),
    Service(
        "tensor subclasses, nested and FakeTensors, modes", "torch", "plain memory only; but causal biases: kernels"
    ),
    Service(
        "forward-mode AD, torch.func (vmap, grad, jvp, ...)",
        "torch ops",
        "all cells and attention, with torch's limits",
    ),
    Service("create_graph=True", "torch", "the kernels' backward cannot be differentiated"),
    Service("gradients given batched (is_grads_batched) or as subclasses", "torch", "as for inputs"),
)


def _guard(name: str) -> Callable[[], bool]:
    """A private predicate of torch. Where a version lacks it the guard answers True: torch's path, slower but right."""
    return getattr(torch._C, name, lambda: True)


is_compiling = torch.compiler.is_compiling
transforms_active = _guard("_are_functorch_transforms_active")
dispatch_modes = _guard("_len_torch_dispatch_stack")
function_modes = _guard("_len_torch_function_stack")
tracing = _guard("_get_tracing_state")
any_autocast = _guard("_is_any_autocast_enabled")
# A flag of the module up to torch 2.13, one of each thread behind a function since.
fx_tracing = getattr(
    _symbolic_trace, "_get_is_fx_tracing", partial(getattr, _symbolic_trace, "_is_fx_tracing_flag", True)
)
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_proxy_mode = torch._C._get_dispatch_mode
_has_storage = getattr(torch._C, "_has_storage", lambda _: False)
# (True) is not None under `torch.autograd.graph.saved_tensors_hooks`, which checkpointing and offloading use.
saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


_frames = torch._C._dynamo.eval_frame


def inlined(function: Function) -> Function:
    """Lets torch.compile compile a function, and what it calls, only as a part of a caller that it compiles.

    Where the caller runs outside a graph, Dynamo would compile each function that it calls on its own. `is_compiling`
    is true there, so what the function decides for a graph would be used outside it. Dynamo reads this setting from
    the code object. `torch.compiler.disable` would break the graphs of callers, cost microseconds in every call and
    import the compiler, which takes a second.
    """
    if hasattr(_frames, "_FrameExecStrategy"):  # a detail of torch; without it graphs are right, but more and smaller
        skip = _frames._FrameAction.SKIP
        _frames.set_code_exec_strategy(function.__code__, _frames._FrameExecStrategy(skip, skip))
    return function


def foreign_function_modes() -> bool:
    """True where a mode sees the calls of torch's functions. The mode of torch.set_default_device, which stays on the
    stack for good, does not count: it touches factory functions only.
    """
    return not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def transformed() -> bool:
    """True inside torch.func transforms and under forward-mode AD."""
    return bool(transforms_active()) or forward_ad._current_level >= 0


def batched() -> bool:
    """True inside torch.func.vmap, whatever is inside or outside of that."""
    return not is_compiling() and any(i.key() == TransformType.Vmap for i in get_interpreter_stack() or ())


def proxying() -> bool:
    """True inside make_fx, whose graph would keep what Python reads as constants."""
    return bool(dispatch_modes()) and _proxy_mode(_PROXY) is not None


def symbolic() -> bool:
    """True while torch.fx traces a model, by calling it with no values."""
    return fx_tracing() and not is_compiling()


@inlined
def observed() -> bool:
    """True where something must see torch's own calls: a compiler, a transform, a mode, a tracer, autocast."""
    return (
        is_compiling()
        or transforms_active()
        or forward_ad._current_level >= 0
        or dispatch_modes() > 0
        or (function_modes() > 0 and foreign_function_modes())
        or tracing() is not None
        or fx_tracing()
        or any_autocast()
    )


def plain(tensor: Tensor, dtype: torch.dtype, beside: Tensor) -> bool:
    """True where a kernel may read the memory of `tensor`: strided, of this dtype, on the device of `beside`, no lazy
    neg bit.
    """
    return all_plain((tensor,), dtype, beside)


def all_plain(tensors: Iterable[Tensor | None], dtype: torch.dtype, beside: Tensor) -> bool:
    """`plain` of every tensor: in one call, as a call costs as much as what it asks of a tensor."""
    types, strided, cpu = PLAIN_TYPES, torch.strided, beside.is_cpu
    device = None if cpu else beside.device  # to compare devices takes three times as long as to ask for the CPU
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in types
            or tensor.dtype is not dtype
            or not (tensor.is_cpu if cpu else tensor.device == device)
            or tensor.layout is not strided
            or tensor.is_nested
            or tensor.is_neg()
        ):
            return False
    return True


@inlined
def composes(tensors: Iterable[Tensor | None]) -> bool:
    """True where torch ops of ours may stand for one of torch's functions: no subclass or mode is there to see that
    function called, and the tensors fit together."""
    if not kernels_selected("attention") or (not is_compiling() and function_modes() and foreign_function_modes()):
        return False
    given = [t for t in tensors if t is not None]
    first = given[0]
    return first.is_floating_point() and all(
        type(t) in PLAIN_TYPES
        and t.layout is torch.strided
        and not t.is_nested
        and t.device == first.device
        and t.dtype in (first.dtype, torch.bool)
        for t in given
    )


def kernels_differentiate(grads: Iterable[Tensor | None]) -> bool:
    """True where the kernels' backward may take these gradients: they are plain, and nothing must see what it does.

    The answer of the forward does not hold here, as the caller gives `create_graph` and `is_grads_batched` to the
    backward. The tensors of the latter belong to no transform that torch.func knows of, but have no storage.
    """
    if torch.is_grad_enabled() or transforms_active() or dispatch_modes():
        return False
    for grad in grads:  # a generator in all() costs a tiny step of attention 5 % of its time
        if grad is None:
            continue
        if not (plain(grad, grad.dtype, grad) and _has_storage(grad)):
            return False
    return True


def kernels_selected(op: str, device: str = "cpu", dtype: torch.dtype | None = None) -> bool:
    """True where a backend serves the op. torch.compile treats the answer as a constant of the graph."""
    return backends.select(op, device, dtype) is not None


kernels_selected._dynamo_marked_constant = True  # what torch._dynamo.assume_constant_result does, without its import


@inlined
def route(
    op: str, tensors: Sequence[Tensor | None], states: Sequence[Tensor | None] = ()
) -> tuple[Route, ModuleType | None]:
    """Who computes a call of an op on these tensors, and with which backend.

    Args:
        op: as of `backends.select`.
        tensors: the input first, then weights and biases; all must have the input's dtype.
        states: initial states, which may also be float32 beside a bfloat16 input.
    """
    if observed():
        return _observed_route(op, [t for t in (*tensors, *states) if t is not None]), None
    first = tensors[0]
    backend, dtype = backends.select_for(op, first), first.dtype
    if backend is None or not all_plain(tensors, dtype, first):
        return Route.TORCH, None
    for state in states:
        wide = dtype is torch.bfloat16 and state is not None and state.dtype is torch.float32
        if state is not None and not plain(state, torch.float32 if wide else dtype, first):
            return Route.TORCH, None
    return Route.KERNELS, backend


def _observed_route(op: str, tensors: list[Tensor]) -> Route:
    if transformed():  # also inside a graph: an op of ours has no rule for them
        return Route.COMPOSITE
    if is_compiling():
        first = tensors[0]
        device = first.device.type
        served = not torch.compiler.is_exporting() and not torch.is_autocast_enabled(device)
        served = served and kernels_selected(op, device, first.dtype)
        served = served and all(
            t.device.type == device and t.dtype is first.dtype and type(t) in PLAIN_TYPES for t in tensors
        )
        return Route.GRAPH if served else Route.TORCH
    return Route.TORCH

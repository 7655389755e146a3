"""The error messages. Where torch has a text for the same mistake, ours begins with it; then comes what was given."""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import repr
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastseq.ops import routing
from fastseq.ops.limits import readable, seen

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence

    from fastseq.ops.recurrent.spec import Cell, Direction, States


def check_tensor(name: str, value: object) -> None:
    """`value` must be a Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def check_steps(input: Tensor, steps: int) -> None:
    """There must be a step."""
    if steps == 0:
        raise RuntimeError(
            f"Expected sequence length to be larger than 0 in RNN, got input of shape {tuple(input.shape)}"
        )


def check_reset(reset: object, shape: tuple[int, ...], device: torch.device) -> None:
    """`reset` must be bool and have `shape`, the first axes of the input."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a bool Tensor, got {type(reset).__name__}")
    if reset.dtype is not torch.bool:
        raise TypeError(f"reset must be a bool Tensor, got dtype {reset.dtype}")
    if tuple(reset.shape) != shape:
        raise ValueError(f"reset must have the shape of the input's first axes, {shape}, got {tuple(reset.shape)}")
    if reset.device != device:
        raise RuntimeError(f"Input and reset tensors are not at the same device, found {device} and {reset.device}")


def check_not_packed(**given: object) -> None:
    """lengths and reset describe padded input; a PackedSequence has lengths of its own and no (T, B) layout."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} cannot be given with a PackedSequence")


def check_packed(packed: PackedSequence) -> int:
    """The fields of a PackedSequence, which anyone can make by hand: torch's ops take most of them as they are. Returns
    the batch size."""
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    check_tensor("data of a PackedSequence", data)
    check_tensor("batch_sizes of a PackedSequence", batch_sizes)
    if batch_sizes.device.type != "cpu":
        raise ValueError(f"batch_sizes should always be on CPU, got {batch_sizes.device}")
    if batch_sizes.dtype is not torch.int64:
        raise RuntimeError(f"expected scalar type Long for batch_sizes but found {batch_sizes.dtype}")
    if batch_sizes.dim() != 1 or not batch_sizes.shape[0]:
        raise RuntimeError(f"batch_sizes must have shape (T,), T > 0, got {tuple(batch_sizes.shape)}")
    if data.dim() and batch_sizes.shape[0] > data.shape[0]:  # before they are read: expanded ones are without end
        raise RuntimeError(
            f"batch_sizes must sum to the {data.shape[0]} rows of data, got {batch_sizes.shape[0]} positive ones"
        )
    sizes = _values(batch_sizes)
    if sizes is None:
        return int(batch_sizes[0])
    batch = sizes[0]
    if sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(f"batch_sizes must be positive and never rise, got {repr(sizes)}")
    if data.dim() and sum(sizes) != data.shape[0]:
        raise RuntimeError(f"batch_sizes must sum to the {data.shape[0]} rows of data, got {sum(sizes)}")
    given = [("sorted_indices", sorted_indices), ("unsorted_indices", unsorted_indices)]
    orders = [_order(name, indices, batch, data.device) for name, indices in given if indices is not None]
    if len(orders) == 2 and None not in orders and [orders[0][i] for i in orders[1]] != list(range(batch)):
        found = f"{repr(orders[1])} for {repr(orders[0])}"
        raise RuntimeError(f"unsorted_indices must be the inverse of sorted_indices, got {found}")
    return batch


def _order(name: str, indices: object, batch: int, device: torch.device) -> list[int] | None:
    """The values, a permutation; None of another device than the CPU, which would be waited for."""
    check_tensor(name, indices)
    if indices.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"index_select(): Expected dtype int32 or int64 for index, got {indices.dtype} for {name}")
    if indices.shape != (batch,):
        raise RuntimeError(f"{name} must have shape {(batch,)}, got {tuple(indices.shape)}")
    if indices.device != device:
        raise RuntimeError(f"Input and {name} are not at the same device, found {device} and {indices.device}")
    order = _values(indices) if indices.is_cpu else None
    if order is not None and sorted(order) != list(range(batch)):
        raise RuntimeError(f"{name} must be a permutation of 0 .. {batch - 1}, got {repr(order)}")
    return order


def _values(tensor: Tensor) -> list[int] | None:
    """To be checked and no more: see `limits.seen`."""
    if readable(tensor):
        return tensor.tolist()
    array = seen(tensor)
    return None if array is None else array.tolist()


def check_hx(cell: Cell, hx: object, function: str, or_none: bool = False) -> States:
    """The states in `hx`: h, or a tuple of h and the cell's others; None for zeros, where allowed."""
    names = "h", *cell.states
    if hx is None and or_none:
        return (None,) * len(names)
    if not cell.states:
        check_tensor("hx", hx)
        return (hx,)
    wanted = f"({', '.join(names)})"
    if not isinstance(hx, tuple | list):
        raise TypeError(f"{function}: hx must be a tuple of Tensors, {wanted}, got {type(hx).__name__}")
    if len(hx) != len(names):
        count = "two" if len(names) == 2 else len(names)
        raise RuntimeError(f"{function} expects {count} hidden states, {wanted}, got a sequence of {len(hx)}")
    for name, state in zip(names, hx, strict=True):
        check_tensor(name, state)
    return tuple(hx)


def states_misfit(states: Sequence[Tensor | None], sizes: Sequence[tuple[int, ...]]) -> str | None:
    """What is wrong with the sizes of initial states, in torch's words."""
    for i, (state, size) in enumerate(zip(states, sizes, strict=True)):
        if state is not None and state.shape != size:
            what = "Expected hidden size" if len(states) == 1 else f"Expected hidden[{i}] size"
            return f"{what} {size}, got {list(state.shape)}"
    return None


def unlike(tensors: Sequence[Tensor | None], others: int) -> str | None:
    """The first tensor with another device or dtype than the input's, which comes first, then states, then, from place
    `others` on, parameters. Autocast casts: under it dtypes may differ.
    """
    first, autocast = tensors[0], routing.any_autocast()
    for place, t in enumerate(tensors):
        if t is None or ((autocast or t.dtype is first.dtype) and t.device == first.device):
            continue
        what = "hidden" if place < others else "parameter"
        if t.device != first.device:
            return (
                f"Input and {what} tensors are not at the same device, "
                f"found input tensor at {first.device} and {what} tensor at {t.device}"
            )
        return (
            f"Input and {what} tensors are not the same dtype, "
            f"found input tensor with {first.dtype} and {what} tensor with {t.dtype}"
        )
    return None


def check_devices(tensors: Sequence[Tensor | None]) -> None:
    """All must be on one device. Torch's ops compute something of meta tensors beside others."""
    device = tensors[0].device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but found at least two devices, {device} and {tensor.device}!"
            )


def check_states(input: Tensor, states: Sequence[Tensor | None], or_float32: bool = False) -> None:
    """Dtype and device of initial states, where torch's own op does not look at them."""
    for state in states:
        if state is None:
            continue
        if state.device != input.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {input.device} and hidden tensor at {state.device}"
            )
        fits = state.dtype is input.dtype or (or_float32 and state.dtype is torch.float32)
        if not fits and not routing.any_autocast():
            raise RuntimeError(
                "Input and hidden tensors are not the same dtype, "
                f"found input tensor with {input.dtype} and hidden tensor with {state.dtype}"
            )


def check_sequence(cell: Cell, input: Tensor, states: States, weights: Direction) -> None:
    """The arguments of fastseq.rnn, lstm and gru."""
    name, count = cell.mode, len(cell.gates)
    initial = dict(zip((f"{state}_0" for state in ("h", *cell.states)), states, strict=True))
    tensors = {**dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights, strict=True)), **initial}
    check_tensor("input", input)
    for key, tensor in tensors.items():
        if tensor is not None or key.startswith("w"):
            check_tensor(key, tensor)
    if input.dim() != 3:
        raise ValueError(f"{name}: Expected input to be 3D, (T, B, I), got {input.dim()}D instead")
    w_ih, w_hh, b_ih, b_hh = weights
    if w_hh.dim() != 2 or w_hh.shape[0] != count * w_hh.shape[1]:
        raise RuntimeError(f"w_hh must have shape ({count} * H, H), got {tuple(w_hh.shape)}")
    hidden = w_hh.shape[1]
    if w_ih.dim() != 2 or w_ih.shape[0] != count * hidden:
        raise RuntimeError(f"w_ih must have shape ({count * hidden}, I), got {tuple(w_ih.shape)}")
    if input.shape[2] != w_ih.shape[1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {input.shape[2]}"
        )
    if (b_ih is None) is not (b_hh is None):
        raise ValueError(f"b_ih and b_hh must both be given or both be None, got {b_ih!r} and {b_hh!r}")
    for key in ("b_ih", "b_hh"):
        if tensors[key] is not None and tensors[key].shape != (count * hidden,):
            raise RuntimeError(f"{key} must have shape ({count * hidden},), got {tuple(tensors[key].shape)}")
    for key, state in initial.items():
        if state is not None and state.shape != (input.shape[1], hidden):
            raise RuntimeError(f"Expected hidden size {(input.shape[1], hidden)}, got {list(state.shape)} for {key}")
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        wide_state = key in initial and (input.dtype, tensor.dtype) == (torch.bfloat16, torch.float32)
        if tensor.dtype != input.dtype and not wide_state and not routing.any_autocast():
            raise ValueError(f"RNN input dtype ({input.dtype}) does not match {key} dtype ({tensor.dtype})")
        if tensor.device != input.device:
            raise RuntimeError(
                f"Input and {'hidden' if key in initial else 'parameter'} tensors are not at the same device, "
                f"found input at {input.device} and {key} at {tensor.device}"
            )
    first = states[0]
    for key, state in initial.items():
        if first is not None and state is not None and state.dtype != first.dtype:
            raise ValueError(f"h_0 dtype ({first.dtype}) does not match {key} dtype ({state.dtype})")
    check_steps(input, input.shape[0])


def step_misfit(cell: Cell, x: object, states: Sequence[object], weights: Sequence[object]) -> str | None:
    """What is wrong with the arguments of a step, in torch's words; None where all is right."""
    named = {"input": x, **dict(zip(("h", *cell.states), states, strict=True))}
    named |= dict(zip(("w_ih", "w_hh", "b_ih", "b_hh", *cell.parameters), weights, strict=True))
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("input", "w_ih", "w_hh")):
            return f"{name} must be a Tensor, got {type(tensor).__name__}"
    w_ih, w_hh, *vectors = weights
    for name, tensor in (("input", x), ("w_ih", w_ih), ("w_hh", w_hh)):
        if tensor.dim() != 2:
            return f"{name} must have 2 dimensions, got {tensor.dim()}"
    (batch, inputs), hidden = x.shape, w_hh.shape[1]
    if inputs != w_ih.shape[1]:
        return f"input has inconsistent input_size: got {inputs} expected {w_ih.shape[1]}"
    for i, state in enumerate(states):
        if state is None:
            continue
        if state.dim() > 0 and state.shape[0] != batch:
            return f"Input batch size {batch} doesn't match hidden{i} batch size {state.shape[0]}"
        if state.dim() > 1 and state.shape[1] != hidden:
            return f"hidden{i} has inconsistent hidden_size: got {state.shape[1]}, expected {hidden}"
        if state.dim() != 2:
            return f"hidden{i} must have 2 dimensions, got {state.dim()}"
    gates = len(cell.gates)
    rows = gates * hidden
    for name, tensor in (("w_ih", w_ih), ("w_hh", w_hh)):
        if tensor.shape[0] != rows:
            return f"{name} must have {rows} rows, {gates} * H, got {tensor.shape[0]}"
    sizes = rows, rows, *[hidden] * len(cell.parameters)
    for name, tensor, size in zip(("b_ih", "b_hh", *cell.parameters), vectors, sizes, strict=True):
        if tensor is not None and tensor.shape != (size,):
            return f"{name} must have shape ({size},), got {tuple(tensor.shape)}"
    h, *others = states
    others = [None if s is not None and s.device == x.device else s for s in others]  # of any dtype: torch promotes
    return unlike((x, h, *others, *weights), 1 + len(states))


def check_step(input: object, weights: Direction) -> None:
    """The arguments of fastseq.rnn_cell, lstm_cell and gru_cell beside the states: tensors."""
    check_tensor("input", input)
    for key, tensor in zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights, strict=True):
        if tensor is not None or key.startswith("w"):
            check_tensor(key, tensor)


def check_no_projection(kwargs: dict[str, object]) -> None:
    """RNN and GRU refuse the argument, whatever its value."""
    if "proj_size" in kwargs:
        raise ValueError(
            f"proj_size argument is only supported for LSTM, not RNN or GRU, got proj_size={kwargs['proj_size']!r}"
        )

"""Recurrent kernels: the cases, and the results of the reference, of torch and of every kernel for one.

One layer in one direction at a time, straight at the backend, so that nothing can fall back to torch unseen. Per case:
forward of the inference kernels with packed weights and with the weights as they are, then forward and all gradients
of the training kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastseq.ops import CELLS
from fastseq.ops.recurrent import formula
from fastseq.reference.torch_layout import recurrent_forward_backward
from fastseq.tools.verify.comparison import Family
from fastseq.tools.verify.tensors import array

# B rows, I inputs, H units; the gates are parts of H units each.
AXES = {
    "x": "BI", "h_0": "BH", "c_0": "BH", "w_ih": "HI", "w_hh": "HH", "b_ih": "H", "b_hh": "H", "reset": "B",
    "y": "BH", "h_n": "BH", "c_n": "BH", "c_all": "BH",
}  # fmt: skip
AXES |= {f"d{name}": letters for name, letters in AXES.items()}


@dataclass(frozen=True)
class Case:
    """Sizes and options of one run."""

    steps: int
    batch: int
    input_size: int
    hidden_size: int
    bias: bool = True
    reverse: bool = False
    lengths: bool = False  # of every size from 0 to T, unsorted
    packed: bool = False  # the layout of a PackedSequence; its lengths are at least 1
    reset: bool = False
    float_state: bool = False  # bfloat16 only: states in float32
    scale: float = 1.0  # of x: large ones drive the gates into saturation

    def __str__(self) -> str:
        options = [name for name in ("reverse", "lengths", "packed", "reset", "float_state") if getattr(self, name)]
        options += [] if self.bias else ["bias=False"]
        options += [] if self.scale == 1 else [f"x * {self.scale:g}"]
        sizes = f"T={self.steps} B={self.batch} I={self.input_size} H={self.hidden_size}"
        return ", ".join([sizes, *options])

    @property
    def every_cell_state(self) -> bool:
        """Whether an LSTM returns all its cell states, and takes gradients for them."""
        return (self.lengths or self.reset) and not self.packed


# Odd and even, one and many, below and above the widest vector, and one sum that is longer than a block of 256.
SHAPES = ((1, 1, 1, 1), (1, 1, 64, 64), (1, 7, 5, 63), (5, 1, 65, 33), (6, 3, 63, 65), (4, 33, 32, 64), (9, 8, 7, 16))
LONG_SUMS = (3, 2, 300, 257)


def cases(dtype: str) -> Iterator[Case]:
    """The default set for a dtype."""
    for shape in SHAPES:
        plain = Case(*shape)
        yield plain
        yield replace(plain, reverse=True)
        yield replace(plain, lengths=True)
        yield replace(plain, reset=True, bias=False)
        yield replace(plain, packed=True, reverse=True)
        yield replace(plain, lengths=True, reset=True, reverse=True)
        if dtype == "bfloat16":
            yield replace(plain, float_state=True)
    yield Case(*LONG_SUMS)
    yield Case(*LONG_SUMS, lengths=True, reset=True)
    yield Case(12, 5, 31, 48, scale=40.0)
    yield Case(40, 2, 17, 24)
    if dtype != "float64":  # large enough for a team of threads, too large for longdouble
        yield Case(20, 32, 64, 256)


@dataclass
class Inputs:
    """What a run takes. Every value is representable in the kernels' dtype, so that all sides see the same numbers."""

    x: Tensor  # (T, B, I)
    h_0: Tensor  # (B, H)
    c_0: Tensor | None  # lstm only, as dc_n and dc_all
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    dy: Tensor  # (T, B, H)
    dh_n: Tensor
    dc_n: Tensor | None
    dc_all: Tensor | None
    lengths: Tensor | None  # (B,)
    reset: Tensor | None  # (T, B)

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """In torch's order."""
        return self.w_ih, self.w_hh, self.b_ih, self.b_hh

    @property
    def active(self) -> Tensor:
        """(T, B) on the CPU, False at padding."""
        steps, batch = self.x.shape[:2]
        if self.lengths is None:
            return torch.ones(steps, batch, dtype=torch.bool)
        return torch.arange(steps)[:, None] < self.lengths

    @property
    def order(self) -> Tensor:
        """(B,) the rows by falling length."""
        return self.lengths.argsort(descending=True, stable=True)


def make_inputs(cell: str, case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs of a case, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    T, B, H = case.steps, case.batch, case.hidden_size
    spec = CELLS[cell]
    gates, other = len(spec.gates) * H, bool(spec.states)  # one at most, c, in what the kernels have

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    lengths = None
    if case.lengths or case.packed:
        shortest = 1 if case.packed else 0
        lengths = torch.randint(shortest, T + 1, (B,), generator=generator)
        lengths[torch.randint(B, (1,), generator=generator)] = T
    x = normal(T, B, case.input_size, scale=case.scale)
    w_ih, w_hh = normal(gates, case.input_size, scale=case.input_size**-0.5), normal(gates, H, scale=H**-0.5)
    biases = (normal(gates, scale=0.5), normal(gates, scale=0.5)) if case.bias else (None, None)
    if spec.kinks:
        # Next to a kink a rounding error flips a gradient between 0 and 1, and no two results can be compared. So
        # the first feature drives every unit well to one side or the other, and the rest is small beside it.
        w_ih *= 0.25 / case.scale
        w_hh *= 0.25
        x[..., 0] = 4.0
        w_ih[:, 0] = torch.randn(gates, generator=generator).sign()
    return Inputs(
        x=x,
        h_0=normal(B, H),
        c_0=normal(B, H) if other else None,
        w_ih=w_ih,
        w_hh=w_hh,
        b_ih=biases[0],
        b_hh=biases[1],
        dy=normal(T, B, H),
        dh_n=normal(B, H),
        dc_n=normal(B, H) if other else None,
        dc_all=normal(T, B, H) if other and case.every_cell_state else None,
        lengths=lengths,
        reset=torch.rand(T, B, generator=generator) < 0.3 if case.reset else None,
    )


def reference_results(cell: str, case: Case, inputs: Inputs, dtype: type) -> dict[str, np.ndarray]:
    """Outputs and gradients by name, computed in `dtype`."""

    def exact(a: Tensor | None):
        return None if a is None else a.double().numpy()

    results = recurrent_forward_backward(
        cell,
        exact(inputs.x),
        exact(inputs.h_0),
        exact(inputs.c_0),
        [exact(weight) for weight in inputs.weights],
        exact(inputs.dy),
        exact(inputs.dh_n),
        exact(inputs.dc_n),
        exact(inputs.dc_all),
        lengths=None if inputs.lengths is None else inputs.lengths.numpy(),
        reset=None if inputs.reset is None else inputs.reset.numpy(),
        reverse=case.reverse,
        dtype=dtype,
    )
    return _without_padding(results, inputs)


def torch_results(cell: str, case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """The same by torch: its sequence op where that can, else its cell in a loop, or the formula of a cell that it
    lacks."""
    leaves = [inputs.x, inputs.h_0, inputs.c_0, *inputs.weights]
    leaves = [None if a is None else a.clone().requires_grad_() for a in leaves]
    x, h_0, c_0, *weights = leaves
    state = (h_0,) if c_0 is None else (h_0, c_0)
    if case.lengths or case.packed or case.reset or CELLS[cell].sequence_op is None:
        y, state_n, c_all = _torch_loop(cell, case, x, state, weights, inputs)
    else:
        y, state_n, c_all = *_torch_sequence(cell, case, x, state, weights), None

    outputs, gradients = [y, *state_n], [inputs.dy, inputs.dh_n, inputs.dc_n][: 1 + len(state_n)]
    if inputs.dc_all is not None:
        outputs, gradients = [*outputs, c_all], [*gradients, inputs.dc_all]
    torch.autograd.backward(outputs, gradients)

    names = ("dx", "dh_0", "dc_0", "dw_ih", "dw_hh", "db_ih", "db_hh")
    results = {"y": y, "h_n": state_n[0]}
    if c_0 is not None:
        results["c_n"] = state_n[1]
    if inputs.dc_all is not None:
        results["c_all"] = c_all
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None:  # a state that no output depends on has no gradient: zero
            results[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return _without_padding({name: array(result) for name, result in results.items()}, inputs)


def _torch_sequence(cell: str, case: Case, x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor | None]):
    hx = [part[None] for part in state]
    x = x.flip(0) if case.reverse else x
    weights = [weight for weight in weights if weight is not None]
    spec = CELLS[cell]
    hx = hx if spec.states else hx[0]
    y, *state_n = spec.sequence_op(x, hx, weights, case.bias, 1, 0.0, True, False, False)
    return y.flip(0) if case.reverse else y, [part[0] for part in state_n]


def _torch_loop(cell: str, case: Case, x: Tensor, state: tuple[Tensor, ...], weights: list, inputs: Inputs):
    spec = CELLS[cell]
    active = inputs.active[..., None].to(x.device)
    cut = torch.zeros_like(active) if inputs.reset is None else inputs.reset[..., None] & active
    if case.reverse:  # the cut between t and t + 1 is met on the way from t + 1 to t
        cut = torch.cat([cut[1:], torch.zeros_like(cut[:1])])
    all_states = [None] * case.steps
    for t in reversed(range(case.steps)) if case.reverse else range(case.steps):
        before = [torch.where(cut[t], 0, part) for part in state]
        if spec.step_op is None:
            after = formula.step(spec, x[t], tuple(before), tuple(weights))
        else:
            after = spec.step_op(x[t], before if spec.states else before[0], *weights)
            after = after if spec.states else (after,)
        state = [torch.where(active[t], new, old) for new, old in zip(after, state, strict=True)]
        all_states[t] = [torch.where(active[t], new, 0) for new in after]
    y, *c_all = (torch.stack(parts) for parts in zip(*all_states, strict=True))
    return y, state, c_all[0] if c_all else None


def kernel_results(
    cell: str, backend, case: Case, inputs: Inputs, isa: str
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(kernel, results) of every kernel of a backend, that of the CPU or of CUDA, that serves the case.

    Padding holds NaN, and so do outputs before each run, so that a value shows which is read where it must not be, or
    is not written where it must be.
    """
    active, nan = inputs.active, float("nan")
    state_dtype = torch.float32 if case.float_state else inputs.x.dtype
    batch_sizes = order = None
    if inputs.lengths is not None:
        batch_sizes, order = active.sum(1), inputs.order

    def laid_out(a: Tensor | None) -> Tensor | None:
        """A sequence as the kernel takes it: padded with NaN, or packed."""
        if a is None or inputs.lengths is None:
            return a
        return _packed(a, active, order) if case.packed else torch.where(active[..., None].to(a.device), a, nan)

    def poisoned(size: int) -> Tensor:
        return torch.full((*laid_out(inputs.x).shape[:-1], size), nan, dtype=inputs.x.dtype, device=inputs.x.device)

    def back(results: dict[str, Tensor | None]) -> dict[str, np.ndarray]:
        results = {name: array(a) for name, a in results.items() if a is not None}
        return results if case.packed else _without_padding(results, inputs)

    h_0, c_0, dh_n, dc_n = (
        None if a is None else a.to(state_dtype) for a in (inputs.h_0, inputs.c_0, inputs.dh_n, inputs.dc_n)
    )
    options = {
        "batch_sizes": batch_sizes,
        "order": order,
        "packed": case.packed,
        "reverse": case.reverse,
        "reset": inputs.reset,
        "float_state": case.float_state,
    }
    step_only = case.steps == 1 and inputs.lengths is None and not case.reset
    with backend.use_isa(isa), backend.filled_with_nan():
        forward = (cell, laid_out(inputs.x), h_0, c_0, inputs.weights)
        kernels = [("inference", None, False), ("training", None, True)]
        if "recurrent" in backend.PACKS:
            kernels.insert(0, ("inference, packed weights", backend.pack(cell, inputs.weights), False))
        for kernel, panels, save in kernels:
            y, h_n, c_n, c_all, saved = backend.recurrent_forward(
                *forward,
                **options,
                panels=panels,
                save=save,
                y=poisoned(case.hidden_size),
                return_c=inputs.dc_all is not None,
            )
            results = {"y": y, "h_n": h_n, "c_n": c_n, "c_all": c_all}
            if save:
                gradients = backend.recurrent_backward(
                    *forward,
                    y,
                    saved,
                    isa,
                    **options,
                    dy=laid_out(inputs.dy),
                    dh_n=dh_n,
                    dc_n=dc_n,
                    dc_all=laid_out(inputs.dc_all),
                    needs=(True, True, c_0 is not None, True, True, case.bias, case.bias),
                    dx=poisoned(case.input_size),
                )
                names = ("dx", "dh_0", "dc_0", "dw_ih", "dw_hh", "db_ih", "db_hh")
                results |= dict(zip(names, gradients, strict=True))
            yield kernel, back(results)
            if step_only:
                y, h_n, c_n, _ = backend.recurrent_step(
                    cell,
                    inputs.x[0],
                    h_0,
                    c_0,
                    *inputs.weights,
                    torch.get_num_threads(),
                    save=save,
                    panels=panels,
                    float_state=case.float_state,
                )
                yield f"step, {kernel}", back({"y": y[None], "h_n": h_n, "c_n": c_n})


SEQUENCES = ("y", "c_all", "dx")


def _packed(a, active: Tensor, order: Tensor):
    """The active rows of a (T, B, N) tensor or array, step by step, the longest first."""
    steps, rows = active[:, order].numpy().nonzero()
    return a[steps, order.numpy()[rows]]


def _without_padding(results: dict[str, np.ndarray], inputs: Inputs) -> dict[str, np.ndarray]:
    """The sequences packed: padding takes no part in the comparison."""
    if inputs.lengths is None:
        return results
    return {name: _packed(a, inputs.active, inputs.order) if name in SEQUENCES else a for name, a in results.items()}


def free_axes(case: Case) -> dict[str, int]:
    """The axes along which the order does not matter, and their sizes."""
    sizes = {"I": case.input_size, "H": case.hidden_size}
    return sizes if case.lengths or case.packed else sizes | {"B": case.batch}


def family(cell: str) -> Family:
    """The kernels of a cell."""
    return Family(
        "recurrent",
        cases,
        partial(make_inputs, cell),
        partial(reference_results, cell),
        partial(torch_results, cell),
        partial(kernel_results, cell),
        AXES,
        free_axes,
    )

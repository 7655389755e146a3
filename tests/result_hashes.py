"""Hashes of what every kernel computes, bit by bit: results and gradients, for every instruction set and dtype.

    python tests/result_hashes.py                  the cases of tests/result_hashes.txt
    python tests/result_hashes.py --all            all cases: a minute
    python tests/result_hashes.py --check FILE     compares with such a listing instead, and fails where they differ
    python tests/result_hashes.py --write          writes tests/result_hashes.txt

A line is a case: name, instruction set, dtype, hash. Inputs depend on the name of the case alone, neither on torch nor
on other cases, and only public names of fastseq are used: so the same file compares two trees, one with the other's
listing. Each case comes in parts: "inference" without gradients, "training" with them, "gradients".

In tests/result_hashes.txt is what depends on the sources alone, not on the compiler, its flags, libm or torch. The
kernels are compiled with -ffp-contract=off, have their own exp and tanh and fix the order of each sum: g++ 11 -O2 and
g++ 12 -O3 agree in all cases. Not in the table are attention's lse and the gradients, which are computed from it: its
logarithm is libm's, whose last bit depends on whether the machine has a fused multiply-add. Nor is dropout, as torch
draws the seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import ops
from fastseq.backends import native

TABLE = Path(__file__).with_suffix(".txt")
Key = tuple[str, str, str]  # name/part, instruction set, dtype
PARTS = ("inference", "training", "gradients")
TABLED_PARTS = ("inference", "gradients")  # what training returns is inference's, bit by bit


class Draw:
    """Numbers from [-1, 1), a stream for each name: PCG64's raw output, which no version of NumPy changes."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.bits = np.random.PCG64(int.from_bytes(blake2b(name.encode(), digest_size=8).digest()))
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = (self._raw(*shape) >> np.uint64(11)) * 2.0**-52 - 1.0
        return torch.from_numpy(values * scale).to(dtype or self.dtype)

    def leaf(self, *shape: int, **options: Any) -> Tensor:
        return self(*shape, **options).requires_grad_()

    def one_in(self, n: int, *shape: int) -> Tensor:
        return torch.from_numpy(self._raw(*shape) % np.uint64(n) == 0)

    def lengths(self, batch: int, steps: int) -> Tensor:
        """Unsorted; the last is `steps`, and where there are three the one in the middle 0."""
        lengths = torch.from_numpy((self._raw(batch) % np.uint64(steps + 1)).astype(np.int64))
        lengths[-1] = steps
        if batch > 2:
            lengths[batch // 2] = 0
        return lengths

    def _raw(self, *shape: int) -> np.ndarray:
        return self.bits.random_raw(int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True)
class Case:
    """`build` draws the inputs: it returns the call, and the leaves of which there are gradients, () for none."""

    name: str
    build: Callable[[Draw], tuple[Callable[[], Any], list[Tensor]]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16)
    tabled: tuple[str, ...] = ()  # the parts in TABLE


# ---- recurrent layers

# The functions, with their options; those of other cells come from their specs. A new one changes no line of another.
CELLS: dict[str, tuple[Callable[..., tuple], dict[str, str]]] = {
    "rnn_tanh": (fastseq.rnn, {}),
    "rnn_relu": (fastseq.rnn, {"nonlinearity": "relu"}),
    "lstm": (fastseq.lstm, {}),
    "gru": (fastseq.gru, {}),
}
MODULES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    **dict.fromkeys(("rnn_tanh", "rnn_relu"), (fastseq.RNN, fastseq.RNNCell)),
    "lstm": (fastseq.LSTM, fastseq.LSTMCell),
    "gru": (fastseq.GRU, fastseq.GRUCell),
}


def of_spec(cell: Any) -> Callable[..., tuple]:
    """What `fastseq.gru` is to the GRU."""
    from fastseq.ops.recurrent.function import run_sequence  # an older tree has another

    options = {"lengths": None, "reset": None, "reverse": False, "return_states": False}

    def function(x: Tensor, hx: Any, *weights: Tensor, **given: Any) -> tuple:
        return run_sequence(cell, x, hx, (*weights, None, None)[:4], **options | given)

    return function


for _name, _cell in ops.CELLS.items():
    if _name not in CELLS:
        CELLS[_name] = of_spec(_cell), {}
        MODULES[_name] = partial(fastseq.nn.Recurrent, _cell), partial(fastseq.nn.RecurrentCell, _cell)
SIZES = (  # T, B, I, H
    (1, 1, 1, 1),
    (1, 1, 33, 65),
    (1, 7, 65, 33),
    (7, 1, 33, 65),
    (7, 33, 65, 7),
    (33, 7, 1, 33),
    (7, 65, 7, 1),
    (65, 1, 7, 129),
    (5, 33, 65, 129),
    (2, 3, 1100, 33),  # more terms than a block of the sums has: of a product
    (130, 33, 7, 33),  # and of a weight's gradient
    (3, 1030, 9, 8),
)
VARIANTS: dict[str, set[str]] = {
    "no_bias": {"no_bias"},
    "states": {"states"},
    "reset": {"reset"},
    "reverse": {"reverse"},
    "lengths": {"lengths"},
    "return_states": {"return_states"},
    "all": {"states", "reset", "reverse", "lengths", "return_states"},
}


def recurrent(cell: str, sizes: tuple[int, int, int, int], options: set[str]) -> Callable[[Draw], Any]:
    """One layer in one direction, by the function."""
    function, chosen = CELLS[cell]
    gates = len(ops.CELLS[cell].gates)
    T, B, I, H = sizes  # noqa: E741

    def build(draw: Draw) -> tuple[Callable[[], Any], list[Tensor]]:
        scale = H**-0.5
        leaves = [draw.leaf(T, B, I), draw.leaf(gates * H, I, scale=scale), draw.leaf(gates * H, H, scale=scale)]
        biases = [] if "no_bias" in options else [draw.leaf(gates * H, scale=scale) for _ in range(2)]
        states = []
        if options & {"states", "float_states"}:
            dtype = torch.float32 if "float_states" in options else None
            states = [draw.leaf(B, H, dtype=dtype) for _ in range(2 if cell == "lstm" else 1)]
        hx = None if not states else tuple(states) if cell == "lstm" else states[0]
        keywords: dict[str, Any] = dict(chosen)
        if "reset" in options:
            keywords["reset"] = draw.one_in(4, T, B)
        if "lengths" in options:
            keywords["lengths"] = draw.lengths(B, T)
        keywords |= {name: True for name in ("reverse", "return_states") if name in options}
        x, *weights = leaves
        return lambda: function(x, hx, *weights, *biases, **keywords), leaves + biases + states

    return build


def module_of(cell: str, draw: Draw, *sizes: int, **options: Any) -> Any:
    """The module with drawn parameters."""
    options |= {"nonlinearity": cell.removeprefix("rnn_")} if cell.startswith("rnn_") else {}
    module = MODULES[cell][0](*sizes, dtype=draw.dtype, **options)
    return set_parameters(module, draw)


def set_parameters(module: Any, draw: Draw) -> Any:
    """`module`, whose parameters, in the order of their names, are drawn."""
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(draw(*parameter.shape, scale=0.2))
    return module


def deep(cell: str, how: str) -> Callable[[Draw], Any]:
    """Two layers, by the module; but for "forward" in two directions."""
    T, B, I, H = 7, 5, 33, 65  # noqa: E741

    def build(draw: Draw) -> tuple[Callable[[], Any], list[Tensor]]:
        first = how == "batch_first"
        module = module_of(cell, draw, I, H, num_layers=2, bidirectional=how != "forward", batch_first=first)
        x = draw.leaf(*((B, T) if first else (T, B)), I)
        keywords: dict[str, Any] = {}
        if how in ("lengths", "batch_first"):
            keywords = {"lengths": draw.lengths(B, T), "return_states": True}
        if how == "reset":
            keywords = {"reset": draw.one_in(4, T, B)}
        lengths = draw.lengths(B, T).clamp(min=1)

        def call() -> Any:
            return module(pack_padded_sequence(x, lengths, enforce_sorted=False) if how == "packed" else x, **keywords)

        return call, [x, *module.parameters()]

    return build


def steps(cell: str, frozen: bool) -> Callable[[Draw], Any]:
    """Step after step of two layers, each with the state of the one before."""

    def build(draw: Draw) -> tuple[Callable[[], Any], list[Tensor]]:
        module, x = module_of(cell, draw, 33, 65, num_layers=2), draw(5, 3, 33)
        if frozen:
            fastseq.freeze(module)

        def call() -> Any:
            state, outputs = None, []
            for x_t in x:
                y, state = module.step(x_t, state)
                outputs.append(y)
            return outputs, state

        return call, [] if frozen else [*module.parameters()]

    return build


def frozen_sequence(cell: str) -> Callable[[Draw], Any]:
    """A frozen module, of packed weights."""

    def build(draw: Draw) -> tuple[Callable[[], Any], list[Tensor]]:
        module, x = fastseq.freeze(module_of(cell, draw, 33, 65, bidirectional=True)), draw(7, 5, 33)
        return lambda: module(x), []

    return build


def one_step(cell: str, batch: int, state: bool) -> Callable[[Draw], Any]:
    """One step of a cell."""
    named = {"nonlinearity": cell.removeprefix("rnn_")} if cell.startswith("rnn_") else {}

    def build(draw: Draw) -> tuple[Callable[[], Any], list[Tensor]]:
        module = set_parameters(MODULES[cell][1](33, 65, dtype=draw.dtype, **named), draw)
        x = draw.leaf(batch, 33)
        states = [draw.leaf(batch, 65) for _ in range(2 if cell == "lstm" else 1)] if state else []
        hx = None if not states else tuple(states) if cell == "lstm" else states[0]
        return lambda: module(x, hx), [x, *states, *module.parameters()]

    return build


def recurrent_cases(cell: str) -> Iterator[Case]:
    """Those of a cell."""
    for sizes in SIZES:
        size = "x".join(map(str, sizes))
        yield Case(f"{cell}/{size}", recurrent(cell, sizes, set()), tabled=TABLED_PARTS * (sizes == (7, 33, 65, 7)))
    for sizes in ((7, 5, 33, 65), (6, 70, 9, 7)):
        size = "x".join(map(str, sizes))
        for variant, options in VARIANTS.items():
            tabled = TABLED_PARTS * (variant == "all" and sizes[3] == 65)
            yield Case(f"{cell}/{size}/{variant}", recurrent(cell, sizes, options), tabled=tabled)
        floats = {"float_states", "return_states"}
        yield Case(f"{cell}/{size}/float_states", recurrent(cell, sizes, floats), (torch.bfloat16,))
    for how in ("forward", "bidirectional", "lengths", "batch_first", "reset", "packed"):
        yield Case(f"{cell}/module/{how}", deep(cell, how))
    yield Case(f"{cell}/module/frozen", frozen_sequence(cell))
    yield Case(f"{cell}/step", steps(cell, False))
    yield Case(f"{cell}/step/frozen", steps(cell, True))
    for batch in (1, 7, 65):
        yield Case(f"{cell}/cell/{batch}", one_step(cell, batch, False))
        tabled = TABLED_PARTS * (batch == 1)
        yield Case(f"{cell}/cell/{batch}/state", one_step(cell, batch, True), tabled=tabled)


# ---- attention

Options = Callable[[Draw], dict[str, Any]]
ATTENTION: dict[str, Options] = {
    "plain": lambda draw: {},
    "causal": lambda draw: {"is_causal": True},
    "lower_right": lambda draw: {"causal": "lower_right"},
    "window": lambda draw: {"window": (9, 4)},
    "causal_window": lambda draw: {"causal": "lower_right", "window": (9, None)},
    "bool_mask": lambda draw: {"attn_mask": ~draw.one_in(4, 2, 1, 33, 65)},
    "float_mask": lambda draw: {"attn_mask": draw.leaf(2, 4, 33, 65)},
    "shared_mask": lambda draw: {"attn_mask": draw.leaf(33, 65)},
    "row_mask": lambda draw: {"attn_mask": draw.leaf(2, 1, 1, 65)},
    "lengths": lambda draw: {"lengths_q": [33, 20], "lengths_k": [7, 65], "causal": "lower_right"},
    "no_keys": lambda draw: {"lengths_k": [0, 40]},
    "softcap": lambda draw: {"softcap": 2.0},
    "alibi": lambda draw: {"alibi_slopes": draw(4, scale=0.5), "is_causal": True},
    "scale": lambda draw: {"scale": 0.7},
    "lse": lambda draw: {"return_lse": True},
    "dropout": lambda draw: {"dropout_p": 0.2},
}
TABLED = ("plain", "lower_right", "window", "bool_mask", "float_mask", "lengths", "softcap", "alibi")


def attention(options: Options, q: tuple[int, ...], k: tuple[int, ...], strided: bool = False) -> Callable[[Draw], Any]:
    """The function. A mask that is a leaf gets a gradient. `strided`: heads beside each other in memory."""

    def build(draw: Draw) -> tuple[Callable[[], Any], list[Tensor]]:
        def leaf(shape: tuple[int, ...]) -> Tensor:
            if strided:
                return draw(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2).requires_grad_()
            return draw.leaf(*shape)

        tensors, keywords = [leaf(q), leaf(k), leaf(k)], options(draw)
        mask = keywords.get("attn_mask")

        def call() -> Any:
            torch.manual_seed(5)  # dropout's
            return fastseq.scaled_dot_product_attention(*tensors, **keywords)

        return call, tensors + ([mask] if mask is not None and mask.requires_grad else [])

    return build


def attention_cases() -> Iterator[Case]:
    """All of attention."""
    forward = PARTS[:1]
    for name, options in ATTENTION.items():
        for depth in (8, 33, 64, 300):
            tabled = forward * ((name in TABLED and depth == 33) or (name == "plain" and depth == 64))
            q, k = (2, 4, 33, depth), (2, 4, 65, depth)
            yield Case(f"attention/{name}/{depth}", attention(options, q, k), tabled=tabled)
    plain, gqa = ATTENTION["plain"], {"enable_gqa": True}
    square, long = (2, 4, 33, 33), (2, 4, 129, 33)
    yield Case("attention/strided", attention(plain, square, square, strided=True))
    yield Case("attention/long", attention(lambda draw: {"is_causal": True}, (1, 2, 300, 64), (1, 2, 300, 64)))
    yield Case("attention/gqa", attention(lambda draw: gqa, (2, 6, 33, 33), (2, 2, 65, 33)), tabled=forward)
    yield Case(
        "attention/gqa/causal", attention(lambda draw: gqa | {"is_causal": True}, (2, 6, 33, 33), (2, 2, 65, 33))
    )
    packed = {"cu_seqlens_q": [0, 7, 7, 33], "cu_seqlens_k": [0, 20, 21, 65]}
    for causal in (None, "lower_right"):
        options = packed | {"causal": causal}
        shapes = (4, 33, 33), (4, 65, 33)
        yield Case(f"attention/cu_seqlens/{causal}", attention(lambda draw, o=options: o, *shapes), tabled=forward)
    for depth in (33, 64, 128):
        for keys in (1, 7, 257, 2100):
            tabled = forward * (keys == 257 and depth == 64)
            q, k = (2, 4, 1, depth), (2, 4, keys, depth)
            yield Case(f"attention/decode/{keys}/{depth}", attention(plain, q, k), tabled=tabled)
    cached = gqa | {"lengths_k": [100, 257]}
    yield Case("attention/decode/gqa", attention(lambda draw: cached, (2, 8, 1, 64), (2, 2, 257, 64)), tabled=forward)
    for name in ("float_mask", "shared_mask"):
        shape = (2, 4, 129, 129) if name == "float_mask" else (129, 129)
        yield Case(f"attention/{name}/long", attention(lambda draw, s=shape: {"attn_mask": draw.leaf(*s)}, long, long))


# ---- layer normalization and linear layers, of sizes from which on the kernels run


def layer_norm(shape: tuple[int, ...], residual: bool, affine: bool) -> Callable[[Draw], Any]:
    def build(draw: Draw) -> tuple[Callable[[], Any], list[Tensor]]:
        x, added = draw.leaf(*shape), draw.leaf(*shape) if residual else None
        weights = [draw.leaf(shape[-1]), draw.leaf(shape[-1])] if affine else []
        leaves = [x, *weights] + ([added] if residual else [])
        return lambda: fastseq.layer_norm(x, shape[-1:], *weights, residual=added), leaves

    return build


def projections(bias: bool) -> Callable[[Draw], Any]:
    """The packed weights of MultiheadAttention, without gradients."""

    def build(draw: Draw) -> tuple[Callable[[], Any], list[Tensor]]:
        module = fastseq.MultiheadAttention(65, 5, bias=bias, batch_first=True, dtype=draw.dtype)
        set_parameters(module.eval(), draw)
        x, memory = draw(4, 65, 65), draw(4, 70, 65)
        return lambda: [module(x, x, x, need_weights=False)[0], module(x, memory, memory, need_weights=False)[0]], []

    return build


def other_cases() -> Iterator[Case]:
    dtypes = torch.float32, torch.float64
    for residual in (False, True):
        for affine in (False, True):
            name = f"layer_norm{'/residual' * residual}{'/affine' * affine}"
            for shape in ((17, 65, 1025), (33, 4097, 9)):
                tabled = TABLED_PARTS * (residual and affine and shape[2] == 1025)
                size = "x".join(map(str, shape))
                yield Case(f"{name}/{size}", layer_norm(shape, residual, affine), dtypes, tabled)
    for bias in (True, False):
        yield Case(f"linear{'' if bias else '/no_bias'}", projections(bias), dtypes, PARTS[:1])


def cases() -> Iterator[Case]:
    for cell in CELLS:
        yield from recurrent_cases(cell)
    yield from attention_cases()
    yield from other_cases()


# ---- hashes


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [] if results is None else [tensor for result in results for tensor in flat(result)]


def digest(tensors: list[Tensor | None]) -> str:
    """Of the dtypes, shapes and bytes, in the order of the axes."""
    found = blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is None:
            found.update(b"none")
            continue
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def from_kernels(outputs: list[Tensor]) -> bool:
    """True where a torch.autograd.Function of Python is in the graph: torch's own layers have none."""
    nodes, seen = [t.grad_fn for t in outputs], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return False


def hashes_of(case: Case, dtype: torch.dtype, everything: bool) -> Iterator[tuple[str, str, str]]:
    """(part, instruction set, hash) of a case."""
    call, leaves = case.build(Draw(case.name, dtype))
    grads: list[Tensor] = []
    for isa in native.isas():
        with native.use_isa(isa):
            if everything or "inference" in case.tabled:
                with torch.no_grad():
                    yield "inference", isa, digest(flat(call()))
            if not leaves or not (everything or "gradients" in case.tabled):
                continue
            with torch.enable_grad():
                outputs = flat(call())
            if everything:
                yield "training", isa, digest(outputs)
            outputs = [t for t in outputs if t.requires_grad]
            if not from_kernels(outputs):
                raise AssertionError(f"{case.name} in {dtype} does not run the kernels")
            if not grads:
                draw = Draw(f"{case.name}/gradients", dtype)
                grads = [draw(*t.shape, dtype=t.dtype) for t in outputs]
            yield "gradients", isa, digest(list(torch.autograd.grad(outputs, leaves, grads, allow_unused=True)))


def listing(everything: bool = False) -> dict[Key, str]:
    """Hashes of the cases in TABLE, or of all."""
    found = {}
    for case in cases():
        for dtype in case.dtypes if everything or case.tabled else ():
            for part, isa, value in hashes_of(case, dtype, everything):
                found[f"{case.name}/{part}", isa, str(dtype).removeprefix("torch.")] = value
    return found


def read(path: Path) -> dict[Key, str]:
    """A listing; a line that begins with # is a comment."""
    lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    return {(name, isa, dtype): value for name, isa, dtype, value in lines}


def differences(found: dict[Key, str], expected: dict[Key, str]) -> list[str]:
    """A line for each case that differs or that one side lacks, of the instruction sets of this machine."""
    here = [key for key in {**expected, **found} if key[1] in native.isas()]
    keys = [key for key in here if found.get(key) != expected.get(key)]
    return [f"{' '.join(key)}: {expected.get(key, 'not listed')} -> {found.get(key, 'no such case')}" for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(description="Hashes of what the kernels compute; see the top of this file.")
    parser.add_argument("--all", action="store_true", help="all cases, not only those of the table")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with this listing")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if options.write and (options.all or options.check):
        parser.error("--write goes with no other option")
    if options.write and (lacking := {isa for _, isa, _ in read(TABLE)} - set(native.isas())):
        parser.error(f"the table has rows of {', '.join(sorted(lacking))}, which this machine cannot run")
    found = listing(options.all)
    if options.check:
        different = differences(found, read(options.check))
        print(*different, f"{len(different)} of {len(found)} cases differ", sep="\n")
        sys.exit(bool(different))
    lines = [f"{' '.join(key)} {value}" for key, value in found.items()]
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")
    else:
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()

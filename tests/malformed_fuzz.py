"""Runs calls that one or two mutations each have made of valid ones: `python malformed_fuzz.py FIRST COUNT [review]`.

A call must raise an error of a kind that torch raises, or return what the checked computation returns. The seed that is
being run is on file descriptor 1, so that a crash names its own.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import math
import os
import random
import resource
import sys
import traceback
import warnings
from typing import Any

import numpy as np
import torch
from cases import TOLERANCES, Tolerance
from malformed_call import Call, checked
from malformed_calls import is_packed, random_call

from fastseq import backends

ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AssertionError)
HUGE = 2**40  # more than there can be memory for
LONG_AXIS = {"attention": 2**14, "packed attention": 2**14}  # which need none for so many keys, but time
# NaN and infinities in what a query may not see may reach it or not.
ATTENTION = (
    "attention",
    "packed attention",
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
)
# For a query that sees no key the fast path of torch's modules gives NaN and the other 0; ours give one of the two.
ROWS_OF_NOTHING = ATTENTION[2:]


# ---- arguments as trees: dicts, lists, tuples and packed sequences of leaves


def leaves(tree: Any, path: tuple = ()) -> list[tuple[tuple, Any]]:
    if is_packed(tree):
        parts = tree._asdict().items()
    elif isinstance(tree, dict):
        parts = tree.items()
    elif isinstance(tree, list | tuple) and any(isinstance(t, torch.Tensor | list | tuple) for t in tree):
        parts = enumerate(tree)
    else:
        return [(path, tree)]
    whole = [] if isinstance(tree, dict) else [(path, tree)]
    return whole + [leaf for key, part in parts for leaf in leaves(part, (*path, key))]


def replaced(tree: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    key, *rest = path
    if is_packed(tree):
        return tree._replace(**{key: replaced(getattr(tree, key), rest, value)})
    if isinstance(tree, dict):
        return tree | {key: replaced(tree[key], rest, value)}
    return type(tree)(replaced(part, rest, value) if i == key else part for i, part in enumerate(tree))


# ---- mutations


def strange(rng: random.Random) -> Any:
    return rng.choice(
        (None, 0, 1, -1, 2.5, float("nan"), True, "x", (), [], [1.0], np.zeros((2, 3), np.float32), object(),
         torch.tensor(1.0), torch.zeros(0), np.float32(0.5), {}, HUGE)
    )  # fmt: skip


def mutate_tensor(rng: random.Random, t: torch.Tensor, huge: int) -> Any:
    if t.numel() >= huge or t.is_meta or t.is_sparse:
        return strange(rng)
    axis = rng.randrange(t.dim()) if t.dim() else None
    kind = rng.choice(
        ("size",) * 8 + ("axes",) * 4 + ("dtype",) * 2 + ("device", "type", "type", "values", "memory", "memory")
    )
    if kind == "size" and axis is not None:
        size = t.shape[axis]
        new = rng.choice((size - 1, size + 1, 0, 1, 2 * size, huge))
        if new <= size:
            return t.narrow(axis, 0, max(new, 0))
        if new == huge:
            return t.narrow(axis, 0, 1).expand(*(huge if a == axis else -1 for a in range(t.dim()))) if size else t
        return torch.cat((t, t), axis).narrow(axis, 0, new) if size else t
    if kind == "axes" and axis is not None:
        return rng.choice(
            (
                lambda: t.select(axis, 0) if t.shape[axis] else t,
                lambda: t.unsqueeze(rng.randint(0, t.dim())),
                lambda: t.transpose(axis, rng.randrange(t.dim())),
                lambda: t.flatten(),
                lambda: t[(None,) * 3],
            )
        )()
    if kind == "dtype":
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
        return t.to(rng.choice((*dtypes, torch.complex64, torch.uint8)))
    if kind == "device":
        return t.to("meta")
    if kind == "type":
        return strange(rng) if rng.random() < 0.7 else t.tolist()
    if kind == "values" and t.numel():
        t = t.clone(memory_format=torch.contiguous_format)
        flat = t.view(-1)
        place = rng.randrange(flat.numel())
        if t.is_floating_point() or t.is_complex():
            flat[place] = rng.choice((float("nan"), float("inf"), 1e30))
        elif t.dtype is not torch.bool:
            new = rng.choice((-1, 0, 1, int(flat[place]) + 1, int(flat[place]) - 1, HUGE, -HUGE))
            flat[place] = min(max(new, torch.iinfo(t.dtype).min), torch.iinfo(t.dtype).max)
        return t
    return mutate_memory(rng, t)


def mutate_memory(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    """The same shape in other memory; not in memory that was freed, of which torch's own sum crashes."""
    axis = rng.randrange(t.dim()) if t.dim() else None
    kind = rng.choice(("strided", "expanded", "negative", "sparse", "subclass", "offset", "inference"))
    if kind == "strided" and t.dim() > 1:
        return t.mT.contiguous().mT
    if kind == "expanded" and axis is not None and t.shape[axis]:
        return t.narrow(axis, 0, 1).expand(t.shape)
    if kind == "negative" and t.is_floating_point():
        return torch._neg_view(t)
    if kind == "sparse":
        return t.to_sparse()
    if kind == "subclass":
        return t.as_subclass(Subclass)
    if kind == "inference":
        with torch.inference_mode():
            return t.clone()
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) if t.numel() else t


class Subclass(torch.Tensor):
    pass


def mutate_plain(rng: random.Random, value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(type(n) is int for n in value) and rng.random() < 0.7:
        values = list(value)
        place = rng.randrange(len(values))
        change = rng.randrange(5)
        if change == 0:
            del values[place]
        elif change == 1:
            values.insert(place, values[place])
        elif change == 2:
            values = [values]
        else:
            values[place] = rng.choice(
                (values[place] - 1, values[place] + 1, -1, 0, HUGE, 2**70, 1.5, float("nan"), True, None, "1")
            )
        return type(value)(values)
    if type(value) in (int, float) and rng.random() < 0.6:
        numbers = (value + 1, value - 1, 0, -1, -value, float("nan"), float("inf"), HUGE, float(value), 1e-40)
        return rng.choice((*numbers, torch.tensor(value), np.float64(value)))
    if type(value) is bool and rng.random() < 0.5:
        return not value
    return strange(rng)


def mutated(rng: random.Random, call: Call) -> tuple[dict[str, Any], list[str]]:
    arguments, told = call.arguments, []
    for _ in range(rng.choice((1, 1, 2))):
        path, value = rng.choice([leaf for leaf in leaves(arguments) if leaf[0]])
        if isinstance(value, torch.Tensor):
            new = mutate_tensor(rng, value, LONG_AXIS.get(call.name, HUGE))
        elif is_packed(value) or (isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value)):
            new = rng.choice((strange(rng), tuple(value)[:1], (*value, None), list(value)))
        else:
            new = mutate_plain(rng, value)
        arguments = replaced(arguments, path, new)
        told.append(f"{'.'.join(map(str, path))} = {described(new)}")
    return arguments, told


def described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value!r}"[:90]
    return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {value.device} {value.layout}"[6:]


# ---- the verdict


def tensors_of(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [t for part in result for t in tensors_of(part)]
    return []


def not_finite(arguments: Any) -> bool:
    """Whether a mutation has put NaN, an infinity or what becomes one somewhere."""
    for _, value in leaves(arguments):
        if isinstance(value, float) and not math.isfinite(value):
            return True
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not (value.is_meta or value.is_sparse):
            value = torch.Tensor.detach(value).as_subclass(torch.Tensor)
            if value.numel() < HUGE and not (value.isfinite() & (value.abs() < 1e20)).all():
                return True
    return False


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """What is not a float must be equal."""
    return TOLERANCES.get(f"fuzz {str(dtype).removeprefix('torch.')}", Tolerance(0, 0))


def difference(ours: Any, wanted: Any, spreads: bool = False) -> str | None:
    ours, wanted = tensors_of(ours), tensors_of(wanted)
    if len(ours) != len(wanted):
        return f"{len(ours)} tensors for {len(wanted)}"
    for a, b in zip(ours, wanted, strict=True):
        if a.shape != b.shape:
            return f"shape {tuple(a.shape)} for {tuple(b.shape)}"
        if a.device != b.device:
            return f"on {a.device} for {b.device}"
        if a.is_meta or a.is_sparse:
            continue
        a, b = (torch.Tensor.detach(t).as_subclass(torch.Tensor) for t in (a, b))
        rtol, atol = max(tolerance_of(a.dtype), tolerance_of(b.dtype))
        half = {torch.bfloat16, torch.float16} & {a.dtype, b.dtype}
        a, b = a.double(), b.double()
        known = b.isfinite() & (b.abs() < 1e6)
        if spreads:  # a weight of 0 times what is not finite, or what is not finite times a scale
            known &= a.isfinite()
        size = b.abs().nan_to_num(0)
        if half and known.any():  # torch's own rounding of what cancels is as large as what it is the rest of
            size = b.abs()[known].max()
        far = ((a - b).abs() > atol + rtol * size) | ~a.isfinite()
        if (far & known).any():
            return f"differs by {(a - b).abs()[known].max()}"
    return None


def backward(result: Any) -> None:
    wanting = [t for t in tensors_of(result) if t.requires_grad and t.is_floating_point()]
    if wanting:
        sum(t.sum() for t in wanting).backward()


def outcome(call, arguments) -> tuple[str, str]:
    """What happened, and what is wrong with it, '' for nothing."""
    torch.manual_seed(0)
    try:
        result = call.ours(arguments)
    except ERRORS as error:
        return f"{type(error).__name__}", ""
    except (AttributeError, KeyError) as error:  # torch's modules ask what is no tensor for its size
        frames = traceback.extract_tb(error.__traceback__)
        return type(error).__name__, "" if "/torch/nn/" in frames[-1].filename else f"{frames[-1]}: {error!r}"
    except Exception as error:
        return type(error).__name__, repr(error)
    try:
        backward(result)
    except ERRORS as error:
        return f"backward {type(error).__name__}", late_refusal(call, arguments, error)
    try:
        with checked():
            wanted = call.torchs(arguments)
    except Exception as error:
        return "result", f"a result where torch says {type(error).__name__}: {error}"
    spreads = call.name in ATTENTION and not_finite(arguments)
    wrong = difference(result, wanted, spreads) or ""
    if wrong.endswith("nan") and call.name in ROWS_OF_NOTHING:
        wrong = difference(result, call.torchs(arguments)) or ""
    return "result", wrong


def late_refusal(call: Call, arguments: Any, error: Exception) -> str:
    """Nothing is wrong where torch's own function is refused by its backward alone, too."""
    for path, value in leaves(arguments):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments = replaced(arguments, path, value.detach().requires_grad_())
    with contextlib.suppress(*ERRORS), checked():
        result = call.torchs(arguments)
        try:
            backward(result)
        except ERRORS:
            return ""
    return f"the backward alone refuses: {error}"


def run(seed: int) -> tuple[str, str, str]:
    rng = random.Random(seed // 2)
    backend = "native" if seed % 2 else "torch"
    call = random_call(rng)
    arguments, told = mutated(rng, call)
    with backends.use_backend(backend):
        what, wrong = outcome(call, arguments)
    return what, wrong, f"seed {seed} ({backend}) {call.name}: {'; '.join(told)}"


def review(seed: int) -> None:
    """For people: where ours refuses what the checked computation takes, and types that differ."""
    rng = random.Random(seed // 2)
    call = random_call(rng)
    arguments, told = mutated(rng, call)
    with backends.use_backend("native" if seed % 2 else "torch"):
        try:
            call.ours(arguments)
            return
        except Exception as e:
            error = e
    with checked():
        try:
            call.torchs(arguments)
            wanted = "a result"
        except Exception as e:
            wanted = f"{type(e).__name__}: {e}"[:100]
            if type(e) is type(error):
                return
    print(f"{call.name} | {'; '.join(told)} | {type(error).__name__}: {str(error)[:100]} | {wanted}".replace("\n", " "))


def main() -> None:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    kinds, wrong_ones = collections.Counter(), []
    for seed in range(first, first + count):
        os.write(1, f"\r{seed}".encode())
        if len(sys.argv) > 3:
            review(seed)
            continue
        what, wrong, told = run(seed)
        kinds[what] += 1
        if wrong:
            wrong_ones.append(f"{told}: {wrong}")
    print("\n" + "\n".join(wrong_ones))
    print(f"{count} calls: {dict(kinds)}, {len(wrong_ones)} wrong")
    sys.exit(bool(wrong_ones))


if __name__ == "__main__":
    main()

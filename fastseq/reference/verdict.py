"""The rule by which a kernel's results are accepted: as exact as torch's, up to a factor of two and the last bits.

The largest error of a computation is partly chance: the same sums in another order may err by half or by twice as much.
So both sides compute a case five times, in five equivalent forms (the same permutation of keys, units or features given
to ours and to torch, and undone in the results; of a single key, unit and feature, which leave nothing to permute, five
draws of the inputs), and what is compared are medians. One lucky rounding of torch's moves no bound, and one unlucky
rounding of ours fails nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-7, "float16": 2.0**-10}
COMPUTATIONS = 5


class Verdict(NamedTuple):
    """What `error_rule` found. The error of a computation is max|result - ref| over all tensors of the case."""

    ours: tuple[float, ...]  # the error of each computation
    torch: tuple[float, ...]
    slack: float  # 4 eps max|ref|

    @property
    def error(self) -> float:
        """The median of ours."""
        return float(np.median(self.ours))

    @property
    def torch_error(self) -> float:
        """The median of torch's."""
        return float(np.median(self.torch))

    @property
    def bound(self) -> float:
        """What the median of ours may be."""
        return 2 * self.torch_error + self.slack

    @property
    def outer_bound(self) -> float:
        """What the largest of ours may be."""
        return 4 * self.torch_error + self.slack

    @property
    def share(self) -> float:
        """How much of what is allowed is used: above 1 is too much, infinite where a value is not finite."""
        if not np.isfinite((*self.ours, *self.torch, self.slack)).all():
            return np.inf
        used = (self.error, self.bound), (max(self.ours), self.outer_bound)
        return max((error / bound if bound else np.inf) if error else 0.0 for error, bound in used)

    @property
    def ok(self) -> bool:
        """Whether the rule accepts the results."""
        return self.share <= 1


def error_rule(
    ours: Sequence[Mapping[str, np.ndarray]],
    torch_: Sequence[Mapping[str, np.ndarray]],
    ref: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]],
    dtype: object,
) -> Verdict:
    """Whether the median error of ours is at most 2 times torch's + 4 eps max|ref|, and the largest at most 4 times
    torch's median + 4 eps max|ref|.

    ours, torch_: the results of equivalent computations by name, the same names in all; five of each, or one for a
    first look. ref: the reference's results, which may have more, or those for each computation. Arrays, or tensors
    that NumPy can read (bfloat16 it cannot: pass `tensor.float()`). ref should be computed in float64, for float64
    results in longdouble. dtype: what the results are stored in, "float32", "float64", "bfloat16" or "float16", or
    torch's dtype of that name. A value that is not finite fails, whoever it comes from. Raises ValueError if names,
    shapes or the numbers of computations do not match, if there is nothing to compare, or for another dtype.

    >>> ref, torch_ = {"y": np.array([1.0, 2.0])}, [{"y": np.array([1.0, 2.0])}]
    >>> error_rule([{"y": np.array([1.0, 2.0 + 1e-7])}], torch_, ref, "float32").ok
    True
    >>> error_rule([{"y": np.array([1.0, 2.0 + 1e-5])}], torch_, ref, "float32").ok
    False
    """
    name = str(dtype).removeprefix("torch.")
    if name not in EPS:
        raise ValueError(f"dtype must be one of {', '.join(EPS)}, got {dtype}")
    refs = [ref] * len(ours) if isinstance(ref, Mapping) else ref
    if not len(ours) == len(torch_) == len(refs) or not ours:
        raise ValueError(f"as many computations of ours as of torch, at least one, got {len(ours)} and {len(torch_)}")
    names = set(ours[0])
    for results in (*ours, *torch_):
        if not names or set(results) != names or not names <= set(refs[0]):
            raise ValueError(f"tensors do not match: {sorted(names)}, {sorted(results)}, ref {sorted(refs[0])}")

    def errors(computations):
        return tuple(
            float(np.max([_max_abs(_difference(key, results[key], ref[key])) for key in names]))
            for results, ref in zip(computations, refs, strict=True)
        )

    slack = 4 * EPS[name] * float(np.max([_max_abs(ref[key]) for ref in refs for key in names]))
    return Verdict(errors(ours), errors(torch_), slack)


def _difference(name: str, result: np.ndarray, ref: np.ndarray) -> np.ndarray:
    if result.shape != ref.shape:
        raise ValueError(f"{name} has shape {tuple(result.shape)}, the reference {ref.shape}")
    return np.asarray(result, dtype=ref.dtype) - ref


def _max_abs(a: np.ndarray) -> float:
    return np.max(np.abs(a), initial=0.0)

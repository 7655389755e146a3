"""The rule by which a kernel's result is accepted: as exact as torch's, up to a factor of two and the last bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-7, "float16": 2.0**-10}


class Verdict(NamedTuple):
    """What `error_rule` found, over all tensors of a case."""

    ok: bool
    worst_ours: float  # max |ours - ref|
    worst_torch: float  # max |torch - ref|
    bound: float  # what worst_ours may be


def error_rule(
    ours: Mapping[str, np.ndarray], torch_: Mapping[str, np.ndarray], ref: Mapping[str, np.ndarray], dtype: object
) -> Verdict:
    """Whether max|ours - ref| <= 2 max|torch - ref| + 4 eps max|ref|, the maximum over all tensors of the case.

    ours, torch_: results by name, the same names in both; ref: the reference's results, which may have more. Arrays, or
    tensors that NumPy can read (bfloat16 it cannot: pass `tensor.float()`). ref should be computed in float64, for
    float64 results in longdouble. dtype: what the results are stored in, "float32", "float64", "bfloat16" or "float16",
    or torch's dtype of that name. A value that is not finite fails, whoever it comes from. Raises ValueError if names
    or shapes do not match, if there is nothing to compare, or for another dtype.

    >>> ref = {"y": np.array([1.0, 2.0])}
    >>> error_rule({"y": np.array([1.0, 2.0 + 1e-7])}, {"y": np.array([1.0, 2.0])}, ref, "float32").ok
    True
    >>> error_rule({"y": np.array([1.0, 2.0 + 1e-5])}, {"y": np.array([1.0, 2.0])}, ref, "float32").ok
    False
    """
    name = str(dtype).removeprefix("torch.")
    if name not in EPS:
        raise ValueError(f"dtype must be one of {', '.join(EPS)}, got {dtype}")
    if not ours or set(ours) != set(torch_) or not set(ours) <= set(ref):
        raise ValueError(f"tensors do not match: ours {sorted(ours)}, torch {sorted(torch_)}, ref {sorted(ref)}")

    def worst(results):
        return float(np.max([_max_abs(_difference(key, results[key], ref[key])) for key in ours]))

    worst_ours, worst_torch = worst(ours), worst(torch_)
    bound = 2 * worst_torch + 4 * EPS[name] * float(np.max([_max_abs(ref[key]) for key in ours]))
    return Verdict(bool(np.isfinite(bound) and worst_ours <= bound), worst_ours, worst_torch, bound)


def _difference(name: str, result: np.ndarray, ref: np.ndarray) -> np.ndarray:
    if result.shape != ref.shape:
        raise ValueError(f"{name} has shape {tuple(result.shape)}, the reference {ref.shape}")
    return np.asarray(result, dtype=ref.dtype) - ref


def _max_abs(a: np.ndarray) -> float:
    return np.max(np.abs(a), initial=0.0)

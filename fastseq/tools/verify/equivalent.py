"""Equivalent computations: the same inputs in another order of keys, units or features, whose results, put back, differ
in their roundings only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastseq.reference.verdict import COMPUTATIONS

Array = TypeVar("Array", Tensor, np.ndarray)


class Permutation:
    """An order for each of some axes, which have letters. What is permuted names the letters of its last axes."""

    def __init__(self, orders: Mapping[str, Tensor]):
        self.orders = orders

    def apply(self, values: Mapping[str, Array | None], axes: Mapping[str, str]) -> dict[str, Array | None]:
        """The values that `axes` names, permuted; the others as they are."""
        return {name: _permuted(a, axes.get(name, ""), self.orders) for name, a in values.items()}

    def undo(self, values: Mapping[str, Array | None], axes: Mapping[str, str]) -> dict[str, Array | None]:
        """The inverse of `apply`."""
        inverse = {letter: order.argsort() for letter, order in self.orders.items()}
        return {name: _permuted(a, axes.get(name, ""), inverse) for name, a in values.items()}


def permutations(sizes: Mapping[str, int]) -> Iterator[Permutation]:
    """As many as the rule compares, the first of which leaves everything where it is. sizes: those of the axes that may
    be permuted.
    """
    yield Permutation({})
    for seed in range(1, COMPUTATIONS):
        generator = torch.Generator().manual_seed(seed)
        yield Permutation({letter: torch.randperm(size, generator=generator) for letter, size in sizes.items()})


def _permuted(a: Array | None, letters: str, orders: Mapping[str, Tensor]) -> Array | None:
    """An axis as long as its order is permuted, one of several such lengths (gates) part by part; of size 1 it is
    broadcast and stays.
    """
    if a is None:
        return None
    for axis, letter in enumerate(letters, start=-len(letters)):
        if letter not in orders or a.shape[axis] == 1:
            continue
        order = orders[letter]
        whole = torch.cat([order + first for first in range(0, a.shape[axis], len(order))])
        if isinstance(a, Tensor):
            a = a.index_select(axis % a.ndim, whole.to(a.device))
        else:
            a = np.take(a, whole.numpy(), axis)
    return a

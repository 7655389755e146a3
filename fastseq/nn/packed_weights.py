"""Packed weights of a module, kept between calls without gradients and checked on every call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Weights = tuple[Tensor | None, ...]  # that are packed together
Pack = Callable[[Weights], Any]


class _Weight(NamedTuple):
    """What a weight was when it was packed."""

    tensor: weakref.ref[Tensor]
    memory: int
    dtype: torch.dtype
    version: int | None
    checksum: tuple[int, int] | None  # None: packed while frozen, the bytes were never read


class _Entry(NamedTuple):
    backend: ModuleType
    isa: str
    weights: list[_Weight | None]
    panels: Any


class PackedWeights:
    """The panels of a module's weights, by their place in the module.

    An entry holds for the very tensors it was made from: same objects, same memory, same version counters and, as
    writes through `.data` change none of these, the same checksum of every byte. `frozen` leaves out the last two.
    Entries are replaced whole, so a thread sees an old one or a new one; two threads may pack the same weights twice.
    """

    def __init__(self) -> None:
        self.frozen = False
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()  # copies and pickles of a module start without

    def clear(self) -> None:
        """Drops every panel."""
        self._entries = {}

    def panels(self, backend: ModuleType, place: int, weights: Sequence[Weights], pack: Pack) -> tuple[Any, ...]:
        """What `pack` makes of each of `weights`, anew where they changed; None where not contiguous.

        Args:
            place: the key of the first of `weights`; the others have those after it.
        """
        panels = []
        for group in weights:
            entry = self._entries.get(place)
            if entry is not None and self._holds(entry, backend, group):
                panels.append(entry.panels)
            else:
                panels.append(self._pack(backend, place, group, pack))
            place += 1
        return tuple(panels)

    def _pack(self, backend: ModuleType, place: int, group: Weights, pack: Pack) -> Any:
        if not all(w is None or w.is_contiguous() for w in group):
            return None
        # Before packing: a write by another thread meanwhile must not pass for packed.
        weights = [None if w is None else self._describe(backend, w) for w in group]
        panels = pack(group)
        self._entries[place] = _Entry(backend, backend.active_isa(), weights, panels)
        return panels

    def _describe(self, backend: ModuleType, weight: Tensor) -> _Weight:
        checksum = None if self.frozen else backend.checksum(weight)
        return _Weight(weakref.ref(weight), weight.data_ptr(), weight.dtype, _version(weight), checksum)

    def _holds(self, entry: _Entry, backend: ModuleType, group: Weights) -> bool:
        if entry.backend is not backend or entry.isa != backend.active_isa():
            return False
        pairs = list(zip(entry.weights, group, strict=True))
        for known, weight in pairs:
            if known is None or weight is None:
                if known is not weight:
                    return False
            elif known.tensor() is not weight or known.memory != weight.data_ptr() or known.dtype is not weight.dtype:
                return False
        if self.frozen:
            return True
        for known, weight in pairs:
            if weight is not None and (known.version != _version(weight) or known.checksum != backend.checksum(weight)):
                return False
        return True


def _version(weight: Tensor) -> int | None:
    try:
        return weight._version
    except RuntimeError:  # inference tensors have none
        return None


class PacksWeights:
    """A module that keeps packed weights for inference. They are no part of its state_dict."""

    def _packed_weights(self) -> PackedWeights:
        packed = self.__dict__.get("_fastseq_packed")
        return self.__dict__.setdefault("_fastseq_packed", PackedWeights()) if packed is None else packed

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._packed_weights().clear()  # .to() and its kin give parameters new memory behind the same identity
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        # Frozen weights are not looked at; and where torch swaps tensors to load, none may be weakly referenced.
        self._packed_weights().clear()
        super()._load_from_state_dict(*args)

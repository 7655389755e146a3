"""Packed weights of a module, kept between calls without gradients and checked on every call."""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops.cell import Direction


class _Entry(NamedTuple):
    backend: ModuleType
    isa: str
    weights: tuple[weakref.ref[Tensor] | None, ...]
    memory: tuple[tuple[int, torch.dtype] | None, ...]
    versions: tuple[int | None, ...]
    checksums: tuple[tuple[int, int] | None, ...] | None  # None: packed while frozen, the bytes were never read
    panels: Any


class PackedWeights:
    """The panels of a module's layers and directions, by their place in the module.

    An entry holds for the very tensors it was made from: same objects, same memory, same version counters and, as
        writes through `.data`
    change none of these, the same checksum of every byte. `frozen` leaves out the last two. Entries are replaced whole,
    so a thread sees an old one or a new one; two threads may pack the same weights twice.
    """

    def __init__(self) -> None:
        self.frozen = False
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()  # copies and pickles of a module start without

    def clear(self) -> None:
        """Drops every panel."""
        self._entries = {}

    def panels(self, backend: ModuleType, cell: str, place: int, weights: Direction) -> Any:
        """The panels for `weights`, packed anew where they changed; None where the weights are not contiguous."""
        entry = self._entries.get(place)
        if entry is not None and self._holds(entry, backend, weights):
            return entry.panels
        if not all(w is None or w.is_contiguous() for w in weights):
            return None
        # Before packing: a write by another thread meanwhile must not pass for packed.
        versions = tuple(map(_version, weights))
        checksums = None if self.frozen else _checksums(backend, weights)
        entry = _Entry(
            backend,
            backend.active_isa(),
            tuple(None if w is None else weakref.ref(w) for w in weights),
            tuple(map(_memory, weights)),
            versions,
            checksums,
            backend.pack(cell, weights),
        )
        self._entries[place] = entry
        return entry.panels

    def _holds(self, entry: _Entry, backend: ModuleType, weights: Direction) -> bool:
        return (
            entry.backend is backend
            and entry.isa == backend.active_isa()
            and all(w is (None if ref is None else ref()) for ref, w in zip(entry.weights, weights, strict=True))
            and entry.memory == tuple(map(_memory, weights))
            and (
                self.frozen
                or (
                    entry.versions == tuple(map(_version, weights))
                    and entry.checksums is not None
                    and entry.checksums == _checksums(backend, weights)
                )
            )
        )


def _memory(weight: Tensor | None) -> tuple[int, torch.dtype] | None:
    return None if weight is None else (weight.data_ptr(), weight.dtype)


def _version(weight: Tensor | None) -> int | None:
    return None if weight is None or weight.is_inference() else weight._version


def _checksums(backend: ModuleType, weights: Direction) -> tuple[tuple[int, int] | None, ...]:
    return tuple(None if w is None else backend.checksum(w) for w in weights)

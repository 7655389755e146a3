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


class _Entry(NamedTuple):
    """Panels, and the state of their weights when they were packed: one value per weight, None for a weight of None."""

    backend: ModuleType
    isa: str
    tensors: list[weakref.ref[Tensor] | None]
    memory: list[int | None]
    dtypes: list[torch.dtype | None]
    versions: list[int | None]
    checksum: tuple[int, ...] | None  # of all of them; None: packed while frozen, the bytes were never read
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
        """What `pack` makes of each of `weights`, packed anew where they changed; None where one is not contiguous.

        Args:
            place: the key of the first of `weights`; the others have those after it.
        """
        panels = []
        for group in weights:
            entry = self._entries.get(place)
            if entry is None or not self._holds(entry, backend, group):
                entry = self._pack(backend, place, group, pack)
            panels.append(None if entry is None else entry.panels)
            place += 1
        return tuple(panels)

    def _pack(self, backend: ModuleType, place: int, group: Weights, pack: Pack) -> _Entry | None:
        given = [w for w in group if w is not None]
        if not all(w.is_contiguous() for w in given):
            return None
        # Taken before packing: if another thread writes meanwhile, the panels must count as outdated.
        entry = _Entry(
            backend,
            backend.active_isa(),
            [None if w is None else weakref.ref(w) for w in group],
            [None if w is None else w.data_ptr() for w in group],
            [None if w is None else w.dtype for w in group],
            [None if w is None or w.is_inference() else w._version for w in group],  # inference tensors have none
            None if self.frozen else backend.checksum(*given),
            None,
        )
        entry = self._entries[place] = entry._replace(panels=pack(group))
        return entry

    def _holds(self, entry: _Entry, backend: ModuleType, group: Weights) -> bool:
        known_backend, isa, tensors, memory, dtypes, versions, checksum, _ = entry
        if known_backend is not backend or isa != backend.active_isa():
            return False
        frozen = self.frozen
        for i, weight in enumerate(group):
            known = tensors[i]
            if weight is None or known is None:
                if weight is not known:
                    return False
            elif not (
                known() is weight
                and memory[i] == weight.data_ptr()
                and dtypes[i] is weight.dtype
                and weight.is_contiguous()
                and (frozen or versions[i] == (None if weight.is_inference() else weight._version))
            ):
                return False
        return frozen or checksum == backend.checksum(*group)


class PacksWeights:
    """A module that keeps packed weights for inference. They are no part of its state_dict."""

    def _packed_weights(self) -> PackedWeights:
        packed = self.__dict__.get("_fastseq_packed")
        return self.__dict__.setdefault("_fastseq_packed", PackedWeights()) if packed is None else packed

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._packed_weights().clear()  # .to() and the like give the same parameter object new memory
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        # Frozen weights are never compared, so loading must drop them. Where torch loads by swapping tensors, none of
        # them may be weakly referenced.
        self._packed_weights().clear()
        super()._load_from_state_dict(*args)

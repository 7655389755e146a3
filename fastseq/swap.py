"""fuse() and unfuse() change the classes of a living model's layers; freeze() and unfreeze() say whether its weights
change."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from fastseq import compat
from fastseq import nn as fastseq_nn
from fastseq.nn.drop_in import restore
from fastseq.nn.packed_weights import PacksWeights

__all__ = ["FuseReport", "Row", "freeze", "fuse", "fuse_report", "unfreeze", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)

# One class each: torch.compile accepts them, and they derive from torch's.
_BOTH = {
    nn.RNNCell: fastseq_nn.RNNCell,
    nn.LSTMCell: fastseq_nn.LSTMCell,
    nn.GRUCell: fastseq_nn.GRUCell,
    nn.MultiheadAttention: fastseq_nn.MultiheadAttention,
    nn.LayerNorm: fastseq_nn.LayerNorm,
    nn.TransformerEncoderLayer: fastseq_nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fastseq_nn.TransformerDecoderLayer,
}
_COMPAT = {nn.RNN: compat.RNN, nn.LSTM: compat.LSTM, nn.GRU: compat.GRU, **_BOTH}
_COMPILABLE = {nn.RNN: fastseq_nn.RNN, nn.LSTM: fastseq_nn.LSTM, nn.GRU: fastseq_nn.GRU, **_BOTH}
_BASES = (nn.RNNBase, nn.RNNCellBase, *_BOTH)
_FORWARDS = {torchs: torchs.forward for torchs in _COMPAT}  # to see where others have put theirs
_TORCH = {ours: torchs for table in (_COMPAT, _COMPILABLE) for torchs, ours in table.items()}


@dataclass(frozen=True)
class Row:
    """What became of one layer of a model that has a counterpart here."""

    name: str  # in the model, "" for the model itself
    before: str
    after: str
    reason: str = ""  # why it was left alone

    @property
    def swapped(self) -> bool:
        """True if the class was changed."""
        return self.before != self.after


@dataclass(frozen=True)
class FuseReport:
    """What fuse() found in a model, one row per layer that has a counterpart here. Its repr is a table."""

    rows: tuple[Row, ...] = field(default_factory=tuple)

    @property
    def swapped(self) -> tuple[Row, ...]:
        """The layers whose class was changed."""
        return tuple(row for row in self.rows if row.swapped)

    @property
    def left(self) -> tuple[Row, ...]:
        """The layers left alone."""
        return tuple(row for row in self.rows if not row.swapped)

    def __repr__(self) -> str:
        head = f"fastseq.fuse: {len(self.swapped)} of {len(self.rows)} layers swapped"
        names = [row.name or "(the model)" for row in self.rows]
        width = max(map(len, names), default=0)
        lines = [head]
        for name, row in zip(names, self.rows, strict=True):
            outcome = f" -> {row.after}" if row.swapped else f": {row.reason}"
            lines.append(f"  {name:<{width}}  {row.before}{outcome}")
        return "\n".join(lines)


_reports: weakref.WeakKeyDictionary[nn.Module, FuseReport] = weakref.WeakKeyDictionary()


def fuse(model: Model, *, compilable: bool = False) -> Model:
    """Swaps the classes of a model's recurrent and attention layers for those with kernels, in place.

    The modules stay the same objects with the same parameters, so hooks, optimizers, aliases and the root module itself
    survive. `fuse` swaps nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention,
    nn.LayerNorm, nn.TransformerEncoderLayer and nn.TransformerDecoderLayer, parametrized ones too. It leaves alone what
    would lose its own behaviour, subclasses and layers whose `forward` was replaced on the instance, and every LSTM
    with proj_size, for which there are no kernels. `fuse_report(model)` tells what was swapped, what not, and why.
    Models that call `torch.nn.functional.scaled_dot_product_attention` themselves run inside `fastseq.sdpa_kernels()`.

    A parametrization is evaluated once for each call of a layer, where torch's layers evaluate it two to five times. A
    parametrization that changes itself notices: `spectral_norm` in training takes one step of its power iteration.

    torch.fx and torch.jit take a fused model as they take torch's; what torch.jit makes of it runs torch's ops. Before
    a whole model is pickled for a machine without fastseq, call `unfuse`. A state_dict needs no such care.

    Args:
        model: any module; may itself be such a layer.
        compilable: False keeps `isinstance(m, nn.LSTM)` true (`fastseq.compat.LSTM`); torch.compile leaves such layers
            out of its graphs, as torch's. True sets `fastseq.LSTM`, which derives from nn.RNNBase and compiles.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no nn.Module.

    Example:
        >>> import torch, fastseq
        >>> model = fastseq.fuse(torch.nn.Sequential(torch.nn.LSTM(3, 4)))
        >>> fastseq.fuse_report(model)
        fastseq.fuse: 1 of 1 layers swapped
          0  torch.nn.LSTM -> fastseq.compat.LSTM
    """
    _check_model("fuse", model)
    targets = _COMPILABLE if compilable else _COMPAT
    rows = []
    for name, module in model.named_modules():
        restore(module)
        plain = _unparametrized(type(module))
        source = _TORCH.get(plain, plain)
        kept = "forward" not in vars(module) and source in targets and source.forward is _FORWARDS[source]
        if kept and not getattr(module, "proj_size", 0):
            before = _label(type(module))
            # A fastseq.LSTM that the model was built with stays one; compilable=True also lifts fastseq.compat.LSTM.
            if plain is source or compilable:
                _set_class(module, targets[source])
            after = _label(type(module))
            rows.append(Row(name, before, after, "" if before != after else "has the kernels already"))
        elif isinstance(module, _BASES):
            rows.append(Row(name, _label(type(module)), _label(type(module)), _why_left(module)))
    _reports[model] = FuseReport(tuple(rows))
    return model


def unfuse(model: Model) -> Model:
    """The inverse of `fuse`: every layer with kernels becomes torch's own class again, in place.

    So do layers that were built as `fastseq.LSTM` and so on. Parameters, hooks and state stay; packed weights are
    dropped.

    Raises:
        TypeError: `model` is no nn.Module.

    Example:
        >>> import torch, fastseq
        >>> type(fastseq.unfuse(fastseq.LSTM(3, 4))) is torch.nn.LSTM
        True
    """
    _check_model("unfuse", model)
    for module in model.modules():
        restore(module)
        target = _TORCH.get(_unparametrized(type(module)))
        if target is not None:
            _set_class(module, target)
            module.__dict__.pop("_fastseq_packed", None)
    _reports.pop(model, None)
    return model


def fuse_report(model: nn.Module) -> FuseReport:
    """What the last `fuse(model)` did, row by row. The report is empty for a model that was not fused, and for a copy
    or a pickle of one that was.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _check_model("fuse_report", model)
    return _reports.get(model, FuseReport())


def freeze(model: Model) -> Model:
    """Promises that the weights do not change, so that calls without gradients need not compare them with their packed
    form.

    The promise holds until `unfreeze`; of a layer, until one of its parameters is replaced or moved. The layer does not
    see a weight that changes in place meanwhile, by an optimizer step or a write through `.data`: call `freeze` again,
    which packs the weights anew. It does see `load_state_dict`. Copies and pickles of the model are not frozen.

    Args:
        model: a layer of fastseq, or any module. Of its layers, those that are not of fastseq are passed over.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no nn.Module.

    Example:
        >>> import torch, fastseq
        >>> lstm, state = fastseq.freeze(fastseq.LSTM(3, 4)), None
        >>> with torch.no_grad():
        ...     for x_t in torch.randn(7, 1, 3):
        ...         output, state = lstm.step(x_t, state)
    """
    return _freeze("freeze", model, True)


def unfreeze(model: Model) -> Model:
    """The inverse of `freeze`: weights are compared on every call again.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    return _freeze("unfreeze", model, False)


def _freeze(name: str, model: Model, frozen: bool) -> Model:
    _check_model(name, model)
    for module in model.modules():
        if isinstance(module, PacksWeights):
            packed = module._packed_weights()
            packed.clear()
            packed.frozen = frozen
    return model


def _check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")


def _unparametrized(cls: type[nn.Module]) -> type[nn.Module]:
    """The class under the one that torch.nn.utils.parametrize put over it."""
    return cls.__bases__[0] if _is_parametrized(cls) else cls


def _is_parametrized(cls: type[nn.Module]) -> bool:
    base = cls.__bases__[0]
    return cls.__name__ == f"Parametrized{base.__name__}" and cls.__module__ == parametrize.__name__


def _set_class(module: nn.Module, target: type[nn.Module]) -> None:
    cls = type(module)
    if _is_parametrized(cls):
        # The same properties over the new base: removing the parametrization restores that base.
        members = {name: m for name, m in vars(cls).items() if name not in ("__dict__", "__weakref__", "__doc__")}
        target = type(f"Parametrized{target.__name__}", (target,), members)
    module.__class__ = target


def _label(cls: type[nn.Module]) -> str:
    plain = _unparametrized(cls)
    if plain in _COMPAT:
        label = f"torch.nn.{plain.__name__}"
    elif plain.__module__ == compat.__name__:
        label = f"fastseq.compat.{plain.__name__}"
    elif plain in _TORCH:
        label = f"fastseq.{plain.__name__}"
    else:
        label = f"{plain.__module__}.{plain.__qualname__}"
    return label if plain is cls else f"parametrized {label}"


def _why_left(module: nn.Module) -> str:
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    cls = _unparametrized(type(module))
    if cls in _FORWARDS and cls.forward is not _FORWARDS[cls]:
        return f"the forward of {_label(cls)} was replaced"
    known = (*_TORCH, *_COMPAT, *_BASES)
    base = next(base for base in cls.__mro__ if base in known)
    if cls.forward is not base.forward:
        return f"a subclass of {_label(base)} with its own forward"
    if getattr(module, "proj_size", 0):
        return "proj_size: the kernels have no projection"
    return f"a subclass of {_label(base)}"

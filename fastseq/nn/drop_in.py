"""Why torch's tools treat a layer of ours as the class of torch that it stands for.

torch.fx leaves a layer whole, and torch.jit.script knows its forward, if its class is defined in `torch.nn`. Users
replace methods of a layer that torch's forward calls, and expect that the replacement is called.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any, ClassVar

from torch import fx, nn

from fastseq.ops import routing


class DropIn:
    """A layer that stands for one of torch's, mixed in before it.

    As with torch's class, torch.fx records a call of it as a call of the module, and torch.jit.script compiles torch's
    forward. torch.fx traces through a subclass with its own forward, and torch.jit.script compiles that forward.
    """

    # Looked up at import: if someone sets `torch.nn.LSTM = fastseq.LSTM`, a later look-up would find ourselves.
    _torch_class: ClassVar[type[nn.Module] | None] = None  # None: torch has no such layer
    _torch_calls: ClassVar[tuple[str, ...]] = ()  # methods that torch's forward calls and ours does not
    _replaces: ClassVar[bool] = False  # a subclass has one of them of its own
    _forward_is_ours: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._replaces = any(_package(_definer(cls, name)) not in _KNOWN for name in cls._torch_calls)
        cls._forward_is_ours = _package(_definer(cls, "forward")) == _OURS

    def _replaced(self) -> bool:
        """True where torch's forward would call a method that is not torch's."""
        own = self.__dict__
        for name in self._torch_calls:  # takes a third of the time of any(), which shows in a call with T = 1
            if name in own:
                return True
        return self._replaces

    def _has_our_forward(self) -> bool:
        return self._forward_is_ours and "forward" not in self.__dict__

    def _torchs(self, *args: Any) -> Any:
        """torch's forward; while torch.fx traces, a node of the graph."""
        node = self._node(*args)
        return self._torch_class.forward(self, *args) if node is None else node

    def _node(self, *args: Any, **options: Any) -> fx.Proxy | None:
        """While torch.fx traces a model that this is a part of, the call of this module in its graph, else None."""
        if not routing.symbolic() or not self._has_our_forward():
            return None
        tracer = _tracer(self, (args, options))
        if tracer is None or tracer.root is self:
            return None
        # The node gets the arguments that the caller wrote, as a node of torch's class does.
        parameters = list(inspect.signature(self.forward).parameters.values())
        given = dict(zip((p.name for p in parameters), args, strict=False)) | options
        given = {p.name: given[p.name] for p in parameters if p.name in given and given[p.name] is not p.default}
        leading = []
        for parameter in parameters:
            if parameter.name not in given or parameter.kind is parameter.KEYWORD_ONLY:
                break
            leading.append(given.pop(parameter.name))
        return tracer.create_proxy("call_module", tracer.path_of_module(self), tuple(leading), given)

    def __prepare_scriptable__(self) -> DropIn:
        """What torch.jit.script compiles: this module, with torch's forward until it is called, copied or pickled."""
        if self._torch_class is None:
            raise RuntimeError(f"torch.jit.script: torch has no {type(self).__name__}, whose forward it could compile")
        self.__class__ = _scriptable(type(self))
        return self


_OURS = __name__.split(".")[0]
_KNOWN = (_OURS, "torch")


def _package(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _definer(cls: type, name: str) -> type:
    return next((base for base in cls.__mro__ if name in vars(base)), DropIn)


def _tracer(module: nn.Module, arguments: Any) -> fx.Tracer | None:
    """Who traces a call: known by any of its arguments, or else by a parameter, which reads as a node of the graph."""
    found = []
    fx.node.map_aggregate(arguments, lambda a: found.append(a) if isinstance(a, fx.Proxy) else a)
    if not found:
        owned = ((m, name) for m in module.modules() for name, p in m._parameters.items() if p is not None)
        found = [getattr(m, name) for m, name in itertools.islice(owned, 1)]
    tracer = getattr(found[0], "tracer", None) if found else None
    return tracer if isinstance(tracer, fx.Tracer) else None


def restore(module: nn.Module) -> None:
    """Gives back its class to a module that torch.jit.script has looked at."""
    module.__class__ = getattr(type(module), "_before_script", type(module))


@functools.cache
def _scriptable(cls: type[DropIn]) -> type[DropIn]:
    """A class for torch.jit.script to look at. The first use of the module afterwards gives it back its own class.

    A copy of the module with another class would not do: torch would leave it in the model in place of the layer.
    """

    def call(self: DropIn, *args: Any, **kwargs: Any) -> Any:
        restore(self)
        return self(*args, **kwargs)

    def reduce(self: DropIn, protocol: int) -> Any:
        restore(self)
        return self.__reduce_ex__(protocol)

    ours = [base for base in cls.__mro__ if _package(base) == _OURS]
    properties = [name for base in ours for name, member in vars(base).items() if isinstance(member, property)]
    named, members = cls, {}
    if cls._forward_is_ours:
        members["forward"] = cls._torch_class.forward
        if cls in ours:
            named = cls._torch_class  # whose overloads torch finds by its name, in its source
    members |= {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__jit_unused_properties__": [*getattr(cls, "__jit_unused_properties__", ()), *properties],
        "__module__": named.__module__,
        "__qualname__": named.__qualname__,
        "_before_script": cls,
    }
    return type(named.__name__, (cls,), members)

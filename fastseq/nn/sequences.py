"""What the modules of whole sequences share. Mixed into torch's classes, here and in fastseq.compat."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

from fastseq.nn.drop_in import DropIn
from fastseq.nn.packed_weights import PacksWeights
from fastseq.ops import routing
from fastseq.ops.autograd import needs_grad
from fastseq.ops.lengths import packed_rows, padded_rows
from fastseq.ops.memory import all_contiguous, unit_stride
from fastseq.ops.recurrent import checks
from fastseq.ops.recurrent.function import has_kernels, run_layer
from fastseq.ops.recurrent.spec import Cell, Direction, Layer, States
from fastseq.ops.routing import Route

_REVERSE = {False: (False,), True: (False, True)}  # by `bidirectional`: the directions of a layer


class _Run(NamedTuple):
    """Who computes the layers of a call, on what."""

    weights: list[Direction]  # per layer and direction
    route: Route
    backend: ModuleType | None
    return_states: bool = False


class SequenceModule(DropIn, PacksWeights):
    """forward() and step() of RNN, LSTM and GRU.

    It is mixed with a class of torch, which has the parameters and the state. That class's checks run first, and its op
    gets only arguments that fit.
    """

    _torch_calls = (
        "check_forward_args",
        "check_hidden_size",
        "check_input",
        "get_expected_cell_size",
        "get_expected_hidden_size",
        "permute_hidden",
    )
    _cell: Cell

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple:
        """A whole sequence: see the class."""
        packed, data, batch = isinstance(input, PackedSequence), input, None
        if packed:
            checks.check_not_packed(lengths=lengths, reset=reset)
            if routing.is_compiling() and not torch.compiler.is_exporting():
                return self._forward_outside(input, hx, return_states=return_states)
            data, batch = input.data, checks.check_packed(input)
        beyond_torch = lengths is not None or reset is not None or return_states
        cell, weights, states = self._cell, self._weights(), self._states(hx)
        misfit = self._misfit(cell, data, batch, states, weights)
        if misfit is None:
            tensors = [data, *states]
            for direction in weights:
                tensors += direction
            route, backend = routing.route("recurrent", tensors)
            if backend is not None and cell.name not in backend.CELLS:
                route, backend = Route.TORCH, None
            if route is not Route.KERNELS and (unlike := checks.unlike(tensors, 1 + len(states))):
                misfit = RuntimeError(unlike)
        if misfit is not None or route is not Route.KERNELS:
            node = self._node(input, hx, lengths=lengths, reset=reset, return_states=return_states)
            if node is not None:
                return node
        if misfit is not None:
            self._refuse(misfit, input, hx)
        empty = not data.numel()
        if empty and not packed:
            checks.check_steps(data, self._steps(data))
        if (empty or self.proj_size) and (route is Route.KERNELS or route is Route.GRAPH):
            route = Route.TORCH
        if route is Route.GRAPH and not has_kernels(cell.name):
            route = Route.TORCH
        if route is Route.KERNELS and not beyond_torch and self._replaced():
            route = Route.TORCH
        if route is not Route.KERNELS:
            if routing.is_compiling() and route is Route.TORCH and not torch.compiler.is_exporting():
                return self._forward_outside(input, hx, lengths=lengths, reset=reset, return_states=return_states)
            if not beyond_torch and route is Route.TORCH and self._torch_class is not None:
                return self._torch_class.forward(self, input, hx)
        run = _Run(weights, route, backend, return_states)
        if packed:
            return self._forward_packed(cell, input, states, run)
        return self._forward_padded(cell, data, states, lengths, reset, run)

    def _forward_outside(self, *args: Any, **options: Any) -> tuple:
        """`forward` outside the graph, as torch runs its own classes."""
        return torch.compiler.disable(type(self).forward)(self, *args, **options)

    def _forward_padded(
        self,
        cell: Cell,
        data: Tensor,
        states: States,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | None,
        run: _Run,
    ) -> tuple:
        unbatched = data.dim() == 2
        batch_first = self.batch_first and not unbatched
        if reset is not None:
            checks.check_reset(reset, tuple(data.shape[:-1]), data.device)
        # The other layouts, by views.
        x = data
        if unbatched:
            x, reset = data.unsqueeze(1), None if reset is None else reset.unsqueeze(1)
            states = tuple(None if s is None else s.unsqueeze(1) for s in states)
        elif batch_first:
            x, reset = data.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
        rows = None
        if lengths is not None:
            rows = padded_rows(lengths, x.shape[0], x.shape[1], x.device, run.route is Route.GRAPH)
        every_state = run.return_states and bool(cell.states)
        call = Layer(cell, _REVERSE[self.bidirectional], rows, reset, every_state, False, batch_first)
        y, states, all_states = self._layers(call, x, states, run)
        if unbatched:
            y = y.squeeze(1)
            states = tuple(s.squeeze(1) for s in states)
        if not run.return_states:
            return y, self._hx(states)
        if unbatched:
            all_states = tuple(s.squeeze(2) for s in all_states)
        elif batch_first:
            all_states = tuple(s.movedim(2, 0) for s in all_states)
        return y, self._hx(states), self._hx(all_states)

    def _forward_packed(self, cell: Cell, input: PackedSequence, states: States, run: _Run) -> tuple:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if sorted_indices is not None:
            states = tuple(None if s is None else s.index_select(1, sorted_indices) for s in states)

        def padded(packed: Tensor) -> Tensor:  # (R, L*D, H) -> (T, L*D, B, H)
            sequence = PackedSequence(packed, batch_sizes, sorted_indices, unsorted_indices)
            sequence, _ = pad_packed_sequence(sequence, batch_first=self.batch_first)
            return sequence if self.batch_first else sequence.transpose(1, 2)

        every_state = run.return_states and bool(cell.states)
        call = Layer(cell, _REVERSE[self.bidirectional], packed_rows(batch_sizes), None, every_state)
        y, states, all_states = self._layers(call, data, states, run)
        if unsorted_indices is not None:
            states = tuple(s.index_select(1, unsorted_indices) for s in states)
        result = (PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), self._hx(states))
        return (*result, self._hx(tuple(map(padded, all_states)))) if run.return_states else result

    def _layers(
        self, call: Layer, x: Tensor, states: States, run: _Run
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The output, as `Results.y`, the last states (L*D, B, H) and, if asked for, all states: (T, L*D, B, H), packed
        (R, L*D, H)."""
        layers, directions = self.num_layers, len(call.reverse)
        inner = call._replace(batch_first=False) if call.batch_first and layers > 1 else call
        packs = run.route is Route.KERNELS and "recurrent" in run.backend.PACKS
        if packs and x.numel() == self.input_size:
            # A single row reads the weights in place: the check whether packed ones are up to date takes as long.
            packs = self._packed_weights().frozen
        initial, weights = states, run.weights
        last, every = [], []
        for layer in range(layers):
            if layers > 1:
                places = slice(layer * directions, (layer + 1) * directions)
                weights = run.weights[places]
                initial = tuple(None if s is None else s[places] for s in states)
            records = torch.is_grad_enabled() and needs_grad(x, *initial, *itertools.chain(*weights))
            panels = self._panels(run.backend, layer * directions, weights) if packs and not records else None
            how = call if layer == layers - 1 else inner
            x, states_n, steps = run_layer(how, x, initial, weights, run.route, run.backend, records, panels)
            last.append(states_n)
            if run.return_states:
                h = x.transpose(0, 1) if how.batch_first else x
                every.append([_by_direction(s, directions) for s in (h, *steps)])
            if self.dropout and layer < layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if layers > 1:
            states_n = tuple(map(torch.cat, zip(*last, strict=True)))
        if not every:
            return x, states_n, ()
        # cat also where there is one, which copies it: no result may share memory with another
        return x, states_n, tuple(torch.cat(s, 1) for s in zip(*every, strict=True))

    def _panels(self, backend: ModuleType, place: int, weights: Sequence[Direction]) -> tuple[Any, ...]:
        return self._packed_weights().panels(backend, place, weights, partial(backend.pack, self._cell.name))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One step with the same weights: what `forward` does for T = 1, for streams that come step by step.

        Args:
            x_t: (B, input_size), or (input_size) unbatched.
            state: as `hx` of `forward`: (L, B, H), for LSTM a pair of them, without the B axis if unbatched; None for
                zeros. For a bfloat16 module it may be bfloat16 or float32.

        Returns:
            The output (B, H) and the state after the step, to be passed to the next. The state of a bfloat16 module is
            float32. With frozen weights, steps give the bits that the whole sequence gives.

        Raises:
            RuntimeError: the module is bidirectional; sizes, dtypes or devices do not fit.
            ValueError: `x_t` is neither 1-D nor 2-D.

        Example:
            >>> import torch, fastseq
            >>> gru, state = fastseq.GRU(3, 4), None
            >>> for x_t in torch.randn(7, 2, 3):
            ...     output, state = gru.step(x_t, state)
            >>> output.shape, state.shape
            (torch.Size([2, 4]), torch.Size([1, 2, 4]))
        """
        name = self._cell.mode
        if self.bidirectional:
            raise RuntimeError(f"step: a bidirectional {name} has no single step, as one direction starts at the end")
        checks.check_tensor("x_t", x_t)
        if x_t.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {x_t.dim()}D instead")
        unbatched = x_t.dim() == 1
        weights, states = self._weights(), self._states(state)
        if states is None:
            raise RuntimeError(f"step: state must be what {name} returns as h_n, got {type(state).__name__}")
        x = x_t.unsqueeze(0).unsqueeze(0) if unbatched else x_t.unsqueeze(0)
        if misfit := self._weights_misfit(self._cell, weights):
            raise RuntimeError(f"step: {misfit}")
        self.check_input(x, None)
        sizes = self._state_sizes(x.shape[1])
        if misfit := checks.states_misfit(states, [(size[0], size[2]) for size in sizes] if unbatched else sizes):
            raise RuntimeError(misfit)
        if unbatched:
            states = tuple(None if s is None else s.unsqueeze(1) for s in states)
        tensors = [w for direction in weights for w in direction]
        route, backend = routing.route("recurrent", (x, *tensors), states)
        if backend is not None and self._cell.name not in backend.CELLS:
            route, backend = Route.TORCH, None
        if route is not Route.KERNELS and (misfit := checks.unlike((x, *tensors), 1)):
            raise RuntimeError(misfit)
        if route in (Route.KERNELS, Route.GRAPH) and (self.proj_size or not x.numel()):
            route = Route.TORCH
        if route is Route.GRAPH and not has_kernels(self._cell.name):
            route = Route.TORCH
        float_state = x.dtype is torch.bfloat16
        checks.check_states(x, states, or_float32=float_state)
        if float_state:
            states = tuple(None if s is None else s.float() for s in states)
        if route is Route.KERNELS and not needs_grad(x, *tensors, *states):
            y, states = self._step_layers(x[0], states, weights, float_state, backend)
        else:
            call = Layer(self._cell, float_state=float_state)
            y, states, _ = self._layers(call, x, states, _Run(weights, route, backend))
            y = y.squeeze(0)
        if unbatched:
            return y.squeeze(0), self._hx(tuple(s.squeeze(1) for s in states))
        return y, self._hx(states)

    def _step_layers(
        self, x: Tensor, states: States, weights: list[Direction], float_state: bool, backend: ModuleType
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`_layers` for one step and one direction without gradients: the shortest way to the kernels."""
        cell, threads = self._cell, torch.get_num_threads()
        packs = "recurrent" in backend.PACKS and self._packed_weights().frozen
        last = []
        for layer, direction in enumerate(weights):
            h, c, *_ = (*(None if s is None else unit_stride(s[layer]) for s in states), None)
            panels = self._panels(backend, layer, [direction])[0] if packs else None
            w_ih, w_hh, b_ih, b_hh = all_contiguous(direction)
            x, h, c, _ = backend.recurrent_step(
                cell.name,
                unit_stride(x),
                h,
                c,
                w_ih,
                w_hh,
                b_ih,
                b_hh,
                threads,
                False,
                panels,
                float_state,
            )
            last.append((h,) if c is None else (h, c))
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        # stack copies: the state must not share memory with the output
        return x, tuple(map(torch.stack, zip(*last, strict=True)))

    # ---- arguments

    def _weights(self) -> list[Direction] | None:
        """Per layer and direction (w_ih, w_hh, b_ih, b_hh[, w_hr]); None if one is missing.

        By name, as `_flat_weights` may be stale here: functional_call and old weight_norm swap weights unseen.
        """
        named, bias = self._parameters, self.bias
        weights = []
        for place, names in enumerate(self._all_weights):
            direction = list(map(named.get, names))
            for weight in direction:
                if weight is None:
                    direction = self._computed_weights(place, names)
                    break
            if direction is None:
                return None
            if not bias:
                direction[2:2] = (None, None)
            weights.append(tuple(direction))
        return weights

    def _computed_weights(self, place: int, names: list[str]) -> list[Tensor] | None:
        """Those of a direction that are not all parameters: parametrized, pruned, deleted."""
        direction = [getattr(self, name, None) for name in names]
        if any(w is None for w in direction):  # of a deleted one torch keeps the last
            direction = self._flat_weights[place * len(names) : (place + 1) * len(names)]
        return None if any(w is None for w in direction) else direction

    def _states(self, hx: Any) -> States | None:
        """h_0 and the other states out of hx, None where hx has another form."""
        others = len(self._cell.states)
        if hx is None:
            return (None,) * (1 + others)
        if not others:
            return (hx,) if isinstance(hx, Tensor) else None
        if not isinstance(hx, tuple | list) or len(hx) != 1 + others:
            return None
        for state in hx:
            if not isinstance(state, Tensor):
                return None
        return tuple(hx)

    def _hx(self, states: tuple[Tensor, ...]) -> Any:
        return states if len(states) > 1 else states[0]

    def _state_sizes(self, batch: int) -> tuple[tuple[int, int, int], ...]:
        places = self.num_layers * (2 if self.bidirectional else 1)
        other = (places, batch, self.hidden_size)
        return ((places, batch, self.proj_size) if self.proj_size else other, *[other] * len(self._cell.states))

    def _steps(self, data: Tensor) -> int:
        return data.shape[1 if self.batch_first and data.dim() == 3 else 0]

    def _misfit(
        self, cell: Cell, data: object, batch: int | None, states: States | None, weights: list[Direction] | None
    ) -> Exception | None:
        """What the first that is not as it should be raises, dtypes and devices apart; None where all is.

        Torch's ops do not look: oneDNN's LSTM reads and writes as far as the sizes of the input say.
        """
        if not isinstance(data, Tensor):
            return TypeError(f"input must be a Tensor or a PackedSequence, got {type(data).__name__}")
        if states is None:
            return RuntimeError(f"{cell.mode.lower()} expects {_expected_hx(cell)} for hx")
        rank, unbatched = data.dim(), False
        if batch is not None:
            if rank != 2:
                return RuntimeError(f"input must have 2 dimensions, got {rank}")
        elif rank == 3:
            batch = data.shape[0 if self.batch_first else 1]
        elif rank == 2:
            unbatched, batch = True, 1
        else:
            return ValueError(f"{cell.mode}: Expected input to be 2D or 3D, got {rank}D instead")
        if data.shape[-1] != self.input_size:
            return RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {data.shape[-1]}"
            )
        if states[0] is not None:
            sizes = self._state_sizes(batch)
            if unbatched:
                sizes = tuple((size[0], size[2]) for size in sizes)
            for state, size in zip(states, sizes, strict=True):
                if state.shape != size:
                    return RuntimeError(checks.states_misfit(states, sizes))
        misfit = self._weights_misfit(cell, weights)
        return None if misfit is None else RuntimeError(misfit)

    def _weights_misfit(self, cell: Cell, weights: list[Direction] | None) -> str | None:
        if weights is None:
            missing = [n for names in self._all_weights for n in names if getattr(self, n, None) is None]
            return f"{', '.join(missing)} of the {cell.mode} must be a Tensor, got None"
        gates, hidden = len(cell.gates) * self.hidden_size, self.proj_size or self.hidden_size
        directions, inputs = 2 if self.bidirectional else 1, self.input_size
        square, bias = (gates, hidden), (gates,)
        others = [(self.hidden_size,)] * len(cell.parameters)
        if self.proj_size:
            others.append((self.proj_size, self.hidden_size))
        for place, direction in enumerate(weights):
            w_ih, w_hh, b_ih, b_hh = direction[:4]
            if place == directions:
                inputs = hidden * directions
            if (
                w_ih.shape != (gates, inputs)
                or w_hh.shape != square
                or (b_ih is not None and not b_ih.shape == b_hh.shape == bias)
                or (others and [w.shape for w in direction[4:]] != others)
            ):
                shapes = (gates, inputs), square, *((bias, bias) if self.bias else ()), *others
                found = (w for w in weights[place] if w is not None)
                for name, weight, shape in zip(self._all_weights[place], found, shapes, strict=False):
                    if weight.shape != shape:
                        return f"{name} must have shape {shape}, got {tuple(weight.shape)}"
        return None

    def _refuse(self, misfit: Exception, input: Any, hx: Any) -> NoReturn:
        """Raises torch's own error where its module has one for these arguments, else ours."""
        if self._torch_class is not None and not routing.is_compiling():
            with UntilOp(self._cell.sequence_op.__name__, misfit):
                self._torch_class.forward(self, input, hx)
        raise misfit


class UntilOp(TorchFunctionMode):
    """Lets torch's module check its arguments, but not call its op, which would compute something of them."""

    def __init__(self, op: str, misfit: Exception) -> None:
        self.op, self.misfit = op, misfit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == self.op:
            raise self.misfit
        return func(*args, **(kwargs or {}))


def _expected_hx(cell: Cell) -> str:
    if not cell.states:
        return "a Tensor"
    names = "h", *cell.states
    return f"{'two' if len(names) == 2 else len(names)} hidden states, ({', '.join(names)}),"


def _by_direction(sequence: Tensor, directions: int) -> Tensor:
    """(T, B, D*H) -> (T, D, B, H), packed (R, D*H) -> (R, D, H)."""
    sequence = sequence.unflatten(-1, (directions, -1))
    return sequence.transpose(1, 2) if sequence.dim() == 4 else sequence

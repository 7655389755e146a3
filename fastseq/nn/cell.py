"""What the modules of single steps share. Mixed into torch's classes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from fastseq.nn.drop_in import DropIn
from fastseq.nn.packed_weights import PackedWeights, PacksWeights
from fastseq.nn.sequences import UntilOp
from fastseq.ops import routing
from fastseq.ops.autograd import needs_grad
from fastseq.ops.recurrent import checks, formula
from fastseq.ops.recurrent.function import pack_step, run_step
from fastseq.ops.recurrent.spec import Cell, Direction, States
from fastseq.ops.routing import Route


class CellModule(DropIn, PacksWeights):
    """What RNNCell, LSTMCell and GRUCell share."""

    def _step(self, cell: Cell, input: Tensor, *states: Tensor | None) -> tuple[Tensor, ...] | None:
        """The states after the step, or None where torch's own forward has to compute them or to name the mistake."""
        if not isinstance(input, Tensor):
            return None
        for state in states:
            if state is not None and not isinstance(state, Tensor):
                return None
        if input.dim() == 1:
            return self._unbatched_step(cell, input, states)
        named = self._parameters
        try:  # four attribute look-ups on a Module cost as much as the step itself
            weights = named["weight_ih"], named["weight_hh"], named["bias_ih"], named["bias_hh"]
        except KeyError:  # parametrized, pruned, replicated
            weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        packed, panels = self.__dict__.get("_fastseq_packed"), None
        if packed is not None and packed.frozen and not routing.is_compiling():
            panels = self._frozen_panels(packed, cell, input, weights)
        result = run_step(cell, input, states, weights, panels)
        if result is None and routing.transformed() and checks.step_misfit(cell, input, states, weights) is None:
            # Per-sample gradients without a state: torch's cells raise, and are to. Opacus calls so a cell that its
            # model called with one, and takes the gradients of zeros for its own; a pair of results it refuses.
            if states[0] is None and not cell.states and routing.batched():
                return None
            return formula.step(cell, input, states, weights)
        return result

    def _unbatched_step(self, cell: Cell, input: Tensor, states: States) -> tuple[Tensor, ...] | None:
        if any(s is not None and s.dim() != 1 for s in states):
            return None
        result = self._step(cell, input.unsqueeze(0), *(None if s is None else s.unsqueeze(0) for s in states))
        return None if result is None else tuple(s.squeeze(0) for s in result)

    def _step_of_torch(self, cell: Cell, input: Tensor, hx: Any, *states: Any) -> Any:
        """torch's forward, whose op gets only what fits: of gates of other sizes it reads parts that are not there."""
        node = self._node(input, hx)
        if node is not None:
            return node
        if not routing.is_compiling():  # the compiler takes the op apart into checked ones
            x = input
            if isinstance(input, Tensor) and input.dim() == 1:
                x, *states = (s.unsqueeze(0) if isinstance(s, Tensor) else s for s in (input, *states))
            weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
            misfit = checks.step_misfit(cell, x, states, weights)
            if misfit is not None:
                with UntilOp(cell.step_op.__name__, RuntimeError(misfit)):
                    self._torch_class.forward(self, input, hx)
                raise RuntimeError(misfit)
        return self._torch_class.forward(self, input, hx)

    def _frozen_panels(self, packed: PackedWeights, cell: Cell, input: Tensor, weights: Direction) -> Any:
        route, backend = routing.route("recurrent", (input, *weights))
        if route is Route.KERNELS and not needs_grad(input, *weights):
            return packed.panels(backend, 0, [weights], partial(pack_step, backend, cell))[0]
        return None

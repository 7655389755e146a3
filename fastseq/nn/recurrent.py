"""Recurrent and RecurrentCell: modules of any cell, those that torch lacks among them."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.nn.cell import CellModule
from fastseq.nn.sequences import SequenceModule
from fastseq.ops import CELLS
from fastseq.ops.recurrent import checks, formula
from fastseq.ops.recurrent.spec import Cell


class Recurrent(SequenceModule, nn.Module):
    """A recurrent layer, or several, of any cell: what `torch.nn.GRU` is to the GRU.

    With `fastseq.cells.gru` it computes what `fastseq.GRU` does, from the same parameters. Arguments of a call, shapes,
    `step` and errors are those of `fastseq.GRU`.

    Args:
        cell: a cell, for example `fastseq.cells.mgu`.
        input_size: features of the input, I.
        hidden_size: units, H.
        num_layers: layers, L, each reading the output of the one before.
        bias: False leaves out both biases.
        batch_first: input and output are (B, T, N) rather than (T, B, N).
        dropout: probability with which an element between two layers is zeroed in training.
        bidirectional: run each layer in both directions, D = 2.
        device, dtype: of the parameters.

    Called with (input, hx=None, *, lengths=None, reset=None, return_states=False). hx and the returned state are h, or
    a tuple of h and the cell's other states, each (L*D, B, H).

    Parameters are `weight_ih_l0` (G*H, I) for a cell of G gates, `weight_hh_l0` (G*H, H), `bias_ih_l0`, `bias_hh_l0`
    (G*H), and `{parameter}_l0` (H) for each parameter of the cell, with `_reverse` in the other direction too.
    All start from U(-1/sqrt(H), 1/sqrt(H)).

    Raises:
        TypeError: `cell` is no cell, sizes are no integers, an input that is no tensor.
        ValueError: sizes that are not positive, a dropout outside [0, 1], the rank of an input.
        RuntimeError: sizes, dtypes or devices that do not fit.

    Source: https://pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.nn.Recurrent(fastseq.cells.mgu, 3, 4, num_layers=2)
        >>> output, h_n = layer(torch.randn(7, 2, 3), lengths=[5, 7])
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 4]), torch.Size([2, 2, 4]))
    """

    _torch_calls = ()
    proj_size = 0

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_cell(cell)
        _check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if not isinstance(dropout, numbers.Number) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], got {dropout!r}")
        if dropout and num_layers == 1:
            warnings.warn("dropout acts between layers, and there is one", stacklevel=2)
        self._cell = cell
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        self._all_weights = []
        directions = 2 if bidirectional else 1
        for layer in range(num_layers):
            for suffix in ("", "_reverse")[:directions]:
                inputs = hidden_size * directions if layer else input_size
                shapes = _shapes(cell, inputs, hidden_size, bias)
                names = [f"{name}_l{layer}{suffix}" for name in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._all_weights.append(names)
        self.reset_parameters()

    @property
    def cell(self) -> Cell:
        """The cell."""
        return self._cell

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        _draw(self)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Checks the features of an input of `step`."""
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for names in self._all_weights for name in names]

    def extra_repr(self) -> str:
        """The arguments that are not their defaults."""
        options = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        given = [f"{n}={getattr(self, n)}" for n, default in options.items() if getattr(self, n) != default]
        return ", ".join([self._cell.name, str(self.input_size), str(self.hidden_size), *given])


class RecurrentCell(CellModule, nn.Module):
    """One step of any cell: what `torch.nn.GRUCell` is to the GRU.

    Args:
        cell: a cell, for example `fastseq.cells.mgu`.
        input_size: features of the input, I.
        hidden_size: units, H.
        bias: False leaves out both biases.
        device, dtype: of the parameters.

    Called with (input, hx=None): input (B, I) or (I); hx and the result are h, (B, H) or (H), or a tuple of h and the
    cell's other states; None for zeros.

    Parameters are `weight_ih` (G*H, I) for a cell of G gates, `weight_hh` (G*H, H), `bias_ih`, `bias_hh` (G*H) and each
    parameter of the cell (H); all start from U(-1/sqrt(H), 1/sqrt(H)).

    Raises:
        TypeError: `cell` is no cell, sizes are no integers, an input or a state that is no tensor.
        ValueError: sizes that are not positive; an input or a state that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit.

    Source: https://pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    Example:
        >>> import torch, fastseq
        >>> cell, h = fastseq.nn.RecurrentCell(fastseq.cells.mgu, 3, 4), None
        >>> for x in torch.randn(7, 2, 3):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_cell(cell)
        _check_sizes(input_size=input_size, hidden_size=hidden_size)
        self._cell = cell
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        for name, shape in _shapes(cell, input_size, hidden_size, True).items():
            absent = name.startswith("bias_") and not bias
            made = None if absent else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, made)
        self.reset_parameters()

    @property
    def cell(self) -> Cell:
        """The cell."""
        return self._cell

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        _draw(self)

    def forward(self, input: Tensor, hx: Any = None) -> Tensor | tuple[Tensor, ...]:
        """One step: see the class."""
        node = self._node(input, hx)
        if node is not None:
            return node
        cell = self._cell
        states = checks.check_hx(cell, hx, "RecurrentCell", or_none=True)
        checks.check_tensor("input", input)
        for name, tensor in zip(("input", "h", *cell.states), (input, *states), strict=True):
            if tensor is not None and tensor.dim() not in (1, 2):
                raise ValueError(f"RecurrentCell: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
        result = None if cell.parameters else self._step(cell, input, *states)
        if result is None:
            unbatched = input.dim() == 1
            x, *states = (t.unsqueeze(0) if unbatched and t is not None else t for t in (input, *states))
            weights = [
                getattr(self, name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", *cell.parameters)
            ]
            if misfit := checks.step_misfit(cell, x, states, weights):
                raise RuntimeError(misfit)
            result = formula.step(cell, x, states, weights)
            result = tuple(s.squeeze(0) for s in result) if unbatched else result
        return result if cell.states else result[0]

    def extra_repr(self) -> str:
        """The arguments that are not their defaults."""
        return f"{self._cell.name}, {self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


def _shapes(cell: Cell, inputs: int, hidden: int, bias: bool) -> dict[str, tuple[int, ...]]:
    rows = len(cell.gates) * hidden
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, inputs), "weight_hh": (rows, hidden)}
    if bias:
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    return shapes | dict.fromkeys(cell.parameters, (hidden,))


def _draw(module: Recurrent | RecurrentCell) -> None:
    bound = 1 / math.sqrt(module.hidden_size)
    for parameter in module.parameters(recurse=False):
        nn.init.uniform_(parameter, -bound, bound)


def _check_cell(cell: object) -> None:
    if not isinstance(cell, Cell):
        raise TypeError(f"cell must be a Cell, as fastseq.cells.gru, got {type(cell).__name__}")
    known = CELLS.get(cell.name, cell)
    if known is not cell:
        raise ValueError(f"cell must not have the name of another one, {cell.name!r}, which has kernels")


def _check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero, got {size}")

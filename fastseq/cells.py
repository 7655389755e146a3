"""The recurrent cells as objects, which `fastseq.nn.Recurrent` and `fastseq.nn.RecurrentCell` take.

Example:
    >>> import fastseq
    >>> fastseq.cells.mgu
    <cell mgu: gates f n, states h>
"""

from fastseq.ops import CELLS

__all__ = sorted(CELLS)

globals().update(CELLS)

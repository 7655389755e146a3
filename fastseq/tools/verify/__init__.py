"""Every kernel of this machine against the float64 reference: the command `fastseq verify`."""

from fastseq.tools.verify.command import DTYPES, FAMILIES, NothingToVerify, run
from fastseq.tools.verify.comparison import Comparison, Family, compare

__all__ = ["DTYPES", "FAMILIES", "Comparison", "Family", "NothingToVerify", "compare", "run"]

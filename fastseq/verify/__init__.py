"""Every kernel of this machine against the float64 reference: the command `fastseq verify`."""

from fastseq.verify.command import DTYPES, FAMILIES, NothingToVerify, judge, run

__all__ = ["DTYPES", "FAMILIES", "NothingToVerify", "judge", "run"]

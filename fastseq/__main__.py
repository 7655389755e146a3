"""`python -m fastseq` is the command `fastseq`."""

import sys

from fastseq.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())

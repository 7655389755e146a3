"""Mutations of valid calls, in processes of their own: see malformed_fuzz.py. Two seeds a call, one per backend."""

import subprocess
import sys
from pathlib import Path

import pytest
from cases import LONG

SEEDS, A_PROCESS = (20_000, 2000) if LONG else (400, 400)
SCRIPT = Path(__file__).with_name("malformed_fuzz.py")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("first", range(0, SEEDS, A_PROCESS))
def test_malformed_calls(first):
    """An error of torch's kinds, or what the checked computation gives. The last seed on stdout is that of a crash."""
    command = [sys.executable, str(SCRIPT), str(first), str(A_PROCESS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    told = done.stdout.rpartition("\r")[2]
    assert done.returncode == 0, f"{told}\n{done.stderr[-2000:]}"

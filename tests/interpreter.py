"""Another Python, for what a process can do only once: choose an instruction set, fork, count its threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def start(code: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` as this interpreter would, with these variables added to the environment."""
    flags = [*(["-S"] if sys.flags.no_site else []), *(["-P"] if sys.flags.safe_path else [])]
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run(code: str, timeout: float = 120, **environment: str) -> str:
    """The same for code that must succeed; returns what it printed."""
    result = start(code, timeout, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()

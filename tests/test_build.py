"""What the build's own options say where they cannot be met."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("on", "FASTSEQ_BUILD_CUDA is on, but no nvcc was found: put it on PATH or its path into CUDACXX"),
        ("auto", "FASTSEQ_BUILD_CUDA must be on or off, got 'auto'"),
    ],
)
def test_a_build_with_cuda_that_cannot_be(value, message, compiler, tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    command = [cmake, "-S", ROOT, "-B", tmp_path, f"-DCMAKE_CXX_COMPILER={compiler}", f"-DFASTSEQ_BUILD_CUDA={value}"]
    environment = os.environ | {"CUDACXX": str(tmp_path / "nvcc")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())

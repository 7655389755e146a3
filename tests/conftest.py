"""Fixtures of every test."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastseq import backends

ROOT = Path(__file__).parent.parent
if torch.cuda.is_available():
    os.environ["FASTSEQ_CUDA"] = "on"  # for test_cuda_recurrent.py; tensors of the CPU never take those kernels


@pytest.fixture(params=["torch", "native"])
def route(request):
    """Runs a test with torch's own operators and with the kernels, which must not make a difference."""
    with backends.use_backend(request.param):
        if request.param == "native" and backends.select() is None:
            pytest.skip("the kernels are not built")
        yield request.param


@pytest.fixture(scope="session")
def build_check(tmp_path_factory):
    """Builds tests/<name>.cpp together with the team of threads; gives the program's path."""
    compiler = os.environ.get("CXX") or shutil.which("g++")

    def build(name):
        if not compiler:
            pytest.skip("there is no C++ compiler")
        program = tmp_path_factory.mktemp("check") / name
        sources = f"tests/{name}.cpp", "csrc/cpu/threads.cpp"
        command = [compiler, "-std=gnu++17", "-O2", "-fopenmp", "-Icsrc", *sources, "-o", program]
        subprocess.run(command, cwd=ROOT, check=True)
        return program

    return build

"""The sources of csrc/cuda, compiled by g++ with the headers in cuda_on_host/ and run on the CPU, by the comparison of
`fastseq verify`. What this cannot show is whatever only a GPU has: its exp and tanh, the code of its compiler, races
between blocks, streams, speed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CELLS

from fastseq import backends
from fastseq.verify import judge
from fastseq.verify.recurrent import Case, kernel_results, make_inputs, reference_results, torch_results

if backends.select() is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

from fastseq.backends import cuda

ROOT = Path(__file__).parent.parent
SHAPES = ((1, 1, 1, 1), (1, 7, 5, 33), (7, 1, 65, 7), (5, 7, 1, 65), (3, 33, 7, 33), (2, 65, 33, 1))
OPTIONS = (
    {},
    {"bias": False},
    {"lengths": True},
    {"packed": True},
    {"reset": True},
    {"lengths": True, "reset": True},
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The path of the emulation."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    path = tmp_path_factory.mktemp("cuda_on_host") / "libfastseq_cuda.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    subprocess.run(
        [compiler, *options, f"-I{ROOT / 'tests/cuda_on_host'}", "-x", "c++", *sources, "-o", path], check=True
    )
    return path


@pytest.fixture(autouse=True)
def emulation(library):
    with cuda.use_emulation(library):
        yield


def check(cell, case, dtype):
    inputs = make_inputs(cell, case, getattr(torch, dtype))
    exact = np.longdouble if dtype == "float64" else np.float64
    reference, yardstick = reference_results(cell, case, inputs, exact), torch_results(cell, case, inputs)
    for kernel, results in kernel_results(cuda, cell, case, inputs, "cuda"):
        verdict = judge(results, {name: yardstick[name] for name in results}, reference, dtype)
        assert verdict.ok, f"{kernel}, {case}: {verdict}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("cell", CELLS)
def test_every_case(cell, options, reverse, dtype):
    for T, B, I, H in SHAPES:  # noqa: E741
        check(cell, Case(T, B, I, H, reverse=reverse, **options), dtype)

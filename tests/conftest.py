"""Fixtures of every test."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastseq import backends

ROOT = Path(__file__).parent.parent
# So that a failed assert of what the tests share shows its values, as one of a test does.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.glob("*.py")))
if torch.cuda.is_available():
    os.environ["FASTSEQ_CUDA"] = "on"  # for test_cuda_recurrent.py; tensors of the CPU never take those kernels


@pytest.fixture(params=["torch", "native"])
def route(request):
    """Runs a test with torch's own operators and with the kernels, which must not make a difference."""
    with backends.use_backend(request.param):
        if request.param == "native" and backends.select("recurrent") is None:
            pytest.skip("the kernels are not built")
        yield request.param


@pytest.fixture
def native():
    """The kernels' backend."""
    return pytest.importorskip("fastseq.backends.native", reason="the extension is not built")


@pytest.fixture(params=[True, False], ids=["dlpack", "attributes"])
def reader(request, native):
    """Both ways in which the binding reads tensors."""
    assert native.attach(exchange=request.param) == request.param
    yield request.param
    native.attach()


@pytest.fixture(scope="session")
def compiler():
    """The C++ compiler."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture(scope="session")
def build_check(compiler, tmp_path_factory):
    """Builds tests/<name>.cpp together with the team of threads; gives the program's path."""

    def build(name):
        program = tmp_path_factory.mktemp("check") / name
        sources = f"tests/{name}.cpp", "csrc/cpu/base/threads.cpp"
        command = [compiler, "-std=gnu++17", "-O2", "-fopenmp", "-Icsrc", *sources, "-o", program]
        subprocess.run(command, cwd=ROOT, check=True)
        return program

    return build


@pytest.fixture(scope="session")
def cuda_on_host(compiler, tmp_path_factory):
    """The path of the sources of csrc/cuda as a library for the CPU: see cuda_on_host/cuda_runtime.h."""
    folder = tmp_path_factory.mktemp("cuda_on_host")
    options = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
        "-Itests/cuda_on_host",
        "-Icsrc",
    ]

    def compiled(source, name, *definitions):
        made = folder / f"{name}.o"
        subprocess.run([compiler, *options, *definitions, "-x", "c++", "-c", source, "-o", made], cwd=ROOT, check=True)
        return made

    def compiled_for(cell):
        name, header, functor = cell
        definitions = {"NAME": name, "HEADER": f'"math/{header}"', "FUNCTOR": functor}
        definitions = [f"-DFASTSEQ_CELL_{key}={value}" for key, value in definitions.items()]
        return compiled(ROOT / "csrc/cuda/recurrent_instance.cu", name, *definitions)

    cells = re.findall(r"^CELL\((\w+), ([\w.]+), (\w+)\)$", (ROOT / "csrc/cells.def").read_text(), re.M)
    sources = [ROOT / "csrc/cuda" / name for name in ("attention.cu", "table.cu")]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = [*pool.map(compiled_for, cells), *pool.map(compiled, sources, [source.stem for source in sources])]
    library = folder / "libfastseq_cuda.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    return library

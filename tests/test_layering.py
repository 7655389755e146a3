"""Who may know whom: imports in Python, includes and symbols in C++, and the size of files."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastseq

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastseq"
CSRC = ROOT / "csrc"
VENDORED = CSRC / "dlpack.h"

# What each part of the package may import of fastseq beside itself. A single file of the package itself (swap.py, ...)
# stands above the library's parts and may import any of them. The command may import everything, nothing the command.
TOP_FILES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
LIBRARY = {"nn": {"ops"}, "ops": {"backends"}, "backends": set(), "reference": set()}
MAY_IMPORT = {
    **LIBRARY,
    "integrations": {*LIBRARY, *TOP_FILES},
    "tools": {*LIBRARY, *TOP_FILES, "integrations"},
    **{name: {*LIBRARY, *TOP_FILES} for name in TOP_FILES},
    "__init__": {*LIBRARY, *TOP_FILES, "integrations"},
    "__main__": {"tools"},
}
# The files that may import the extension.
BINDINGS = {"backends/native.py", "backends/cuda/library.py"}
# What each room of csrc may include beside its own files and those of csrc itself.
MAY_INCLUDE = {
    "math": set(),
    "rows": {"math"},
    "cpu/base": set(),
    "cpu/gemm": {"cpu/base"},
    **{
        f"cpu/{name}": {"math", "rows", "cpu/base", "cpu/gemm"}
        for name in ("attention", "layer_norm", "linear", "recurrent")
    },
    "cpu": {"cpu/base"},
    "cuda": {"math", "rows"},
    "": {"math", "cpu/base"},
}

CELLS = re.findall(r"^CELL\((\w+)", (CSRC / "cells.def").read_text(), re.M)

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CXX_FILES = sorted(
    path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu") and path != VENDORED
)
SOURCES = [
    path
    for folder in ("fastseq", "csrc", "tests", "bench", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".pyx", ".pxd", ".pxi", ".h", ".cpp", ".cuh", ".cu") and path != VENDORED
]


def name_of(path):
    return str(path.relative_to(ROOT))


def imports_of(path):
    """The absolute names of all modules that a file imports; `from a import b` counts as a.b and a."""
    names = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def parts_of(path):
    """The parts of fastseq that a file imports."""
    known = set(MAY_IMPORT) | {"_native"}
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("fastseq.")} & known


def includes_of(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_imports_point_one_way(path):
    inside = path.relative_to(PACKAGE)
    imported = parts_of(path)
    assert "_native" not in imported or str(inside) in BINDINGS
    part = inside.parts[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"{part} is not in the table above"
    assert imported <= MAY_IMPORT[part] | {part, "_native"}


def packages():
    found = [module for module in pkgutil.walk_packages(fastseq.__path__, "fastseq.") if module.ispkg]
    return [fastseq, *(importlib.import_module(module.name) for module in found)]


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.__name__)
def test_no_module_has_the_name_of_an_object_of_its_package(package):
    # `import a.b as m` returns the attribute b of a, which would be the object.
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    assert names
    hidden = [name for name in names if not isinstance(vars(package).get(name, package), types.ModuleType)]
    assert not hidden


@pytest.mark.parametrize("path", sorted((PACKAGE / "reference").rglob("*.py")), ids=name_of)
def test_the_reference_knows_numpy_only(path):
    outside = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
    assert outside <= {"numpy", "fastseq"}


FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}


@pytest.mark.parametrize(
    "path", [p for p in PYTHON_FILES if p.relative_to(PACKAGE).parts[0] in ("backends", "nn", "ops")], ids=name_of
)
def test_new_tensors_are_told_their_device(path):
    # Else torch.set_default_device would decide: see test_default_device.py.
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
            assert "device" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_what_a_backend_has_is_asked_of_its_contract(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            assert not re.search(r"backend|native|cuda", ast.unparse(node.args[0])), f"{path}:{node.lineno}"


# Who may know a cell by its name: the cell's own files. Torch's class names are others ("LSTM"); lists of public names
# hold functions.
_STEMS = "|".join(sorted({name.split("_")[0] for name in CELLS}))
OF_A_CELL = re.compile(rf"ops/cells/\w+\.py|(nn|reference)/({_STEMS})\.py")


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_no_cell_is_known_by_its_name(path):
    if OF_A_CELL.fullmatch(str(path.relative_to(PACKAGE))):
        return
    tree = ast.parse(path.read_text())
    public = [
        leaf
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for leaf in ast.walk(node)
    ]
    names = {*CELLS, *(name.split("_")[0] for name in CELLS)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names]
    assert not [f"{path}:{node.lineno}" for node in found if node not in public]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_the_package_imports_no_tests(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & {"tests", "bench", "cases", "pytest"}


def test_tests_import_no_tests():
    # What several share stands in a module that is no test, or one of them could not change without the others.
    found = {path.name: imports_of(path) for path in (ROOT / "tests").glob("*.py")}
    assert len(found) > 50
    names = {name.removesuffix(".py") for name in found if name.startswith("test_")} | {"conftest"}
    assert not {name: imported & names for name, imported in found.items() if imported & names}


def test_tolerances_stand_in_one_table():
    for path in sorted((ROOT / "tests").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for keyword in node.keywords if isinstance(node, ast.Call) and path.name != "cases.py" else ():
                literal = isinstance(keyword.value, ast.Constant) and keyword.arg in ("rtol", "atol", "rel", "abs")
                assert not literal, f"{name_of(path)}:{node.lineno}: use TOLERANCES of cases.py"


def test_the_extension_imports_nothing():
    for path in PACKAGE.glob("_native*"):
        if path.suffix in (".pyx", ".pxd", ".pxi"):
            text = path.read_text()
            assert not re.findall(r"^\s*(?:import|from)\s+(?!cpython|libc)\w+.*import", text, re.M), path
            assert not re.findall(r"^\s*import\s", text, re.M), path


@pytest.mark.parametrize("path", CXX_FILES, ids=name_of)
def test_includes(path):
    included = includes_of(path)
    inside = path.relative_to(CSRC)
    assert not [name for name in included if re.search(r"torch|ATen|c10|[Pp]ython", name)], "csrc knows no torch"
    assert ("immintrin.h" in included) <= (str(inside) == "cpu/base/simd.h"), "intrinsics are for cpu/base/simd.h"
    assert ("omp.h" in included) <= (str(inside) == "cpu/base/threads.cpp"), "OpenMP is for cpu/base/threads.cpp"
    assert any(name.startswith("cuda_") for name in included) <= (str(inside) == "cuda/common.cuh")
    assert ("#pragma omp" in path.read_text()) <= (str(inside) == "cpu/base/threads.cpp")
    if inside.parts[0] == "math":
        assert not [name for name in included if "/" in name], "math/ knows nothing but itself"
    else:
        ours = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.M)
        assert not [name for name in ours if not (CSRC / name).exists()], "includes name a file from csrc/ on"
        room = inside.parent.as_posix().removeprefix(".")
        rooms = {Path(name).parent.as_posix().removeprefix(".") for name in ours}
        assert rooms <= MAY_INCLUDE[room] | {room, ""}
    if path.name.endswith("-inl.h"):
        standard = {name for name in included if re.fullmatch(r"[a-z_]+", name)}
        assert standard <= {"cstdint", "cstddef", "cstring", "type_traits", "utility"}, "weak symbols of std"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_size(path):
    assert len(path.read_text().splitlines()) <= 500, "split it"


# ---- the objects of the build


ISAS = re.findall(r"^ISA\((\w+)", (CSRC / "isas.def").read_text(), re.M)


def kernel_objects():
    """The ISA, the cell or "" and the path of every object that CMake compiled for an ISA, in the newest build."""
    builds = sorted(ROOT.glob("build/*/CMakeFiles"), key=lambda path: path.stat().st_mtime)
    if not builds:
        return []
    return [
        (isa, cell, path)
        for isa in ISAS
        for cell in ("", *CELLS)
        for path in builds[-1].glob(f"kernels_{isa}{cell and '_'}{cell}.dir/csrc/cpu/**/*.o")
    ]


def test_no_weak_symbol_leaves_its_isa():
    # The linker keeps one copy of a weak symbol: an AVX-512 one in the hands of the baseline is an illegal instruction.
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    objects = kernel_objects()
    if not objects:
        pytest.skip("there is no build tree beside the sources")
    weak = {}
    for isa, _, path in objects:
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            kind, symbol = line[17:18], line[19:]
            # Tables and names of a type (vtable for, typeinfo for) belong to the type.
            if kind in "WVu" and f"fastseq::{isa}::" not in symbol.split("(")[0] and not symbol.startswith("DW.ref."):
                weak.setdefault(symbol, set()).add(f"{isa}/{path.parent.name}/{path.stem}")
    assert not weak


def test_every_isa_is_built_from_the_same_sources():
    objects = kernel_objects()
    if not objects:
        pytest.skip("there is no build tree beside the sources")
    sources = {}
    for isa, cell, path in objects:
        sources.setdefault(isa, set()).add((cell, f"{path.parent.name}/{path.name}"))
    assert "baseline" in sources
    assert all(names == sources["baseline"] for names in sources.values())
    assert {("", "cpu/table.cpp.o"), *((cell, "recurrent/instance.cpp.o") for cell in CELLS)} <= sources["baseline"]

"""Which instruction set runs, who decides, and what is linked."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from interpreter import run, start

native = pytest.importorskip("fastseq.backends.native", reason="the extension is not built")

from fastseq import _native  # noqa: E402  only if it is built
from fastseq.backends.contract import Refused  # noqa: E402

ORDER = ("baseline", "avx2", "avx512", "avx512_bf16")
VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64, "avx512_bf16": 64}

# Runs a kernel and prints what the table that ran it says of itself.
REPORT = """
    import torch
    from fastseq.backends import native
    x, weights = torch.randn(3, 2, 5), (torch.randn(28, 5), torch.randn(28, 7), None, None)
    panels = native.pack("lstm", weights)
    y = native.recurrent_forward("lstm", x, None, None, weights, panels=panels)[0]
    assert y.isfinite().all()
    print(native.active_isa(), panels.isa, native.vector_bytes())
"""


def test_isas():
    isas = native.isas()
    assert isas[0] == "baseline"
    assert list(isas) == [isa for isa in ORDER if isa in isas]
    if platform.machine() == "x86_64":
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
        assert ("avx2" in isas) == ({"avx2", "fma", "f16c", "bmi1", "bmi2"} <= flags)
        assert ("avx512" in isas) == ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= flags)
        assert ("avx512_bf16" in isas) == ("avx512" in isas and "avx512_bf16" in flags)


def test_the_best_runs_by_default():
    assert run(REPORT, FASTSEQ_ISA="").split()[0] == native.isas()[-1]


@pytest.mark.parametrize("isa", native.isas())
def test_the_forced_one_runs(isa):
    active, panels, width = run(REPORT, FASTSEQ_ISA=isa).split()
    assert (active, panels) == (isa, isa)
    if platform.machine() == "x86_64":
        assert int(width) == VECTOR_BYTES[isa]


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2 ", *(isa for isa in ORDER if isa not in native.isas())])
def test_another_name_is_an_error(isa):
    result = start("import fastseq.backends", FASTSEQ_ISA=isa)
    assert result.returncode != 0
    assert f"ValueError: FASTSEQ_ISA is {isa!r}" in result.stderr
    assert all(name in result.stderr for name in native.isas())
    with pytest.raises(ValueError, match=isa), native.use_isa(isa):
        pass


@pytest.mark.parametrize("isa", native.isas())
def test_use_isa(isa):
    before = native.active_isa()
    weights = torch.randn(28, 5), torch.randn(28, 7), None, None
    with native.use_isa(isa):
        assert native.active_isa() == isa
        assert native.pack("lstm", weights).isa == isa
    assert native.active_isa() == before
    with pytest.raises(ZeroDivisionError), native.use_isa(isa):
        _ = 1 / 0
    assert native.active_isa() == before


def test_the_backward_runs_on_the_isa_of_its_forward():
    cell, x = "gru", torch.randn(3, 2, 5)
    weights = torch.randn(21, 5), torch.randn(21, 7), torch.randn(21), torch.randn(21)
    for isa in native.isas():
        gradients = []
        for active in native.isas():
            with native.use_isa(isa):
                y, _, _, _, saved = native.recurrent_forward(cell, x, None, None, weights, save=True)
            with native.use_isa(active):
                gradients.append(
                    native.recurrent_backward(
                        cell, x, None, None, weights, y, saved, isa,
                        dy=y, dh_n=None, dc_n=None, dc_all=None, needs=[True] * 7,
                    )
                )  # fmt: skip
        for other in gradients[1:]:
            assert all(a is b or torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fma_peak(dtype):
    assert native.fma_peak(dtype, 0.01) > 1e8
    with pytest.raises(ValueError):
        native.fma_peak(torch.int64)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 15, 16, 1_000_003])
def test_read_rate(size, threads):
    for isa in native.isas():
        with native.use_isa(isa):
            rate = _native.read_rate(torch.ones(size), 0.01, threads)
        assert rate == 0 if size < 16 else 1e3 < rate < 1e13  # whole cache lines are read


def test_read_rate_refuses():
    with pytest.raises(Refused, match="contiguous"):
        native.read_rate(torch.ones(4, 4).t())
    with pytest.raises(Refused, match="dtypes"):
        native.read_rate(torch.ones(4, dtype=torch.complex64))


# ---- the backends


def test_backend_names():
    code = "import fastseq.backends as b; k = b.select('linear'); print(k and k.__name__)"
    assert run(code, FASTSEQ_BACKEND="") == "fastseq.backends.native"
    assert run(code, FASTSEQ_BACKEND="torch") == "None"
    result = start(code, FASTSEQ_BACKEND="jax")
    assert result.returncode != 0
    assert "ValueError: the backend must be one of native, torch, got 'jax'" in result.stderr


FUNCTIONS = {
    "recurrent": ("recurrent_forward", "recurrent_backward", "recurrent_step"),
    "attention": ("attention_forward", "attention_backward"),
    "layer_norm": ("layer_norm_forward", "layer_norm_backward"),
    "linear": ("linear_forward",),
}
PACKING = {"recurrent": "pack", "linear": "pack_linear"}


def test_backends_fill_the_contract():
    from fastseq.backends import contract, cuda

    for backend in (native, cuda):
        names = {*contract.Backend.__annotations__, *vars(contract.Backend)}
        assert {name for name in names if not name.startswith("_")} <= set(dir(backend))
        assert backend.PACKS <= set(backend.SERVES) <= set(FUNCTIONS)
        names = [name for op in backend.SERVES for name in FUNCTIONS[op]] + [PACKING[op] for op in backend.PACKS]
        assert all(callable(getattr(backend, name)) for name in names)
        assert not backend.PACKS or callable(backend.checksum)


def test_a_backend_serves_ops_devices_and_dtypes():
    from fastseq import backends

    with backends.use_backend("native"):
        assert backends.select("recurrent", "cpu", torch.bfloat16) is native
        assert backends.select("recurrent", "cpu", torch.float16) is None
        assert backends.select("recurrent", "meta") is None
        assert backends.select("convolution") is None


def test_use_backend():
    from fastseq import backends

    before = backends.select("recurrent")
    with backends.use_backend("torch"):
        assert backends.select("recurrent") is None
        with backends.use_backend("native"):
            assert backends.select("recurrent") is native
        assert backends.select("recurrent") is None
    assert backends.select("recurrent") is before
    with pytest.raises(ValueError, match="jax"), backends.use_backend("jax"):
        pass


def test_a_missing_build_warns_once_and_a_broken_one_is_an_error():
    missing = """
        import sys, warnings
        class Missing:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "fastseq._native":
                    raise {error}
        sys.meta_path.insert(0, Missing)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fastseq.backends
            import fastseq.backends
        print(fastseq.backends.select("recurrent"), [str(w.message).split()[0] for w in caught])
    """
    absent = 'ModuleNotFoundError("no module", name="fastseq._native")'
    assert run(missing.replace("{error}", absent)) == "None ['fastseq._native']"
    result = start(missing.replace("{error}", 'ImportError("undefined symbol")'))
    assert result.returncode != 0
    assert "undefined symbol" in result.stderr


# ---- what is linked and loaded


def test_openmp_is_linked_once_by_its_plain_name():
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    listing = subprocess.run(["readelf", "-d", _native.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert needed.count("libgomp.so.1") == 1
    assert not [name for name in needed if re.search(r"libi?omp|libgomp-|torch|python", name)]


def test_there_is_one_pool_of_threads():
    if not torch.backends.openmp.is_available():
        pytest.skip("this torch is built without OpenMP")
    report = run("""
        import os, re
        import torch
        from fastseq.backends import native
        torch.set_num_threads(3)
        a = torch.randn(600, 600)
        (a.exp() @ a).sum()
        before = len(os.listdir("/proc/self/task"))
        x, weights = torch.randn(20, 64, 128), (torch.randn(384, 128), torch.randn(384, 128), None, None)
        native.recurrent_forward("gru", x, None, None, weights, save=True)
        native.checksum(torch.randn(1 << 20))
        a.exp()
        after = len(os.listdir("/proc/self/task"))
        maps = open("/proc/self/maps").read()
        print(after - before, len(set(re.findall(r"\\S*lib(?:gomp|i?omp5?)[-.\\w]*\\.so\\S*", maps))))
    """)
    assert report == "0 1"


def test_the_extension_imports_no_torch():
    code = f"""
        import sys
        from importlib import util
        sys.modules["torch"] = None
        spec = util.spec_from_file_location("fastseq._native", {_native.__file__!r})
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(*module.isas())
    """
    assert run(code) == " ".join(native.isas())

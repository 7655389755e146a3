"""The command `fastseq`: what it prints, its exit codes, and that `verify` can fail."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq.ops import SERVICE
from fastseq.reference import COMPUTATIONS
from fastseq.tools import demo, info
from fastseq.tools.char_lm import TextError, read_text
from fastseq.tools.cli import main
from fastseq.tools.verify import attention, command, layer_norm, recurrent

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def the_quick_brown_fox(jumps):\n    return jumps\n\n\n" * 60, encoding="utf-8")
    return path


def refused(arguments, capsys):
    """The one line in which a call is refused."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1
    return captured.err


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (fastseq.__version__, torch.__version__, *info.ISA_FLAGS, *info.VARIABLES, "threads", "GPU"):
        assert expected in printed
    for row in SERVICE:
        assert row.case in printed


def test_info_names_the_active_isa(native, capsys):
    with native.use_isa("baseline"):
        main(["info"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["baseline", "active"] in lines
    assert sum(line[1:] == ["active"] for line in lines) == 1
    for isa in set(info.ISA_FLAGS) - set(native.isas()):
        assert any(line[:2] == [isa, "no:"] for line in lines)


def test_info_says_why_there_are_no_kernels(monkeypatch, capsys):
    monkeypatch.setattr(info, "load_kernels", lambda: (None, "No module named 'fastseq._native'"))
    assert main(["info"]) == 0
    assert "not built: No module named 'fastseq._native'" in capsys.readouterr().out


def test_readme_holds_the_tables_of_the_code():
    for row in SERVICE:
        assert f"| {row.case} | {row.served_by} | {row.reason} |\n" in README
    for name, meaning in info.VARIABLES.items():
        assert f"| `{name}` | {meaning} |\n" in README


def test_module_is_the_command():
    command = [sys.executable, "-m", "fastseq", "info"]
    assert "Instruction sets" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def verified(op, dtype, native, capsys):
    """How many results of the active kernels `fastseq verify` has found sound."""
    assert main(["verify", "--op", op, "--dtype", dtype, "--isa", native.active_isa()]) == 0
    printed = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in printed if line.startswith(op))
    assert row[1:3] == [native.active_isa(), dtype]
    assert row[-1] == "ok"
    return int(row[3])


@pytest.mark.parametrize("dtype", command.DTYPES)
@pytest.mark.parametrize("cell", recurrent.CELLS)
def test_verify(native, cell, dtype, capsys):
    cases = list(recurrent.cases(dtype))
    assert verified(cell, dtype, native, capsys) == 3 * len(cases) + 3 * sum(map(_is_step, cases))


def _is_step(case):
    return case.steps == 1 and not (case.lengths or case.packed or case.reset)


@pytest.mark.parametrize("dtype", command.DTYPES)
def test_verify_attention(native, dtype, capsys):
    assert verified("attention", dtype, native, capsys) == 2 * len(list(attention.cases(dtype)))


@pytest.mark.parametrize("dtype", command.DTYPES)
def test_verify_layer_norm(native, dtype, capsys):
    assert verified("layer_norm", dtype, native, capsys) == 2 * len(list(layer_norm.cases(dtype)))


@pytest.fixture
def few(monkeypatch):
    """Verifies these cases of an op only."""

    def only(op, *cases):
        monkeypatch.setitem(command.FAMILIES, op, command.FAMILIES[op]._replace(cases=lambda dtype: iter(cases)))

    return only


def test_verify_runs_every_isa(native, few, monkeypatch, capsys):
    few("gru", recurrent.Case(2, 3, 5, 7))
    few("attention", attention.Case(2, 3, 1, 5, 7, 9, 9))
    entered = []
    use_isa = native.use_isa
    monkeypatch.setattr(native, "use_isa", lambda isa: (entered.append(isa), use_isa(isa))[1])
    assert main(["verify", "--op", "gru", "--op", "attention", "--dtype", "float32"]) == 0
    assert entered == [isa for _ in range(2) for isa in native.isas() for _ in range(COMPUTATIONS)]
    assert capsys.readouterr().out.count(" ok") == 2 * len(native.isas())


def _add_to_output(results):
    results[0].add_(1e-3)


def _forget_an_output(results):
    results[0][..., -1] = float("nan")


def _add_to_gradient(results):
    results[4].mul_(1.001)  # dw_hh


def _double_a_state(results):
    results[1].mul_(2)  # h_n, or dh_0


@pytest.mark.parametrize(
    ("function", "damage"),
    [
        ("recurrent_forward", _add_to_output),
        ("recurrent_forward", _forget_an_output),
        ("recurrent_forward", _double_a_state),
        ("recurrent_backward", _add_to_gradient),
        ("recurrent_backward", _forget_an_output),
        ("recurrent_backward", _double_a_state),
        ("recurrent_step", _add_to_output),
    ],
)
def test_verify_fails(native, few, monkeypatch, function, damage, capsys):
    _damage(native, monkeypatch, function, damage)
    case = recurrent.Case(4, 3, 5, 7)
    few("gru", replace(case, steps=1), case, replace(case, reverse=True))
    monkeypatch.setattr(command, "SHOWN_FAILURES", 99)
    assert main(["verify", "--op", "gru", "--dtype", "float32", "--isa", "baseline"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED gru baseline float32: " in printed
    assert "T=1 B=3 I=5 H=7: Verdict" in printed
    assert ("T=4 B=3 I=5 H=7, reverse: Verdict" in printed) == (function != "recurrent_step")


def _damage(native, monkeypatch, function, damage):
    sound = getattr(native, function)

    def damaged(*arguments, **options):
        results = sound(*arguments, **options)
        damage(results)
        return results

    monkeypatch.setattr(native, function, damaged)


def _see_every_key(results):
    if results[1] is not None:
        results[1].add_(1e-3)  # lse


def _lose_a_key_gradient(results):
    results[1][..., -1, :] = 0


def _double_the_mask_gradient(results):
    results[3].mul_(2)


@pytest.mark.parametrize(
    ("function", "damage"),
    [
        ("attention_forward", _add_to_output),
        ("attention_forward", _forget_an_output),
        ("attention_forward", _see_every_key),
        ("attention_backward", _add_to_output),
        ("attention_backward", _lose_a_key_gradient),
        ("attention_backward", _double_the_mask_gradient),
    ],
)
def test_verify_attention_fails(native, few, monkeypatch, function, damage, capsys):
    _damage(native, monkeypatch, function, damage)
    few("attention", attention.Case(2, 3, 1, 5, 7, 9, 9, float_mask="NLS", lse=True))
    assert main(["verify", "--op", "attention", "--dtype", "float32", "--isa", "baseline"]) == 1
    failure = "training, B=2 N=3/1 L=5 S=7 D=9 E=9, float_mask=NLS, lse: Verdict"
    assert f"FAILED attention baseline float32: {failure}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "damage"),
    [
        ("layer_norm_forward", _add_to_output),
        ("layer_norm_forward", _forget_an_output),
        ("layer_norm_backward", _add_to_output),
        ("layer_norm_backward", _forget_an_output),
    ],
)
def test_verify_layer_norm_fails(native, few, monkeypatch, function, damage, capsys):
    _damage(native, monkeypatch, function, damage)
    few("layer_norm", layer_norm.Case(2, 3, 65, residual=True))
    assert main(["verify", "--op", "layer_norm", "--dtype", "float32", "--isa", "baseline"]) == 1
    failure = "training, T=2 B=3 N=65, residual: Verdict"
    assert f"FAILED layer_norm baseline float32: {failure}" in capsys.readouterr().out


def test_verify_counts_the_failures_it_does_not_show(native, few, monkeypatch, capsys):
    _damage(native, monkeypatch, "recurrent_forward", _add_to_output)
    few("gru", recurrent.Case(2, 3, 5, 7), recurrent.Case(2, 3, 5, 7, reverse=True))
    assert main(["verify", "--op", "gru", "--dtype", "float32", "--isa", "baseline"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(lines) == command.SHOWN_FAILURES + 1
    assert lines[-1] == f"FAILED gru baseline float32: {6 - command.SHOWN_FAILURES} more"


def test_verify_without_the_isa(native, monkeypatch, capsys):
    monkeypatch.setattr(native, "isas", lambda: ("baseline",))
    assert "avx512: not available here, only baseline" in refused(["verify", "--isa", "avx512"], capsys)


class OnlyRecurrent:
    """A backend with no more than that."""

    __name__ = "some.backend"

    def __init__(self, native):
        self.SERVES = {"recurrent": native.SERVES["recurrent"]}

    def isas(self):
        return ("cuda",)


@pytest.mark.parametrize("op", ["linear", "layer_norm", "attention"])
def test_verify_names_what_a_backend_has_no_kernels_for(native, monkeypatch, op, capsys):
    backend = OnlyRecurrent(native)
    with pytest.raises(command.NothingToVerify, match=f"{op}: no kernels in some.backend"):
        command.verify(backend, [op], ["float32"], ["cuda"])
    monkeypatch.setattr(command, "load_cuda_kernels", lambda: (backend, ""))
    assert f"{op}: no kernels in some.backend" in refused(["verify", "--op", op, "--isa", "cuda"], capsys)


def test_verify_without_kernels(monkeypatch, capsys):
    monkeypatch.setattr(command, "load_kernels", lambda: (None, "No module named 'fastseq._native'"))
    assert "not built: No module named 'fastseq._native'" in refused(["verify"], capsys)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_demo(cell, text, tmp_path, capsys):
    picture = tmp_path / "out.png"
    options = ["--cell", cell, "--text", str(text), "--steps", "3", "--threads", "1", "--output", str(picture)]
    assert main(["demo", *options]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "torch.nn",
        "fastseq",
        "characters/s",
        "times torch.nn's",
        "first 3 steps",
        "threads: 1",
        "\ndef ",
    ):
        assert expected in printed
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_demo_fails_where_the_losses_differ(text, tmp_path, monkeypatch, capsys):
    def broken(model):
        with torch.no_grad():
            model.linear.weight.mul_(1.1)
        return model

    monkeypatch.setattr(fastseq, "fuse", broken)
    assert main(["demo", "--text", str(text), "--steps", "2", "--output", str(tmp_path / "out.png")]) == 1
    assert "FAILED: above 0.0001" in capsys.readouterr().out


def test_demo_fails_where_no_kernels_run(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastseq, "fuse", lambda model: model)
    assert main(["demo", "--text", str(text), "--steps", "2", "--output", str(tmp_path / "out.png")]) == 1
    assert "FAILED: the fused model ran no kernels" in capsys.readouterr().out


def test_loss_difference():
    assert demo.loss_difference([1.0, 2.0], [1.0, 2.0]) == 0
    assert demo.loss_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert demo.loss_difference([1.0] * 50 + [7.0], [1.0] * 51) == 0
    assert not demo.loss_difference([1.0, float("nan")], [1.0, 2.0]) <= demo.LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["dance"], "dance"),
        (["info", "--steps", "3"], "--steps"),
        (["verify", "--isa", "mmx"], "'mmx'"),
        (["verify", "--dtype", "float16"], "'float16'"),
        (["verify", "--threads", "0"], "at least 1, got '0'"),
        (["demo", "--threads", "0"], "at least 1, got '0'"),
        (["verify", "--threads", "1" + "0" * 30], "at most 1024"),
        (["demo", "--steps", "1" * 5000], "--steps"),
        (["demo", "--cell", "transformer"], "'transformer'"),
        (["demo", "--steps", "0"], "at least 1, got '0'"),
        (["demo", "--steps", "many"], "at least 1, got 'many'"),
        (["demo", "--text", "/no/such/file"], "cannot read /no/such/file: No such file or directory"),
        (["demo", "--text", "/"], "cannot read /: Is a directory"),
        (["demo", "--output", "/no/such/folder/out.png"], "/no/such/folder is not a writable folder"),
        (["demo", "--output", "picture.jpeg"], "must end in .png, got picture.jpeg"),
    ],
)
def test_refused(arguments, message, capsys):
    assert message in refused(arguments, capsys)


def test_text_too_short(tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("too short", encoding="utf-8")
    assert main(["demo", "--text", str(path)]) == 2
    assert "the text has 9 characters, too few" in capsys.readouterr().err


def test_texts_of_nothing_and_of_one_character(tmp_path, capsys):
    path = tmp_path / "text.txt"
    for content in ("", "a" * 2000):
        path.write_text(content)
        code = main(["demo", "--text", str(path), "--steps", "1", "--output", str(tmp_path / "out.png")])
        assert code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("fastseq demo: error: the text has ")


def test_text_not_utf8(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(TextError, match=r"latin1\.txt is not UTF-8 text \(byte 3\)"):
        read_text(path)


@pytest.mark.parametrize(("command", "module"), [("verify", "rich"), ("demo", "rich"), ("demo", "matplotlib")])
def test_missing_extra(command, module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"needs {module} of the extra `cli`" in refused([command], capsys)

"""The examples at small size: each learns, and its losses are those of torch's own operators."""

import json
import random
import re

import captioning
import char_lm
import classify
import numpy as np
import pytest
import seq2seq
from cases import TOLERANCES

from fastseq import backends

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def text(tmp_path):
    """Sentences that can be guessed well, but not to the last character."""
    rng = random.Random(0)
    words = [rng.choice(("the cat sat. ", "a dog ran off. ", "nobody saw it. ")) for _ in range(600)]
    path = tmp_path / "text.txt"
    path.write_text("".join(words), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path):
    """Digits by name and as digits, one to three of them."""
    rng = random.Random(0)
    numbers = ["".join(rng.choices("0123456789", k=rng.randint(1, 3))) for _ in range(800)]
    path = tmp_path / "pairs.tsv"
    lines = (f"{' '.join(DIGITS[int(digit)] for digit in number)}\t{number}" for number in dict.fromkeys(numbers))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def two_tongues(tmp_path):
    """Two files of invented lines, made of different syllables."""
    rng = random.Random(0)
    paths = []
    for name, syllables in {"soft": ("la", "mi", "nu", "so"), "hard": ("kat", "top", "rik", "la")}.items():
        lines = [" ".join(rng.choices(syllables, k=rng.randint(8, 16))) for _ in range(300)]
        paths.append(tmp_path / name)
        paths[-1].write_text("\n".join(lines), encoding="utf-8")
    return paths


@pytest.fixture
def coco(tmp_path):
    """Images 10, 11, ... whose features say what is in them, and captions; some images have only the one."""
    rng = np.random.default_rng(0)
    animals = rng.integers(3, size=120)
    annotations = [
        {"image_id": 10 + i, "id": 2 * i + k, "caption": caption}
        for i, animal in enumerate(animals[:110])
        for k, caption in enumerate((f"A {('cat', 'dog', 'owl')[animal]}.", "An animal"))
    ]
    captions, features = tmp_path / "captions.json", tmp_path / "features.npz"
    captions.write_text(json.dumps({"images": [{"id": 10 + i} for i in range(110)], "annotations": annotations}))
    np.savez(features, image_ids=10 + np.arange(120), features=np.eye(3)[animals] + 0.1 * rng.standard_normal((120, 3)))
    return captions, features


@pytest.mark.parametrize("options", [[], ["--one-hot", "--cell", "gru"]])
def test_char_lm_learns(text, options, capsys):
    small = ["--steps", "120", "--hidden", "64", "--layers", "1", "--window", "32", "--rate", "1e-2", "--length", "50"]
    assert char_lm.main(["--text", str(text), *small, *options]) < 1.3
    assert re.search("(sat|ran|saw)", capsys.readouterr().out.split("how the model goes on")[1])


def test_char_lm_needs_text(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit):
        char_lm.main(["--text", str(tmp_path / "short.txt")])
    assert "the text has 9 characters, too few" in capsys.readouterr().err


@pytest.mark.parametrize("cell", ["rnn", "lstm", "attention"])
def test_captioning_learns(cell, capsys):
    assert (
        captioning.main(["--cell", cell, "--count", "1500", "--steps", "250", "--batch", "32"]) > 0.06
    )  # guessing: 0.03
    assert " left of a " in capsys.readouterr().out


def test_captioning_draws_its_attention(tmp_path):
    picture = tmp_path / "attention.png"
    captioning.main(["--count", "100", "--steps", "20", "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("cell", ["lstm", "attention"])
def test_captioning_reads_coco(coco, cell, capsys):
    captions, features = map(str, coco)
    small = ["--steps", "100", "--hidden", "32", "--batch", "16"]
    assert captioning.main(["--captions", captions, "--features", features, "--cell", cell, *small]) > 0.9
    assert "198 captions to learn from, 11 images held out, 10 words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--captions", "captions.json"], "go together"),
        (["--plot", "out.png", "--cell", "lstm"], "--plot needs --cell attention"),
        (["--count", "9"], "fewer than 10 images"),
    ],
)
def test_captioning_refuses(options, message, capsys):
    with pytest.raises(SystemExit):
        captioning.main(options)
    assert message in capsys.readouterr().err


def test_seq2seq_learns(pairs):
    assert seq2seq.main(["--pairs", str(pairs), "--steps", "200", "--hidden", "64", "--rate", "5e-3"]) > 0.8


def test_the_dates_are_what_they_say():
    assert [seq2seq.ordinal(day) for day in (1, 12, 22)] == ["1st", "12th", "22nd"]
    formats = seq2seq.written(seq2seq.date(2024, 3, 2))
    assert "Saturday, the 2nd of March 2024" in formats
    assert {"03/02/2024", "02.03.2024", "3/2/24", "2.3.24"} <= set(formats)


def test_classify_learns(two_tongues):
    files = ["--files", *map(str, two_tongues)]
    assert classify.main([*files, "--steps", "40", "--hidden", "32", "--rate", "1e-2"]) > 0.95


def test_classify_reads_the_standard_library(capsys):
    classify.main(["--steps", "2", "--hidden", "8"])
    assert "classes: asyncio, email" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (char_lm.main, ["--cell", "rnn", "--hidden", "65"]),
        (char_lm.main, ["--cell", "lstm", "--one-hot"]),
        (char_lm.main, ["--cell", "gru"]),
        (captioning.main, ["--cell", "rnn", "--count", "100"]),
        (captioning.main, ["--cell", "lstm", "--count", "100"]),
        (captioning.main, ["--cell", "attention", "--count", "100"]),
        (seq2seq.main, ["--count", "200"]),
        (classify.main, ["--cell", "rnn"]),
        (classify.main, ["--cell", "lstm"]),
        (classify.main, ["--cell", "gru"]),
    ],
)
def test_the_kernels_make_no_difference(main, options, text, two_tongues, capsys):
    if backends.select("recurrent") is None:
        pytest.skip("the kernels are not built")
    data = {char_lm.main: ["--text", str(text)], classify.main: ["--files", *map(str, two_tongues)]}.get(main, [])
    losses = {}
    for backend in backends.BACKENDS:
        with backends.use_backend(backend):
            main([*options, *data, "--steps", "4"])
        losses[backend] = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses["torch"]) == 4
    rtol, atol = TOLERANCES["printed losses"]
    assert losses["native"] == pytest.approx(losses["torch"], rel=rtol, abs=atol)

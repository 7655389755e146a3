"""The example `arithmetic_transformer` at small size: its problems, that it learns, and what its decoder may see."""

import arithmetic_transformer as arithmetic
import pytest
import torch


def test_problems():
    texts = {" ".join(problem): " ".join(answer) for problem, answer in arithmetic.problems(49)}
    assert len(texts) == 2 * 99 * 99
    assert texts["BOS NEGATIVE 3 0 subtract NEGATIVE 3 4 EOS"] == "BOS POSITIVE 0 4 EOS"
    assert texts["BOS NEGATIVE 4 9 add NEGATIVE 4 9 EOS"] == "BOS NEGATIVE 9 8 EOS"
    assert texts["BOS POSITIVE 0 7 subtract POSITIVE 0 7 EOS"] == "BOS POSITIVE 0 0 EOS"
    for problem, answer in arithmetic.problems(99)[::1000]:
        assert (len(problem), len(answer)) == (arithmetic.PROBLEM, arithmetic.ANSWER)


def test_learns(capsys):
    """Operands of one digit, a small model, few steps: far better than guessing, which is right once in 30 times."""
    reached = arithmetic.main(
        ["--largest", "9", "--features", "32", "--layers", "1", "--steps", "400", "--batch", "64"]
    )
    printed = capsys.readouterr().out
    assert f"exactly right on held-out problems: {reached:.2%}" in printed
    assert reached > 0.2


def test_the_decoder_sees_no_later_word():
    torch.manual_seed(0)
    model = arithmetic.Calculator(16, 2, 2).eval()
    problem = torch.randint(len(arithmetic.WORDS), (3, arithmetic.PROBLEM))
    answer = torch.randint(len(arithmetic.WORDS), (3, arithmetic.ANSWER))
    before = model(problem, answer)
    answer[:, 3] = (answer[:, 3] + 1) % len(arithmetic.WORDS)
    after = model(problem, answer)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])


@pytest.mark.parametrize("arguments", [["--largest", "100"], ["--features", "20", "--heads", "4"]])
def test_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        arithmetic.main(arguments)
    assert "must be" in capsys.readouterr().err

"""The language model of the demo: windows that follow each other, a state that runs on, the default text."""

import pytest
import torch

from fastseq.tools.char_lm import CharLM, Text, TextError, Training, detached, sample, standard_library_text, windows


def test_windows_are_streams_of_the_text():
    ids = torch.arange(29)
    seen = [next(stream) for stream in [windows(ids, batch=2, length=4)] for _ in range(4)]
    starts = [inputs[0].tolist() for inputs, _, _ in seen]
    assert starts == [[0, 14], [4, 18], [8, 22], [0, 14]]
    assert [fresh for _, _, fresh in seen] == [True, False, False, True]
    for inputs, targets, _ in seen:
        assert inputs.shape == (4, 2)
        assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(("characters", "enough"), [(9, True), (8, False), (1, False), (0, False)])
def test_windows_need_text(characters, enough):
    if enough:
        inputs, targets, _ = next(windows(torch.arange(characters), batch=2, length=4))
        assert inputs.shape == targets.shape == (4, 2)
    else:
        with pytest.raises(TextError, match=rf"has {characters} characters.*at least 9 are needed"):
            windows(torch.arange(characters), batch=2, length=4)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_training_carries_the_state_and_learns(cell):
    torch.manual_seed(0)
    text = Text("abcdefgh" * 40)
    training = Training(CharLM(len(text.characters), cell, 16, 32), text.ids, batch=4, length=16, rate=1e-2)
    losses = [training.step()]
    after_first = training.state
    losses += [training.step() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    for before, after in zip(_parts(after_first), _parts(training.state), strict=True):
        assert not after.requires_grad
        assert not torch.equal(before, after)


def test_training_clips():
    torch.manual_seed(0)
    text = Text("abcdefgh" * 40)
    training = Training(CharLM(len(text.characters), "rnn", 4, 4), text.ids, batch=2, length=8, clip=1e-3)
    training.step()
    gradients = [parameter.grad.norm() for parameter in training.model.parameters()]
    assert torch.stack(gradients).norm() <= 1.001e-3


def _parts(state):
    return state if isinstance(state, tuple) else (state,)


def test_detached_keeps_the_shape_of_the_state():
    h, c = torch.ones(2, requires_grad=True) * 2, torch.ones(2, requires_grad=True) * 3
    assert not detached(h).requires_grad
    assert [part.requires_grad for part in detached((h, c))] == [False, False]


def test_sample_is_repeatable():
    torch.manual_seed(0)
    text = Text("to be or not to be")
    model = CharLM(len(text.characters), "gru", 8, 8)
    drawn = sample(model, text, "to ", 25)
    assert len(drawn) == 25
    assert set(drawn) <= set(text.characters)
    assert drawn == sample(model, text, "to ", 25)
    assert drawn != sample(model, text, "to ", 25, seed=1)


def test_standard_library_text():
    content = standard_library_text(50_000)
    assert len(content) == 50_000
    assert content.isascii()
    assert "import" in content
    assert content == standard_library_text(60_000)[:50_000]

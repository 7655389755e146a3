"""How many Python functions of the package a call of a tiny model enters: most of its time is theirs."""

import sys
from pathlib import Path

import pytest
import torch

import fastseq

pytestmark = pytest.mark.usefixtures("native")

PACKAGE = str(Path(fastseq.__file__).parent)
FORWARD = 26
BACKWARD = 18


def frames_of(call):
    """The functions of the package that `call` enters, in order; a generator at each of its turns."""
    names = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return names


def test_lstm():
    """The second call of a module with one layer and biases, gradients recorded, and its backward."""
    lstm, x, dy = fastseq.LSTM(3, 4), torch.randn(5, 2, 3), torch.randn(5, 2, 4)
    lstm(x)[0].backward(dy)
    results = []
    forward = frames_of(lambda: results.append(lstm(x)))
    backward = frames_of(lambda: results[0][0].backward(dy))
    assert "RecurrentFunction.forward" in forward
    assert len(forward) <= FORWARD, "\n".join(forward)
    assert len(backward) <= BACKWARD, "\n".join(backward)

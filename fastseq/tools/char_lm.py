"""A character language model: the model and the training loop behind `fastseq demo`.

Plain torch on purpose: nothing here knows of the kernels. `fastseq.fuse(CharLM(...))` is all that changes a run.

Notation: T window length, B batch (parallel streams of text), V vocabulary.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = {layer.__name__.lower(): layer for layer in (nn.LSTM, nn.GRU, nn.RNN)}
DEFAULT = next(iter(LAYERS))


class TextError(ValueError):
    """The text cannot be read, or is too short to train on."""


class Text:
    """A text as character numbers.

    ids (N,) int64; `characters[i]` is the character of number i.

    >>> text = Text("abca")
    >>> text.ids.tolist(), text.decode([2, 1])
    ([0, 1, 2, 0], 'cb')
    """

    def __init__(self, content: str) -> None:
        self.characters = sorted(set(content))
        self.number = {character: i for i, character in enumerate(self.characters)}
        self.ids = torch.tensor([self.number[character] for character in content], dtype=torch.int64)

    def decode(self, numbers: list[int]) -> str:
        """The characters of these numbers, joined."""
        return "".join(self.characters[i] for i in numbers)


def read_text(path: Path) -> str:
    """The content of a UTF-8 file; TextError if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from None


def standard_library_text(size: int = 1_000_000) -> str:
    """The first `size` characters of the running Python's own top-level modules, in alphabetical order."""
    content = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        # A few modules hold characters of many scripts, which would only blow up the vocabulary.
        source = path.read_text(encoding="utf-8", errors="replace")
        if source.isascii():
            content += source
        if len(content) >= size:
            break
    if not content:
        raise TextError("this Python has no source files of its standard library; name a text")
    return content[:size]


def windows(ids: Tensor, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Windows of `batch` parallel streams, without end: inputs (T, B), the next characters (T, B), and whether the
    streams start anew, so that no state may be carried into the window. TextError if the text is too short.
    """
    stream = (ids.numel() - 1) // batch
    if stream < length:
        raise TextError(
            f"the text has {ids.numel():,} characters, too few for {batch} streams of {length}: "
            f"at least {batch * length + 1:,} are needed"
        )
    inputs = ids[: batch * stream].view(batch, stream).t()
    targets = ids[1 : batch * stream + 1].view(batch, stream).t()
    starts = itertools.cycle(range(0, stream - length + 1, length))
    return ((inputs[start : start + length], targets[start : start + length], start == 0) for start in starts)


class CharLM(nn.Module):
    """Embedding, recurrent layers, linear: characters (T, B) -> scores of the next one (T, B, V) and the state."""

    def __init__(
        self, vocabulary: int, cell: str = DEFAULT, embedding: int = 128, hidden: int = 256, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.recurrent = LAYERS[cell](embedding, hidden, num_layers=layers)
        self.linear = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor, state=None):
        """Scores and state; state None starts from zeros."""
        output, state = self.recurrent(self.embedding(characters), state)
        return self.linear(output), state


def detached(state):
    """The state cut off its history, so that the backward pass ends at the window's first step."""
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


class Training:
    """Truncated backpropagation through time: the state runs on from window to window, the gradient does not."""

    def __init__(self, model: CharLM, ids: Tensor, batch: int, length: int, rate: float = 2e-3, clip: float = 1.0):
        self.model = model
        self.clip = clip
        self.windows = windows(ids, batch, length)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        self.state = None

    def step(self) -> float:
        """One window: forward, backward, clip by the L2 norm, update. Returns the loss in nats per character."""
        inputs, targets, fresh = next(self.windows)
        scores, state = self.model(inputs, None if fresh else self.state)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.state = detached(state)
        return loss.item()


@torch.no_grad()
def sample(model: CharLM, text: Text, prompt: str, length: int, temperature: float = 0.7, seed: int = 0) -> str:
    """`length` characters that the model draws after `prompt`, each fed back as the next input."""
    generator = torch.Generator().manual_seed(seed)
    characters = torch.tensor([[text.number[character]] for character in prompt])
    state, drawn = None, []
    for _ in range(length):
        scores, state = model(characters, state)
        chances = torch.softmax(scores[-1] / temperature, dim=-1)
        characters = torch.multinomial(chances, 1, generator=generator)
        drawn.append(characters.item())
    return text.decode(drawn)

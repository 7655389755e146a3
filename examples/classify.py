"""Sequence classification: from which package of the standard library is this line of code?

    python examples/classify.py
    python examples/classify.py --files austen.txt melville.txt darwin.txt

A bidirectional layer reads the bytes of a line; its two last hidden states, one from each end, go through a linear
layer. Lines differ in length: a batch is padded, and `lengths=` tells the layer where each line ends, so that the last
state is that of the last byte and no padding is computed. Nothing has to be sorted or packed.

With --files every file is a class, and its lines are the examples: who wrote this line?
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fastseq

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
LAYERS = {"rnn": fastseq.RNN, "lstm": fastseq.LSTM, "gru": fastseq.GRU}
SHORTEST, LONGEST = 20, 120  # bytes of a line


def standard_library_files() -> dict[str, list[Path]]:
    """The source files of each package."""
    root = Path(sysconfig.get_path("stdlib"))
    return {name: sorted((root / name).rglob("*.py")) for name in PACKAGES}


def labelled_lines(files: dict[str, list[Path]]) -> list[tuple[bytes, int]]:
    """The different lines of all files with the numbers of their classes, without those that occur in two classes."""
    classes_of: dict[bytes, set[int]] = {}
    for label, paths in enumerate(files.values()):
        for path in paths:
            for line in path.read_bytes().splitlines():
                if len(line.strip()) >= SHORTEST:
                    classes_of.setdefault(line.strip()[:LONGEST], set()).add(label)
    return [(line, *labels) for line, labels in classes_of.items() if len(labels) == 1]


def batch_of(examples: list[tuple[bytes, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes (T, B), padded, the lengths (B,) and the classes (B,)."""
    lines = [torch.tensor(list(line)) for line, _ in examples]
    lengths = torch.tensor([len(line) for line in lines])
    return pad_sequence(lines), lengths, torch.tensor([label for _, label in examples])


class Classifier(nn.Module):
    """Bytes (T, B) and lengths (B,) -> scores of the classes (B, C)."""

    def __init__(self, classes: int, cell: str, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, embedding)
        self.recurrent = LAYERS[cell](embedding, hidden, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(2 * hidden, classes)

    def forward(self, lines: Tensor, lengths: Tensor) -> Tensor:
        """Many to one: only the last states are used."""
        _, state = self.recurrent(self.embedding(lines), lengths=lengths)
        h_n = state[0] if isinstance(state, tuple) else state  # (2, B, H)
        return self.linear(self.dropout(torch.cat([h_n[0], h_n[1]], dim=-1)))


@torch.no_grad()
def accuracy(model: Classifier, examples: list[tuple[bytes, int]]) -> float:
    """The share of the examples that the model gets right."""
    model.eval()
    right = 0
    for start in range(0, len(examples), 256):
        lines, lengths, labels = batch_of(examples[start : start + 256])
        right += (model(lines, lengths).argmax(dim=-1) == labels).sum().item()
    model.train()
    return right / len(examples)


def main(argv: list[str] | None = None) -> float:
    """Train and measure. Returns the accuracy on held-out lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, nargs="+", help="text files, each a class")
    parser.add_argument("--cell", choices=LAYERS, default="gru")
    parser.add_argument("--embedding", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    files = {path.name: [path] for path in args.files} if args.files else standard_library_files()
    names = list(files)
    examples = labelled_lines(files)
    if len(examples) < 10:
        parser.error("too few lines: name files with more of them")
    rng.shuffle(examples)
    held_out, examples = examples[: len(examples) // 10], examples[len(examples) // 10 :]
    largest, count = Counter(label for _, label in held_out).most_common(1)[0]
    print(f"{len(examples):,} lines to learn from, {len(held_out):,} held out; classes: {', '.join(names)}")

    model = Classifier(len(names), args.cell, args.embedding, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    for step in range(1, args.steps + 1):
        lines, lengths, labels = batch_of(rng.sample(examples, min(args.batch, len(examples))))
        loss = F.cross_entropy(model(lines, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, args.steps // 20) == 0:
            print(f"step {step:>4}  loss {loss.item():.4f}")

    reached = accuracy(model, held_out)
    print(f"accuracy on held-out lines: {reached:.1%} (always {names[largest]}: {count / len(held_out):.1%})\n")
    lines, lengths, labels = batch_of(held_out[:8])
    model.eval()
    for (line, _), guess, label in zip(held_out, model(lines, lengths).argmax(dim=-1), labels, strict=False):
        verdict = "right" if guess == label else f"wrong, it is {names[label]}"
        print(f"{line.decode(errors='replace')[:60]:<60}  {names[guess]} ({verdict})")
    return reached


if __name__ == "__main__":
    main()

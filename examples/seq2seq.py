"""Sequence to sequence with attention: dates as people write them -> ISO 8601.

    python examples/seq2seq.py
    python examples/seq2seq.py --pairs phrases.tsv

"Sunday, the 3rd of March 2024" -> "2024-03-03", character by character. A bidirectional GRU reads the source, a second
GRU writes the target, and each of its states attends to all states of the first (Luong, Pham and Manning, "Effective
approaches to attention-based neural machine translation", 2015: global attention, general score, no input feeding). So
training (teacher forcing) runs the decoder over the whole target at once, and only translating goes step by step, with
`step`.

With --pairs a file of your own is learnt: a source and a target in each line, with a tab between them.
"""

from __future__ import annotations

import argparse
import random
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fastseq

PAD, START, END = range(3)  # the characters are numbered from 3 on
FIRST_DAY, LAST_DAY = date(1950, 1, 1), date(2049, 12, 31)  # so a year of two digits says its century


def ordinal(day: int) -> str:
    """1 -> 1st, 12 -> 12th, 22 -> 22nd."""
    return f"{day}{'th' if day in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def written(day: date) -> list[str]:
    """A day in all formats. With slashes the month comes first, with dots the day."""
    return [
        f"{day.day} {day:%B} {day.year}",
        f"{day:%B} {day.day}, {day.year}",
        f"{day:%A}, the {ordinal(day.day)} of {day:%B} {day.year}",
        f"{day:%a %d %b %Y}".upper(),
        f"{day:%b} {ordinal(day.day)} '{day:%y}",
        f"{day:%m/%d/%Y}",
        f"{day.month}/{day.day}/{day:%y}",
        f"{day:%d.%m.%Y}",
        f"{day.day}.{day.month}.{day:%y}",
        f"{day:%Y%m%d}",
    ]


def date_pairs(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Different days, each in one of the formats, and their ISO forms."""
    days = rng.sample(range(FIRST_DAY.toordinal(), LAST_DAY.toordinal() + 1), count)
    return [(rng.choice(written(day)), day.isoformat()) for day in map(date.fromordinal, days)]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The lines `source<tab>target` of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(source, target) for source, tab, target in (line.partition("\t") for line in lines) if source and tab]


class Vocabulary:
    """The characters of one side, and texts as their numbers."""

    def __init__(self, texts: list[str]) -> None:
        self.characters = sorted(set("".join(texts)))
        self.number = {character: i for i, character in enumerate(self.characters, start=END + 1)}

    def __len__(self) -> int:
        return len(self.characters) + END + 1

    def encode(self, text: str) -> Tensor:
        """The numbers of the characters and END."""
        return torch.tensor([*(self.number[character] for character in text), END])

    def decode(self, numbers: list[int]) -> str:
        """The text up to END."""
        numbers = numbers[: numbers.index(END)] if END in numbers else numbers
        return "".join(self.characters[i - END - 1] for i in numbers if i > END)


class Translator(nn.Module):
    """S source steps, T target steps, B batch, H hidden units, V characters of the target."""

    def __init__(self, sources: int, targets: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(sources, embedding)
        self.encoder = fastseq.GRU(embedding, hidden, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.target_embedding = nn.Embedding(targets, embedding)
        self.decoder = fastseq.GRU(embedding, hidden)
        self.key = nn.Linear(2 * hidden, hidden, bias=False)
        self.combine = nn.Linear(3 * hidden, hidden)
        self.linear = nn.Linear(hidden, targets)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Source (S, B) -> the encoder's states (S, B, 2H), which are padding (B, S), the decoder's first state."""
        memory, h_n = self.encoder(self.source_embedding(source), lengths=lengths)
        state = torch.tanh(self.bridge(torch.cat([h_n[0], h_n[1]], dim=-1)))
        padding = torch.arange(len(source)) >= lengths[:, None]
        return memory, padding, state[None]

    def scores(self, h: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Decoder states (T, B, H) attend to the encoder's: scores of the next characters (T, B, V)."""
        scores = torch.einsum("tbh,sbh->tbs", h, self.key(memory))
        weights = scores.masked_fill(padding, -torch.inf).softmax(dim=-1)
        context = torch.einsum("tbs,sbh->tbh", weights, memory)
        return self.linear(torch.tanh(self.combine(torch.cat([h, context], dim=-1))))

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Teacher forcing: the scores of each character of the target (T, B), given those before it."""
        memory, padding, state = self.encode(source, lengths)
        before = torch.cat([torch.full_like(target[:1], START), target[:-1]])
        h, _ = self.decoder(self.target_embedding(before), state)
        return self.scores(h, memory, padding)

    @torch.no_grad()
    def translate(self, source: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """Greedy decoding: the likeliest character at each step, until all have ended; (T, B)."""
        memory, padding, state = self.encode(source, lengths)
        character = torch.full_like(lengths, START)
        written, ended = [], torch.zeros_like(padding[:, 0])
        while len(written) < longest and not ended.all():
            h, state = self.decoder.step(self.target_embedding(character), state)
            character = self.scores(h[None], memory, padding)[0].argmax(dim=-1)
            written.append(character)
            ended |= character == END
        return torch.stack(written)


def main(argv: list[str] | None = None) -> float:
    """Train and translate. Returns the share of held-out sources whose translation is right to the last character."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, help="a file of lines `source<tab>target` (default: generated dates)")
    parser.add_argument("--count", type=int, default=10_000, help="generated dates, at most 36525")
    parser.add_argument("--embedding", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    pairs = read_pairs(args.pairs) if args.pairs else date_pairs(args.count, rng)
    if len(pairs) < 10:
        parser.error("too few pairs")
    sources, targets = (Vocabulary(list(side)) for side in zip(*pairs, strict=True))
    rng.shuffle(pairs)
    held_out, pairs = pairs[: len(pairs) // 10][:500], pairs[len(pairs) // 10 :]
    print(f"{len(pairs):,} pairs to learn from, {len(held_out):,} held out")

    def batch_of(pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
        """Sources (S, B), their lengths (B,) and targets (T, B), padded."""
        encoded = [sources.encode(source) for source, _ in pairs]
        lengths = torch.tensor([len(source) for source in encoded])
        return pad_sequence(encoded), lengths, pad_sequence([targets.encode(target) for _, target in pairs])

    model = Translator(len(sources), len(targets), args.embedding, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    for step in range(1, args.steps + 1):
        source, lengths, target = batch_of(rng.sample(pairs, min(args.batch, len(pairs))))
        scores = model(source, lengths, target)
        loss = F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, args.steps // 20) == 0:
            print(f"step {step:>4}  loss {loss.item():.4f}")

    source, lengths, target = batch_of(held_out)
    written = model.translate(source, lengths, longest=2 * len(target))
    results = [targets.decode(numbers) for numbers in written.t().tolist()]
    reached = sum(result == right for result, (_, right) in zip(results, held_out, strict=True)) / len(held_out)
    print(f"exactly right on held-out pairs: {reached:.1%}\n")
    for result, (text, right) in list(zip(results, held_out, strict=True))[:10]:
        print(f"{text:<36} -> {result}" + ("" if result == right else f"  (wrong: {right})"))
    return reached


if __name__ == "__main__":
    main()

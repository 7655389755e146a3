"""Arithmetic with a Transformer: sums of numbers of two digits, as sequences of words.

    python examples/arithmetic_transformer.py

"BOS NEGATIVE 30 subtract NEGATIVE 34 EOS" -> "BOS POSITIVE 04 EOS", digit by digit. The encoder reads the problem with
self-attention; the decoder writes the answer with causal self-attention over what it has written and attention to the
encoder (Vaswani et al., "Attention is all you need", 2017), here with layer norms before each part instead of after it.
Training is teacher forcing. Held-out problems are answered greedily, and an answer counts if every word is right.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq

WORDS = ("BOS", "EOS", "POSITIVE", "NEGATIVE", "add", "subtract", *"0123456789")
NUMBER = {word: number for number, word in enumerate(WORDS)}
PROBLEM, ANSWER = 9, 5  # words, all of them: no padding


def words(number: int) -> list[str]:
    """-7 -> NEGATIVE 0 7; 0 is positive."""
    return ["NEGATIVE" if number < 0 else "POSITIVE", *f"{abs(number):02}"]


def problems(largest: int) -> list[tuple[list[str], list[str]]]:
    """Every sum and difference of two numbers from -largest to largest that has two digits, and its answer."""
    numbers = range(-largest, largest + 1)
    results = ((a, b, name, result) for a in numbers for b in numbers
               for name, result in (("add", a + b), ("subtract", a - b)) if abs(result) <= 99)  # fmt: skip
    return [
        (["BOS", *words(a), name, *words(b), "EOS"], ["BOS", *words(result), "EOS"]) for a, b, name, result in results
    ]


def encode(texts: Iterable[list[str]]) -> Tensor:
    """The numbers of the words, (B, T)."""
    return torch.tensor([[NUMBER[word] for word in text] for text in texts])


class Calculator(nn.Module):
    """B problems, S words of a problem, T words of an answer, V words in all."""

    def __init__(self, features: int, heads: int, layers: int) -> None:
        super().__init__()
        sizes, options = (features, heads, 4 * features), {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.embedding = nn.Embedding(len(WORDS), features)
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(*sizes, **options) for _ in range(layers))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(*sizes, **options) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(features), nn.LayerNorm(features)
        self.linear = nn.Linear(features, len(WORDS))
        self.register_buffer("positions", positional_encoding(PROBLEM, features))
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(ANSWER))

    def embed(self, text: Tensor) -> Tensor:
        """(B, T) -> (B, T, features): what a word is and where it stands."""
        return self.embedding(text) + self.positions[: text.shape[1]]

    def encode(self, problem: Tensor) -> Tensor:
        """(B, S) -> (B, S, features)."""
        x = self.embed(problem)
        for layer in self.encoder:
            x = layer(x)
        return self.encoder_norm(x)

    def decode(self, answer: Tensor, memory: Tensor) -> Tensor:
        """The beginning of an answer (B, T) -> the scores (B, T, V) of the words that come after each of its words."""
        x, mask = self.embed(answer), self.causal[: answer.shape[1], : answer.shape[1]]
        for layer in self.decoder:
            x = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return self.linear(self.decoder_norm(x))

    def forward(self, problem: Tensor, answer: Tensor) -> Tensor:
        """Teacher forcing."""
        return self.decode(answer, self.encode(problem))

    @torch.no_grad()
    def answer(self, problem: Tensor) -> Tensor:
        """Greedy decoding: (B, S) -> (B, T)."""
        memory = self.encode(problem)
        answer = problem.new_full((len(problem), 1), NUMBER["BOS"])
        while answer.shape[1] < ANSWER:
            answer = torch.cat([answer, self.decode(answer, memory)[:, -1:].argmax(dim=-1)], dim=1)
        return answer


def positional_encoding(length: int, features: int) -> Tensor:
    """Sines and cosines of falling frequency, (length, features)."""
    angle = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, features, 2) / features)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def main(argv: list[str] | None = None) -> float:
    """Train and answer. Returns the share of held-out problems that are answered right to the last word."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=49, help="operands are from its negative to it, at most 99")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2, help="of the encoder and of the decoder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 1 <= args.largest <= 99:
        parser.error(f"--largest must be from 1 to 99, got {args.largest}")
    if args.features % (2 * args.heads):
        parser.error(f"--features must be a multiple of twice --heads, got {args.features} and {args.heads}")
    torch.manual_seed(args.seed)

    texts = problems(args.largest)
    random.Random(args.seed).shuffle(texts)
    source, target = (encode(side) for side in zip(*texts, strict=True))
    held_out, learnt = source[: len(source) // 10], len(source) // 10
    print(f"{len(source) - learnt:,} problems to learn from, {learnt:,} held out")

    model = fastseq.fuse(Calculator(args.features, args.heads, args.layers))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps + 1, pct_start=0.1)
    for step in range(1, args.steps + 1):
        chosen = torch.randint(learnt, len(source), (args.batch,))
        answer = target[chosen]
        scores = model(source[chosen], answer[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), answer[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 20) == 0:
            print(f"step {step:>5}  loss {loss.item():.4f}")

    model.eval()
    answers = model.answer(held_out)
    right = (answers == target[:learnt]).all(dim=1)
    print(f"exactly right on held-out problems: {right.float().mean():.2%}\n")
    for (problem, solution), answer, correct in list(zip(texts, answers.tolist(), right.tolist(), strict=False))[:10]:
        written = " ".join(WORDS[number] for number in answer)
        print(f"{' '.join(problem):<50} -> {written}" + ("" if correct else f"  (wrong: {' '.join(solution)})"))
    return right.float().mean().item()


if __name__ == "__main__":
    main()

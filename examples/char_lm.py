"""A character language model: it reads a text and learns to go on writing it.

    python examples/char_lm.py
    python examples/char_lm.py --text novel.txt --cell gru --temperature 0.9

Characters become vectors (learned, or one-hot), recurrent layers read them, a linear layer scores the next character.
Trained by truncated backpropagation through time. The model and a training step are those of `fastseq demo`, in
fastseq/tools/char_lm.py: plain torch, which `fastseq.fuse` speeds up. The text is the standard library of the running
Python, unless you name one; its end is held out to measure the perplexity.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq
from fastseq.tools.char_lm import (
    LAYERS,
    CharLM,
    Text,
    TextError,
    Training,
    read_text,
    sample,
    standard_library_text,
    windows,
)


def make_model(vocabulary: int, args: argparse.Namespace) -> CharLM:
    """The language model with fused layers."""
    model = CharLM(vocabulary, args.cell, vocabulary if args.one_hot else 128, args.hidden, args.layers)
    if args.one_hot:
        # To look up row i of the identity is to write the character i as a one-hot vector. It is not trained.
        model.embedding = nn.Embedding.from_pretrained(torch.eye(vocabulary))
    return fastseq.fuse(model)


@torch.no_grad()
def perplexity(model: CharLM, ids: Tensor) -> float:
    """Among how many equally likely characters the model hesitates, on average: exp of the mean loss."""
    inputs, targets, _ = next(windows(ids, batch=1, length=len(ids) - 1))
    scores, _ = model(inputs)
    return math.exp(F.cross_entropy(scores.flatten(0, 1), targets.flatten()))


def main(argv: list[str] | None = None) -> float:
    """Train, measure, write. Returns the perplexity on the held-out end of the text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: the standard library of this Python)")
    parser.add_argument("--cell", choices=LAYERS, default="lstm")
    parser.add_argument("--one-hot", action="store_true", help="one-hot vectors in place of a learned embedding")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="streams of text that are read side by side")
    parser.add_argument("--window", type=int, default=64, help="characters after which the gradient is cut")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate of Adam")
    parser.add_argument("--clip", type=float, default=1.0, help="largest L2 norm of the gradient")
    parser.add_argument("--length", type=int, default=400, help="characters to write in the end")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the samples: low is safe, high is bold")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    try:
        text = Text(standard_library_text() if args.text is None else read_text(args.text))
        held_out = min(len(text.ids) // 10, 20_000)
        model = make_model(len(text.characters), args)
        training = Training(model, text.ids[: len(text.ids) - held_out], args.batch, args.window, args.rate, args.clip)
    except TextError as error:
        parser.error(str(error))
    print(f"{len(text.ids):,} characters, {len(text.characters)} different, the last {held_out:,} held out")

    for step in range(1, args.steps + 1):
        loss = training.step()
        if step % max(1, args.steps // 20) == 0:
            print(f"step {step:>4}  loss {loss:.4f}  perplexity {math.exp(loss):.2f}")

    unseen = text.ids[len(text.ids) - held_out :]
    reached = perplexity(model, unseen)
    print(f"perplexity on the held-out characters: {reached:.2f} (guessing: {len(text.characters)})")
    prompt = text.decode(unseen[:100].tolist())
    written = sample(model, text, prompt, args.length, args.temperature, args.seed)
    print(f"\nThe first held-out characters:\n\n{prompt}\n\nand how the model goes on:\n\n{written}")
    return reached


if __name__ == "__main__":
    main()

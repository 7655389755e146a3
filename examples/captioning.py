"""Image captioning: a convolutional network looks at an image, a recurrent one says what is in it.

    python examples/captioning.py --cell rnn|lstm|attention
    python examples/captioning.py --plot attention.png
    python examples/captioning.py --captions captions_train2017.json --features features.npz

- rnn, lstm: an affine map of the features is the first state (after Vinyals et al., "Show and tell", 2015).
- attention: at each word an LSTM looks at the cells of the feature grid anew, more at some than at others (soft
  attention; Xu et al., "Show, attend and tell", 2015). --plot draws where it looks.

Without data the images are coloured shapes, drawn here and described by a small grammar, and the convolutional network
is trained along. Captions in the format of COCO come with features of your own network: a .npz file with `image_ids`
(N,) and `features`, (N, channels) or (N, channels, height, width).
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from pathlib import Path

import torch
from captioning_data import SIZE, read_coco, scenes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fastseq

NULL, START, END, UNK = "<NULL>", "<START>", "<END>", "<UNK>"  # NULL is padding, number 0


class RecurrentDecoder(nn.Module):
    """An RNN or LSTM over the words, whose first state is an affine map of the whole feature grid."""

    def __init__(self, layer: type[nn.Module], grid: torch.Size, embedding: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(grid.numel(), hidden)
        self.recurrent = layer(embedding, hidden)

    def forward(self, words: Tensor, grid: Tensor, state=None):
        """Word vectors (T, B, E) -> hidden states (T, B, H), the last state, no attention weights."""
        if state is None:
            h_0 = self.first(grid.flatten(1))[None]
            # The cell state too: what an LSTM is to keep for many words has to be there.
            state = (h_0, h_0) if isinstance(self.recurrent, fastseq.LSTM) else h_0
        return *self.recurrent(words, state), None


class AttentionDecoder(nn.Module):
    """An LSTM that sees, beside each word, what its last hidden state attends to in the feature grid."""

    def __init__(self, grid: torch.Size, embedding: int, hidden: int) -> None:
        super().__init__()
        channels, height, width = grid
        self.project = nn.Linear(channels, hidden)
        self.position = nn.Parameter(0.1 * torch.randn(height * width, hidden))  # without it, a cell is nowhere
        self.cell = fastseq.LSTMCell(embedding + hidden, hidden)

    def forward(self, words: Tensor, grid: Tensor, state=None):
        """Word vectors (T, B, E) -> hidden states (T, B, H), the last state, attention weights (T, B, cells)."""
        cells = self.project(grid.flatten(2).transpose(1, 2)) + self.position  # (B, cells, H)
        if state is None:
            h = cells.mean(dim=1)
            state = h, torch.zeros_like(h)
        hidden, attention = [], []
        for word in words:
            scores = torch.einsum("bh,bch->bc", state[0], cells) / cells.shape[-1] ** 0.5
            weights = scores.softmax(dim=-1)
            seen = torch.einsum("bc,bch->bh", weights, cells)
            state = self.cell(torch.cat([word, seen], dim=-1), state)
            hidden.append(state[0])
            attention.append(weights)
        return torch.stack(hidden), state, torch.stack(attention)


class Captioner(nn.Module):
    """Images or features (B, ...) and the words so far (T, B) -> scores of each next word (T, B, V)."""

    def __init__(self, vocabulary: list[str], eye: nn.Module, grid: torch.Size, cell: str, embedding: int, hidden: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.eye = eye
        self.embedding = nn.Embedding(len(vocabulary), embedding)
        if cell == "attention":
            self.decoder = AttentionDecoder(grid, embedding, hidden)
        else:
            layer = {"rnn": fastseq.RNN, "lstm": fastseq.LSTM}[cell]
            self.decoder = RecurrentDecoder(layer, grid, embedding, hidden)
        self.linear = nn.Linear(hidden, len(vocabulary))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """Teacher forcing: the words before are those of the caption."""
        hidden, _, _ = self.decoder(self.embedding(words), self.eye(images))
        return self.linear(hidden)

    @torch.no_grad()
    def caption(self, images: Tensor, longest: int = 20) -> tuple[list[list[str]], Tensor | None]:
        """The likeliest word at each step until END: the words of each image, and the attention (T, B, cells)."""
        grid, state = self.eye(images), None
        word = torch.full((len(images),), self.vocabulary.index(START))
        drawn, attention = [], []
        for _ in range(longest):
            hidden, state, weights = self.decoder(self.embedding(word[None]), grid, state)
            word = self.linear(hidden[0]).argmax(dim=-1)
            drawn.append(word)
            attention.append(weights)
        captions = [[self.vocabulary[i] for i in row] for row in torch.stack(drawn, dim=1).tolist()]
        captions = [words[: words.index(END)] if END in words else words for words in captions]
        return captions, None if weights is None else torch.cat(attention)


def convolutions() -> nn.Module:
    """Images (B, 3, 32, 32) -> features (B, 64, 4, 4), each of which sees a whole shape."""
    sizes = (3, 32, 2), (32, 64, 2), (64, 64, 2), (64, 64, 1)
    layers = ((nn.Conv2d(i, o, 3, s, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in sizes)
    return nn.Sequential(*itertools.chain(*layers))


def draw_attention(path: Path, image: Tensor, words: list[str], attention: Tensor, grid: torch.Size) -> None:
    """The image once for each word, bright where the model looked when it said the word."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * len(words), 2), layout="constrained")
    for axes, word, weights in zip(figure.subplots(1, len(words)), words, attention, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.imshow(
            weights.view(grid[1:]).numpy(), alpha=0.6, cmap="gray", extent=(0, SIZE, SIZE, 0), interpolation="bilinear"
        )
        axes.set_title(word)
        axes.axis("off")
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> float:
    """Train and caption. Returns the share of held-out images whose caption is, word for word, one of theirs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=("rnn", "lstm", "attention"), default="attention")
    parser.add_argument("--captions", type=Path, help="captions in COCO's JSON format; with --features")
    parser.add_argument("--features", type=Path, help="a .npz file with image_ids and features; with --captions")
    parser.add_argument("--count", type=int, default=4000, help="images to draw where no captions are given")
    parser.add_argument("--plot", type=Path, help="draw the attention over a held-out image (needs matplotlib)")
    parser.add_argument("--embedding", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if bool(args.captions) != bool(args.features):
        parser.error("--captions and --features go together")
    if args.plot and (args.captions or args.cell != "attention"):
        parser.error("--plot needs --cell attention and the drawn images")
    torch.manual_seed(args.seed)

    images, captions = read_coco(args.captions, args.features) if args.captions else scenes(args.count, args.seed)
    if len(images) < 10:
        parser.error("fewer than 10 images with captions")
    eye = nn.BatchNorm2d(images.shape[1]) if args.captions else convolutions()  # features of any scale will do
    grid = eye(images[:2])[0].shape
    unseen = slice(0, len(images) // 10)
    pairs = [(i, caption.split()) for i in range(unseen.stop, len(images)) for caption in captions[i]]
    counts = Counter(word for _, caption in pairs for word in caption)
    vocabulary = [NULL, START, END, UNK, *sorted(word for word, count in counts.items() if count > 1)]
    number = {word: i for i, word in enumerate(vocabulary)}
    encoded = [
        (i, torch.tensor([number.get(word, number[UNK]) for word in (START, *caption, END)])) for i, caption in pairs
    ]
    print(f"{len(pairs):,} captions to learn from, {unseen.stop:,} images held out, {len(vocabulary)} words")

    model = Captioner(vocabulary, eye, grid, args.cell, args.embedding, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    for step in range(1, args.steps + 1):
        chosen = [encoded[i] for i in torch.randint(len(encoded), (args.batch,)).tolist()]
        words = pad_sequence([caption for _, caption in chosen])  # (T, B), NULL after the end
        scores = model(images[[i for i, _ in chosen]], words[:-1])
        loss = F.cross_entropy(scores.flatten(0, 1), words[1:].flatten(), ignore_index=number[NULL])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % max(1, args.steps // 20) == 0:
            print(f"step {step:>4}  loss {loss.item():.4f}")

    model.eval()
    written, attention = model.caption(images[unseen])
    right = [" ".join(words) in known for words, known in zip(written, captions[unseen], strict=True)]
    reached = sum(right) / len(right)
    print(f"captions of held-out images that are exactly right: {reached:.1%}\n")
    for words, known in list(zip(written, captions[unseen], strict=True))[:8]:
        print(f"{' '.join(words):<42}" + ("" if " ".join(words) in known else f"  (it is: {known[0]})"))
    if args.plot:
        longest = max(range(len(written)), key=lambda i: len(written[i]))
        draw_attention(args.plot, images[longest], written[longest], attention[:, longest], grid)
        print(f"\nwrote {args.plot}")
    return reached


if __name__ == "__main__":
    main()

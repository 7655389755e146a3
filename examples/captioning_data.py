"""The data of captioning.py: coloured shapes with captions by a small grammar, and captions in the format of COCO."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIZE = 32  # pixels
COLORS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.2, 0.9), "yellow": (0.9, 0.8, 0.1)}
SHAPES = {
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= 0.9 * r,
    "circle": lambda x, y, r: x**2 + y**2 <= r**2,
    "triangle": lambda x, y, r: (abs(y) <= r) & (abs(x) <= (y + r) / 2),
}


def scene(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """An image (3, SIZE, SIZE) of one or two shapes on a dark noisy ground, and its caption."""
    near, far, across = rng.uniform(6, 11), rng.uniform(20, 25), rng.uniform(9, 22, size=2)
    words, places = {
        0: ("", [(across[0], across[1])]),
        1: (" left of ", [(near, across[0]), (far, across[0])]),
        2: (" above ", [(across[0], near), (across[0], far)]),
    }[rng.integers(3)]
    image, names = rng.uniform(0, 0.2, (3, SIZE, SIZE)), []
    row, column = np.mgrid[:SIZE, :SIZE]
    for x, y in places:
        color, shape = rng.choice(list(COLORS)), rng.choice(list(SHAPES))
        image[:, SHAPES[shape](column - x, row - y, rng.uniform(4, 6))] = np.array(COLORS[color])[:, None]
        names.append(f"a {color} {shape}")
    return image, words.join(names)


def scenes(count: int, seed: int) -> tuple[Tensor, list[list[str]]]:
    """Images (N, 3, SIZE, SIZE) and the captions of each."""
    rng = np.random.default_rng(seed)
    images, captions = zip(*(scene(rng) for _ in range(count)), strict=True)
    return torch.tensor(np.array(images), dtype=torch.float32), [[caption] for caption in captions]


def read_coco(captions: Path, features: Path) -> tuple[Tensor, list[list[str]]]:
    """Features (N, channels, height, width) and the captions of each image, for the images that have both."""
    of_image: dict[int, list[str]] = {}
    for annotation in json.loads(captions.read_text(encoding="utf-8"))["annotations"]:
        words = re.findall(r"[a-z0-9']+", annotation["caption"].lower())
        of_image.setdefault(annotation["image_id"], []).append(" ".join(words))
    with np.load(features) as archive:
        ids, grid = archive["image_ids"].tolist(), torch.tensor(archive["features"], dtype=torch.float32)
    known = [i for i, image in enumerate(ids) if image in of_image]
    if grid.dim() == 2:
        grid = grid[:, :, None, None]
    return grid[known], [of_image[ids[i]] for i in known]

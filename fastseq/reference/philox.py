"""Philox4x32, a counter-based generator of random numbers, in NumPy.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". A draw depends on its counter and the key alone, so
that it can be repeated in any order: what the backward of dropout needs.
"""

from __future__ import annotations

import numpy as np

# The paper's: two odd multipliers, and the steps of the key, the golden ratio and sqrt(3) - 1 in units of 2^-32.
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 7) -> np.ndarray:
    """Four words of 32 random bits for every counter: counter (..., 4) uint32, key two words -> (..., 4) uint32.

    Seven rounds are the fewest that pass the tests of the paper; ten are its default.

    >>> counter = np.zeros((1, 4), np.uint32)
    >>> [f"{word:08x}" for word in philox4x32(counter, (0, 0), rounds=10)[0]]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    x0, x1, x2, x3 = np.moveaxis(np.asarray(counter, np.uint32), -1, 0)
    for n in range(rounds):
        key0, key1 = (np.uint32((word + n * step) % 2**32) for word, step in zip(key, KEY_STEPS, strict=True))
        high0, low0 = _halves(MULTIPLIERS[0] * x0.astype(np.uint64))
        high1, low1 = _halves(MULTIPLIERS[1] * x2.astype(np.uint64))
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
    return np.stack([x0, x1, x2, x3], axis=-1)


def _halves(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (product >> np.uint64(32)).astype(np.uint32), (product & np.uint64(0xFFFFFFFF)).astype(np.uint32)

"""A shuffled order of any length, one place at a time and without memory."""

from typing import Any

import numpy as np

_MASK = 2**64 - 1
_ROUNDS = 6


class Shuffle:
    """A permutation of 0 .. n - 1, drawn by numbers: `shuffle[i]` is the place of i.

    A Feistel network permutes the next even number of bits; what falls outside of n goes through it
    again until it is inside, which keeps it a permutation.

    Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, the cycle-walking cipher;
    the rounds mix as splitmix64 does (Steele, Lea and Flood 2014).
    """

    def __init__(self, n: int, *seed: int):
        assert n > 0
        self._n = n
        self._half = max(1, -(-(n - 1).bit_length() // 2))
        random = np.random.Generator(np.random.Philox(list(seed)))
        keys: np.ndarray[Any, np.dtype[np.uint64]] = random.integers(
            2**64, size=_ROUNDS, dtype=np.uint64
        )
        self._keys: list[int] = keys.tolist()

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, place: int) -> int:
        assert 0 <= place < self._n
        found = self._permute(place)
        while found >= self._n:
            found = self._permute(found)
        return found

    def _permute(self, place: int) -> int:
        half, mask = self._half, (1 << self._half) - 1
        left, right = place >> half, place & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << half | right


def _mixed(x: int) -> int:
    """64 bits, each depending on all of x."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31

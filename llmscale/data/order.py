"""The order of the sequences of an epoch: a permutation computed from its index, so that no list of it exists
anywhere.

`permute` maps a place in the epoch to a sequence of the source, one to one, for any number of sequences, with memory
for the indices asked for alone: a generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002). An index is a pair (left, right) on a grid of a × b cells, a and b close to √n; each round adds a
keyed hash of one half to the other, which can always be undone; the fewer than a cells beyond n go through again
until they come back inside. With 8 rounds all orders of 4 sequences are equally frequent as far as 24,000 keys can
tell (4 and 6 rounds fail that chi-square test). Cost: `benchmarks/data_stream.py`; a shuffled list of the sequences
of 1 T tokens would hold 2 GB a rank.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

ROUNDS = 8
Words = npt.NDArray[np.uint64]
_WORD = 2**64 - 1


def mix(word: int) -> int:
    """A hash of a 64-bit word, one to one: SplitMix64 (Steele, Lea and Flood, 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def permute(indices: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The sequence that stands at each index of an epoch's order.

    indices: [n], each in [0, size). For one seed and epoch this is a permutation of range(size).
    """
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    key = mix(mix(seed) ^ epoch)
    keys = [mix(key + number) for number in range(ROUNDS)]
    found = _feistel(indices.astype(np.uint64), height, width, keys)
    while (outside := np.flatnonzero(found >= np.uint64(size))).size:
        found[outside] = _feistel(found[outside], height, width, keys)
    return found.astype(np.int64)


def _feistel(cells: Words, height: int, width: int, keys: list[int]) -> Words:
    """One pass over the grid of height × width cells."""
    rows, columns = np.uint64(height), np.uint64(width)
    left, right = np.divmod(cells, columns)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _hash(right, even)) % rows
        right = (right + _hash(left, odd)) % columns
    return left * columns + right


def _hash(words: Words, key: int) -> Words:
    """40 well-mixed bits of each word: few enough that adding them to half an index never overflows."""
    words = (words ^ np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(32)
    words *= np.uint64(0x94D049BB133111EB)
    return words >> np.uint64(24)

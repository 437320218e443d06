"""The order of the sequences of an epoch: a permutation computed from its index, so that no list of it exists
anywhere, and one that stays in one neighbourhood of the data for a while.

`permute` maps a place in the epoch to a number, one to one, for any size, with memory for the indices asked for
alone: a generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). An index is a
pair (left, right) on a grid of a × b cells, a and b close to √n; each round adds a keyed hash of one half to the
other, which can always be undone; the fewer than a cells beyond n go through again until they come back inside. With
8 rounds all orders of 4 sequences are equally frequent as far as 24,000 keys can tell (4 and 6 rounds fail that
chi-square test). A shuffled list of the sequences of 1 T tokens would hold 2 GB a rank.

`Order` permutes blocks of neighbouring sequences over the epoch and sequences inside a window of blocks, as in a
shuffle buffer but exact: what a window reads is fetched once and read whole, however far away it is stored. With one
permutation of all sequences, every batch would touch as many samples of a remote store as it has sequences, anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

ROUNDS = 8
_STRETCH = 4096
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_WORD = 2**64 - 1


def mix(word: int) -> int:
    """A hash of a 64-bit word, one to one: SplitMix64 (Steele, Lea and Flood, 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def permute(indices: Integers, size: int, seed: int, epoch: int) -> Integers:
    """The number that stands at each index of an epoch's order.

    indices: [n], each in [0, size). For one seed and epoch this is a permutation of range(size).
    """
    return _permute(indices, size, np.array([mix(mix(seed) ^ epoch)], dtype=np.uint64))


@dataclass(frozen=True)
class Order:
    """The order of `size` sequences, `block` of which lie side by side in storage, `window` blocks open at a time.

    An epoch is a row of windows. Blocks are permuted over the whole epoch; the next `window` of them fill a window,
    whose sequences are permuted among themselves. The fewer than `block` sequences that fill no block belong to the
    last window. Where all blocks fit in one window, that is a permutation of all sequences.
    """

    size: int
    block: int
    window: int
    seed: int

    def sequences(self, places: Integers, epoch: int) -> Integers:
        """The sequence at each place of an epoch. places: [n], each in [0, size).

        Neighbouring places, the usual case, are looked up in a short stretch of the order that is computed at once.
        """
        if not len(places):
            return places
        first, last = int(places.min()) // _STRETCH, int(places.max()) // _STRETCH
        if last - first > 1:
            return self.compute(places, epoch)
        if first == last:
            return _stretch(self, first, epoch)[places - first * _STRETCH]
        both = np.concatenate([_stretch(self, first, epoch), _stretch(self, last, epoch)])
        return both[places - first * _STRETCH]

    def compute(self, places: Integers, epoch: int) -> Integers:
        """As `sequences`, from nothing but the numbers."""
        numbers = np.minimum(places // self._span, self._last)
        inside = places - numbers * self._span
        keys = _mix(np.uint64(mix(mix(mix(self.seed) ^ epoch))) ^ numbers.astype(np.uint64))
        last = numbers == self._last
        for group, size in ((~last, self._span), (last, self.size - self._last * self._span)):
            if group.any():
                inside[group] = _permute(inside[group], size, keys[group])
        blocks, rest = np.divmod(numbers * self._span + inside, self.block)
        whole = blocks < self._blocks
        if whole.any():
            blocks[whole] = permute(blocks[whole], self._blocks, self.seed, epoch)
        found: Integers = blocks * self.block + rest
        return found

    def window_of(self, place: int) -> tuple[int, int]:
        """The places of the window that holds this one: its first, and the one after its last."""
        number = min(place // self._span, self._last)
        return number * self._span, self.size if number == self._last else (number + 1) * self._span

    @property
    def _blocks(self) -> int:
        return self.size // self.block

    @property
    def _span(self) -> int:
        return self.window * self.block

    @property
    def _last(self) -> int:
        """The number of the last window."""
        return max(0, self._blocks - 1) // self.window


@lru_cache(maxsize=32)
def _stretch(order: Order, number: int, epoch: int) -> Integers:
    first = number * _STRETCH
    found = order.compute(np.arange(first, min(first + _STRETCH, order.size)), epoch)
    found.flags.writeable = False
    return found


def _permute(indices: Integers, size: int, keys: Words) -> Integers:
    """Permute with a key for each index, or with one for all; keys: [n] or [1]."""
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    rounds = _mix(keys + np.arange(ROUNDS, dtype=np.uint64)[:, None])
    found = _feistel(indices.astype(np.uint64), height, width, rounds)
    while (outside := np.flatnonzero(found >= np.uint64(size))).size:
        again = rounds if rounds.shape[1] == 1 else rounds[:, outside]
        found[outside] = _feistel(found[outside], height, width, again)
    return found.astype(np.int64)


def _mix(words: Words) -> Words:
    """`mix` of each word."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _feistel(cells: Words, height: int, width: int, keys: Words) -> Words:
    """One pass over the grid of height × width cells. keys: [rounds, n] or [rounds, 1]."""
    rows, columns = np.uint64(height), np.uint64(width)
    left, right = np.divmod(cells, columns)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _hash(right, even)) % rows
        right = (right + _hash(left, odd)) % columns
    return left * columns + right


def _hash(words: Words, key: Words) -> Words:
    """40 well-mixed bits of each word: few enough that adding them to half an index never overflows."""
    words = (words ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(32)
    words *= np.uint64(0x94D049BB133111EB)
    return words >> np.uint64(24)

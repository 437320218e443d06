"""Which source each position of the stream reads, and its how-manieth sequence that is: arithmetic, no state.

Sources are the leaves of a binary tree. A node that has handed out p sequences has given round(share × p) of them to
its left side: a count that never falls and grows by one at most, so "is the p-th left?" and "how many before it?" are
the same line of arithmetic. A position walks from the root to its source in log2(sources) such steps. Each rounds by
half a sequence at most, so at every position the count of a source is within half the tree's height of weight ×
position, which random draws miss by √position: every batch holds the same mix.

Shares are whole numbers of 2⁻³², so all ranks agree bit for bit up to position 2⁶³; the rounding moves a weight by
1e-9.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
_ONE = 1 << 32


class Mixture:
    """Weighted sources, interleaved evenly."""

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: one positive number a source; only their ratios matter."""
        self.weights = tuple(weights)

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """(source, ordinal) of each position: the source gives it as its ordinal-th sequence, from 0. [n] each."""
        sources = np.zeros(len(positions), dtype=np.int64)
        ordinals = np.zeros(len(positions), dtype=np.int64)
        self._descend(0, len(self.weights), np.arange(len(positions)), positions, sources, ordinals)
        return sources, ordinals

    def counts(self, position: int) -> tuple[int, ...]:
        """How many of the first `position` sequences each source gives."""
        return self._count(0, len(self.weights), position)

    def _descend(
        self, low: int, high: int, rows: Integers, passed: Integers, sources: Integers, ordinals: Integers
    ) -> None:
        """Fill in the rows that the sources low..high share; passed: how many sequences the node gave before each."""
        if high - low == 1:
            sources[rows] = low
            ordinals[rows] = passed
            return
        middle, share = self._cut(low, high)
        before = _scaled(share, passed)
        left = _scaled(share, passed + 1) > before
        self._descend(low, middle, rows[left], before[left], sources, ordinals)
        self._descend(middle, high, rows[~left], (passed - before)[~left], sources, ordinals)

    def _count(self, low: int, high: int, passed: int) -> tuple[int, ...]:
        if high - low == 1:
            return (passed,)
        middle, share = self._cut(low, high)
        left = (share * passed + _ONE // 2) // _ONE
        return self._count(low, middle, left) + self._count(middle, high, passed - left)

    def _cut(self, low: int, high: int) -> tuple[int, int]:
        """Where the node low..high is cut, and the share of its left side in 2⁻³²; no side goes empty."""
        middle = (low + high) // 2
        share = round(_ONE * (sum(self.weights[low:middle]) / sum(self.weights[low:high])))
        return middle, min(max(share, 1), _ONE - 1)


def _scaled(share: int, numbers: Integers) -> Integers:
    """round(share × numbers / 2³²), exact for numbers up to 2⁶³: the product is formed in two halves of 32 bits."""
    words = numbers.astype(np.uint64)
    factor, half, bits = np.uint64(share), np.uint64(_ONE // 2), np.uint64(32)
    low = words & np.uint64(_ONE - 1)
    return ((words >> bits) * factor + ((low * factor + half) >> bits)).astype(np.int64)

"""Which two tokens each token of a BPE vocabulary is merged from.

A vocabulary that says how good each token is, but not what it was made from (tiktoken's ranks, sentencepiece's scores),
merges any two neighbours whose text together is a token, the best first, the leftmost of equals. Hugging Face's BPE
wants the pairs. Both then give the same tokens, for this reason: until a token comes about, no merge has crossed its
two ends, so the merges between them were those that its text alone undergoes, in the same order. That order is fixed,
hence each token comes about from one pair, and a token whose text alone does not become it never comes about at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T", str, bytes)


def merges(tokens: Iterable[tuple[T, ...]], rank: Mapping[T, float]) -> list[tuple[T, T]]:
    """The pair that each token is merged from, in the order of the ranks.

    tokens: each as the symbols that it begins as. rank: the lowest is merged first; no two may be equal.
    """
    found = [(rank[pair[0] + pair[1]], pair) for symbols in tokens if (pair := _last_pair(symbols, rank))]
    return [pair for _, pair in sorted(found)]


def _last_pair(symbols: tuple[T, ...], rank: Mapping[T, float]) -> tuple[T, T] | None:
    """The two that are left before the last merge; None where the merges end before."""
    parts = list(symbols)
    never = float("inf")
    ranks = [rank.get(left + right, never) for left, right in pairwise(parts)]
    while len(parts) > 2:
        best = min(ranks)
        if best == never:
            return None
        at = ranks.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del ranks[at]
        if at:
            ranks[at - 1] = rank.get(parts[at - 1] + parts[at], never)
        if at < len(ranks):
            ranks[at] = rank.get(parts[at] + parts[at + 1], never)
    return (parts[0], parts[1]) if len(parts) == 2 else None

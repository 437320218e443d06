"""A look into a dataset: totals, how long the documents are, and some of them as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmscale.data.shards import Card
from llmscale.data.split import Split, splits
from llmscale.data.tokenizer import Tokenizer

_BAR = 40
_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Description:
    """What a split holds. documents: some of them decoded, shortened to their first characters."""

    folder: Path
    card: Card
    documents: list[str]


def describe(folder: Path, documents: int = 3) -> list[Description]:
    """Describe a split, or all splits of a dataset. documents: how many to decode, from samples spread evenly."""
    return [Description(one, (split := Split(one)).card, _documents(split, documents)) for one in splits(folder)]


def histogram(card: Card) -> list[str]:
    """Document lengths as text, a line for each power of two from the shortest to the longest."""
    most = max(card.document_lengths, default=0)
    label = len(f"{2 ** len(card.document_lengths):,}")
    lines = []
    for power, count in enumerate(card.document_lengths):
        if 2 ** (power + 1) <= card.shortest_document:
            continue
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        lines.append(f"{2**power:>{label},} – {2 ** (power + 1) - 1:<{label},} {count:>12,} {bar}".rstrip())
    return lines


def _documents(split: Split, count: int) -> list[str]:
    """The first document that begins in each of `count` samples (fewer, where there are fewer)."""
    tokenizer = Tokenizer(split.tokenizer)
    samples = [(shard, number) for shard in split.shards for number in range(len(shard.offsets))]
    count = min(count, split.card.documents)
    texts: list[str] = []
    for pick in sorted({index * len(samples) // count for index in range(count)}):
        tokens, starts = split.read_sample(*samples[pick], split.sample_length(pick))
        # A sample of a short dataset holds all the documents that are asked for.
        wanted = -(-count // len(samples))
        for start, end in zip(starts[:wanted], [*starts[1:], len(tokens)], strict=False):
            texts.append(_shortened(tokenizer.decode(tokens[start : min(end, start + _SHOWN_CHARACTERS)].tolist())))
    return texts[:count]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"

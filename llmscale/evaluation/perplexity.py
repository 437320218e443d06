"""Perplexity of a model on token shards, through transformers.

A split is read as it is stored: one long row of tokens, documents one after another, each with its end. A window of
`context` tokens moves over it by `stride`; of each window the predictions of the tokens that no window before has
predicted are counted, so every token but the first counts once, with at least context - stride tokens before it (but in
the first window). The figure is exp of the mean negative log-likelihood over all tokens, not the mean of windows'
perplexities. A smaller stride gives a lower perplexity and takes context / stride times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llmscale.data.source import Integers
from llmscale.data.split import Split
from llmscale.errors import DataError


@dataclass(frozen=True)
class Score:
    """loss: mean over the tokens, in nats. tokens: that were predicted."""

    source: str
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def together(scores: Sequence[Score]) -> Score:
    """All sources, each token counted once."""
    tokens = sum(score.tokens for score in scores)
    return Score("all", tokens, sum(score.loss * score.tokens for score in scores) / tokens)


@torch.no_grad()
def score(
    model: Any,
    split: Split,
    context: int,
    stride: int,
    batch_size: int,
    most: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """The score of a split. model: transformers', in evaluation mode. most: tokens to read, all when None.

    report: called with (tokens predicted, in all).

    Raises:
        DataError: the split is broken, or has fewer than two tokens.
    """
    total = min(split.card.tokens, most or split.card.tokens) - 1
    if total < 1:
        raise DataError(f"{split.place}: holds {split.card.tokens} token(s), and a prediction needs two")
    loss, done = 0.0, 0
    batch: list[tuple[Integers, int]] = []
    for window in _windows(split, total + 1, context, stride):
        # What is shorter, the end of the split, is a batch of its own.
        if batch and (len(batch) == batch_size or len(window[0]) != len(batch[0][0])):
            loss, done, batch = loss + _loss(model, batch), done + sum(new for _, new in batch), []
            report(done, total)
        batch.append(window)
    loss, done = loss + _loss(model, batch), done + sum(new for _, new in batch)
    report(done, total)
    return Score(split.place, done, loss / done)


def _windows(split: Split, total: int, context: int, stride: int) -> Iterator[tuple[Integers, int]]:
    """(context + 1 tokens, how many of the last ones are to be predicted); fewer at the end."""
    row, begin, seen = np.empty(0, dtype=np.int64), 0, 1
    for tokens in _samples(split, total):
        row = np.concatenate([row, tokens])
        while len(row) >= context + 1:
            end = begin + context + 1
            yield row[: context + 1], end - seen
            seen, begin, row = end, begin + stride, row[stride:]
    if (end := begin + len(row)) > seen:
        yield row, end - seen


def _samples(split: Split, total: int) -> Iterator[Integers]:
    sample = 0
    for shard in split.shards:
        for number in range(len(shard.offsets)):
            if total <= 0:
                return
            tokens, _ = split.read_sample(shard, number, split.sample_length(sample))
            yield tokens[:total].astype(np.int64)
            total -= len(tokens)
            sample += 1


def _loss(model: Any, batch: Sequence[tuple[Integers, int]]) -> float:
    """The sum of the losses of what is to be predicted, in nats."""
    rows = torch.from_numpy(np.stack([row for row, _ in batch])).to(model.device)
    logits = model(rows[:, :-1], use_cache=False).logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    total = torch.zeros((), dtype=torch.float64)
    for row, (_, new) in zip(losses, batch, strict=True):
        total += row[-new:].double().sum().cpu()
    return float(total)

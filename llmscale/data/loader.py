"""Batches of one data-parallel rank, read ahead in a thread: the stream for a training loop, ours or any other's.

    from llmscale.data.loader import Loader
    from llmscale.data.stream import Stream

    stream = Stream([("data/train", 1.0)], sequence_length=2048, seed=1)
    with Loader(stream, batch_size=256, rank=rank, world_size=world_size) as batches:
        for tokens, labels in batches:
            ...
    stream.close()

To stop and go on: keep `batches.state()` with the checkpoint, and later call `stream.resume(state)` before the Loader
is made, with any other batch_size and world_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np

from llmscale.data.prefetch import Prefetch
from llmscale.data.source import Integers
from llmscale.data.stream import Stream

if TYPE_CHECKING:
    import torch

LOOK_AHEAD = 1 << 14
"""Sequences of one rank that sources are told about before they are read, so that remote ones can fetch them.

The first batches of a shuffle window touch nearly all of its samples: they have to come while the one before lasts.
"""
T = TypeVar("T")
Pair = tuple["torch.Tensor", "torch.Tensor"]


def tokens_and_labels(rows: Integers) -> Pair:
    """tokens and labels, each int64 [batch, sequence], of rows [batch, sequence + 1]."""
    import torch

    tensor = torch.from_numpy(rows)
    return tensor[:, :-1].contiguous(), tensor[:, 1:].contiguous()


class Loader(Iterator[T], Generic[T]):
    """The batches of one rank, in order and without end, or `batches` of them.

    Of the batch_size sequences of a batch, rank r of n reads those at positions r, r + n, r + 2n …: all ranks together
    read each position once, and whatever their number is, the batch is the same set of sequences.
    """

    @overload
    def __init__(
        self: Loader[Pair], stream: Stream, batch_size: int, *, rank: int = ..., world_size: int = ...,
        position: int | None = ..., batches: int | None = ..., prefetch: int = ...,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self, stream: Stream, batch_size: int, *, rank: int = ..., world_size: int = ...,
        position: int | None = ..., batches: int | None = ..., prefetch: int = ..., collate: Callable[[Integers], T],
    ) -> None: ...  # fmt: skip
    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        position: int | None = None,
        batches: int | None = None,
        prefetch: int = 2,
        collate: Callable[[Integers], Any] = tokens_and_labels,
    ) -> None:
        """batch_size: sequences over all ranks. position: sequences that were read before; where the stream was
        resumed, else 0, when None. prefetch: batches ready ahead. collate: what becomes of the rows
        [batch_size / world_size, sequence_length + 1], in the thread.

        Raises:
            ValueError: a rank that there is none of, or ranks that share no batch.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: ranks count from 0 to {world_size - 1}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} does not divide over {world_size} ranks")
        position = stream.position if position is None else position
        if position < 0:
            raise ValueError(f"position {position}: give the number of sequences that were read, at least 0")
        self.position = position
        self._stream, self._batch_size, self._collate = stream, batch_size, collate
        self._rank, self._world_size, self._batches = rank, world_size, batches
        self._ready: Prefetch[T] = Prefetch(self._produce(position), prefetch)

    def __next__(self) -> T:
        """The next batch.

        Raises:
            DataError: what holds it is missing or damaged.
        """
        batch = next(self._ready)
        self.position += self._batch_size
        return batch

    def __enter__(self) -> Loader[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """What it takes to go on after the batches that were given so far."""
        return self._stream.state(self.position)

    def close(self) -> None:
        """End the thread, at once where the stream was closed before; else it is given a few seconds."""
        self._ready.close()

    def _produce(self, first: int) -> Iterator[T]:
        ahead = max(1, LOOK_AHEAD * self._world_size // self._batch_size)
        number = told = 0
        while self._batches is None or number < self._batches:
            limit = number + 1 + ahead if self._batches is None else min(number + 1 + ahead, self._batches)
            # Told in halves of what is ahead: it costs the arithmetic of the order each time. The end is told at once.
            if limit - told > ahead // 2 or told < limit == self._batches:
                self._stream.look_ahead(self._positions(first, told, limit))
                told = limit
            yield self._collate(self._stream.read(self._positions(first, number, number + 1)))
            number += 1

    def _positions(self, first: int, low: int, high: int) -> Integers:
        """What this rank reads of the batches low..high."""
        return np.arange(first + low * self._batch_size + self._rank, first + high * self._batch_size, self._world_size)

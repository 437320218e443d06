"""The stream: any position gives its sequence of tokens, with nothing but the number to remember.

    position -> mixture: which source, its how-manieth sequence -> the source: its order, its shards

Who reads which position does not matter: any number of ranks and workers see the same stream, and resuming is asking
for the next number. Rows are gathered in the shards' own 2 or 4 bytes and widened to int64 at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmscale.data.mixture import Mixture
from llmscale.data.source import Integers, Source
from llmscale.data.split import Split
from llmscale.data.token_source import TokenSource
from llmscale.errors import DataError

_OPEN_SHARDS = 512
"""Mapped at a time, over all sources: a mapping holds a file descriptor, of which a process often has 1,024."""


class Stream:
    """Sequences of weighted sources, by position."""

    def __init__(self, sources: Sequence[tuple[str, float]], sequence_length: int, seed: int) -> None:
        """sources: (folder of a split, weight). Every source must have been built with the same tokenizer."""
        if not sources:
            raise DataError("no source of data: give at least one folder that `llmscale data build` wrote")
        splits = [Split(folder) for folder, _ in sources]
        limit = max(8, _OPEN_SHARDS // len(splits))
        self._sources: list[Source] = [TokenSource(split, sequence_length, seed, limit) for split in splits]
        first = self._sources[0]
        for split, source in zip(splits, self._sources, strict=True):
            if source.tokenizer_sha256 != first.tokenizer_sha256:
                raise DataError(
                    f"{split.folder}: built with another tokenizer than {splits[0].folder}; build both with one"
                )
        self._mixture = Mixture([weight for _, weight in sources])
        self._dtype = np.result_type(*(source.dtype for source in self._sources))
        self.sequence_length = sequence_length
        self.vocab_size = max(source.vocab_size for source in self._sources)
        self.tokenizer = first.tokenizer

    def read(self, positions: Sequence[int] | Integers) -> Integers:
        """The sequences at these positions (0 and up), [len(positions), sequence_length + 1].

        Raises DataError for a shard that is missing or has changed, and for ids beyond the vocabulary.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and int(wanted.min()) < 0:
            raise ValueError(f"positions count from 0: {int(wanted.min())}")
        tokens = np.empty((len(wanted), self.sequence_length + 1), dtype=self._dtype)
        numbers, ordinals = self._mixture.locate(wanted)
        for number, source in enumerate(self._sources):
            rows = np.flatnonzero(numbers == number)
            if rows.size:
                source.read(ordinals[rows], rows, tokens)
        return tokens.astype(np.int64)

    def epochs(self, position: int) -> tuple[float | None, ...]:
        """Passes over each source that the first `position` sequences make: 1.5 is one and a half.

        None for a source whose length is not known.
        """
        counts = self._mixture.counts(position)
        return tuple(
            count / source.sequences if source.sequences else None
            for count, source in zip(counts, self._sources, strict=True)
        )

    def close(self) -> None:
        """Let go of what the sources hold."""
        for source in self._sources:
            source.close()

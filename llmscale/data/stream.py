"""The stream: any position gives its sequence of tokens, with nothing but the number to remember.

    position -> mixture: which source, its how-manieth sequence -> order: where in the source -> a slice of a mapped tar

A source is one long row of tokens (`shards.py`). Sequence i of it is tokens i × L to i × L + L: L + 1 of them, the
last being the first of the next sequence, so every token is a label once an epoch. The fewer than L tokens at the end
of a source that fill no sequence are no labels. Who reads which position does not matter: any number of ranks and
workers see the same stream, and resuming is asking for the next number.

Shards are mapped, never read whole: the operating system's page cache holds them once for all ranks of a node. Rows
are gathered in the shards' own 2 or 4 bytes, checked against the vocabulary in one pass, and widened to int64 at the
end. One core, sequences of 4,096 (`benchmarks/data_stream.py`): 0.98 G tokens/s in reads of 512 positions, 0.79 G in
reads of 64 and 0.30 G in reads of 8, where a bare random read of a mapped flat file makes 1.0 to 1.1 G: ask for many
positions at once.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmscale.data.mixture import Mixture
from llmscale.data.order import permute
from llmscale.data.shards import REBUILD, Split, Tokens, sample_key
from llmscale.errors import DataError

Integers = npt.NDArray[np.int64]
_OPEN_SHARDS = 512
"""Mapped at a time, over all sources: a mapping holds a file descriptor, of which a process often has 1,024."""


class Stream:
    """Sequences of weighted sources, by position."""

    def __init__(self, sources: Sequence[tuple[str, float]], sequence_length: int, seed: int) -> None:
        """sources: (folder of a split, weight). Every source must have been built with the same tokenizer."""
        if not sources:
            raise DataError("no source of data: give at least one folder that `llmscale data build` wrote")
        splits = [Split(Path(folder)) for folder, _ in sources]
        for split in splits[1:]:
            if split.card.tokenizer_sha256 != splits[0].card.tokenizer_sha256:
                raise DataError(
                    f"{split.folder}: built with another tokenizer than {splits[0].folder}; build both with one"
                )
        limit = max(8, _OPEN_SHARDS // len(splits))
        self._sources = [_Source(split, sequence_length, seed, limit) for split in splits]
        self._mixture = Mixture([weight for _, weight in sources])
        self._dtype = np.result_type(*(split.card.dtype for split in splits))
        self.sequence_length = sequence_length
        self.vocab_size = max(split.card.vocab_size for split in splits)
        self.tokenizer = splits[0].tokenizer

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
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            row, column = (int(index[0]) for index in np.nonzero(tokens >= self.vocab_size))
            self._sources[numbers[row]].refuse(int(ordinals[row]), column, int(tokens[row, column]))
        return tokens.astype(np.int64)

    def epochs(self, position: int) -> tuple[float, ...]:
        """Passes over each source that the first `position` sequences make: 1.5 is one and a half."""
        counts = self._mixture.counts(position)
        return tuple(count / source.sequences for count, source in zip(counts, self._sources, strict=True))


class _Source:
    """One split, cut into sequences.

    A shard whose size is not the index's is refused when it is mapped. One that is cut short while mapped ends the
    process (SIGBUS): shards are replaced by a rename, never written in place.
    """

    def __init__(self, split: Split, sequence_length: int, seed: int, open_shards: int) -> None:
        card = split.card
        self.sequences = max(0, card.tokens - 1) // sequence_length
        if not self.sequences:
            raise DataError(
                f"{split.folder}: holds {card.tokens} tokens, and one sequence needs {sequence_length + 1}; "
                "build it from more text or use a shorter data.sequence_length"
            )
        present = set(os.listdir(split.folder))
        if missing := [shard.name for shard in split.shards if shard.name not in present]:
            raise DataError(f"{split.folder / missing[0]}: shard is missing ({len(missing)} in all); {REBUILD}")
        self._split = split
        self._length = sequence_length
        self._seed = seed
        self._open_shards = open_shards
        self._dtype = np.dtype(card.dtype).newbyteorder("<")
        self._mapped: dict[int, Tokens] = {}
        samples = [len(shard.offsets) for shard in split.shards]
        self._shard_of = np.repeat(np.arange(len(samples)), samples)
        offsets = [np.array(shard.offsets, dtype=np.int64) for shard in split.shards]
        self._offset_of = np.concatenate(offsets) // self._dtype.itemsize

    def read(self, ordinals: Integers, rows: Integers, out: Tokens) -> None:
        """Copy the sequences that the source gives at these ordinals into rows of out."""
        size = self._split.card.sample_tokens
        starts = self._starts(ordinals)
        samples = starts // size
        places = starts % size
        spans = places + self._length + 1 > size
        first = self._offset_of[samples] + places
        for row, shard, start in zip(
            rows[~spans].tolist(), self._shard_of[samples[~spans]].tolist(), first[~spans].tolist(), strict=True
        ):
            mapped = self._mapped.get(shard)
            if mapped is None:
                mapped = self._map(shard)
            out[row] = mapped[start : start + self._length + 1]
        for row, place in zip(rows[spans].tolist(), starts[spans].tolist(), strict=True):
            self._copy_across(place, out[row])

    def refuse(self, ordinal: int, column: int, token: int) -> None:
        """Say where an id stands that the vocabulary does not have."""
        sample = int(self._starts(np.array([ordinal]))[0] + column) // self._split.card.sample_tokens
        shard = self._split.shards[self._shard_of[sample]].name
        raise DataError(
            f"{self._split.folder / shard}: sample {sample_key(sample)} holds the id {token}, and the vocabulary has "
            f"{self._split.card.vocab_size}; the shard is damaged (`llmscale data verify` checks all): {REBUILD}"
        )

    def _starts(self, ordinals: Integers) -> Integers:
        """The first token of the sequence at each ordinal."""
        epochs, places = np.divmod(ordinals, self.sequences)
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            found[rows] = permute(places[rows], self.sequences, self._seed, epoch)
        return found * self._length

    def _copy_across(self, start: int, out: Tokens) -> None:
        """Copy a sequence that lies in more than one sample."""
        done = 0
        while done < len(out):
            sample, place = divmod(start + done, self._split.card.sample_tokens)
            shard, offset = int(self._shard_of[sample]), int(self._offset_of[sample])
            mapped = self._mapped[shard] if shard in self._mapped else self._map(shard)
            count = min(len(out) - done, self._split.card.sample_tokens - place)
            out[done : done + count] = mapped[offset + place : offset + place + count]
            done += count

    def _map(self, number: int) -> Tokens:
        """Map a shard, all of the tar, as tokens; what has been mapped longest gives way."""
        shard = self._split.shards[number]
        path = self._split.folder / shard.name
        try:
            with path.open("rb") as file:
                if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
                    raise DataError(f"{path}: has {size} bytes, index.json says {shard.bytes}; {REBUILD}")
                mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=self._dtype)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {REBUILD}") from None
        while len(self._mapped) >= self._open_shards:
            del self._mapped[next(iter(self._mapped))]
        self._mapped[number] = mapped
        return mapped

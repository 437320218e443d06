"""Sequences out of token shards, where they lie: a source of the stream (`stream.py`).

A split is one long row of tokens (`shards.py`). Sequence i of it is tokens i × L to i × L + L: L + 1 of them, the
last being the first of the next sequence, so every token is a label once an epoch. The fewer than L tokens at the end
of a source that fill no sequence are no labels.

Shards are mapped, never read whole: the operating system's page cache holds them once for all ranks of a node. Rows
are gathered in the shards' own 2 or 4 bytes. One core, sequences of 4,096 (`benchmarks/data_stream.py`): 0.98 G
tokens/s in reads of 512 positions, 0.79 G in reads of 64 and 0.30 G in reads of 8, where a bare random read of a
mapped flat file makes 1.0 to 1.1 G: ask for many positions at once.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

from llmscale.data.order import permute
from llmscale.data.shards import REBUILD, Tokens, sample_key
from llmscale.data.source import Integers
from llmscale.data.split import Split
from llmscale.errors import DataError


class TokenSource:
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
        self.tokenizer = split.tokenizer
        self.tokenizer_sha256 = card.tokenizer_sha256
        self.vocab_size = card.vocab_size
        self.dtype = np.dtype(card.dtype)
        self._mapped: dict[int, Tokens] = {}
        samples = [len(shard.offsets) for shard in split.shards]
        self._shard_of = np.repeat(np.arange(len(samples)), samples)
        offsets = [np.array(shard.offsets, dtype=np.int64) for shard in split.shards]
        self._offset_of = np.concatenate(offsets) // self.dtype.itemsize

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
        sequences = out[rows]
        if sequences.size and int(sequences.max()) >= self.vocab_size:
            row, column = (int(index[0]) for index in np.nonzero(sequences >= self.vocab_size))
            raise DataError(self._beyond(int(starts[row]) + column, int(sequences[row, column])))

    def look_ahead(self, ordinals: Integers) -> None:
        """Nothing to fetch: the shards are here."""

    def state(self, ordinal: int) -> dict[str, Any]:
        """Nothing: the ordinal says it all."""
        return {}

    def close(self) -> None:
        """Let go of the shards."""
        self._mapped.clear()

    def _beyond(self, place: int, token: int) -> str:
        """Says where an id stands that the vocabulary does not have."""
        sample = place // self._split.card.sample_tokens
        shard = self._split.shards[self._shard_of[sample]].name
        return (
            f"{self._split.folder / shard}: sample {sample_key(sample)} holds the id {token}, and the vocabulary has "
            f"{self.vocab_size}; the shard is damaged (`llmscale data verify` checks all): {REBUILD}"
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
                mapped = np.frombuffer(
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=self.dtype.newbyteorder("<")
                )
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {REBUILD}") from None
        while len(self._mapped) >= self._open_shards:
            del self._mapped[next(iter(self._mapped))]
        self._mapped[number] = mapped
        return mapped

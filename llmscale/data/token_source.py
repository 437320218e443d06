"""Sequences out of token shards, near or far: a source of the stream (`stream.py`).

A split is one long row of tokens (`shards.py`). Sequence i of it is tokens i × L to i × L + L: L + 1 of them, the
last being the first of the next sequence, so every token is a label once an epoch. The fewer than L tokens at the end
of a source that fill no sequence are no labels.

Order: blocks of the sequences that a sample holds, shuffled in windows (`order.py`), so that a window's samples are
read whole while it lasts. A sequence length that divides the tokens of a sample (2^18) keeps each block in one
sample; any other makes blocks straddle two, and a store is then asked for most samples twice an epoch.

Checks: the first time that this process reads of a sample, all of it is compared with the index (CRC-32, dtype, ids).
The label that a sample's last sequence takes from the next sample is compared with the vocabulary alone, or, with
on_error="skip", has all of that sample checked: else a broken one would be left out and its first token trained on. A
process that reads few sequences of each sample reads all of it for them, once: with hundreds of ranks on a shared file
system verify="never" spares that, after `llmscale data verify`.

Speed from a folder, one core, sequences of 4,096 of uint16, warm (`python -m benchmarks.data_stream`): 0.88 G tokens/s
in reads of 512 and 0.77 G in reads of 64, 0.84 and 0.73 of random reads of one mapped flat file; 0.47 G in reads of 8.
The first pass, with its checks, makes 0.47 G.

Broken samples, with on_error="skip": a sequence that takes inputs or its last label from one is replaced by the next
sound sequence of the same window's order, which begins again at its start. That is a function of which samples are
broken and of nothing else: all ranks and batches see the same stream, in which some sequences of the window come twice.
A store that cannot be reached, or a disk that this machine cannot read, breaks no sample; it stops the run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmscale.data.cached_samples import CONNECTIONS, CachedSamples, samples_of
from llmscale.data.order import Order
from llmscale.data.quarantine import Broken, OnError, Quarantine, message
from llmscale.data.shards import REBUILD, Tokens, sample_key
from llmscale.data.source import Integers
from llmscale.data.split import Split
from llmscale.errors import DataError, UsageError

SHUFFLE_WINDOW = 4096
_UNKNOWN, _SOUND, _BROKEN = range(3)


class TokenSource:
    """One split, cut into sequences. May be read by several threads, one of them at a time."""

    def __init__(
        self,
        split: Split,
        sequence_length: int,
        seed: int,
        open_shards: int,
        *,
        shuffle_window: int = SHUFFLE_WINDOW,
        verify: Literal["first", "never"] = "first",
        on_error: OnError = "stop",
        max_skipped: float = 0.001,
        report: Path | None = None,
        connections: int = CONNECTIONS,
        readers: int = 1,
    ) -> None:
        """shuffle_window: in blocks, each of about a sample; another one is another order.

        verify: whether samples are checked when they are first read; what is fetched always is. max_skipped: share of
        the samples that may be left out, one always may. report: where they are written down, a JSON object a line.
        connections: files that are fetched at the same time. readers: of the cache, over all processes of the node.
        """
        card = split.card
        self.sequences = max(0, card.tokens - 1) // sequence_length
        if not self.sequences:
            raise DataError(
                f"{split.place}: holds {card.tokens} tokens, and one sequence needs {sequence_length + 1}; "
                "build it from more text or use a shorter data.sequence_length"
            )
        if on_error == "skip" and verify == "never":
            raise UsageError("on_error: skip needs verify: first, or what is broken would depend on who read it")
        if split.store is None and on_error == "stop":
            present = set(os.listdir(split.folder))
            if missing := [shard.name for shard in split.shards if shard.name not in present]:
                raise DataError(f"{split.folder / missing[0]}: shard is missing ({len(missing)} in all); {REBUILD}")
        self._split = split
        self._length = sequence_length
        self._order = Order(self.sequences, max(1, card.sample_tokens // sequence_length), shuffle_window, seed)
        self._skip = on_error == "skip"
        self.quarantine = Quarantine(split, on_error, max_skipped, report)
        self._samples = samples_of(split, open_shards, connections, readers, size_matters=not self._skip)
        self.cache_bytes = self._two_windows(shuffle_window)
        self._state = np.full(card.samples, _UNKNOWN if verify == "first" else _SOUND, dtype=np.uint8)
        self._look_through = verify == "never" and card.vocab_size < 2 ** (8 * np.dtype(card.dtype).itemsize)
        self._reading = threading.Lock()
        self.tokenizer_sha256 = card.tokenizer_sha256
        self.vocab_size = card.vocab_size
        self.end_of_document = card.end_of_document
        self.dtype = np.dtype(card.dtype)
        self.fingerprint = card.index_sha256

    def read_tokenizer(self) -> bytes:
        """The text of the tokenizer.json beside the shards."""
        return self._split.read_tokenizer()

    def read(self, ordinals: Integers, rows: Integers, out: Tokens) -> None:
        """Copy the sequences that the source gives at these ordinals into rows of out."""
        with self._reading:
            epochs, places = np.divmod(ordinals, self.sequences)
            starts = self._starts(epochs, places)
            try:
                for row in self._unsound(starts).tolist():
                    starts[row] = self._replacement(int(epochs[row]), int(places[row]))
                    self.quarantine.replace(int(ordinals[row]))
                self._copy(starts, self._labels(starts), rows, out)
            except Broken as broken:
                raise DataError(message(self._split, broken)) from None
            finally:
                self._samples.release()

    def look_ahead(self, ordinals: Integers) -> None:
        """Begin to fetch what these sequences need; returns at once."""
        if self._split.store is not None:
            first, last = self._touched(self._starts(*np.divmod(ordinals, self.sequences)))
            spans = zip(first.tolist(), last.tolist(), strict=True)
            self._samples.look_ahead(sample for low, high in spans for sample in range(low, high + 1))

    def counters(self) -> dict[str, float]:
        """What fetching took, all sources of the cache together, and what was left out of this one."""
        left = self.quarantine.left_out()
        return {
            **self._samples.counters.as_dict(),
            "skipped_samples": left.units,
            "replaced_sequences": left.carried + left.replaced,
        }

    def epochs(self, ordinal: int) -> float:
        """Passes over the source that the sequences before this one make."""
        return ordinal / self.sequences

    def state(self, ordinal: int) -> dict[str, Any]:
        """Nothing: the ordinal says it all."""
        return {}

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Nothing to know."""

    def close(self) -> None:
        """Let go of the shards, and end what fetches them; a read that waits for a store ends with a DataError."""
        if self._split.store is not None:
            self._split.store.close()
        with self._reading:  # files are not closed under a read: their numbers would be another file's
            self._samples.close()

    def _two_windows(self, shuffle_window: int) -> int:
        """Bytes of the cache: a window that does not stay in it would be fetched again for every batch."""
        if not isinstance(self._samples, CachedSamples):
            return 0
        sizes = self._samples.sizes
        return min(2 * shuffle_window * int(np.ceil(sizes.mean())), int(sizes.sum()))

    def _starts(self, epochs: Integers, places: Integers) -> Integers:
        """The first token of the sequence at each place of an epoch."""
        if not epochs.size or epochs[0] == epochs[-1] == epochs.max():
            return self._order.sequences(places, int(epochs[0]) if epochs.size else 0) * self._length
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            found[rows] = self._order.sequences(places[rows], epoch)
        return found * self._length

    def _touched(self, starts: Integers) -> tuple[Integers, Integers]:
        """The first and last sample that each sequence takes inputs from, with on_error="skip" its last label too."""
        size = self._split.card.sample_tokens
        return starts // size, (starts + self._length - (not self._skip)) // size

    def _unsound(self, starts: Integers) -> Integers:
        """The rows whose sequence cannot be used; all samples of the others are here, and checked."""
        first, last = self._touched(starts)
        unsound: set[int] = set()
        if not self._known_and_here(first, last):
            samples = _between(first, last)
            self._look_at(samples)
            if self._skip and (self._state[samples] == _BROKEN).any():
                spans = zip(first.tolist(), last.tolist(), strict=True)
                unsound = {
                    row for row, (low, high) in enumerate(spans) if (self._state[low : high + 1] == _BROKEN).any()
                }
        return np.array(sorted(unsound), dtype=np.int64)

    def _labels(self, starts: Integers) -> dict[int, int]:
        """The first tokens of the samples that sequences take their last label from, and nothing else."""
        _, last = self._touched(starts)
        after = (starts + self._length) // self._split.card.sample_tokens
        return {sample: self._samples.first_token(sample) for sample in after[after > last].tolist()}

    def _known_and_here(self, first: Integers, last: Integers) -> bool:
        """Whether all that these sequences touch is in a folder, and known to be sound: the usual case, found fast."""
        if self._split.store is not None or self._length > self._split.card.sample_tokens:
            return False
        return bool((self._state[first] == _SOUND).all() and (self._state[last] == _SOUND).all())

    def _look_at(self, samples: Integers) -> None:
        """Have these samples here and checked, each for the first time; what is broken is left out."""
        for broken in self._samples.prepare(samples[self._state[samples] != _BROKEN].tolist()).values():
            self._leave_out(broken)
        for sample in samples[self._state[samples] == _UNKNOWN].tolist():
            try:
                self._samples.check(sample)
                self._state[sample] = _SOUND
            except Broken as broken:
                self._leave_out(broken)

    def _leave_out(self, broken: Broken) -> None:
        self.quarantine.add(broken)
        self._state[broken.unit] = _BROKEN

    def _replacement(self, epoch: int, place: int) -> int:
        """Where the next sound sequence of the window begins, after this place."""
        first, end = self._order.window_of(place)
        for step in range(1, end - first):
            other = np.array([first + (place - first + step) % (end - first)])
            start = self._order.sequences(other, epoch) * self._length
            if not self._unsound(start).size:
                return int(start[0])
        raise DataError(f"{self._split.place}: no sample of a whole shuffle window is sound; {REBUILD}")

    def _copy(self, starts: Integers, labels: dict[int, int], rows: Integers, out: Tokens) -> None:
        """Copy the sequences that begin at these tokens into rows of out."""
        samples, places = np.divmod(starts, self._split.card.sample_tokens)
        offsets = self._samples.byte_of[samples] + places * self.dtype.itemsize
        across = places + self._length >= self._split.card.sample_tokens
        units = self._samples.unit_of[samples]
        # Together, what is in one file: of many small ones only a few are open.
        turns = np.argsort(units, kind="stable")
        buffer = None if out.dtype == self.dtype else np.empty(self._length + 1, dtype=self.dtype)
        files, whole = self._samples.files, (self._length + 1) * self.dtype.itemsize
        for row, sample, unit, offset, place, more in zip(
            *(column[turns].tolist() for column in (rows, samples, units, offsets, places, across)), strict=True
        ):
            target: Any = out[row] if buffer is None else buffer
            if more:
                self._fill_across(target, sample, place, labels)
            else:
                file = files.get(unit) or self._samples.file(sample)
                try:
                    count = os.preadv(file, [target], offset)
                except OSError as error:
                    raise self._samples.unreadable(sample, error) from None
                if count != whole:
                    raise self._cut_short(sample)
            if buffer is not None:
                out[row] = buffer
            if self._look_through and int(target.max()) >= self.vocab_size:
                beyond = sample + (place + int(np.argmax(target >= self.vocab_size))) // self._split.card.sample_tokens
                reason = f"holds the id {int(target.max())}, and the vocabulary has {self.vocab_size}"
                raise Broken(beyond, self._samples.shard(beyond).name, reason)

    def _fill_across(self, target: Tokens, sample: int, place: int, labels: dict[int, int]) -> None:
        """Copy a sequence that does not end in the sample that it begins in."""
        size, done = self._split.card.sample_tokens, 0
        while done < len(target):
            if done == self._length and sample in labels:
                target[done] = labels[sample]
                return
            part = target[done : done + size - place]
            offset = int(self._samples.byte_of[sample]) + place * self.dtype.itemsize
            file = self._samples.file(sample)
            try:
                count = os.preadv(file, [part.data], offset)
            except OSError as error:
                raise self._samples.unreadable(sample, error) from None
            if count != part.nbytes:
                raise self._cut_short(sample)
            done, sample, place = done + len(part), sample + 1, 0

    def _cut_short(self, sample: int) -> DataError:
        return DataError(
            f"{self._split.where(self._samples.shard(sample).name)}: sample {sample_key(sample)} was cut short "
            f"while it was read; {REBUILD}"
        )


def _between(first: Integers, last: Integers) -> Integers:
    """All samples from first to last of each row, once each."""
    found = [first]
    while (first < last).any():
        first = np.minimum(first + 1, last)
        found.append(first)
    return np.unique(np.concatenate(found))

"""The stream: any position gives its sequence of tokens, with nothing but the number to remember.

    position -> mixture: which source, its how-manieth sequence -> the source: its order, its shards

Who reads which position does not matter: any number of ranks and workers see the same stream, and resuming is asking
for the next number. `state` says besides how far each source is: after `resume`, sources that were re-weighted, added,
moved or left out go on, each from where it was. Rows are gathered in the shards' own 2 or 4 bytes and widened to int64
at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmscale.data.cache import Cache
from llmscale.data.mixture import Mixture
from llmscale.data.quarantine import LeftOut, OnError
from llmscale.data.source import Integers, Source
from llmscale.data.split import Split
from llmscale.data.store import is_remote
from llmscale.data.text_shards import TextSplit, is_text
from llmscale.data.text_source import TextSource
from llmscale.data.token_source import SHUFFLE_WINDOW, TokenSource
from llmscale.errors import DataError, UsageError

_OPEN_SHARDS = 384
"""Kept open between reads, over all sources of a stream: a process may often hold 1,024, and a run has two streams."""


@dataclass(frozen=True)
class Reading:
    """How sources are read."""

    shuffle_window: int = SHUFFLE_WINDOW
    """Of token shards, in samples; another one is another order."""
    verify: Literal["first", "never"] = "first"
    """Whether a sample is checked when this process first reads of it."""
    on_error: OnError = "stop"
    """What a broken sample does: end the run, or be left out and written down in `report`."""
    max_skipped: float = 0.001
    """Share of a source that may be left out."""
    report: Path | None = None
    cache: Path | None = None
    """Folder on this node for what is fetched from elsewhere; a temporary one of the user's when None."""
    cache_bytes: int = 16 << 30
    readers: int = 1
    """Processes of this node that share the cache."""
    workers: int = 2
    """Threads that tokenise text shards."""


class Stream:
    """Sequences of weighted sources, by position."""

    def __init__(
        self, sources: Sequence[tuple[str, float]], sequence_length: int, seed: int, reading: Reading | None = None
    ) -> None:
        """sources: (folder, URL or pipe: command of a split or description, weight); all with one tokenizer.

        Raises:
            UsageError: a number that is none of what it stands for. DataError: a source is missing or broken.
        """
        if not sources:
            raise DataError("no source of data: give at least one folder that `llmscale data build` wrote")
        self._paths = [path for path, _ in sources]
        self._reading = reading or Reading()
        _refuse_absurd(sources, sequence_length, self._reading)
        self._cache: Cache | None = None
        limit = _OPEN_SHARDS // len(sources)
        # What is fetched ahead takes half of the cache, over all that do.
        fetching = sum(map(is_remote, self._paths))
        own = replace(self._reading, readers=self._reading.readers * max(1, fetching))
        self._sources = [open_source(path, sequence_length, seed, limit, self._open_cache, own) for path in self._paths]
        self._refuse_small_cache()
        first = self._sources[0]
        for path, source in zip(self._paths, self._sources, strict=True):
            if source.tokenizer_sha256 != first.tokenizer_sha256:
                raise DataError(f"{path}: has another tokenizer than {self._paths[0]}; build both with one")
            if source.end_of_document != first.end_of_document:
                raise DataError(
                    f"{path}: documents end with the id {source.end_of_document}, those of {self._paths[0]} "
                    f"with {first.end_of_document}; build both with the same --end-of-document"
                )
        self.formats = tuple("text" if isinstance(one, TextSource) else "tokens" for one in self._sources)
        self._mixture = Mixture([weight for _, weight in sources])
        self._since = 0
        self.position = 0
        """Where reading goes on: what `resume` was told."""
        self._bases = np.zeros(len(sources), dtype=np.int64)
        self._dtype = np.result_type(*(source.dtype for source in self._sources))
        self.sequence_length = sequence_length
        self.seed = seed
        self.vocab_size = max(source.vocab_size for source in self._sources)
        self.end_of_document = first.end_of_document

    def _open_cache(self) -> Cache:
        """Of the node, which all sources share; opened by the first that needs it."""
        if self._cache is None:
            self._cache = Cache(self._reading.cache, self._reading.cache_bytes)
        return self._cache

    def _refuse_small_cache(self) -> None:
        """The sources are read side by side: what they need adds up."""
        sharing = [path for path, source in zip(self._paths, self._sources, strict=True) if source.cache_bytes]
        needed = sum(source.cache_bytes for source in self._sources)
        if self._cache is not None and needed > self._cache.limit:
            raise UsageError(
                f"{', '.join(sharing[:3])}{' …' if len(sharing) > 3 else ''}: the cache's limit is {self._cache.limit} "
                f"bytes, and two shuffle windows {'of each ' if len(sharing) > 1 else ''}take {needed}; "
                "raise the limit, or lower shuffle_window"
            )

    def read_tokenizer(self) -> bytes:
        """The text of the sources' tokenizer.json.

        Raises:
            DataError: that of the first source is missing, or another than its data was made with.
        """
        return self._sources[0].read_tokenizer()

    def read(self, positions: Sequence[int] | Integers) -> Integers:
        """The sequences at these positions (0 and up), [len(positions), sequence_length + 1].

        Raises DataError for a shard that is missing or has changed, and for ids beyond the vocabulary.
        """
        numbers, ordinals = self._locate(positions)
        tokens = np.empty((len(numbers), self.sequence_length + 1), dtype=self._dtype)
        for number, source in enumerate(self._sources):
            rows = np.flatnonzero(numbers == number)
            if rows.size:
                source.read(ordinals[rows], rows, tokens)
        return tokens.astype(np.int64)

    def look_ahead(self, positions: Sequence[int] | Integers) -> None:
        """Tell the sources what will be read soon, so that they fetch it; returns at once."""
        numbers, ordinals = self._locate(positions)
        for number, source in enumerate(self._sources):
            rows = np.flatnonzero(numbers == number)
            if rows.size:
                source.look_ahead(ordinals[rows])

    def _locate(self, positions: Sequence[int] | Integers) -> tuple[Integers, Integers]:
        """(source, ordinal in it) of each position."""
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and int(wanted.min()) < self._since:
            raise ValueError(f"positions count from {self._since}: {int(wanted.min())}")
        numbers, ordinals = self._mixture.locate(wanted - self._since)
        return numbers, ordinals + self._bases[numbers]

    def counts(self, position: int) -> tuple[int, ...]:
        """How many sequences of each source the first `position` ones of the stream hold."""
        counts = self._mixture.counts(position - self._since)
        return tuple(int(base) + count for base, count in zip(self._bases, counts, strict=True))

    def epochs(self, position: int) -> tuple[float | None, ...]:
        """Passes over each source that the first `position` sequences make: 1.5 is one and a half.

        None for a text source that this process has not read so far: only reading tells how many sequences it has.
        """
        return tuple(source.epochs(count) for count, source in zip(self.counts(position), self._sources, strict=True))

    def state(self, position: int) -> dict[str, Any]:
        """What it takes to go on at this position, as JSON; its size does not grow with the data that is sound."""
        parts = zip(self._paths, self._sources, self._mixture.weights, self._bases, self.counts(position), strict=True)
        sources = [
            {
                "path": path,
                "fingerprint": source.fingerprint,
                "weight": weight,
                "base": int(base),
                "sequences": count,
                "state": dict(source.state(count)),
                "left_out": source.quarantine.state(count),
            }
            for path, source, weight, base, count in parts
        ]
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "shuffle_window": self._reading.shuffle_window,
            "position": position,
            "since": self._since,
            "sources": sources,
        }

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One of the states that ranks of different sequences gave at the same position: each knows what it read.

        Takes up what the others have left out. Raises DataError where that is too much of a source.
        """
        sources = [
            {
                **own[0],
                "state": dict(source.merge([one["state"] for one in own])),
                "left_out": source.quarantine.merge([one["left_out"] for one in own]),
            }
            for source, *own in zip(self._sources, *(state["sources"] for state in states), strict=True)
        ]
        return {**states[0], "sources": sources}

    def resume(self, state: Mapping[str, Any]) -> list[str]:
        """Go on where `state` was taken; gives what is not as it was then, in words.

        Sources are known by their content: a copy elsewhere is the same source, one that was built anew is another and
        begins at its first sequence. With the same sources and weights the stream is the one that was never stopped;
        else the mixture starts afresh at the state's position, and each known source goes on from its own count.

        Raises:
            UsageError: another seed or sequence length, with which "where it was" means nothing.
        """
        for key, now, name in (
            ("seed", self.seed, "run.seed"),
            ("sequence_length", self.sequence_length, "data.sequence_length"),
            ("shuffle_window", self._reading.shuffle_window, "data.shuffle_window"),
        ):
            if state[key] != now:
                raise UsageError(
                    f"{name}: is {now}, and the data was read with {state[key]} so far, which gives another order; "
                    f"use {state[key]}, or start a new run from the checkpoint's weights"
                )
        saved: list[Mapping[str, Any]] = list(state["sources"])
        same = [(source["fingerprint"], source["weight"]) for source in saved] == [
            (source.fingerprint, weight) for source, weight in zip(self._sources, self._mixture.weights, strict=True)
        ]
        self._since = state["since"] if same else state["position"]
        self.position = state["position"]
        notes, left = [], list(saved)
        for number, (path, source) in enumerate(zip(self._paths, self._sources, strict=True)):
            found = next((one for one in left if one["fingerprint"] == source.fingerprint), None)
            # Where it was may have been told before: by a checkpoint whose weights turned out to be damaged.
            known = found or {"base": 0, "sequences": 0, "state": {}}
            self._bases[number] = known["base" if same else "sequences"]
            source.resume(known["state"])
            source.quarantine.resume(known.get("left_out", {}))
            if found is None:
                changed = any(one["path"] == path for one in saved)
                notes.append(f"{path} {'has changed' if changed else 'is new'}: it begins at its first sequence")
                continue
            left.remove(found)
            weight = self._mixture.weights[number]
            if weight != found["weight"]:
                notes.append(f"{path}: weight {found['weight']:g} -> {weight:g}, goes on at {found['sequences']:,}")
        gone = [one for one in left if one["path"] not in self._paths]
        return notes + [f"{one['path']} is left out, after {one['sequences']:,} sequences" for one in gone]

    def left_out(self, position: int) -> LeftOut:
        """What of all sources is broken, and how many of the first `position` sequences others were read for."""
        parts = zip(self._sources, self.counts(position), strict=True)
        return sum((source.quarantine.left_out(count) for source, count in parts), LeftOut())

    def counters(self) -> dict[str, float]:
        """What this process left out of all sources, and what fetching took."""
        total: dict[str, float] = {}
        fetched: dict[str, float] = {}
        for source in self._sources:
            for name, value in source.counters().items():
                if name.startswith(("skipped_", "replaced_")):
                    total[name] = total.get(name, 0) + value
                else:
                    fetched[name] = value  # of the cache, which the sources share
        return {**total, **fetched}

    def close(self) -> None:
        """Let go of what the sources hold; a read that waits for a store ends with a DataError."""
        if self._cache is not None:
            self._cache.close()
        for source in self._sources:
            source.close()


def _refuse_absurd(sources: Sequence[tuple[str, float]], sequence_length: int, reading: Reading) -> None:
    """What a config's schema refuses, for those who have none."""
    for path, weight in sources:
        if not 0 < weight < math.inf:
            raise UsageError(f"{path}: the weight {weight} is no share of a mixture; give a positive number")
    counts = {"sequence_length": sequence_length}
    counts |= {name: getattr(reading, name) for name in ("shuffle_window", "cache_bytes", "readers", "workers")}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} {count}: give at least 1")
    for name, one, other in (("verify", "first", "never"), ("on_error", "stop", "skip")):
        if (given := getattr(reading, name)) not in (one, other):
            raise UsageError(f"{name} {given!r}: give {one!r} or {other!r}")
    if not 0 <= reading.max_skipped <= 1:
        raise UsageError(f"max_skipped {reading.max_skipped}: give a share from 0 to 1")


def open_source(
    place: str, sequence_length: int, seed: int, open_shards: int, cache: Callable[[], Cache], reading: Reading
) -> Source:
    """The source that the card.json there says it is. cache: of the node, opened when something has to be fetched."""
    if is_text(place):
        return TextSource(
            TextSplit(place, cache),
            sequence_length,
            seed,
            workers=reading.workers,
            on_error=reading.on_error,
            max_skipped=reading.max_skipped,
            report=reading.report,
        )
    return TokenSource(
        Split(place, cache() if is_remote(place) else None),
        sequence_length,
        seed,
        open_shards,
        shuffle_window=reading.shuffle_window,
        verify=reading.verify,
        readers=reading.readers,
        on_error=reading.on_error,
        max_skipped=reading.max_skipped,
        report=reading.report,
    )

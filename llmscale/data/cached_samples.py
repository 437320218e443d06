"""Samples of a split that lies elsewhere: fetched into the cache of the node, ahead of being read where possible.

Of a URL, a sample is one byte range of its shard: from its .npy header over its documents, whose bytes the checksum
covers too, to the first token of the next sample, which is the last label of this one's last sequence. One request a
sample, and one more a shard, whose last sample's label is in another file. Of a command, whole shards are fetched.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from typing import BinaryIO, cast

import numpy as np

from llmscale.data.cache import Cache
from llmscale.data.fetcher import Fetcher
from llmscale.data.pipe_store import PipeStore
from llmscale.data.quarantine import Broken
from llmscale.data.samples import LocalSamples, Samples
from llmscale.data.shards import NPY_HEADER
from llmscale.data.source import Integers
from llmscale.data.split import Split
from llmscale.data.store import Damaged, Missing, UrlStore
from llmscale.errors import DataError

CONNECTIONS = 16


class CachedSamples(Samples):
    """In files that are fetched into the cache. A unit is what is fetched at once; sizes: bytes of each."""

    def __init__(self, split: Split, open_files: int, connections: int, readers: int) -> None:
        super().__init__(split, open_files)
        self._cache = cast(Cache, split.cache)
        self.counters = self._cache.counters
        self.sizes = self._sizes()
        ahead = self._cache.limit // 2 // readers // int(self.sizes.max(initial=1))
        self._fetcher = Fetcher(self._bring, connections, max(1, ahead))
        self._checked: set[int] = set()
        self._fetched_again: set[int] = set()

    def prepare(self, samples: Iterable[int]) -> dict[int, Broken]:
        """Bring these samples here, all at once; gives those that cannot be."""
        wanted: dict[int, list[int]] = {}
        for sample in samples:
            wanted.setdefault(int(self.unit_of[sample]), []).append(sample)
        absent = []
        for unit in wanted:
            if unit not in self.files:
                found = self._cache.open(self._split.key, self._name(unit))
                if found is None:
                    absent.append(unit)
                else:
                    self._hold(unit, found)
        self._fetcher.seen(wanted)
        self.counters.add(cache_hits=len(wanted) - len(absent), cache_misses=len(absent))
        if not absent:
            return {}
        started = time.monotonic()
        errors = self._fetcher.fetch(absent)
        self.counters.add(waits=1, wait_seconds=time.monotonic() - started)
        return {sample: self._broken(sample, error) for unit, error in errors.items() for sample in wanted[unit]}

    def look_ahead(self, samples: Iterable[int]) -> None:
        """Bring these samples here while others are read; returns at once."""
        units = dict.fromkeys(int(self.unit_of[sample]) for sample in samples)
        absent = [unit for unit in units if not self._cache.has(self._split.key, self._name(unit))]
        if absent:
            self._fetcher.look_ahead(absent)

    def check(self, sample: int) -> None:
        """Compare a sample with the index, unless it was when it came. A damaged copy is fetched again, once.

        Raises:
            Broken: says what is wrong with it.
        """
        if sample in self._checked:
            self._checked.discard(sample)
            return
        try:
            super().check(sample)
        except Broken:
            unit = int(self.unit_of[sample])
            if unit in self._fetched_again:
                raise
            self._fetched_again.add(unit)
            os.close(self.files.pop(unit))
            self._cache.discard(self._split.key, self._name(unit))
            super().check(sample)

    def release(self) -> None:
        """Close all files: those that are evicted while they are open still take their room."""
        Samples.close(self)

    def close(self) -> None:
        """Close all files, and end all threads; the store is closed already."""
        self._fetcher.close()
        super().close()

    @abstractmethod
    def _sizes(self) -> Integers:
        """Bytes of each unit's file."""

    @abstractmethod
    def _name(self, unit: int) -> str:
        """The name of a unit's file in the cache."""

    @abstractmethod
    def _fetch(self, unit: int, file: BinaryIO) -> None:
        """Write a unit's file."""

    def _bring(self, unit: int) -> None:
        """Have a unit in the cache; runs in the fetcher's threads."""
        os.close(self._get(unit))

    def _get(self, unit: int) -> int:
        size = int(self.sizes[unit])
        return self._cache.get(self._split.key, self._name(unit), size, lambda file: self._fetch(unit, file))

    def _open(self, unit: int, sample: int) -> int:
        try:
            return self._get(unit)
        except (Missing, Damaged) as error:
            raise self._broken(sample, error) from None

    def _broken(self, sample: int, error: BaseException) -> Broken:
        """What a store has that is wrong is the sample's fault; that it cannot be reached is nobody's."""
        name = self.shard(sample).name
        if isinstance(error, Missing):
            return Broken(sample, name, "the shard is missing")
        if isinstance(error, Damaged):
            return Broken(sample, name, error.reason)
        raise error


class RangedSamples(CachedSamples):
    """Of a URL: a unit is a sample's region of its shard, up to the first token of the next sample in it."""

    def __init__(self, split: Split, open_files: int, connections: int, readers: int) -> None:
        super().__init__(split, open_files, connections, readers)
        self._store = cast(UrlStore, split.store)
        self._place = self.byte_of
        self.byte_of = np.full_like(self._place, NPY_HEADER)
        self.unit_of = np.arange(len(self._place))
        self._labels: dict[int, int] = {}

    def first_token(self, sample: int) -> int:
        """The first token of a sample: it came with the sample before, or is fetched alone.

        Raises:
            Broken: it cannot be had.
        """
        if self.number(sample) == 0:
            if sample not in self._labels:
                self._labels[sample] = self._fetch_label(sample)
            return self._labels[sample]
        before = sample - 1
        place = int(self._place[sample] - self._place[before]) + NPY_HEADER
        return self._read_token(sample, before, place)

    def _sizes(self) -> Integers:
        sizes = np.diff(self.byte_of, append=0) + NPY_HEADER + self._itemsize
        lasts = self._first[1:] - 1
        ends = np.array([shard.bytes for shard in self._split.shards], dtype=np.int64)
        sizes[lasts] = ends - self.byte_of[lasts] + NPY_HEADER
        return sizes

    def _name(self, unit: int) -> str:
        return f"{unit:09d}"

    def _fetch(self, unit: int, file: BinaryIO) -> None:
        shard, number = self.shard(unit), self.number(unit)
        start, end = self._split.region(shard, number)

        def problem(data: bytes) -> str:
            return self.problem(memoryview(data)[: end - start], unit)

        try:
            file.write(self._store.read(shard.name, start, start + int(self.sizes[unit]), problem))
        except Damaged as error:
            size = None
            with suppress(DataError):
                size = self._store.size(shard.name)
            if size not in (None, shard.bytes):
                reason = f"the shard has {size} bytes, index.json says {shard.bytes}"
                raise Damaged(str(error), reason) from None
            raise
        self._checked.add(unit)
        if number + 1 == len(shard.offsets) and unit + 1 < len(self.unit_of):
            with suppress(DataError, Broken):  # said when the label is read
                self._labels[unit + 1] = self._fetch_label(unit + 1)

    def _fetch_label(self, sample: int) -> int:
        start = int(self._place[sample])
        try:
            data = self._store.read(self.shard(sample).name, start, start + self._itemsize)
        except (Missing, Damaged) as error:
            raise self._broken(sample, error) from None
        return self._token(sample, data)


class PipedSamples(CachedSamples):
    """Of a command: a unit is a shard."""

    def _sizes(self) -> Integers:
        return np.array([shard.bytes for shard in self._split.shards], dtype=np.int64)

    def _name(self, unit: int) -> str:
        return self._split.shards[unit].name

    def _fetch(self, unit: int, file: BinaryIO) -> None:
        cast(PipeStore, self._split.store).copy(self._name(unit), file, int(self.sizes[unit]))


def samples_of(split: Split, open_files: int, connections: int, readers: int, size_matters: bool) -> Samples:
    """The samples of a split, wherever it lies. readers: processes of this node that share the cache."""
    if split.store is None:
        return LocalSamples(split, open_files, size_matters)
    kind = RangedSamples if isinstance(split.store, UrlStore) else PipedSamples
    return kind(split, open_files, connections, readers)

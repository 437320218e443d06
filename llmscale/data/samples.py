"""Where the tokens of each sample can be read, and whether they are what the index says.

Three kinds of split, one way to read them: a file descriptor and the byte where the sample's tokens begin.

    a folder      a shard is its file, where it lies
    a URL         a sample is a file in the cache: one byte range of the shard, checked before it is kept
    a command     a shard is a file in the cache

Files are read with pread and not mapped: a mapping of a file that is cut short meanwhile kills the process (SIGBUS),
a read of it comes short and says so. In batches of 64 pread into the batch makes 0.83 of the rate of copying out of a
mapping (sequences of 4,096, one core); not having to look through the ids of a batch again gives more than that back.
"""

from __future__ import annotations

import os
import stat
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from typing import BinaryIO, cast

import numpy as np

from llmscale.data.cache import Cache
from llmscale.data.fetcher import Fetcher
from llmscale.data.pipe_store import PipeStore
from llmscale.data.quarantine import Broken
from llmscale.data.shards import NPY_HEADER, Shard
from llmscale.data.source import Integers
from llmscale.data.split import Split, parse_sample
from llmscale.data.store import Counters, Damaged, Missing, UrlStore
from llmscale.errors import DataError

CONNECTIONS = 16


class Samples(ABC):
    """The samples of a split, each in a file: of its own or its shard's."""

    def __init__(self, split: Split, open_files: int) -> None:
        self._split = split
        self._open_files = open_files
        self._files: dict[int, int] = {}
        self.counters = Counters()
        counts = [len(shard.offsets) for shard in split.shards]
        self.shard_of = np.repeat(np.arange(len(counts)), counts)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        offsets = [np.array(shard.offsets, dtype=np.int64) for shard in split.shards]
        self.unit_of: Integers = self.shard_of
        self.byte_of = np.concatenate(offsets) if offsets else np.empty(0, dtype=np.int64)
        self._itemsize = np.dtype(split.card.dtype).itemsize
        self._buffer = bytearray()

    @abstractmethod
    def prepare(self, samples: Iterable[int]) -> dict[int, Broken]:
        """Bring these samples here, all at once; gives those that cannot be."""

    @abstractmethod
    def look_ahead(self, samples: Iterable[int]) -> None:
        """Bring these samples here while others are read; returns at once."""

    @abstractmethod
    def release(self) -> None:
        """Close the files that another process may want to evict."""

    def file(self, sample: int) -> int:
        """A descriptor of the file that holds a sample, good until the next call.

        Raises:
            Broken: the file cannot be had. DataError: nor can the store be reached.
        """
        unit = int(self.unit_of[sample])
        found = self._files.get(unit)
        if found is None:
            found = self._open(unit, sample)
            self._hold(unit, found)
        return found

    def check(self, sample: int) -> None:
        """Compare a sample with the index and the card.

        Raises:
            Broken: says what is wrong with it.
        """
        shard, number = self.shard(sample), self.number(sample)
        start, end = self._split.region(shard, number)
        first = int(self.byte_of[sample]) - NPY_HEADER
        if len(self._buffer) < end - start:
            self._buffer = bytearray(end - start)
        view = memoryview(self._buffer)[: end - start]
        count = os.preadv(self.file(sample), [view], first)
        if problem := self.problem(view[:count], sample):
            raise Broken(sample, shard.name, problem)

    def first_token(self, sample: int) -> int:
        """The first token of a sample, which is the last label of the sequence before it.

        Raises:
            Broken: it cannot be had.
        """
        data = os.pread(self.file(sample), self._itemsize, int(self.byte_of[sample]))
        return self._token(sample, data)

    def shard(self, sample: int) -> Shard:
        """The shard that a sample is in."""
        return self._split.shards[int(self.shard_of[sample])]

    def number(self, sample: int) -> int:
        """The place of a sample in its shard."""
        return sample - int(self._first[self.shard_of[sample]])

    def problem(self, data: bytes | memoryview, sample: int) -> str:
        """What is wrong with a sample's region of its shard, or nothing."""
        try:
            tokens, documents = parse_sample(data, np.dtype(self._split.card.dtype), self._split.sample_length(sample))
        except (ValueError, EOFError) as error:
            return str(error)
        found = zlib.crc32(documents.data, zlib.crc32(tokens.data))
        if found != self.shard(sample).checksums[self.number(sample)]:
            return "its checksum differs from index.json: it was damaged, or changed since it was indexed"
        if (largest := int(tokens.max())) >= self._split.card.vocab_size:
            return f"holds the id {largest}, and the vocabulary has {self._split.card.vocab_size}"
        return ""

    def close(self) -> None:
        """Close all files, and end all threads."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _hold(self, unit: int, file: int) -> None:
        """Keep a descriptor; what was opened longest ago gives way."""
        while len(self._files) >= self._open_files:
            os.close(self._files.pop(next(iter(self._files))))
        self._files[unit] = file

    @abstractmethod
    def _open(self, unit: int, sample: int) -> int:
        """A new descriptor of a unit's file."""

    def _token(self, sample: int, data: bytes) -> int:
        if len(data) < self._itemsize:
            raise Broken(sample, self.shard(sample).name, "cut short")
        token = int.from_bytes(data, "little")
        if token >= self._split.card.vocab_size:
            reason = f"holds the id {token}, and the vocabulary has {self._split.card.vocab_size}"
            raise Broken(sample, self.shard(sample).name, reason)
        return token


class LocalSamples(Samples):
    """In shards in a folder. size_matters: refuse a shard whose size is not the index's, whatever its samples are."""

    def __init__(self, split: Split, open_files: int, size_matters: bool) -> None:
        super().__init__(split, open_files)
        self._size_matters = size_matters

    def prepare(self, samples: Iterable[int]) -> dict[int, Broken]:
        """They are here."""
        return {}

    def look_ahead(self, samples: Iterable[int]) -> None:
        """They are here."""

    def release(self) -> None:
        """Nobody evicts them."""

    def _open(self, unit: int, sample: int) -> int:
        shard = self._split.shards[unit]
        try:
            found = os.open(self._split.folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "the shard is missing" if missing else f"the shard cannot be read: {error.strerror}"
            raise Broken(sample, shard.name, reason) from None
        status = os.fstat(found)
        size = status.st_size
        if stat.S_ISDIR(status.st_mode) or (self._size_matters and size != shard.bytes):
            os.close(found)
            raise Broken(sample, shard.name, f"the shard has {size} bytes, index.json says {shard.bytes}")
        return found


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
            if unit not in self._files:
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
        absent = [unit for unit in units if not self._cache.path(self._split.key, self._name(unit)).exists()]
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
            os.close(self._files.pop(unit))
            self._cache.discard(self._split.key, self._name(unit))
            super().check(sample)

    def release(self) -> None:
        """Close all files: those that are evicted while they are open still take their room."""
        Samples.close(self)

    def close(self) -> None:
        """Close all files, and end all threads."""
        cast(UrlStore | PipeStore, self._split.store).close()
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
        return self._token(sample, os.pread(self.file(before), self._itemsize, place))

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

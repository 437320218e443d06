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
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from llmscale.data.quarantine import NOT_THERE, Broken, unreadable
from llmscale.data.shards import NPY_HEADER, Shard
from llmscale.data.source import Integers
from llmscale.data.split import Split, parse_sample
from llmscale.data.store import Counters
from llmscale.errors import DataError


class Samples(ABC):
    """The samples of a split, each in a file: of its own or its shard's."""

    def __init__(self, split: Split, open_files: int) -> None:
        """open_files: so many are kept open from one read to the next; one is while it is read."""
        self._split = split
        self._open_files = open_files
        self.files: dict[int, int] = {}
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
        """A read is over: close the files that are not to be kept open."""

    def file(self, sample: int) -> int:
        """A descriptor of the file that holds a sample, good until the next call.

        Raises:
            Broken: the file is not there, or is another. DataError: it cannot be read here, or its store not reached.
        """
        unit = int(self.unit_of[sample])
        found = self.files.get(unit)
        if found is None:
            found = self._open(unit, sample)
            self._hold(unit, found)
        return found

    def check(self, sample: int) -> None:
        """Compare a sample with the index and the card.

        Raises:
            Broken: says what is wrong with it. DataError: it cannot be read here.
        """
        shard, number = self.shard(sample), self.number(sample)
        start, end = self._split.region(shard, number)
        first = int(self.byte_of[sample]) - NPY_HEADER
        if len(self._buffer) < end - start:
            self._buffer = bytearray(end - start)
        view = memoryview(self._buffer)[: end - start]
        file = self.file(sample)
        try:
            count = os.preadv(file, [view], first)
        except OSError as error:
            raise self.unreadable(sample, error) from None
        if problem := self.problem(view[:count], sample):
            raise Broken(sample, shard.name, problem)

    def first_token(self, sample: int) -> int:
        """The first token of a sample, which is the last label of the sequence before it.

        Raises:
            Broken: it cannot be had. DataError: it cannot be read here.
        """
        return self._read_token(sample, sample, int(self.byte_of[sample]))

    def unreadable(self, sample: int, error: OSError) -> DataError:
        """What to raise where the system fails to read a sample."""
        return unreadable(self._split.where(self.shard(sample).name), error)

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
        except ValueError as error:
            return str(error)
        found = zlib.crc32(documents.data, zlib.crc32(tokens.data))
        if found != self.shard(sample).checksums[self.number(sample)]:
            return "its checksum differs from index.json: it was damaged, or changed since it was indexed"
        if (largest := int(tokens.max())) >= self._split.card.vocab_size:
            return f"holds the id {largest}, and the vocabulary has {self._split.card.vocab_size}"
        return ""

    def close(self) -> None:
        """Close all files, and end all threads."""
        while self.files:
            os.close(self.files.popitem()[1])

    def _hold(self, unit: int, file: int) -> None:
        """Keep a descriptor; what was opened longest ago gives way."""
        while len(self.files) >= max(1, self._open_files):
            os.close(self.files.pop(next(iter(self.files))))
        self.files[unit] = file

    @abstractmethod
    def _open(self, unit: int, sample: int) -> int:
        """A new descriptor of a unit's file."""

    def _read_token(self, sample: int, holder: int, place: int) -> int:
        """The first token of a sample, which stands at a byte of the file that holds the sample `holder`."""
        file = self.file(holder)
        try:
            data = os.pread(file, self._itemsize, place)
        except OSError as error:
            raise self.unreadable(holder, error) from None
        return self._token(sample, data)

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
        """Nobody evicts them: close them only where there are too many sources for each to keep one."""
        if not self._open_files:
            self.close()

    def _open(self, unit: int, sample: int) -> int:
        shard = self._split.shards[unit]
        try:
            found = os.open(self._split.folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        except NOT_THERE:
            raise Broken(sample, shard.name, "the shard is missing") from None
        except OSError as error:
            raise self.unreadable(sample, error) from None
        status = os.fstat(found)
        size = status.st_size
        if stat.S_ISDIR(status.st_mode) or (self._size_matters and size != shard.bytes):
            os.close(found)
            raise Broken(sample, shard.name, f"the shard has {size} bytes, index.json says {shard.bytes}")
        return found

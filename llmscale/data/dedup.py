"""Which documents of a build are copies of an earlier one, to the letter or nearly so; the first in order is kept.

Exact: 128 bits of BLAKE2b of the text. Near: MinHash with banding (Broder 1997, "On the resemblance and containment
of documents"; Indyk & Motwani 1998): a document is the set of its runs of SHINGLE_WORDS lower-case words (each
character is a word where a script writes none apart), and the share of PERMUTATIONS random orders in which two sets
have the same smallest member estimates their Jaccard similarity J with a standard error of sqrt(J (1 - J) / 128),
0.035 at 0.8. Eight bits of each smallest member are kept (b-bit minwise hashing, Li & König 2010); by chance 1 in 256
agree, so J = (agreeing - 1/256) / (1 - 1/256). With bands of r rows two documents share a band with probability
1 - (1 - J^r)^(128 // r), and r is the largest that gives at least 0.95 at the threshold. Whoever shares a band is
compared over all 128, so a document is removed for its estimate and never for a band alone.

Kept here rather than in datasketch, rensa or text-dedup, whose tables are Python objects that live in memory and end
with the process: a build must go on after a kill, and count its bytes a document. On disk (mapped, so memory only as
far as there is some) a kept document takes 16 bytes, with near 144 and a bit for each band; in memory 4 bytes a table
at a load of 1/4 to 1/2: 8 to 16 bytes for exact, and as much for each band of near (18 at 0.8).
"""

from __future__ import annotations

import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmscale.errors import DataError

PERMUTATIONS = 128
SHINGLE_WORDS = 5
DIGEST_BYTES = 16
_FOUND_AT_THRESHOLD = 0.95
_CROWD = 32
"""So many documents are listed under one value of a band. What thousands share is boilerplate; other bands tell."""
_EMPTY = np.uint32(0xFFFFFFFF)
_CHUNK = 2048
_APART = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_APART}]|[^\\W{_APART}]+")

Minima = npt.NDArray[np.uint32]
Signatures = npt.NDArray[np.uint8]


def rows_per_band(threshold: float) -> int:
    """The most rows with which a pair at the threshold shares a band in 95 of 100 cases."""
    return max(
        (r for r in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= _FOUND_AT_THRESHOLD),
        default=1,
    )


def minima(text: str) -> Minima:
    """The smallest member of a text's shingles in each random order. [PERMUTATIONS]; of a union: the minimum."""
    smallest = np.full(PERMUTATIONS, _EMPTY)
    words = _WORD.findall(text.lower())
    if not words:
        return smallest
    hashes = np.fromiter(map(zlib.crc32, map(str.encode, words)), dtype=np.uint64, count=len(words))
    run = min(SHINGLE_WORDS, len(words))
    shingles = np.zeros(len(words) - run + 1, dtype=np.uint64)
    for place in range(run):
        shingles = _mix(shingles + hashes[place : place + len(shingles)])
    values = (shingles >> np.uint64(32)).astype(np.uint32)
    for start in range(0, len(values), _CHUNK):
        ordered = values[start : start + _CHUNK] * _FACTORS[:, None]
        ordered += _TERMS[:, None]
        np.minimum(smallest, ordered.min(axis=1), out=smallest)
    return smallest


class Deduplicator:
    """Remembers the documents that were kept. Its file goes on with the first `kept` of them after a kill."""

    def __init__(self, path: Path, threshold: float | None, kept: int = 0) -> None:
        """threshold: of near duplicates; None removes exact ones alone."""
        self.near = threshold is not None
        self._threshold = threshold or 1.0
        self.rows = rows_per_band(self._threshold) if self.near else 1
        self.bands = PERMUTATIONS // self.rows if self.near else 0
        row: list[Any] = [("digest", "<u8", 2)]
        if self.near:
            row += [("signature", "u1", PERMUTATIONS), ("listed", "u1", -(-self.bands // 8))]
        self._file = _Rows(path, np.dtype(row), kept)
        self._exact = _Slots(1)
        self._banded = _Slots(self.bands)
        for start in range(0, kept, 1 << 16):
            self._list(start, min(kept, start + (1 << 16)))

    @property
    def kept(self) -> int:
        """Documents that were kept."""
        return self._file.count

    def sync(self) -> None:
        """Bring everything onto the disk."""
        self._file.sync()

    def check(self, digests: Sequence[bytes], smallest: npt.NDArray[np.uint32] | None) -> list[str]:
        """Of each of some documents, in order: "exact" or "near" where it is a copy, else "", and it is remembered.

        smallest: [documents, PERMUTATIONS], the `minima` of each, where near duplicates are looked for.
        """
        verdicts = [""] * len(digests)
        pairs = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
        for query, _, found in self._exact.look_up(pairs[:, :1]):
            for copy in query[(self._file.all["digest"][found] == pairs[query]).all(axis=1)].tolist():
                verdicts[copy] = "exact"
        seen: set[bytes] = set()
        for number, digest in enumerate(digests):
            if digest in seen:
                verdicts[number] = "exact"
            seen.add(digest)
        row = np.zeros(len(digests), dtype=self._file.all.dtype)
        row["digest"] = pairs
        if smallest is not None:
            row["signature"] = ((smallest * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8)
            wordy = smallest[:, 0] != _EMPTY
            numbers = np.array([n for n in range(len(digests)) if not verdicts[n] and wordy[n]], dtype=np.int64)
            listed = self._check_near(row["signature"][numbers], numbers, verdicts)
            row["listed"][numbers] = np.packbits(listed, axis=1)
        first = self.kept
        self._file.append(row[[not verdict for verdict in verdicts]])
        self._list(first, self.kept)
        return verdicts

    def _check_near(
        self, signatures: Signatures, numbers: npt.NDArray[np.int64], verdicts: list[str]
    ) -> npt.NDArray[np.bool_]:
        """Mark near copies, of earlier documents and of each other; gives under which bands to list the others."""
        keys = self._keys(signatures)
        crowd = np.zeros(keys.shape, dtype=np.int64)
        copies = np.zeros(len(keys), dtype=bool)
        for query, table, found in self._banded.look_up(keys):
            same = self._file.all["signature"][found] == signatures[query]
            shared = same[:, : self.bands * self.rows].reshape(len(same), self.bands, self.rows)
            together = shared[np.arange(len(table)), table].all(axis=1)
            np.add.at(crowd, (query[together], table[together]), 1)
            copies[query[together & self._alike(same)]] = True
        listed = crowd < _CROWD
        values, counts = np.unique(keys, return_counts=True)
        repeated = np.isin(keys, values[counts > 1])
        others: defaultdict[int, list[int]] = defaultdict(list)
        for number in np.flatnonzero(repeated.any(axis=1) & ~copies).tolist():
            bands = np.flatnonzero(repeated[number]).tolist()
            before = sorted({other for band in bands for other in others[int(keys[number, band])]})
            if before and self._alike(signatures[before] == signatures[number]).any():
                copies[number] = True
                continue
            for band in bands:
                there = others[int(keys[number, band])]
                listed[number, band] = crowd[number, band] + len(there) < _CROWD
                if listed[number, band]:
                    there.append(number)
        for copy in numbers[copies].tolist():
            verdicts[copy] = "near"
        return listed

    def _alike(self, same: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whether the estimate reaches the threshold. same: [pairs, PERMUTATIONS]."""
        estimate = (same.mean(axis=-1) - 1 / 256) / (1 - 1 / 256)
        return np.asarray(estimate >= self._threshold)

    def _keys(self, signatures: Signatures) -> npt.NDArray[np.uint64]:
        """64 bits of each band, its number mixed in. [documents, bands]"""
        keys = np.broadcast_to(np.arange(self.bands, dtype=np.uint64), (len(signatures), self.bands)).copy()
        banded = signatures[:, : self.bands * self.rows].reshape(len(signatures), self.bands, self.rows)
        for row in range(self.rows):
            keys = _mix(keys + banded[:, :, row])
        return keys

    def _list(self, first: int, end: int) -> None:
        """Enter rows of the file into the tables; makes them larger where they are full, and enters all again."""
        if self._exact.fits(end):
            rows = self._file.all[first:end]
            numbers = np.arange(first, end)
            self._exact.insert(rows["digest"][:, :1], np.ones((len(rows), 1), dtype=bool), numbers)
            if self.near:
                listed = np.unpackbits(rows["listed"], axis=1, count=self.bands).astype(bool)
                self._banded.insert(self._keys(rows["signature"]), listed, numbers)
            return
        self._exact.grow(end)
        self._banded.grow(end)
        for start in range(0, end, 1 << 16):
            self._list(start, min(end, start + (1 << 16)))


class _Rows:
    """Rows of one type in a file that is mapped into memory."""

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int) -> None:
        self._path = path
        self._dtype = dtype
        self.count = count
        if not count:
            path.write_bytes(b"")
        elif not path.is_file() or path.stat().st_size < count * dtype.itemsize:
            raise DataError(f"{path}: does not hold the {count} documents that were kept")
        self._reserve(max(count, 1 << 12))

    def append(self, rows: npt.NDArray[Any]) -> None:
        if self.count + len(rows) > len(self.all):
            self.all.flush()
            self._reserve(2 * (self.count + len(rows)))
        self.all[self.count : self.count + len(rows)] = rows
        self.count += len(rows)

    def sync(self) -> None:
        self.all.flush()

    def _reserve(self, rows: int) -> None:
        with self._path.open("r+b") as file:
            file.truncate(rows * self._dtype.itemsize)
            # A page of a mapped file for which the disk has no room is a signal that kills; here it is an OSError.
            os.posix_fallocate(file.fileno(), 0, rows * self._dtype.itemsize)
        self.all: np.memmap[Any, Any] = np.memmap(self._path, dtype=self._dtype, mode="r+", shape=(rows,))


class _Slots:
    """Hash tables side by side, from keys to numbers of rows: open addressing, linear probing, at most half full."""

    def __init__(self, tables: int) -> None:
        self._tables = tables
        self._make(1 << 12)

    def fits(self, rows: int) -> bool:
        return 2 * rows <= self._size

    def grow(self, rows: int) -> None:
        """Room for so many rows; what was in the tables is gone."""
        self._make(1 << (4 * rows - 1).bit_length())

    def insert(
        self, keys: npt.NDArray[np.uint64], wanted: npt.NDArray[np.bool_], numbers: npt.NDArray[np.int64]
    ) -> None:
        """Enter rows under their keys. keys, wanted: [rows, tables]; numbers: [rows]."""
        row, table = np.nonzero(wanted)
        place = self._place(keys[row, table])
        entry = (numbers[row] + 1).astype(np.uint32)
        while len(entry):
            at = table * self._size + place
            free = self._slots[at] == 0
            self._slots[at[free]] = entry[free]  # of several that want a slot, one gets it
            left = self._slots[at] != entry
            table, place, entry = table[left], (place[left] + 1) & (self._size - 1), entry[left]

    def look_up(self, keys: npt.NDArray[np.uint64]) -> Iterator[tuple[npt.NDArray[np.int64], ...]]:
        """All rows that may be under the keys: (row of keys, table, number of the row found), and others as well."""
        query, table = (part.ravel() for part in np.indices(keys.shape))
        place = self._place(keys.ravel())
        while len(query):
            entry = self._slots[table * self._size + place]
            there = entry != 0
            query, table, place = query[there], table[there], place[there]
            if len(query):
                yield query, table, entry[there].astype(np.int64) - 1
            place = (place + 1) & (self._size - 1)

    def _place(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return (keys & np.uint64(self._size - 1)).astype(np.int64)

    def _make(self, size: int) -> None:
        self._size = size
        self._slots = np.zeros(self._tables * size, dtype=np.uint32)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): every bit of the result hangs on every bit of the input."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_FACTORS = (_mix(np.arange(PERMUTATIONS, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
_TERMS = (_mix(np.arange(PERMUTATIONS, 2 * PERMUTATIONS, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)
"""x -> factor x + term (mod 2^32) is a permutation, the factor being odd."""

"""One split of a dataset, wherever it lies: its card and index, read and checked against each other."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import tarfile
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from llmscale.data.cache import Cache
from llmscale.data.inputs import local_path
from llmscale.data.parts import is_pattern
from llmscale.data.pipe_store import PipeStore, open_store
from llmscale.data.records import parse
from llmscale.data.shards import (
    INDEX_HEAD,
    INDEX_TAIL,
    NPY_HEADER,
    REBUILD,
    Card,
    Index,
    Shard,
    Tokens,
    sample_key,
)
from llmscale.data.store import Missing, Patience, UrlStore, is_remote
from llmscale.data.text_shards import is_text
from llmscale.errors import DataError, UsageError

_MOST_CARD_BYTES = 1 << 28
_MOST_INDEX_BYTES = 1 << 32
_MOST_OVERHEAD = 1 << 15
"""Bytes of headers, padding and a tar's end that come with a sample."""
_BUILD_REMOTE = "name the URL of a split, such as s3://bucket/dataset/train, that `llmscale data build` wrote"

_DOCUMENTS = b"\x93NUMPY\x01\x00v\x00{'descr': '<u4', 'fortran_order': False, 'shape': ("


class Split:
    """One split: its card and index, read and checked against each other. The shards are not touched."""

    unit: ClassVar[str] = "sample"
    fix: ClassVar[str] = REBUILD

    def __init__(self, place: str | Path, cache: Cache | None = None, patience: Patience | None = None) -> None:
        """place: a folder, an fsspec URL or pipe:COMMAND (`store.py`). cache: where a remote split is kept."""
        self.place = local_path(str(place))
        self.store: UrlStore | PipeStore | None = None
        self.cache = cache
        if is_remote(self.place):
            self.cache = cache = cache or Cache()
            self.store = store = open_store(self.place, patience or Patience(), cache.counters)
            try:
                data = store.read_all("card.json", _MOST_CARD_BYTES)
            except Missing:
                raise UsageError(f"{self.place}: not a dataset, it has no card.json; {_BUILD_REMOTE}") from None
            self.card = parse(Card, data, self.where("card.json"), REBUILD)
            self.key = self.card.index_sha256[:32]
            self.folder = self._keep("index.json", self.card.index_sha256, _MOST_INDEX_BYTES).parent
            self._keep("tokenizer.json", self.card.tokenizer_sha256, _MOST_CARD_BYTES)
        else:
            self.folder = Path(self.place)
            if not (self.folder / "card.json").is_file():
                raise UsageError(_not_a_split(self.folder))
            if is_text(self.folder):
                raise UsageError(f"{self.folder}: describes text, and is not read with token shards; name it by itself")
            self.card = parse(Card, _content(self.folder / "card.json"), self.where("card.json"), REBUILD)
        self.shards = tuple(_shards(self.folder / "index.json", self.where("index.json"), self.card.index_sha256))
        samples = sum(len(shard.offsets) for shard in self.shards)
        index = self.where("index.json")
        if samples != self.card.samples or samples != -(-self.card.tokens // self.card.sample_tokens):
            raise DataError(f"{index}: {samples} samples, card.json says {self.card.samples}; {REBUILD}")
        most = self.card.sample_tokens * (np.dtype(self.card.dtype).itemsize + 4) + _MOST_OVERHEAD
        for number, shard in enumerate(self.shards):
            if shard.bytes > most * len(shard.offsets):  # a reader would ask for that much memory
                raise DataError(
                    f"{index}: shards.{number}.bytes: {shard.bytes} are more than {len(shard.offsets)} samples of "
                    f"{self.card.sample_tokens} tokens take; {REBUILD}"
                )
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise DataError(f"{index}: lists a shard twice; {REBUILD}")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json beside the shards; of a remote split, a copy of it."""
        return self.folder / "tokenizer.json"

    def read_tokenizer(self) -> bytes:
        """The text of the tokenizer.json.

        Raises:
            DataError: it is missing, or not the one that made the shards.
        """
        if not self.tokenizer.is_file():
            raise DataError(f"{self.tokenizer}: is missing; {REBUILD}")
        content = _content(self.tokenizer)
        if hashlib.sha256(content).hexdigest() != self.card.tokenizer_sha256:
            raise DataError(
                f"{self.tokenizer}: not the tokenizer that made the shards (its checksum differs); {REBUILD}"
            )
        return content

    def where(self, name: str) -> str:
        """What to call one of its files in a message: its path, or its URL."""
        return self.store.where(name) if self.store else str(self.folder / name)

    @property
    def units(self) -> int:
        """Samples."""
        return self.card.samples

    def unit_name(self, number: int) -> str:
        """A sample's key."""
        return sample_key(number)

    def sample_length(self, sample: int) -> int:
        """Tokens of a sample."""
        return min(self.card.sample_tokens, self.card.tokens - sample * self.card.sample_tokens)

    def region(self, shard: Shard, number: int) -> tuple[int, int]:
        """The bytes of a shard from the .npy header of its number-th sample's tokens to the end of its documents."""
        last = number + 1 == len(shard.offsets)
        end = shard.bytes if last else shard.offsets[number + 1] - NPY_HEADER - tarfile.BLOCKSIZE
        return shard.offsets[number] - NPY_HEADER, end

    def read_sample(self, shard: Shard, number: int, length: int) -> tuple[Tokens, Tokens]:
        """(tokens, documents) of a shard's number-th sample, read from where the index says that it stands."""
        try:
            return parse_sample(self._bytes(shard, *self.region(shard, number)), np.dtype(self.card.dtype), length)
        except ValueError as error:
            raise DataError(
                f"{self.where(shard.name)}: sample {number} of it is damaged ({error}); {REBUILD}"
            ) from None

    def _bytes(self, shard: Shard, start: int, end: int) -> bytes:
        """A part of a shard."""
        if isinstance(self.store, UrlStore):
            return self.store.read(shard.name, start, end)
        try:
            with self.open_shard(shard) as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise DataError(f"{self.where(shard.name)}: cannot be read: {error.strerror}; {REBUILD}") from None

    def open_shard(self, shard: Shard) -> io.BufferedReader:
        """A shard as a file: itself, or what the cache has of it. OSError where it is not there."""
        if self.store is None or self.cache is None:
            return (self.folder / shard.name).open("rb")
        store = self.store
        fetched = self.cache.get(
            self.key, shard.name, shard.bytes, lambda file: store.copy(shard.name, file, shard.bytes)
        )
        return os.fdopen(fetched, "rb")

    def _keep(self, name: str, sha256: str, most: int) -> Path:
        """A small file of a remote split, in the cache."""
        store, cache = cast(UrlStore | PipeStore, self.store), cast(Cache, self.cache)
        path = cache.keep(self.key, name, sha256, lambda: store.read_all(name, most))
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise DataError(f"{self.where(name)}: not the one that card.json was written for; {REBUILD}")
        return path


def parse_sample(data: bytes | memoryview, dtype: np.dtype[Any], length: int) -> tuple[Tokens, Tokens]:
    """(tokens, documents) of a region of a shard. ValueError says what is wrong with it."""
    end = NPY_HEADER + length * dtype.itemsize
    if len(data) < end:
        raise ValueError(f"cut short: {max(0, len(data) - NPY_HEADER) // dtype.itemsize} of {length} tokens are there")
    header = bytes(data[:NPY_HEADER])
    if header != _npy_header(dtype, length):
        raise ValueError(f"its .npy header is not that of {length} tokens of {dtype}")
    tokens = np.frombuffer(data, dtype=dtype.newbyteorder("<"), count=length, offset=NPY_HEADER)
    # What numpy would read of the documents, without its parser, which takes as long as the checksum.
    member = end + -end % tarfile.BLOCKSIZE
    header = bytes(data[member : member + tarfile.BLOCKSIZE + len(_DOCUMENTS)])
    size = header[124:135]
    if header[tarfile.BLOCKSIZE :] != _DOCUMENTS or not size.isdigit():
        raise ValueError("its documents are not where they should be, or are no array of uint32")
    start = member + tarfile.BLOCKSIZE + NPY_HEADER
    count = (int(size, 8) - NPY_HEADER) // 4
    if count < 0 or start + 4 * count > len(data):
        raise ValueError("its documents are cut short")
    return tokens, np.frombuffer(data, dtype="<u4", count=count, offset=start)


@lru_cache
def _npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    header = io.BytesIO()
    described = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def splits(place: Path | str) -> list[Path]:
    """The splits of what a user named: a split, a dataset, one that was built in parts, or a pattern that names some.

    Raises:
        UsageError: it names none.
    """
    found = [folder for folder in _folders(place) if (folder / "card.json").is_file()]
    if not found:
        raise UsageError(_not_a_split(Path(place)))
    return found


def without_card(place: Path | str) -> list[Path]:
    """The folders among them that have shards or an index, and no card: what is left of splits."""
    return [
        folder
        for folder in _folders(place)
        if not (folder / "card.json").exists()
        and ((folder / "index.json").exists() or any(folder.glob("shard-*.tar*")))
    ]


def _folders(place: Path | str) -> list[Path]:
    """The folders that may be splits of what a user named."""
    named = sorted(glob.glob(str(place))) if is_pattern(str(place)) else [str(place)]
    found = []
    for folder in map(Path, named):
        inside = [] if (folder / "card.json").is_file() else [*folder.glob("*"), *folder.glob("part-*/*")]
        found += [folder, *sorted(path for path in inside if path.is_dir())]
    return found


def _shards(path: Path, where: str, sha256: str) -> Iterator[Shard]:
    """The shards of an index, a line each as they are written, so that 5 million samples take 60 MB and not 600."""
    data = _content(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{where}: not the one that card.json was written for (its checksum differs); {REBUILD}")
    lines = io.BytesIO(data)
    if lines.readline().rstrip() != INDEX_HEAD:
        yield from parse(Index, data, where, REBUILD).shards
        return
    for number, line in enumerate(lines):
        if line.rstrip() in (INDEX_TAIL, b""):
            continue
        shard = parse(Shard, line.rstrip(b",\n"), where, REBUILD, f"shards.{number}")
        packed = {"offsets": array("q", shard.offsets), "checksums": array("I", shard.checksums)}
        yield shard.model_copy(update=packed)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {REBUILD}") from None


def _not_a_split(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; build one with `llmscale data build`"
    inside = sorted(card.parent.name for card in folder.glob("*/card.json"))
    if inside:
        return f"{folder}: holds the splits {' and '.join(inside)}; name one of them, such as {folder / inside[0]}"
    return f"{folder}: not a dataset, it has no card.json; build one with `llmscale data build`"

"""The format of a dataset: token shards that are plain webdataset tars and can be mapped like flat files.

    DIR/train/                     one split, what `data.train[].path` names; DIR/validation/ is another
        card.json                  what it is: tokenizer fingerprint, vocabulary, dtype, totals
        index.json                 where every sample's tokens stand: shards, byte offsets, checksums
        tokenizer.json             the tokenizer that made it
        shard-00000.tar            samples: 000000000.tokens.npy, 000000000.documents.npy; 000000001.tokens.npy …

The tokens of a split are one long row, every document followed by the end-of-document token; a sample is the next
`sample_tokens` of them, whatever documents they belong to, and `documents` holds the places in it where a document
begins. So token t is in sample t // sample_tokens, with no search and no table of documents, and an offset a sample
is all that has to be known. A .npy member has 640 bytes before its data, so tokens lie aligned in the tar.

SAMPLE_TOKENS, measured on uint16 with documents of 1,000 tokens and sequences of 4,096 (`benchmarks/data_stream.py
--sample-tokens`): the tar is larger than its tokens by 3.1 % at 2^15 tokens a sample, 0.6 % at 2^18, 0.3 % at 2^20;
sequences that span two samples, which take two copies, are 12.5 %, 1.6 % and 0.4 %; the stream reads 0.93, 0.98 and
0.97 G tokens/s. 2^18 (512 KiB of uint16) is the least at which neither is felt, and still small enough for other
webdataset readers to shuffle.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from llmscale.data.store import plain_name
from llmscale.errors import DataError

SAMPLE_TOKENS = 1 << 18
Tokens = npt.NDArray[np.unsignedinteger]
NPY_HEADER = 128
INDEX_HEAD, INDEX_TAIL = b'{"shards": [', b"]}"
_LENGTH_BINS = 40
_MOST_SHARD_BYTES = 1 << 42
_MOST_SAMPLE_TOKENS = 1 << 30


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


R = TypeVar("R", bound=_Record)


class Card(_Record):
    """What a split is: card.json."""

    format: Literal["llmscale-tokens"] = "llmscale-tokens"
    version: Literal[1] = 1
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1)
    end_of_document: int
    dtype: Literal["uint16", "uint32"]
    sample_tokens: int = Field(ge=1, le=_MOST_SAMPLE_TOKENS)
    """Tokens of every sample but the last."""
    shards: int
    samples: int
    documents: int
    tokens: int
    """End-of-document tokens included."""
    bytes: int
    document_lengths: list[int]
    """Number of documents of 2^i to 2^(i+1) - 1 tokens, their end included."""
    shortest_document: int
    longest_document: int
    index_sha256: str


class Shard(_Record):
    """A tar file, in index.json. offsets: first byte of each sample's tokens.

    checksums: CRC-32 of each sample's tokens and documents. name: that of a file beside the index, and no path.
    """

    name: str
    bytes: int = Field(ge=0, le=_MOST_SHARD_BYTES)
    sha256: str
    tokens: int
    documents: int
    offsets: Sequence[int]
    checksums: Sequence[int]

    @model_validator(mode="after")
    def _sane(self) -> Shard:
        if not plain_name(self.name):
            raise PydanticCustomError("name", "{name} is not a plain file name", {"name": repr(self.name)})
        try:
            places = array("q", [0, *self.offsets, self.bytes])
            sound = len(array("I", self.checksums)) == len(self.offsets) > 0
        except OverflowError:
            sound = False
        if not sound or (np.diff(np.frombuffer(places, dtype=np.int64)) < NPY_HEADER).any():
            raise PydanticCustomError("offsets", "offsets beyond the shard, out of order, or without checksums")
        return self


class Index(_Record):
    """Where everything stands: index.json."""

    shards: list[Shard]


REBUILD = "copy the folder again, or build it again with `llmscale data build --overwrite`"


def sample_key(sample: int) -> str:
    """The name of a sample in its tar, without the member's ending."""
    return f"{sample:09d}"


class SplitWriter:
    """Writes a split, document after document, into a folder that exists and is empty."""

    def __init__(self, folder: Path, dtype: str, end_of_document: int, sample_tokens: int, shard_samples: int) -> None:
        self._folder = folder
        self._end = np.array([end_of_document], dtype=dtype)
        self._sample = np.empty(sample_tokens, dtype=np.dtype(dtype).newbyteorder("<"))
        self._shard_samples = shard_samples
        self._used = 0
        self._starts: list[int] = []
        self._samples = 0
        self._shard: _Tar | None = None
        self._shards: list[Shard] = []
        self._lengths = [0] * _LENGTH_BINS
        self._shortest, self._longest = 0, 0
        self._document = 0
        self.documents = 0
        self.tokens = 0

    def add(self, tokens: Tokens, first: bool, last: bool) -> None:
        """Add a document, or the next piece of it; its end is written after the last piece."""
        if first:
            self._starts.append(self._used)
            self.documents += 1
        self._append(tokens)
        if last:
            self._append(self._end)
            self._lengths[self._document.bit_length() - 1] += 1
            self._shortest = min(self._shortest or self._document, self._document)
            self._longest = max(self._longest, self._document)
            self._document = 0

    def finish(self, tokenizer: bytes, vocab_size: int) -> Card:
        """Write what is left, the index, the tokenizer.json and, last, the card."""
        if self._used:
            self._flush()
        self._close_shard()
        lines = ",\n".join(shard.model_dump_json() for shard in self._shards)
        index = INDEX_HEAD + f"\n{lines}\n".encode() + INDEX_TAIL + b"\n"
        card = Card(
            tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
            vocab_size=vocab_size,
            end_of_document=int(self._end[0]),
            dtype="uint16" if self._end.dtype.itemsize == 2 else "uint32",
            sample_tokens=len(self._sample),
            shards=len(self._shards),
            samples=self._samples,
            documents=self.documents,
            tokens=self.tokens,
            bytes=sum(shard.bytes for shard in self._shards),
            document_lengths=self._lengths[: self._longest.bit_length()],
            shortest_document=self._shortest,
            longest_document=self._longest,
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        _write(self._folder / "tokenizer.json", tokenizer)
        _write(self._folder / "index.json", index)
        _write(self._folder / "card.json", (card.model_dump_json(indent=1) + "\n").encode())
        return card

    def abandon(self) -> None:
        """Let go of the open file, when the split will not be finished."""
        if self._shard:
            self._shard.close()

    def _append(self, tokens: Tokens) -> None:
        self._document += len(tokens)
        self.tokens += len(tokens)
        while len(tokens):
            if self._used == len(self._sample):
                self._flush()
            count = min(len(tokens), len(self._sample) - self._used)
            self._sample[self._used : self._used + count] = tokens[:count]
            self._used += count
            tokens = tokens[count:]

    def _flush(self) -> None:
        if self._shard is None:
            self._shard = _Tar(self._folder / f"shard-{len(self._shards):05d}.tar")
        # A document that is about to begin beyond the end belongs to the next sample.
        starts = [start for start in self._starts if start < self._used]
        self._shard.add(self._samples, self._sample[: self._used], np.array(starts, dtype="<u4"))
        self._samples += 1
        self._starts = [0] * (len(self._starts) - len(starts))
        self._used = 0
        if len(self._shard.offsets) == self._shard_samples:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard:
            self._shards.append(self._shard.finish())
            self._shard = None


class _Tar:
    """A tar file being written: ustar, no times, no owners, so that the same content is the same bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._bytes = self._tokens = self._documents = 0
        self.offsets: list[int] = []
        self._checksums: list[int] = []

    def add(self, sample: int, tokens: Tokens, documents: Tokens) -> None:
        self.offsets.append(self._member(f"{sample_key(sample)}.tokens.npy", tokens))
        self._member(f"{sample_key(sample)}.documents.npy", documents)
        self._checksums.append(checksum(tokens, documents))
        self._tokens += len(tokens)
        self._documents += len(documents)

    def finish(self) -> Shard:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return Shard(
            name=self._path.name,
            bytes=self._bytes,
            sha256=self._sha256.hexdigest(),
            tokens=self._tokens,
            documents=self._documents,
            offsets=self.offsets,
            checksums=self._checksums,
        )

    def close(self) -> None:
        self._file.close()

    def _member(self, name: str, array: Tokens) -> int:
        """Write a member; gives the offset of the array's first byte."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        info = tarfile.TarInfo(name)
        info.size = len(header.getvalue()) + array.nbytes
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + header.getvalue())
        offset = self._bytes
        self._write(array.tobytes())
        self._write(bytes(-info.size % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)


def checksum(tokens: Tokens, documents: Tokens) -> int:
    """CRC-32 of a sample's content."""
    return zlib.crc32(documents.tobytes(), zlib.crc32(tokens.tobytes()))


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def parse(kind: type[R], data: bytes, where: str, at: str = "") -> R:
    """A card, an index or a shard of one. at: its key in the file."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([at] * bool(at) + [str(part) for part in first["loc"]]) or "the whole file"
        raise DataError(f"{where}: {key}: {first['msg']}; {REBUILD}") from None

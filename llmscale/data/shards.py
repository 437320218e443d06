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

import base64
import hashlib
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from llmscale.data.durable import ArrayTar, partial, reopen, sync, write_whole
from llmscale.data.records import Record
from llmscale.data.store import plain_name

SAMPLE_TOKENS = 1 << 18
Tokens = npt.NDArray[np.unsignedinteger]
NPY_HEADER = 128
INDEX_HEAD, INDEX_TAIL = b'{"shards": [', b"]}"
_LENGTH_BINS = 40
_MOST_SHARD_BYTES = 1 << 42
_MOST_SAMPLE_TOKENS = 1 << 30


class Card(Record):
    """What a split is: card.json."""

    format: Literal["llmscale-tokens"]
    version: Literal[1]
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
    deduplication: Deduplication | None = None
    skipped_records: int = 0
    """That were no documents, when the dataset was built; of all splits together."""


class Deduplication(Record):
    """How duplicates were removed when a dataset was built, and how many; of all splits together."""

    method: Literal["exact", "near"]
    threshold: float | None = None
    """Estimated Jaccard similarity from which on two documents are near duplicates."""
    shingle_words: int | None = None
    permutations: int | None = None
    bands: int | None = None
    exact_removed: int = 0
    near_removed: int = 0


class Shard(Record):
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


class Index(Record):
    """Where everything stands: index.json."""

    shards: list[Shard]


REBUILD = "copy the folder again, or build it again with `llmscale data build --overwrite`"


def sample_key(sample: int) -> str:
    """The name of a sample in its tar, without the member's ending."""
    return f"{sample:09d}"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.tar"


class OpenShard(BaseModel):
    """What stands in a shard that is being written."""

    tokens: int = 0
    documents: int = 0
    offsets: list[int] = Field(default_factory=list)
    checksums: list[int] = Field(default_factory=list)


class WriterState(Record):
    """Where a SplitWriter is, between two calls of add, so that another one can go on there."""

    documents: int = 0
    tokens: int = 0
    samples: int = 0
    shards: int = 0
    bytes: int = 0
    """Of the finished shards."""
    index_bytes: int = 0
    """Of index.json, as far as the finished shards go."""
    lengths: list[int] = Field(default_factory=lambda: [0] * _LENGTH_BINS)
    shortest: int = 0
    longest: int = 0
    document: int = 0
    """Tokens of the document that is open."""
    starts: list[int] = Field(default_factory=list)
    open_sample: str = ""
    """Base64 of the tokens that are not in a shard yet."""
    open_bytes: int = 0
    """Of the shard that is not finished, where there is one."""
    open_shard: OpenShard = Field(default_factory=OpenShard)


class SplitWriter:
    """Writes a split, document after document, into a folder.

    A shard is SHARD.tar.partial while it is written, and is on disk when it gets its name; so is index.json. state:
    what `save` gave, to go on in the same folder; without it the folder is empty.
    """

    def __init__(
        self, folder: Path, dtype: str, end_of_document: int, sample_tokens: int, shard_samples: int,
        state: WriterState | None = None,
    ) -> None:  # fmt: skip
        state = state or WriterState()
        self._folder = folder
        self._end = np.array([end_of_document], dtype=dtype)
        self._sample = np.empty(sample_tokens, dtype=np.dtype(dtype).newbyteorder("<"))
        self._shard_samples = shard_samples
        left = np.frombuffer(base64.b64decode(state.open_sample), dtype=self._sample.dtype)
        self._sample[: len(left)] = left
        self._used = len(left)
        self._starts = list(state.starts)
        self._samples = state.samples
        self._lengths = list(state.lengths)
        self._shortest, self._longest = state.shortest, state.longest
        self._document = state.document
        self._bytes = state.bytes
        self.documents = state.documents
        self.tokens = state.tokens
        self.shards = state.shards
        """Finished ones."""
        self._tar: ArrayTar | None = None
        self._shard = state.open_shard.model_copy(deep=True)
        self._index = reopen(folder / "index.json", state.index_bytes)
        try:
            self._open_tar(state.open_bytes)
        except BaseException:
            self.abandon()
            raise

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

    def save(self) -> WriterState:
        """Bring everything onto the disk, and say where that is."""
        sync(self._index)
        if self._tar:
            self._tar.sync()
        return WriterState(
            documents=self.documents,
            tokens=self.tokens,
            samples=self._samples,
            shards=self.shards,
            bytes=self._bytes,
            index_bytes=self._index.tell(),
            lengths=self._lengths,
            shortest=self._shortest,
            longest=self._longest,
            document=self._document,
            starts=self._starts,
            open_sample=base64.b64encode(self._sample[: self._used].tobytes()).decode(),
            open_bytes=self._tar.bytes if self._tar else 0,
            open_shard=self._shard,
        )

    def finish(
        self, tokenizer: bytes, vocab_size: int, deduplication: Deduplication | None = None, skipped: int = 0
    ) -> Card:
        """Write what is left, the index, the tokenizer.json and, last, the card."""
        if self._used:
            self._flush()
        self._close_shard()
        self._index.write((b"" if self.shards else INDEX_HEAD + b"\n") + b"\n" + INDEX_TAIL + b"\n")
        sync(self._index)
        self._index.seek(0)
        index_sha256 = hashlib.file_digest(self._index, "sha256").hexdigest()
        self._index.close()
        card = Card(
            format="llmscale-tokens",
            version=1,
            tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
            vocab_size=vocab_size,
            end_of_document=int(self._end[0]),
            dtype="uint16" if self._end.dtype.itemsize == 2 else "uint32",
            sample_tokens=len(self._sample),
            shards=self.shards,
            samples=self._samples,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self._bytes,
            document_lengths=self._lengths[: self._longest.bit_length()],
            shortest_document=self._shortest,
            longest_document=self._longest,
            index_sha256=index_sha256,
            deduplication=deduplication,
            skipped_records=skipped,
        )
        write_whole(self._folder / "tokenizer.json", tokenizer)
        partial(self._folder / "index.json").replace(self._folder / "index.json")
        write_whole(self._folder / "card.json", (card.model_dump_json(indent=1) + "\n").encode())
        return card

    def abandon(self) -> None:
        """Let go of the open files, when the split will not be finished now."""
        self._index.close()
        if self._tar:
            self._tar.close()

    def _open_tar(self, kept: int) -> None:
        """Go on with the shard that was begun, if there is one, and remove those that come after it."""
        if kept:
            self._tar = ArrayTar(self._folder / shard_name(self.shards), kept)
        for path in self._folder.glob("shard-*.tar*"):
            number = int(path.name.split("-")[1].split(".")[0])
            if number > self.shards or (number == self.shards and not kept):
                path.unlink()

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
        if self._tar is None:
            self._tar = ArrayTar(self._folder / shard_name(self.shards))
            self._shard = OpenShard()
        # A document that is about to begin beyond the end belongs to the next sample.
        starts = [start for start in self._starts if start < self._used]
        tokens, documents = self._sample[: self._used], np.array(starts, dtype="<u4")
        key = sample_key(self._samples)
        self._shard.offsets.append(self._tar.member(f"{key}.tokens.npy", tokens))
        self._tar.member(f"{key}.documents.npy", documents)
        self._shard.checksums.append(checksum(tokens, documents))
        self._shard.tokens += len(tokens)
        self._shard.documents += len(documents)
        self._samples += 1
        self._starts = [0] * (len(self._starts) - len(starts))
        self._used = 0
        if len(self._shard.offsets) == self._shard_samples:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._tar:
            sha256 = self._tar.finish()
            shard = Shard(name=self._tar.path.name, bytes=self._tar.bytes, sha256=sha256, **self._shard.model_dump())
            self._index.write((b",\n" if self.shards else INDEX_HEAD + b"\n") + shard.model_dump_json().encode())
            self._bytes += shard.bytes
            self.shards += 1
            self._tar = None


def checksum(tokens: Tokens, documents: Tokens) -> int:
    """CRC-32 of a sample's content."""
    return zlib.crc32(documents.tobytes(), zlib.crc32(tokens.tobytes()))

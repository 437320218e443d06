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
import os
import tarfile
import zlib
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmscale.data.durable import ArrayTar, partial, reopen, sync, write_whole
from llmscale.errors import DataError

SAMPLE_TOKENS = 1 << 18
Tokens = npt.NDArray[np.unsignedinteger]
_LENGTH_BINS = 40
_INDEX_HEAD = b'{"shards": [\n'


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
    sample_tokens: int = Field(ge=1)
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


class Deduplication(_Record):
    """How duplicates were removed when a dataset was built, and how many; of all splits together."""

    method: Literal["exact", "near"]
    threshold: float | None = None
    """Estimated Jaccard similarity from which on two documents are near duplicates."""
    shingle_words: int | None = None
    permutations: int | None = None
    bands: int | None = None
    exact_removed: int = 0
    near_removed: int = 0


class Shard(_Record):
    """A tar file, in index.json. offsets: first byte of each sample's tokens.

    checksums: CRC-32 of each sample's tokens and documents.
    """

    name: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    offsets: list[int]
    checksums: list[int]


class Index(_Record):
    """Where everything stands: index.json."""

    shards: list[Shard]


class Split:
    """One split on disk: its card and index, read and checked against each other. The shards are not touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "card.json").is_file():
            raise DataError(_not_a_split(folder))
        self.card = _read(Card, folder / "card.json")
        index = folder / "index.json"
        self.shards = tuple(_read(Index, index, self.card.index_sha256).shards)
        samples = sum(len(shard.offsets) for shard in self.shards)
        if samples != self.card.samples or samples != -(-self.card.tokens // self.card.sample_tokens):
            raise DataError(f"{index}: {samples} samples, card.json says {self.card.samples}; {REBUILD}")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json beside the shards."""
        return self.folder / "tokenizer.json"

    def sample_length(self, sample: int) -> int:
        """Tokens of a sample."""
        return min(self.card.sample_tokens, self.card.tokens - sample * self.card.sample_tokens)

    def read_sample(self, shard: Shard, number: int, length: int) -> tuple[Tokens, Tokens]:
        """(tokens, documents) of a shard's number-th sample, read from where the index says that it stands."""
        dtype = np.dtype(self.card.dtype).newbyteorder("<")
        path = self.folder / shard.name
        try:
            with path.open("rb") as file:
                file.seek(shard.offsets[number])
                tokens = np.frombuffer(file.read(length * dtype.itemsize), dtype=dtype)
                file.seek(-file.tell() % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE, os.SEEK_CUR)
                return tokens, np.lib.format.read_array(file, allow_pickle=False)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {REBUILD}") from None
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: sample {number} of it is damaged ({error}); {REBUILD}") from None


REBUILD = "copy the folder again, or build it again with `llmscale data build --overwrite`"


def sample_key(sample: int) -> str:
    """The name of a sample in its tar, without the member's ending."""
    return f"{sample:09d}"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.tar"


def splits(folder: Path) -> list[Path]:
    """The splits of what a user named: a split itself, or a folder that holds some."""
    found = [folder] if (folder / "card.json").is_file() else sorted(card.parent for card in folder.glob("*/card.json"))
    if not found:
        raise DataError(_not_a_split(folder))
    return found


class OpenShard(BaseModel):
    """What stands in a shard that is being written."""

    tokens: int = 0
    documents: int = 0
    offsets: list[int] = Field(default_factory=list)
    checksums: list[int] = Field(default_factory=list)


class WriterState(_Record):
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

    def finish(self, tokenizer: bytes, vocab_size: int, deduplication: Deduplication | None = None) -> Card:
        """Write what is left, the index, the tokenizer.json and, last, the card."""
        if self._used:
            self._flush()
        self._close_shard()
        self._index.write(b"\n]}\n" if self.shards else _INDEX_HEAD + b"\n]}\n")
        sync(self._index)
        self._index.seek(0)
        index_sha256 = hashlib.file_digest(self._index, "sha256").hexdigest()
        self._index.close()
        card = Card(
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
            self._index.write((b",\n" if self.shards else _INDEX_HEAD) + shard.model_dump_json().encode())
            self._bytes += shard.bytes
            self.shards += 1
            self._tar = None


def checksum(tokens: Tokens, documents: Tokens) -> int:
    """CRC-32 of a sample's content."""
    return zlib.crc32(documents.tobytes(), zlib.crc32(tokens.tobytes()))


def _read(kind: type[R], path: Path, sha256: str | None = None) -> R:
    try:
        data = path.read_bytes()
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"{path}: not the one that card.json was written for (its checksum differs); {REBUILD}")
        return kind.model_validate_json(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {REBUILD}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise DataError(f"{path}: {where}: {first['msg']}; {REBUILD}") from None


def _not_a_split(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; build one with `llmscale data build`"
    inside = sorted(card.parent.name for card in folder.glob("*/card.json"))
    if inside:
        return f"{folder}: holds the splits {' and '.join(inside)}; name one of them, such as {folder / inside[-1]}"
    return f"{folder}: not a dataset, it has no card.json; build one with `llmscale data build`"

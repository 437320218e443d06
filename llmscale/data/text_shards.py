"""Raw-text webdataset shards, described once so that they can be tokenised while they stream (`text_source.py`).

    DIR/card.json        what it is: tokenizer fingerprint, vocabulary, number of logical streams, totals
    DIR/index.json       the shards, and the pieces that each is read in: byte offsets, documents, checksums
    DIR/tokenizer.json   the tokenizer to use

The shards stay where they are, and as they are: tars whose samples hold a text (.txt, or .json with a text key). A
piece is a run of whole samples of about PIECE_BYTES: the least that is read, checked and shuffled as one. A tar is read
once to find them; the index has about 70 bytes for each.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import Field

from llmscale.data.durable import write_whole
from llmscale.data.inputs import find
from llmscale.data.records import Record, read_record
from llmscale.data.tars import samples
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError, UsageError

TEXT_FORMAT = "llmscale-text"
PIECE_BYTES = 512 << 10
STREAMS = 64
_END = bytes(2 * tarfile.BLOCKSIZE)


class TextCard(Record):
    """What a description is: card.json."""

    format: Literal["llmscale-text"] = "llmscale-text"
    version: Literal[1] = 1
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1)
    end_of_document: int
    end_of_document_token: str
    dtype: Literal["uint16", "uint32"]
    text_key: str
    streams: int = Field(ge=1)
    shards: int
    pieces: int = Field(ge=1)
    documents: int
    bytes: int
    index_sha256: str


class Piece(Record):
    """A run of whole samples in a shard."""

    offset: int = Field(ge=0)
    bytes: int = Field(ge=1)
    documents: int
    checksum: int
    """CRC-32 of its bytes."""


class TextShard(Record):
    """A tar file. path: relative to the description's folder where it is given so."""

    path: str
    bytes: int
    pieces: list[Piece]


class TextIndex(Record):
    """Where everything stands: index.json."""

    shards: list[TextShard]


def is_text(folder: Path) -> bool:
    """Whether a folder says that it describes text."""
    try:
        card = json.loads((folder / "card.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and card.get("format") == TEXT_FORMAT


class TextSplit:
    """A description, read back. The shards are not touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = read_record(TextCard, folder / "card.json", DESCRIBE)
        self.shards = tuple(read_record(TextIndex, folder / "index.json", DESCRIBE, self.card.index_sha256).shards)
        self.pieces = tuple((shard, piece) for shard in self.shards for piece in shard.pieces)
        if len(self.pieces) != self.card.pieces:
            raise DataError(f"{folder}: {len(self.pieces)} pieces, card.json says {self.card.pieces}; {DESCRIBE}")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json to use."""
        return self.folder / "tokenizer.json"

    def path(self, shard: TextShard) -> Path:
        """Where a shard lies."""
        return self.folder / shard.path

    def texts(self, number: int) -> list[str]:
        """The documents of a piece, in the order of the tar. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: the shard is missing, has changed, or is damaged.
        """
        shard, piece = self.pieces[number]
        path = self.path(shard)
        try:
            with path.open("rb") as file:
                if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
                    raise DataError(f"{path}: has {size} bytes, had {shard.bytes} when it was described; {DESCRIBE}")
                file.seek(piece.offset)
                data = file.read(piece.bytes)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {DESCRIBE}") from None
        if zlib.crc32(data) != piece.checksum:
            place = f"the piece of {piece.bytes} bytes at {piece.offset}"
            raise DataError(f"{path}: {place} is not what was described (its checksum differs); {DESCRIBE}")
        return [
            one.data.decode("utf-8", "replace")
            for one in samples(str(path), io.BytesIO(data + _END), self.card.text_key)
        ]


DESCRIBE = "copy the file again, or describe the shards again with `llmscale data describe`"


def describe(
    inputs: Sequence[str],
    tokenizer: Path,
    output: Path,
    *,
    streams: int = STREAMS,
    text_key: str = "text",
    end_of_document: str | None = None,
    pattern: str | None = None,
    report: Callable[[int, int, int], None] = lambda done, total, documents: None,
) -> TextCard:
    """Write OUTPUT/card.json, index.json and tokenizer.json for the tars that the inputs name.

    streams: logical streams that the text is read in side by side; at most one a piece. Ranks share the work of
    tokenising where their number divides it. report: called with (bytes read, bytes in all, documents).

    Raises:
        UsageError: the output holds something else, or an input is no plain tar. DataError: a tar is damaged, or has a
        sample without text.
    """
    if streams < 1:
        raise UsageError(f"--streams {streams}: give at least 1")
    loaded = Tokenizer(tokenizer, end_of_document, pattern)
    paths = []
    for file in find(inputs, [".tar"]):
        if (path := file.path) is None:
            raise UsageError(
                f"--input {file.name}: text shards are read where they lie, on this machine; copy them here"
            )
        paths.append(path)
        if path.suffix != ".tar":
            raise UsageError(
                f"--input {path}: not a .tar file; a compressed one has to be unpacked to be read in pieces"
            )
    there = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    if foreign := [name for name in there if name not in ("card.json", "index.json", "tokenizer.json")]:
        raise UsageError(f"--output {output}: holds {foreign[0]!r}, which is no description; name another folder")
    total, done, documents = sum(path.stat().st_size for path in paths), 0, 0
    shards = []
    for path in paths:
        pieces = list(_pieces(path, text_key))
        done, documents = done + path.stat().st_size, documents + sum(piece.documents for piece in pieces)
        shards.append(TextShard(path=_relative(path, output), bytes=path.stat().st_size, pieces=pieces))
        report(done, total, documents)
    count = sum(len(shard.pieces) for shard in shards)
    if not documents:
        raise DataError(f"no document in {len(paths)} shard(s); give tars with .txt or .json samples")
    lines = ",\n".join(shard.model_dump_json() for shard in shards)
    index = f'{{"shards": [\n{lines}\n]}}\n'.encode()
    card = TextCard(
        tokenizer_sha256=loaded.sha256,
        vocab_size=loaded.vocab_size,
        end_of_document=loaded.end_of_document,
        end_of_document_token=loaded.end_of_document_token,
        dtype="uint16" if loaded.dtype == "uint16" else "uint32",
        text_key=text_key,
        streams=min(streams, count),
        shards=len(shards),
        pieces=count,
        documents=documents,
        bytes=total,
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "card.json").unlink(missing_ok=True)
        write_whole(output / "tokenizer.json", loaded.content)
        write_whole(output / "index.json", index)
        write_whole(output / "card.json", (card.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}; name another --output") from None
    return card


def _relative(path: Path, folder: Path) -> str:
    """The path from the folder, for shards beneath the folder's parent, which move along with it; else the whole."""
    whole, parent = path.resolve(), folder.resolve().parent
    return os.path.relpath(whole, folder.resolve()) if parent in whole.parents else str(whole)


def _pieces(path: Path, text_key: str) -> Iterator[Piece]:
    """Cut a tar between samples, as soon as PIECE_BYTES are together."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file, path.open("rb") as again:
            begin = end = documents = 0
            for sample in samples(str(path), file, text_key):
                documents, end = documents + 1, sample.end
                if end - begin >= PIECE_BYTES:
                    yield _piece(again, begin, end, documents)
                    begin, documents = end, 0
            if documents:
                yield _piece(again, begin, end, documents)
            if size < end + len(_END):
                raise DataError(f"{path}: ends without the two empty blocks of a whole tar; copy it again")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _piece(file: BinaryIO, begin: int, end: int, documents: int) -> Piece:
    file.seek(begin)
    checksum, left = 0, end - begin
    while left and (data := file.read(min(left, 1 << 20))):
        checksum, left = zlib.crc32(data, checksum), left - len(data)
    return Piece(offset=begin, bytes=end - begin, documents=documents, checksum=checksum)

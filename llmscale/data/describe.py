"""Describing raw-text webdataset shards: reads each tar once, and writes the pieces that it is read in later.

What a description is: `text_shards.py`.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from llmscale.data.durable import write_whole
from llmscale.data.inputs import InputFile, find
from llmscale.data.tars import END_OF_TAR, samples
from llmscale.data.text_shards import TEXT_FORMAT, Piece, TextCard, TextShard
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError, UsageError

PIECE_BYTES = 512 << 10
STREAMS = 64


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
    files = find(inputs, [".tar"])
    for file in files:
        if not file.file_name.endswith(".tar"):
            raise UsageError(
                f"--input {file.name}: not a .tar file; a compressed one has to be unpacked to be read in pieces"
            )
    there = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    if foreign := [name for name in there if name not in ("card.json", "index.json", "tokenizer.json")]:
        raise UsageError(f"--output {output}: holds {foreign[0]!r}, which is no description; name another folder")
    total, done, documents = sum(file.size for file in files), 0, 0
    shards = []
    for file in files:
        shard = _shard(file, text_key, output)
        done, documents = done + shard.bytes, documents + sum(piece.documents for piece in shard.pieces)
        shards.append(shard)
        report(done, max(total, done), documents)
    count = sum(len(shard.pieces) for shard in shards)
    if not documents:
        raise DataError(f"no document in {len(files)} shard(s); give tars with .txt or .json samples")
    lines = ",\n".join(shard.model_dump_json() for shard in shards)
    index = f'{{"shards": [\n{lines}\n]}}\n'.encode()
    card = TextCard(
        format=TEXT_FORMAT,
        version=1,
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
        bytes=done,
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


def _shard(about: InputFile, text_key: str, folder: Path) -> TextShard:
    """Cut a tar between samples, as soon as PIECE_BYTES are together."""
    pieces: list[Piece] = []
    documents = end = 0
    try:
        with about.open() as file:
            reader = _Reader(file)
            for sample in samples(about.name, cast(BinaryIO, reader), text_key):
                documents, end = documents + 1, sample.end
                if end - reader.begin >= PIECE_BYTES:
                    pieces.append(reader.piece(end, documents))
                    documents = 0
            if documents:
                pieces.append(reader.piece(end, documents))
            size = reader.size()
    except OSError as error:
        raise DataError(f"{about.name}: cannot be read: {error.strerror or error}") from None
    if size < end + len(END_OF_TAR):
        raise DataError(f"{about.name}: ends without the two empty blocks of a whole tar; copy it again")
    path = about.name if about.path is None else _relative(about.path, folder)
    return TextShard(path=path, bytes=size, pieces=pieces)


class _Reader:
    """A file that is read once, from front to back, and kept until its checksum is known."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._kept = bytearray()
        self.begin = 0
        """Where what is kept begins."""

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = self._file.read(size)
        self._kept += data
        return data

    def piece(self, end: int, documents: int) -> Piece:
        """What lies before `end`, which is kept no longer."""
        length = end - self.begin
        with memoryview(self._kept) as kept:
            checksum = zlib.crc32(kept[:length])
        del self._kept[:length]
        found = Piece(offset=self.begin, bytes=length, documents=documents, checksum=checksum)
        self.begin = end
        return found

    def size(self) -> int:
        """Bytes of the file, which is read to its end."""
        size = self.begin + len(self._kept)
        while data := self._file.read(1 << 20):
            size += len(data)
        return size

"""From files to documents, in pieces, whatever the files are.

    .jsonl .ndjson      a line is a document: the value of --text-key
    .json               the same, where its first line is an object with --text-key (C4, Dolma); else the file is one
    .parquet            a row is a document: the column --text-key
    .tar                a webdataset shard: a sample is a document, its .txt, or its .json with --text-key
    anything else       the file is a document

Each may be compressed as a whole, .gz or .zst (a .parquet is inside); endings count in any case. Files are streamed:
a file of any size needs little memory. A document longer than PIECE_BYTES is handed on in pieces (the tokenizer takes
about 200 bytes a byte of text: 2 GB for one string of 12 MB). Pieces are cut at a line break between two non-blank
characters where there is one, the second no slash, which o200k keeps with a line break: there byte-level BPE cuts as
well, so the tokens are the same as without the cut.

Left out, counted and named: text files that hold a NUL byte in their first 8 KiB (binary). Bytes that are not UTF-8
become U+FFFD. A byte order mark at the beginning of a document is no part of it.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal, cast

from pydantic import BaseModel, ConfigDict

from llmscale.data.inputs import InputFile, unreadable
from llmscale.data.tars import MOST_BYTES, every_sample
from llmscale.errors import DataError, UsageError, shown

PIECE_BYTES = 1 << 20
_PROBE_BYTES = 8192
_NAMED = 5
_ROWS = 256
_ROWS_BYTES = 16 << 20
"""Of a parquet file, in memory at a time: so many rows, fewer where they are long (by the mean of their row group)."""
EXTRA = "pip install 'llmscale[data]'"


@dataclass(frozen=True)
class Part:
    """Bytes as they stand in a file: a text file or a piece of it, or a line of a .jsonl file.

    A bad one has a message in their place, about a record that is no document.
    """

    where: str
    """For messages: the file, and the line in a .jsonl file."""
    kind: Literal["text", "json", "bad"]
    data: bytes
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Piece:
    """A document's text, or a piece of it. replaced: how many bad characters became U+FFFD."""

    text: str
    data: bytes
    first: bool
    last: bool
    replaced: int


class BadRecord(DataError):
    """A line of JSON or a sample of a tar that is no document; those after it may be."""


class Seen(BaseModel):
    """What there was among the files that the user may not expect."""

    model_config = ConfigDict(frozen=True)

    binary_files: int = 0
    binary_names: tuple[str, ...] = ()
    """Of the first few."""
    json_of_lines: int = 0
    """.json files that were read a line at a time."""
    json_as_text: int = 0
    """.json files that were read as text, each one document."""
    links: int = 0
    """Links to folders, and links to nothing, that were not followed inside folders."""
    link_names: tuple[str, ...] = ()
    """Of the first few."""

    def and_binary(self, name: str) -> Seen:
        """With one more binary file."""
        names = (*self.binary_names, name)[:_NAMED]
        return self.model_copy(update={"binary_files": self.binary_files + 1, "binary_names": names})

    def and_links(self, names: Sequence[str]) -> Seen:
        """With these links."""
        return self.model_copy(update={"links": len(names), "link_names": tuple(map(shown, names[:_NAMED]))})

    def and_json(self, of_lines: bool) -> Seen:
        """With one more .json file."""
        kind = "json_of_lines" if of_lines else "json_as_text"
        return self.model_copy(update={kind: getattr(self, kind) + 1})


class Reader:
    """Reads the parts of all files in order, and counts as it goes, from `seen` on."""

    def __init__(self, files: Sequence[InputFile], text_key: str = "text", seen: Seen | None = None) -> None:
        self.files = tuple(files)
        self.total_bytes = sum(file.size for file in self.files)
        self.bytes_read = 0
        """Of the files as they lie there, compressed or not."""
        self.seen = seen or Seen()
        self._text_key = text_key

    def __iter__(self) -> Iterator[Part]:
        done = 0
        for about in self.files:
            with about.open() as file:
                try:
                    for part in self._parts(about, file):
                        self.bytes_read = done + min(file.tell(), about.size or file.tell())
                        yield part
                except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
                    raise unreadable(about.name, error) from None
            done += about.size
            self.bytes_read = done

    def _parts(self, about: InputFile, file: BinaryIO) -> Iterator[Part]:
        name, file = _decompressed(about.file_name.lower(), file)
        if name.endswith(".json"):
            head = file.readline(MOST_BYTES + 1)
            file = cast(BinaryIO, _Again(head, file))
            of_lines = _holds_text(head, self._text_key)
            self.seen = self.seen.and_json(of_lines)
            name += "l" * of_lines
        if name.endswith((".jsonl", ".ndjson")):
            return _lines(about.shown, file)
        if name.endswith(".parquet"):
            return _rows(about.shown, file, self._text_key)
        if name.endswith((".tar", ".tgz")):
            return _tar(about.shown, file, self._text_key)
        return self._text(about.shown, file)

    def _text(self, name: str, file: BinaryIO) -> Iterator[Part]:
        first = True
        for data, last in _pieces(file):
            if first and b"\0" in data[:_PROBE_BYTES]:
                self.seen = self.seen.and_binary(name)
                return
            yield Part(name, "text", data, first, last)
            first = False


def _decompressed(name: str, file: BinaryIO) -> tuple[str, BinaryIO]:
    """The name without a compression's ending, and the file's content."""
    if name.endswith((".gz", ".tgz", ".zst")) and not cast(io.BufferedReader, file).peek(1):
        raise EOFError("the file is empty, and no compressed one is")
    if name.endswith((".gz", ".tgz")):
        return name.removesuffix(".gz"), cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if name.endswith(".zst"):
        # Not with the package zstandard: its reader takes a file that is cut short for a whole one.
        arrow = _arrow(name)
        stream = arrow.CompressedInputStream(arrow.PythonFile(file, "r"), "zstd")
        return name.removesuffix(".zst"), io.BufferedReader(stream, 1 << 20)
    return name, file


class _Again(io.BufferedIOBase):
    """A file whose first line was read already, from its beginning."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head = io.BytesIO(head)
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._head.read(size)
        return data + self._file.read(-1 if size is None or size < 0 else size - len(data))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._head.readline(size) or self._file.readline(-1 if size is None else size)


def _holds_text(line: bytes, key: str) -> bool:
    """Whether a line is an object that has a text, or none, under a key: the first of a file of such lines."""
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.startswith(b"{"):
        return False
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get(key, 0), str | None)


def _arrow(name: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UsageError(f"--input {shown(name)}: this format needs the package pyarrow; {EXTRA}") from None
    return pyarrow


def _lines(name: str, file: BinaryIO) -> Iterator[Part]:
    for number, line in enumerate(iter(partial(file.readline, MOST_BYTES + 1), b""), 1):
        if len(line) > MOST_BYTES:
            raise DataError(f"{name}:{number}: a line of over {MOST_BYTES} bytes; is this a .jsonl file?")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # of the file, whose lines are no documents yet
        if line.strip():
            yield Part(f"{name}:{number}", "json", line)


def _rows(name: str, file: BinaryIO, text_key: str) -> Iterator[Part]:
    arrow = _arrow(name)
    from pyarrow import parquet

    try:
        # So buffered, a row group is read a page at a time: groups of 116 MiB in 44 MiB, not in 150.
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        columns = table.schema_arrow
        if text_key not in columns.names:
            there = ", ".join(columns.names[:10])
            raise DataError(
                f"{name}: no column {text_key!r}, there is {there}; name the one of the text with --text-key"
            )
        kind = columns.field(text_key).type
        if arrow.types.is_dictionary(kind):
            kind = kind.value_type
        if kind not in (arrow.string(), arrow.large_string(), arrow.string_view()):
            raise DataError(f"{name}: the column {text_key!r} holds {kind}, not text; name another with --text-key")
        number = 0
        for group in range(table.num_row_groups):
            rows = _rows_at_once(table.metadata.row_group(group), text_key)
            for batch in table.iter_batches(batch_size=rows, columns=[text_key], row_groups=[group]):
                # Strings need not be UTF-8, whatever the file says; bytes are what a text file has too.
                for value in batch.column(0).cast(kind).cast(arrow.large_binary()):
                    number += 1
                    yield from _whole(f"{name}: row {number}", value.as_py() or b"")
    except arrow.ArrowException as error:
        raise DataError(f"{name}: not a sound parquet file ({error}); mend it or leave it out of --input") from None


def _rows_at_once(group: Any, text_key: str) -> int:
    """How many rows of a row group are held in memory at a time."""
    columns = (group.column(number) for number in range(group.num_columns))
    size = sum(int(column.total_uncompressed_size) for column in columns if column.path_in_schema == text_key)
    return max(1, min(_ROWS, _ROWS_BYTES * int(group.num_rows) // max(size, 1)))


def _tar(name: str, file: BinaryIO, text_key: str) -> Iterator[Part]:
    for sample in every_sample(name, file, text_key):
        where = f"{name}: sample {sample.key}"
        yield from [Part(where, "bad", sample.problem.encode())] if sample.problem else _whole(where, sample.data)


def _whole(where: str, data: bytes) -> Iterator[Part]:
    """A document that is in memory already, in pieces."""
    first = True
    for block, last in _pieces(io.BytesIO(data)):
        yield Part(where, "text", block, first, last)
        first = False


def pieces(part: Part, text_key: str) -> Iterator[Piece]:
    """The text of a part. text_key: which value of a JSON object holds the document.

    Raises:
        BadRecord: before anything is given.
    """
    if part.kind == "bad":
        raise BadRecord(part.data.decode())
    if part.kind == "text":
        text = _decoded(part.data, part.first)
        replaced = text.count("\ufffd") - part.data.count(b"\xef\xbf\xbd")
        yield Piece(text, part.data, part.first, part.last, replaced)
        return
    data, replaced = _json_text(part, text_key)
    first = True
    for block, last in _pieces(io.BytesIO(data)):
        yield Piece(_decoded(block, first), block, first, last, replaced if first else 0)
        first = False


def texts(data: bytes) -> Iterator[tuple[str, bool]]:
    """A document in pieces: (text, whether it goes on from the one before). Bytes that are not UTF-8 become U+FFFD."""
    continues = False
    for block, _ in _pieces(io.BytesIO(data)):
        yield _decoded(block, not continues), continues
        continues = True


def _decoded(data: bytes, first: bool) -> str:
    """A document's piece as text. first: its first one."""
    text = data.decode("utf-8", errors="replace")
    return text.removeprefix("\ufeff") if first else text


def _json_text(part: Part, key: str) -> tuple[bytes, int]:
    """The document of a line as UTF-8, and how many characters had to be replaced."""
    line = part.data.decode("utf-8", errors="replace")
    replaced = line.count("\ufffd") - part.data.count(b"\xef\xbf\xbd")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{part.where}: not a line of JSON ({error}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise BadRecord(f"{part.where}: a JSON object is wanted, not {type(row).__name__}; mend or remove the line")
    if key not in row:
        there = ", ".join(sorted(row)[:10]) or "nothing"
        raise BadRecord(f"{part.where}: no key {key!r}, there is {there}; name the key of the text with --text-key")
    if (text := row[key]) is None:  # as in parquet: a document without text
        return b"", replaced
    if not isinstance(text, str):
        raise BadRecord(
            f"{part.where}: {key!r} is not a string but {type(text).__name__}; name another with --text-key"
        )
    try:
        return text.encode(), replaced
    except UnicodeEncodeError:  # JSON may escape half a surrogate pair, which no UTF-8 can hold
        whole = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
        return whole.encode(), replaced + whole.count("\ufffd") - text.count("\ufffd")


def _pieces(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """A file in blocks of at most PIECE_BYTES, each with whether it is the last; an empty file is one empty block."""
    block = b""
    while len(block := block + file.read(PIECE_BYTES + 1 - len(block))) > PIECE_BYTES:
        at = _cut(block)
        yield block[:at], False
        block = block[at:]
    yield block, True


def _cut(block: bytes) -> int:
    """Where to cut: after the last line break between non-blank characters, else between two characters."""
    at = PIECE_BYTES
    while (at := block.rfind(b"\n", PIECE_BYTES // 2, at)) > 0:
        before = block[at - 4 : at].decode("utf-8", "ignore")[-1:]
        after = block[at + 1 : at + 5].decode("utf-8", "ignore")[:1]
        if after and not (before.isspace() or after.isspace() or after == "/"):
            return at + 1
    for at in range(PIECE_BYTES, PIECE_BYTES - 4, -1):
        if block[at] & 0xC0 != 0x80:  # not in the middle of a UTF-8 character
            return at
    return PIECE_BYTES

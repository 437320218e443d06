"""From paths to documents: which files are read, in which order, and in pieces of what size.

One document is a whole text file or one line of a .jsonl file. The order is that of the inputs as given, sorted by
path inside a folder or glob, and each file counts once. A document longer than PIECE_BYTES is handed on in pieces, so
that a file of any size needs little memory (the tokenizer takes about 200 bytes a byte of text: 2 GB for one string
of 12 MB). Pieces are cut at a line break between two non-blank characters where there is one: there byte-level BPE
cuts as well, so the tokens are the same as without the cut.

Left out, and counted: files that hold a NUL byte in their first 8 KiB (binary). Bytes that are not UTF-8 become
U+FFFD."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from llmscale.errors import DataError, UsageError

PIECE_BYTES = 1 << 20
_PROBE_BYTES = 8192


@dataclass(frozen=True)
class Part:
    """Bytes as they stand in a file: a text file or a piece of it, or a line of a .jsonl file."""

    where: str
    """For messages: the file, and the line in a .jsonl file."""
    kind: Literal["text", "json"]
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


class Reader:
    """Reads the parts of all files in order, and counts as it goes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        try:
            self.total_bytes = sum(path.stat().st_size for path in self.paths)
        except OSError as error:
            raise _unreadable(Path(error.filename), error) from None
        self.bytes_read = 0
        self.binary_files = 0

    def __iter__(self) -> Iterator[Part]:
        done = 0
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    for part in self._lines(path, file) if _is_jsonl(path) else self._text(path, file):
                        self.bytes_read = done + file.tell()
                        yield part
                    done += file.tell()
            except (OSError, EOFError, zlib.error) as error:
                raise _unreadable(path, error) from None

    def _text(self, path: Path, file: BinaryIO) -> Iterator[Part]:
        first = True
        for data, last in _pieces(file):
            if first and b"\0" in data[:_PROBE_BYTES]:
                self.binary_files += 1
                return
            yield Part(str(path), "text", data, first, last)
            first = False

    def _lines(self, path: Path, file: BinaryIO) -> Iterator[Part]:
        lines = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Part(f"{path}:{number}", "json", line)


def find(inputs: Sequence[str], suffixes: Sequence[str] = ()) -> list[Path]:
    """The files that paths, globs and folders name.

    suffixes: keep only these from folders; hidden files and folders, and __pycache__, are left out there.
    """
    found: dict[Path, Path] = {}
    for name in inputs:
        matches = [name] if os.path.exists(name) else sorted(filter(os.path.exists, glob.glob(name, recursive=True)))
        files = [file for match in matches for file in _files(Path(match), suffixes)]
        if not files:
            ending = f" with suffix {', '.join(suffixes)}" if suffixes and matches else ""
            what = f"holds no file{ending}" if matches else "matches no file"
            raise UsageError(f"--input {name}: {what}; give existing files, folders or quoted globs")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def pieces(part: Part, text_key: str) -> Iterator[Piece]:
    """The text of a part. text_key: which value of a JSON object holds the document."""
    if part.kind == "text":
        text = part.data.decode("utf-8", errors="replace")
        replaced = text.count("\ufffd") - part.data.count(b"\xef\xbf\xbd")
        yield Piece(text, part.data, part.first, part.last, replaced)
        return
    data, replaced = _json_text(part, text_key)
    first = True
    for block, last in _pieces(io.BytesIO(data)):
        yield Piece(block.decode("utf-8"), block, first, last, replaced if first else 0)
        first = False


def _json_text(part: Part, key: str) -> tuple[bytes, int]:
    """The document of a line as UTF-8, and how many characters had to be replaced."""
    line = part.data.decode("utf-8", errors="replace")
    replaced = line.count("\ufffd") - part.data.count(b"\xef\xbf\xbd")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{part.where}: not a line of JSON ({error}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{part.where}: a JSON object is wanted, not {type(row).__name__}; mend or remove the line")
    if key not in row:
        there = ", ".join(sorted(row)[:10]) or "nothing"
        raise DataError(f"{part.where}: no key {key!r}, there is {there}; name the key of the text with --text-key")
    if not isinstance(text := row[key], str):
        raise DataError(
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
        if not (block[at - 1 : at].isspace() or block[at + 1 : at + 2].isspace()):
            return at + 1
    for at in range(PIECE_BYTES, PIECE_BYTES - 4, -1):
        if block[at] & 0xC0 != 0x80:  # not in the middle of a UTF-8 character
            return at
    return PIECE_BYTES


def _files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = []
    for folder, folders, names in os.walk(path, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        kept = (name for name in names if not name.startswith(".") and (not suffixes or name.endswith(tuple(suffixes))))
        found += [file for name in kept if (file := Path(folder, name)).is_file()]
    return sorted(found)


def _is_jsonl(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _refuse(error: OSError) -> None:
    raise _unreadable(Path(error.filename), error)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(f"{path}: cannot be read: {reason}; mend the file or leave it out of --input")

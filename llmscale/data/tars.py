"""The samples of a webdataset shard that holds text: members that follow on each other and share a key.

A sample's text is its .txt, else the value of a key in its .json, whichever comes first; other members are passed over.
The tar is read from front to back, once. Links, names that leave their folder and sizes that no text has are refused.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Self

from llmscale.errors import DataError

END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
MOST_BYTES = 1 << 30
"""The longest document that is taken: a tar header may claim any size."""
_MOST_HEADER_BYTES = 1 << 20
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """data: the text in UTF-8, as good as it was. end: where in the tar the sample's last member ends.

    problem: why it has no text, where it has none.
    """

    key: str
    data: bytes
    end: int
    problem: str = ""


class _Header(tarfile.TarInfo):
    """A member's header. The library takes a damaged one, and the end of a file, for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.count(b"\0") == tarfile.BLOCKSIZE:  # the end of a tar
                raise
            raise tarfile.ReadError(str(error)) from None
        if header.type in _LONG_HEADERS and header.size > _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def samples(name: str, file: BinaryIO, text_key: str) -> Iterator[Sample]:
    """The samples of a tar, named so in messages.

    Raises:
        DataError: it is damaged, has members that no honest shard has, or a sample without text.
    """
    for sample in every_sample(name, file, text_key):
        if sample.problem:
            raise DataError(sample.problem)
        yield sample


def every_sample(name: str, file: BinaryIO, text_key: str) -> Iterator[Sample]:
    """The samples of a tar, those without text too.

    Raises:
        DataError: it is damaged, or has members that no honest shard has.
    """
    key: str | None = None
    data: bytes | None = None
    problem = ""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=1 << 18, tarinfo=_Header) as tar:
            for member in tar:
                if member.isdir():
                    continue
                _refuse(name, member)
                folder, _, own = member.name.removeprefix("./").rpartition("/")
                stem, _, ending = own.partition(".")
                here = f"{folder}/{stem}" if folder else stem
                if key is not None and here != key:
                    yield _sample(name, key, data, end, problem)
                    data, problem = None, ""
                key = here
                found, wrong = _text(name, tar, member, ending.lower(), text_key)
                problem = problem or wrong
                if found is not None and (not data or (found and ending.lower() == "txt")):
                    data = found
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, EOFError) as error:
        place = f" near {key!r}" if key is not None else ""
        raise DataError(f"{name}: not a whole tar file ({error}{place}); copy it again") from None
    if key is not None:
        yield _sample(name, key, data, end, problem)


def _sample(name: str, key: str, data: bytes | None, end: int, problem: str) -> Sample:
    if data is None:
        problem = problem or f"{name}: sample {key!r} has no .txt and no .json with the text; see --text-key"
    return Sample(key, data or b"", end, problem)


def _refuse(name: str, member: tarfile.TarInfo) -> None:
    """Members that no honest shard has."""
    if not member.isfile():
        raise DataError(f"{name}: member {member.name!r} is a link or a device; a shard holds files only")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{name}: member {member.name!r} leaves its folder; pack the shard again")
    if member.size > MOST_BYTES:
        raise DataError(
            f"{name}: member {member.name!r} says it has {member.size} bytes; at most {MOST_BYTES} are taken"
        )


def _text(
    name: str, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, text_key: str
) -> tuple[bytes | None, str]:
    """The text that a member holds, if that is what it is for; and what is wrong with it."""
    if ending not in ("txt", "json"):
        return None, ""
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise DataError(f"{name}: member {member.name!r} is cut short; copy the shard again")
    if ending == "txt":
        return data, ""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        return None, f"{name}: member {member.name!r} is not JSON ({error}); mend or remove it"
    text = found.get(text_key, 0) if isinstance(found, dict) else None
    if isinstance(found, dict) and text is None:
        return b"", ""  # null: a document without text
    # JSON may escape half a surrogate pair, which no UTF-8 can hold.
    return text.encode("utf-8", "replace") if isinstance(text, str) else None, ""

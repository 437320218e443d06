"""The small JSON files of a dataset: typed, and checked when they are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmscale.errors import DataError


class Record(BaseModel):
    """What such a file holds, or a part of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")


R = TypeVar("R", bound=Record)


def read_record(kind: type[R], path: Path, fix: str, sha256: str | None = None) -> R:
    """Read a file. fix: what to do where it is broken. sha256: what its bytes must give.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {fix}") from None
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path}: not the one that card.json was written for (its checksum differs); {fix}")
    return parse(kind, data, str(path), fix)


def parse(kind: type[R], data: bytes, where: str, fix: str, at: str = "") -> R:
    """What such a file holds, or a part of it. at: its key in the file.

    Raises:
        DataError: it is something else.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([at] * bool(at) + [str(part) for part in first["loc"]]) or "the whole file"
        raise DataError(f"{where}: {key}: {first['msg']}; {fix}") from None

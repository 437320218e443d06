"""What a build needs to go on after a kill: journal.json in the folder where it works, written anew at each shard.

The file is replaced whole, after everything that it speaks of is on disk; what a killed build wrote later is cut off.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from llmscale.data.durable import sync_folder, write_whole
from llmscale.data.encode import Position
from llmscale.data.shards import WriterState
from llmscale.errors import DataError, UsageError

DATASET = "dataset"
"""Folder of the splits, within the one where the build works."""
_NAME = "journal.json"


class Journal(BaseModel):
    """The state of a build between two jobs."""

    version: Literal[1] = 1
    options: dict[str, str]
    """What must be given again: option -> value."""
    position: Position = Position()
    split: str = ""
    """Where the document that is open goes."""
    empty: int = 0
    replaced: int = 0
    exact_removed: int = 0
    near_removed: int = 0
    kept: int = 0
    """Documents that the deduplication remembers."""
    writers: dict[str, WriterState] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Replace the journal in a folder, once the names of the files beside it are on disk."""
        for split in self.writers:
            sync_folder(folder / DATASET / split)
        write_whole(folder / _NAME, self.model_dump_json().encode())
        sync_folder(folder)


def load(folder: Path, options: dict[str, str]) -> Journal | None:
    """The journal of an unfinished build, if there is one.

    Raises:
        UsageError: it was begun with other options. DataError: the journal is broken.
    """
    path = folder / _NAME
    if not path.is_file():
        return None
    if not (folder / DATASET).is_dir():  # killed after the dataset had left for its place
        drop(folder)
        return None
    try:
        journal = Journal.model_validate_json(path.read_bytes())
    except ValidationError:
        raise DataError(f"{path}: damaged, or of another version; drop that unfinished build with --restart") from None
    for name, value in journal.options.items():
        if (now := options.get(name)) != value:
            raise UsageError(
                f"{folder}: an unfinished build with {name} {value} is there, and now {name} is {now}; "
                "give the same to go on, or drop it with --restart"
            )
    return journal


@contextmanager
def held(folder: Path, output: str) -> Iterator[None]:
    """Make sure that no other build works in this folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output {output}: another build is writing it; wait for it or name another") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def drop(folder: Path) -> None:
    """Remove an unfinished build: the journal first, for without the rest it is none."""
    (folder / _NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

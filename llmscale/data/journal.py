"""What a build needs to go on after a kill: journal.json in the folder where it works, written anew at each shard.

The file is replaced whole, after everything that it speaks of is on disk; what a killed build wrote later is cut off.
It is there before anything else is, and goes last: a folder without it is no build's, and is left alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from llmscale.data.durable import sync_folder, temporary, write_whole
from llmscale.data.encode import Position
from llmscale.data.shards import WriterState
from llmscale.errors import DataError, UsageError, shown

DATASET = "dataset"
"""Folder of the splits, within the one where the build works."""
KEPT = "documents.kept"
"""File of the documents that the deduplication remembers, beside it."""
_NAME = "journal.json"
_DROPPED = "dropped"


class Journal(BaseModel):
    """The state of a build between two jobs."""

    version: Literal[2] = 2
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
    skipped: int = 0
    """Records that were passed over."""
    skipped_bytes: int = 0
    """Of the report on them."""
    writers: dict[str, WriterState] = Field(default_factory=dict)

    @property
    def documents(self) -> int:
        """Documents that are written."""
        return sum(writer.documents for writer in self.writers.values())

    def save(self, folder: Path) -> None:
        """Replace the journal in a folder, once the names of the files beside it are on disk."""
        for split in self.writers:
            sync_folder(folder / DATASET / split)
        write_whole(folder / _NAME, self.model_dump_json().encode())
        sync_folder(folder)


def begin(folder: Path, options: dict[str, str]) -> Journal:
    """The journal of a new build, in a folder that gets nothing else before."""
    journal = Journal(options=options)
    folder.mkdir(parents=True, exist_ok=True)
    journal.save(folder)
    return journal


def load(folder: Path, options: dict[str, str]) -> Journal | None:
    """The journal of an unfinished build, if there is one.

    Raises:
        UsageError: it was begun with other options, or no build made the folder. DataError: the journal is broken.
    """
    path = folder / _NAME
    if not (folder / DATASET).is_dir():  # killed before there was anything, or after the dataset had left for its place
        drop(folder)
        return None
    check_own(folder)
    try:
        journal = Journal.model_validate_json(path.read_bytes())
    except ValidationError:
        raise DataError(
            f"{shown(path)}: damaged, or of another version; drop that unfinished build with --restart"
        ) from None
    for name, value in journal.options.items():
        if (now := options.get(name)) != value:
            raise UsageError(
                f"{shown(folder)}: an unfinished build with {name} {value} is there, and now {name} is {now}; "
                "give the same to go on, or drop it with --restart"
            )
    return journal


def check_own(folder: Path) -> None:
    """Make sure that a build made this folder, if it is there.

    Raises:
        UsageError: it holds something else.
    """
    if not os.path.lexists(folder):
        return
    there = sorted(os.listdir(folder)) if folder.is_dir() and not folder.is_symlink() else []
    own = _NAME in there or there == [temporary(folder / _NAME).name]
    if not own and (there or not folder.is_dir()):
        raise UsageError(
            f"{shown(folder)}: builds work there, and no build made it; move it away, or name another place"
        )


@contextmanager
def held(folder: Path, output: str) -> Iterator[None]:
    """Make sure that no other build works in this folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.llmscale-lock")
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except BlockingIOError:
            same = False
        if not same:  # held, or just let go by a build that has removed the file
            raise UsageError(f"--output {shown(output)}: another build is writing it; wait for it or name another")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def drop(folder: Path) -> None:
    """Remove an unfinished build, and nothing else that lies in the folder: the dataset first, the journal last.

    Raises:
        UsageError: no build made the folder.
    """
    check_own(folder)
    if (folder / DATASET).is_dir():
        shutil.rmtree(folder / _DROPPED, ignore_errors=True)
        (folder / DATASET).rename(folder / _DROPPED)
    shutil.rmtree(folder / _DROPPED, ignore_errors=True)
    for path in (folder / KEPT, temporary(folder / _NAME), folder / _NAME):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # something else lies there
        folder.rmdir()

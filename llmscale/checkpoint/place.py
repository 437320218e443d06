"""Where checkpoints lie: a folder, or any fsspec URL, which universal_pathlib makes look like one.

A store has no rename: there the manifest is written last, and removed first, so that a step without one is not whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, cast

from llmscale.errors import CheckpointError, LlmscaleError, UsageError

ABANDONED = "abandoned_"


def place_of(text: str | Path) -> Path:
    """A path, or what a URL names, which has the same methods. Raises UsageError where a package is missing."""
    if "://" not in str(text):
        return Path(text)
    if str(text).startswith("file://"):
        return Path(str(text).removeprefix("file://"))
    try:
        from upath import UPath

        place = UPath(str(text).rstrip("/"))
        _ = place.fs
    except (ImportError, ValueError) as error:
        raise UsageError(f"{text}: cannot be reached: {error}; install the package, or name a folder") from None
    return cast(Path, place)


def is_remote(place: Path) -> bool:
    """Whether it is in a store."""
    return hasattr(place, "fs")


@contextmanager
def reading(place: Path, done: str = "read") -> Iterator[None]:
    """What keeps a place from being read is no damage to what lies there; what is missing, or no such file, may be.

    done: what was to be done with it.

    Raises:
        CheckpointError: it cannot be reached now. FileNotFoundError and ValueError pass through.
    """
    # The packages of stores have errors of their own, with no class in common.
    trouble = Exception if is_remote(place) else OSError
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ValueError, LlmscaleError):
        raise
    except trouble as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CheckpointError(f"{place}: cannot be {done} now ({reason}); see to that, and try again") from error


def filesystem(place: Path) -> Any:
    """The fsspec filesystem of a place in a store; what it remembers of listings is forgotten."""
    found = cast(Any, place).fs
    found.invalidate_cache()
    return found


def read_range(place: Path, start: int, end: int) -> bytes:
    """The bytes from start to end of a file in a store."""
    data: bytes = cast(Any, place).fs.cat_file(cast(Any, place).path, start=start, end=end)
    return data


def make_folder(place: Path) -> None:
    """Make a folder and those above it; in a store the first part of the path, a bucket it may be, must be there."""
    if not is_remote(place):
        place.mkdir(parents=True)
        return
    parts = str(cast(Any, place).path).split("/")
    first = 2 if parts[0] else 3  # "bucket/a" and "/folder/a"
    for end in range(first, len(parts) + 1):
        with suppress(FileExistsError):
            cast(Any, place).fs.mkdir("/".join(parts[:end]), create_parents=False)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no reader ever takes half of it for whole; of a link, the link."""
    if is_remote(checkpoint):
        found = filesystem(checkpoint)
        path = cast(Any, checkpoint).path
        if found.exists(f"{path}/manifest.json"):
            found.rm_file(f"{path}/manifest.json")
        if found.exists(path):
            found.rm(path, recursive=True)
        return
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def set_aside(checkpoint: Path) -> Path:
    """Give a checkpoint a name that no run resumes from or prunes: abandoned_step_00000100. Returns where it is.

    In a store it is copied there, by the store itself where that can, and then removed.
    """
    with reading(checkpoint, "set aside"):
        if is_remote(checkpoint):
            filesystem(checkpoint)
        names = (f"{ABANDONED}{checkpoint.name}" + (f"_{number}" if number > 1 else "") for number in count(1))
        target = next(place for name in names if not (place := checkpoint.with_name(name)).exists())
        if is_remote(checkpoint):
            found = filesystem(checkpoint)
            found.copy(cast(Any, checkpoint).path, cast(Any, target).path, recursive=True)
            remove(checkpoint)
        else:
            checkpoint.rename(target)
    return target

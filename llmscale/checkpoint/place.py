"""Where checkpoints lie: a folder, or any fsspec URL, which universal_pathlib makes look like one.

A store has no rename: there the manifest is written last, and removed first, so that a step without one is not whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

from llmscale.errors import UsageError


def place_of(text: str | Path) -> Path:
    """A path, or what a URL names, which has the same methods. Raises UsageError where a package is missing."""
    if "://" not in str(text):
        return Path(text)
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


def filesystem(place: Path) -> Any:
    """The fsspec filesystem of a place in a store; what it remembers of listings is forgotten."""
    found = cast(Any, place).fs
    found.invalidate_cache()
    return found


def read_range(place: Path, start: int, end: int) -> bytes:
    """The bytes from start to end of a file in a store."""
    data: bytes = cast(Any, place).fs.cat_file(cast(Any, place).path, start=start, end=end)
    return data


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no reader ever takes half of it for whole."""
    if is_remote(checkpoint):
        found = filesystem(checkpoint)
        path = cast(Any, checkpoint).path
        if found.exists(f"{path}/manifest.json"):
            found.rm_file(f"{path}/manifest.json")
        if found.exists(path):
            found.rm(path, recursive=True)
        return
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)

"""Which checkpoints a run directory has: the newest whole one, and which to remove."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from llmscale.checkpoint.format import Checkpoint, Damaged
from llmscale.checkpoint.place import filesystem, is_remote, place_of, remove
from llmscale.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under a folder, oldest first, whole or not; nothing that is still being written."""
    if is_remote(folder):
        filesystem(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_whole(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; broken ones are passed over with a warning."""
    return next(whole(folder), None)


def whole(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints that are whole as far as sizes tell, newest first; others are passed over with a warning."""
    for path in reversed(checkpoints(folder)):
        try:
            yield Checkpoint(path)
        except Damaged as error:
            logger.warning("passing over a broken checkpoint: %s", error)


def candidates(resume: str, folder: Path) -> Iterator[Checkpoint]:
    """What `checkpoint.resume` names, the best first: auto, never, or a checkpoint or a folder of them.

    Raises:
        CheckpointError: the path that was asked for, or a folder that has checkpoints, holds no whole one.
    """
    if resume == "never":
        return
    if resume == "auto":
        found = None
        for found in whole(folder):
            yield found
        if found is None and checkpoints(folder):
            raise CheckpointError(
                f"{folder}: none of its checkpoints is whole; copy one there, or set checkpoint.resume to never"
            )
        return
    named = _at(place_of(resume))
    if named is None:
        raise CheckpointError(
            f"checkpoint.resume: {resume} holds no whole checkpoint; name a step_* folder or a run directory"
        )
    yield named


def open_checkpoint(named: str | Path) -> Checkpoint:
    """A step's folder, or the newest whole checkpoint of a run directory, here or in a store.

    Raises:
        UsageError: there is none. CheckpointError: the step that was named is broken.
    """
    place = place_of(named)
    found = _at(place)
    if found is None:
        raise UsageError(f"{place}: no whole checkpoint there; name a step_* folder or a run directory")
    return found


def _at(place: Path) -> Checkpoint | None:
    if (place / "manifest.json").is_file():
        return Checkpoint(place)
    return newest_whole(place) or newest_whole(place / "checkpoints")


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` checkpoints (0 keeps all). Returns what was removed."""
    stale = checkpoints(folder)[:-keep] if keep else []
    for path in stale:
        remove(path)
    return stale

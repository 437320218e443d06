"""Which checkpoints a run directory has: the whole ones, what a name stands for, and which to remove."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from llmscale.checkpoint.format import Checkpoint, Damaged
from llmscale.checkpoint.place import filesystem, is_remote, place_of, reading, remove, set_aside
from llmscale.config import yaml_text
from llmscale.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)
_STEP = re.compile(r"step_\d{8,}")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under a folder, oldest first, whole or not; nothing that is still being written.

    Raises:
        CheckpointError: the folder cannot be read now.
    """
    try:
        with reading(folder):
            if is_remote(folder):
                names = [str(name) for name in filesystem(folder).ls(cast(Any, folder).path, detail=False)]
                found = [folder / name.rstrip("/").rpartition("/")[2] for name in names]
            else:
                found = [path for path in folder.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in found if _STEP.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.removeprefix("step_"))


def whole(paths: Sequence[Path]) -> Iterator[Checkpoint]:
    """Those of the checkpoints, oldest first, that are whole as far as sizes tell, newest first; others are passed
    over with a warning."""
    for path in reversed(paths):
        try:
            yield Checkpoint(path)
        except Damaged as error:
            logger.warning("passing over a broken checkpoint: %s", error)


def candidates(resume: str, folder: Path) -> Iterator[Checkpoint]:
    """What a run of `checkpoint.resume` may go on from, the best first: auto, never, or a name (`named`).

    Where a name was followed before, what that run has saved since under `folder` comes first: a job that is started
    again with the same config goes on.

    Raises:
        CheckpointError: the path that was asked for, or a folder that has checkpoints, holds no whole one.
    """
    if resume == "never":
        return
    own, found = checkpoints(folder), None
    if resume == "auto":
        for found in whole(own):
            yield found
        if found is None and own:
            raise CheckpointError(
                f"{folder}: none of its checkpoints is whole; copy one there, or set checkpoint.resume to never"
            )
        return
    for found in whole(own):
        if found.manifest["config"].get("checkpoint", {}).get("resume") != resume:
            break
        yield found
    found = None
    for found in whole(named(resume)):
        yield found
    if found is None:
        raise CheckpointError(
            f"checkpoint.resume: {resume} holds no whole checkpoint; name a step_* folder or a run directory"
        )


def open_checkpoint(name: str | Path) -> Checkpoint:
    """A step's folder, or the newest whole checkpoint of a run directory, here or in a store.

    Raises:
        UsageError: there is none. CheckpointError: the step that was named is broken.
    """
    paths = named(name)
    found = Checkpoint(paths[0]) if paths == [place_of(name)] else next(whole(paths), None)
    if found is None:
        raise UsageError(f"{name}: no whole checkpoint there; name a step_* folder or a run directory")
    return found


def named(name: str | Path) -> list[Path]:
    """The checkpoints that a name stands for, oldest first, whole or not: a step's own folder, a run directory (whose
    config.yaml says where they lie), or a folder of them.

    Raises:
        CheckpointError: it cannot be read now.
    """
    place = place_of(name)
    if (_STEP.fullmatch(place.name) and not _is_missing(place)) or not _is_missing(place / "manifest.json"):
        return [place]
    for folder in (_configured(place), place / "checkpoints", place):
        if folder is not None and (found := checkpoints(folder)):
            return found
    return []


def _is_missing(place: Path) -> bool:
    try:
        with reading(place):
            place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def _configured(run: Path) -> Path | None:
    """Where the config of a run directory puts its checkpoints, if it says so."""
    try:
        with reading(run):
            config = yaml_text.parse((run / "config.yaml").read_text(encoding="utf-8"))
        folder = config["checkpoint"]["folder"]
    except (FileNotFoundError, NotADirectoryError, ValueError, yaml_text.Invalid, KeyError, TypeError):
        return None
    return place_of(folder) if isinstance(folder, str) else None


def abandon(folder: Path, begun: Path | None) -> list[Path]:
    """Set aside the checkpoints under a folder that a run which begins at `begun` has not come from.

    These are the ones of later steps, or all where it begins elsewhere. Returns where they are now. What is left under
    the folder is behind the run, and what it saves is newer.
    """
    own = checkpoints(folder)
    behind = next((index + 1 for index, path in enumerate(own) if begun is not None and _same(path, begun)), 0)
    return [set_aside(path) for path in own[behind:]]


def _same(one: Path, other: Path) -> bool:
    if is_remote(one) or is_remote(other):
        return str(one) == str(other)
    return os.path.samefile(one, other)


def prune(folder: Path, keep: int, newest: Path) -> list[Path]:
    """Keep the `keep` newest checkpoints that are whole (0 keeps all); remove what is older than these.

    newest: the one just saved, which counts as the first. Returns what was removed.
    """
    if not keep:
        return []
    older = [path for path in checkpoints(folder) if step_of(path) < step_of(newest)]
    left = keep - 1
    while older and left:
        left -= _opens(older.pop())
    for path in older:
        remove(path)
    return older


def _opens(path: Path) -> bool:
    try:
        Checkpoint(path)
    except Damaged:
        return False
    return True

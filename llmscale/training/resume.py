"""Where a run begins: rank 0 chooses a checkpoint and all ranks open that one; what the run has not come from is set
aside, so that its own are the newest from then on.

Ranks may see different folders: a network file system shows a new file on one node before another, and a folder that
was thought to be shared may not be. Each for itself they would train on weights of different steps, unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from llmscale.checkpoint.format import Checkpoint, Damaged
from llmscale.checkpoint.place import place_of
from llmscale.checkpoint.retention import abandon, candidates
from llmscale.config.schema import RunConfig
from llmscale.errors import CheckpointError, LlmscaleError
from llmscale.training.state import on_all_ranks

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")
_DATA = ("sequence_length", "mask_documents")


def load_newest(
    resume: str, folder: Path, load: Callable[[Checkpoint], Loaded]
) -> tuple[Checkpoint, Loaded] | tuple[None, None]:
    """Load the best of what `checkpoint.resume` may go on from (`candidates`), or the next where that is damaged.

    load: called on every rank; raises Damaged on all of them or on none.

    Raises:
        CheckpointError: none is whole.
    """
    speaks, damaged = dist.get_rank() == 0, ""
    offers = candidates(resume, folder)  # looks at nothing until it is asked, which rank 0 alone does
    while (checkpoint := agreed(lambda: next(offers, None))) is not None:
        try:
            return checkpoint, load(checkpoint)
        except Damaged as error:
            damaged = str(error)
            if speaks:
                logger.warning("passing over a broken checkpoint: %s", error)
    if damaged:
        older = "" if resume != "auto" else "; no older one is whole: copy one there, or set checkpoint.resume to never"
        raise CheckpointError(damaged + older)
    return None, None


def agreed(choose: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """The checkpoint that rank 0 chooses, opened by every rank.

    Raises:
        LlmscaleError: what `choose` raised. CheckpointError: some rank does not see the same.
    """
    rank = dist.get_rank()
    found: Checkpoint | None = None
    offer: list[tuple[str, int] | LlmscaleError | None] = [None]
    if rank == 0:
        try:
            found = choose()
            offer = [None if found is None else (str(found.path), found.manifest["crc32"])]
        except LlmscaleError as error:
            offer = [error]
    dist.broadcast_object_list(offer, src=0)
    chosen = offer[0]
    if isinstance(chosen, LlmscaleError):
        raise chosen
    if chosen is None:
        return None
    path, crc32 = chosen

    def look() -> None:
        nonlocal found
        if rank == 0:
            return
        fix = "checkpoints must lie where all nodes see the same; if they do, start again"
        try:
            found = Checkpoint(place_of(path))
        except Damaged as error:
            raise CheckpointError(f"{path}: rank {rank} does not see what rank 0 sees: {error}; {fix}") from None
        if found.manifest["crc32"] != crc32:
            raise CheckpointError(f"{path}: rank {rank} sees another checkpoint there than rank 0; {fix}")

    on_all_ranks(look)
    return found


def set_others_aside(folder: Path, begun: Checkpoint | None) -> list[Path]:
    """Before a run that begins at a checkpoint saves any: rename what it has not come from. Called by all ranks.

    Returns where these are now, on rank 0.

    Raises:
        CheckpointError: they cannot be renamed.
    """
    found: list[Path] = []

    def rename() -> None:
        if dist.get_rank() == 0:
            found.extend(abandon(folder, begun.path if begun else None))

    on_all_ranks(rename)
    return found


def layout_changes(checkpoint: Checkpoint, layout: Mapping[str, Any]) -> list[str]:
    """What of the layout is not as it was saved, in words."""
    saved = {**dict.fromkeys(layout), **checkpoint.manifest["layout"]}
    return _changed("", saved, layout)


def what_changed(checkpoint: Checkpoint, layout: Mapping[str, Any], config: RunConfig, random: bool) -> Iterator[str]:
    """What a run that resumed says of it, a line each. random: whether the random state is as it was, or need not be.

    What has changed of the data's sources, the stream tells.
    """
    moved = layout_changes(checkpoint, layout)
    on = f", on another layout ({', '.join(moved)})" if moved else ""
    yield f"resumed from {checkpoint.path} at step {checkpoint.step}{on}"
    saved, now = checkpoint.manifest["config"], config.model_dump(mode="json")
    changed = _changed("", saved, {"deepspeed": now["deepspeed"]})
    for section in ("model", "training", "optimizer", "schedule"):
        changed += _changed(f"{section}.", saved.get(section, {}), now[section])
    if changed := [*changed, *_changed("data.", saved.get("data", {}), {key: now["data"][key] for key in _DATA})]:
        yield f"not as it was saved: {', '.join(changed)}"
    if not random:
        yield "the random state is a new one: it was saved by another kind of device, or another torch"


def _changed(section: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that are another now, of those that there were when it was saved."""
    return [
        f"{section}{name} {saved[name]} -> {value}"
        for name, value in now.items()
        if name in saved and (list(value) if isinstance(value, tuple) else value) != saved[name]
    ]

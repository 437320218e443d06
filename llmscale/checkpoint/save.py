"""Saving: every rank writes what it owns, rank 0 commits with one rename.

If any rank fails (a full disk), all of them learn of it, nothing is committed, and the older checkpoints are untouched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmscale.checkpoint.format import FORMAT, Entry, Fragment, write_tensors
from llmscale.errors import CheckpointError


def step_name(step: int) -> str:
    """The folder of a step's checkpoint: step_00000100."""
    return f"step_{step:08d}"


def save(
    folder: Path,
    step: int,
    fragments: Sequence[Fragment],
    random_state: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
) -> Path:
    """Write a checkpoint of `step` under `folder`, together with all other ranks. Returns its path.

    facts: what else stands in the manifest. Raises CheckpointError on every rank when one of them cannot write.
    """
    rank = dist.get_rank()
    final, work = folder / step_name(step), folder / f".{step_name(step)}.tmp"
    _together(lambda: _fresh(work) if rank == 0 else None, f"{work}: cannot be made")
    file = f"rank_{rank:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    rows: list[tuple[str, Entry]] = []
    for part in fragments:
        entry = Entry(file, part.tensor_rank, part.tensor_size, part.start, part.numel)
        rows.append((part.weight.name, entry))
        tensors.update({entry.key(state, part.weight.name): tensor for state, tensor in part.tensors.items()})
    tensors.update({f"rng/{name}": value for name, value in random_state.items()})
    states = list(fragments[0].tensors) if fragments else []
    written = _together(
        lambda: (file, write_tensors(work / file, tensors), rows, states), f"{final}: the checkpoint cannot be written"
    )
    if rank == 0:
        manifest = {"format": FORMAT, "step": step, **facts}
        manifest["states"] = next((found for *_, found in written if found), [])
        index: dict[str, list[dict[str, Any]]] = {}
        for _, _, found, _ in written:
            for name, entry in found:
                index.setdefault(name, []).append(asdict(entry))
        manifest["files"] = {name: size for name, size, _, _ in written}
    _together(lambda: _commit(work, final, manifest, index) if rank == 0 else None, f"{final}: cannot be committed")
    return final


def _together(action: Any, failure: str) -> list[Any]:
    """Run `action` on every rank and give every rank all results; if one fails, all raise the same error."""
    try:
        outcome: tuple[Any, str | None] = (action(), None)
    except OSError as error:
        outcome = (None, f"{error.strerror or error} on rank {dist.get_rank()}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    errors = [error for _, error in outcomes if error]
    if errors:
        raise CheckpointError(f"{failure}: {errors[0]}; older checkpoints are untouched")
    return [result for result, _ in outcomes]


def _fresh(work: Path) -> None:
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)


def _commit(work: Path, final: Path, manifest: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    for name, content in (("index.json", index), ("manifest.json", manifest)):
        with (work / name).open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
    if final.exists():
        # The same step again, after a resume from an earlier one.
        remove(final)
    work.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no reader ever sees half of it: it is renamed first."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)

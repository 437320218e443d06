"""Saving: every rank writes what it owns, rank 0 commits with one rename, or in a store with the manifest.

Asynchronously, a rank copies its state into buffers of its own, which is all that training waits for, and a thread
writes them and commits, with collectives of its own process group. One save at a time: the next waits for the one
before. How it ended is agreed on by all ranks, at the same step. If any rank fails (a full disk), nothing is committed,
and the older checkpoints are untouched.

The buffers are kept from save to save: as many bytes of the node's memory as the rank's state has.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmscale.checkpoint.format import FORMAT, Entry, Fragment, seal
from llmscale.checkpoint.place import is_remote, make_folder, remove, set_aside
from llmscale.checkpoint.tensor_file import Header, write
from llmscale.errors import CheckpointError

logger = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """The folder of a step's checkpoint: step_00000100."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Saved:
    """A save that ended. seconds: from its beginning to the commit. error: why there is no checkpoint."""

    step: int
    path: Path
    seconds: float
    error: str | None


@dataclass(frozen=True)
class _Part:
    """What one rank writes: tensors by their names in its file, and what the index says of them."""

    file: str
    tensors: Mapping[str, torch.Tensor]
    rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]]
    """(weight, an entry without its checksums, state -> name in the file)."""
    states: Sequence[str]


class Saver:
    """Saves checkpoints under a folder, together with all other ranks. Made and closed by all of them."""

    def __init__(
        self,
        folder: Path,
        asynchronous: bool,
        committed: Callable[[Path], Any] = lambda path: None,
        committing: Callable[[], Any] = lambda: None,
    ) -> None:
        """committed: called by rank 0 after each commit, in the thread that writes; it may fail, with a warning.
        committing: before it; what that raises, the save fails with.
        """
        self._folder, self._asynchronous = folder, asynchronous
        self._committed, self._committing = committed, committing
        # Of the thread, and of what is agreed on meanwhile: collectives of one group must not meet.
        self._group = dist.new_group(backend="gloo")
        self._agreement = dist.new_group(backend="gloo")
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended: Saved | None = None
        self._broken: BaseException | None = None
        if dist.get_rank() == 0:
            _sweep(folder)

    def save(
        self,
        step: int,
        fragments: Sequence[Fragment],
        random_state: Mapping[str, torch.Tensor],
        facts: Mapping[str, Any],
    ) -> Saved | None:
        """Save a step; waits for the save before, and gives how that ended.

        facts: what else stands in the manifest. Synchronously, `wait` has nothing to wait for, and tells how it ended.
        """
        before = self.wait()
        began = time.monotonic()
        part = _part(f"rank_{dist.get_rank():05d}.safetensors", fragments, random_state)
        if self._asynchronous:
            part = self._copied(part)
        run = threading.Thread(target=self._run, args=(step, part, facts, began), name="checkpoint", daemon=True)
        self._thread = run
        run.start()
        if not self._asynchronous:
            run.join()
        return before

    def poll(self) -> Saved | None:
        """How a save ended, once it has on all ranks; called by all of them at the same step."""
        if self._thread is None:
            return None
        running = torch.tensor([int(self._thread.is_alive())])
        dist.all_reduce(running, op=dist.ReduceOp.MAX, group=self._agreement)
        return None if running.item() else self.wait()

    def wait(self) -> Saved | None:
        """Wait for a save under way, and give how it ended. Raises what its collectives did: another rank is lost."""
        if self._thread is None:
            return None
        self._thread.join()
        if self._broken is not None:
            raise self._broken
        self._thread, ended, self._ended = None, self._ended, None
        return ended

    def _copied(self, part: _Part) -> _Part:
        """The part in buffers of the CPU, which are made by the first save."""
        for name, tensor in part.tensors.items():
            if name not in self._buffers or self._buffers[name].shape != tensor.shape:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return _Part(part.file, {name: self._buffers[name] for name in part.tensors}, part.rows, part.states)

    def _run(self, step: int, part: _Part, facts: Mapping[str, Any], began: float) -> None:
        path, error = self._folder / step_name(step), None
        try:
            self._write(step, part, facts, path)
        except CheckpointError as caught:
            error = str(caught)
        except BaseException as caught:
            # Of the collectives: another rank is gone. `wait` raises it where it is understood.
            self._broken = caught
            return
        self._ended = Saved(step, path, time.monotonic() - began, error)

    def _write(self, step: int, part: _Part, facts: Mapping[str, Any], final: Path) -> None:
        rank = dist.get_rank()
        work = final if is_remote(final) else final.with_name(f".{final.name}.tmp")

        def commit() -> None:
            self._committing()
            _commit(work, final, step, facts, written)

        self._together(lambda: _fresh(work) if rank == 0 else None, f"{work}: cannot be made")
        try:
            written = self._together(
                lambda: _write_part(work / part.file, part), f"{final}: the checkpoint cannot be written"
            )
            self._together(
                lambda: commit() if rank == 0 else None,
                f"{final}: cannot be committed",
            )
        except CheckpointError:
            if rank == 0:
                with suppress(Exception):  # a store's package has errors of its own
                    _clear(work)
            raise
        if rank == 0:
            try:
                self._committed(final)
            except Exception as error:  # whatever became of older ones: this one is whole
                logger.warning("%s is saved; older checkpoints could not be removed: %s", final, error)

    def _together(self, action: Callable[[], Any], failure: str) -> list[Any]:
        """Run `action` on every rank and give every rank all results; if one fails, all raise the same error."""
        try:
            outcome: tuple[Any, str | None] = (action(), None)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            outcome = (None, f"{reason} on rank {dist.get_rank()}")
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self._group)
        if errors := [error for _, error in outcomes if error]:
            raise CheckpointError(f"{failure}: {errors[0]}; older checkpoints are untouched")
        return [result for result, _ in outcomes]


def _part(file: str, fragments: Sequence[Fragment], random_state: Mapping[str, torch.Tensor]) -> _Part:
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for one in fragments:
        entry = Entry(file, one.tensor_rank, one.tensor_size, one.start, one.numel, {})
        keys = {state: entry.key(state, one.weight.name) for state in one.tensors}
        tensors |= {keys[state]: tensor for state, tensor in one.tensors.items()}
        rows.append((one.weight.name, asdict(entry), keys))
    tensors |= {f"rng/{name}": value for name, value in random_state.items()}
    return _Part(file, tensors, rows, list(fragments[0].tensors) if fragments else [])


def _write_part(path: Path, part: _Part) -> tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]], Sequence[str]]:
    """(file, what the manifest says of it, rows of the index, states)."""
    headers = [Header(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in part.tensors.items()]
    done = write(path, headers, part.tensors.values())
    random = {name.removeprefix("rng/"): crc32 for name, crc32 in done.crc32.items() if name.startswith("rng/")}
    rows = [
        (weight, {**entry, "crc32": {state: done.crc32[key] for state, key in keys.items()}})
        for weight, entry, keys in part.rows
    ]
    return part.file, {"bytes": done.bytes, "head_crc32": done.head_crc32, "random": random}, rows, part.states


def _fresh(work: Path) -> None:
    if is_remote(work) and (work / "manifest.json").exists():
        set_aside(work)
    _clear(work)
    make_folder(work)


def _clear(work: Path) -> None:
    if is_remote(work):
        remove(work)
    else:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what saves and removals that were killed have left."""
    if not is_remote(folder):
        for kind in ("tmp", "removed"):
            for path in folder.glob(f".step_*.{kind}"):
                shutil.rmtree(path, ignore_errors=True)


def _commit(work: Path, final: Path, step: int, facts: Mapping[str, Any], written: Sequence[Any]) -> None:
    index: dict[str, list[dict[str, Any]]] = {}
    for _, _, rows, _ in written:
        for weight, entry in rows:
            index.setdefault(weight, []).append(entry)
    states: Sequence[str] = next((found for *_, found in written if found), [])
    files = {name: about for name, about, *_ in written}
    write_records(work, {"format": FORMAT, "step": step, **facts, "states": states}, index, files)
    if is_remote(final):
        return
    if final.exists():
        # Rare: a run sets later steps aside before it begins. Killed before the next line, it has lost no whole one.
        set_aside(final)
    work.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_records(
    folder: Path,
    manifest: Mapping[str, Any],
    index: Mapping[str, Sequence[Mapping[str, Any]]],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write index.json, and manifest.json with what both say of the files."""
    text = json.dumps(index, indent=1).encode()
    files = {**files, "index.json": {"bytes": len(text), "head_crc32": zlib.crc32(text)}}
    whole = json.loads(json.dumps({**manifest, "files": files}))  # as it will be read: lists for tuples
    for name, content in (("index.json", text), ("manifest.json", json.dumps(seal(whole), indent=1).encode())):
        with (folder / name).open("wb") as file:
            file.write(content)
            if not is_remote(folder):
                file.flush()
                os.fsync(file.fileno())

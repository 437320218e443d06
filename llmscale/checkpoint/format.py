"""What a checkpoint is on disk, and how it is read.

    checkpoints/step_00000100/
        manifest.json            step, tokens, the run's config, layout, versions, data position; every file's size and
                                 checksums; a checksum of itself
        index.json               weight -> the fragments it is made of: the file each stands in, and its checksums
        rank_00000.safetensors   what rank 0 owned: fragments of fp32 weights and optimizer state, and its random state

Things have global names, so that any layout loads what any other saved. A fragment is a run of one tensor-parallel
part of a weight, flattened: ZeRO cuts weights at arbitrary elements. Writing happens in a hidden folder that is
renamed at the end: a reader sees all of a checkpoint or none. No pickle anywhere. Checksums are CRC-32: of each
tensor's bytes, compared whenever one is read, and of all other bytes of the files, so that no flipped bit goes unseen.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from llmscale.checkpoint.place import reading
from llmscale.checkpoint.tensor_file import Reader, raw_bytes
from llmscale.config.schema import Model, RunConfig
from llmscale.errors import CheckpointError
from llmscale.models.cut import local_shape, pieces
from llmscale.models.family import Weight, families

FORMAT = 2
WEIGHT = "weight"
"""The state that every weight has: its fp32 master. The others are the optimizer's: exp_avg, exp_avg_sq, ..."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of tensor-parallel part `tensor_rank` of `tensor_size` of a weight, flattened.

    tensors: state name -> 1-D tensor of numel elements, a view of the live state; "weight" is always there.
    """

    weight: Weight
    tensor_rank: int
    tensor_size: int
    start: int
    tensors: Mapping[str, torch.Tensor]

    @property
    def numel(self) -> int:
        return self.tensors[WEIGHT].numel()


@dataclass(frozen=True)
class Entry:
    """A row of index.json: where a fragment stands."""

    file: str
    tensor_rank: int
    tensor_size: int
    start: int
    numel: int
    crc32: Mapping[str, int]
    """Of each state's bytes."""

    def key(self, state: str, weight: str) -> str:
        """The tensor's name in its file."""
        return f"{state}/{weight}/{self.tensor_rank}/{self.start}"


class Damaged(CheckpointError):
    """A file of a checkpoint is missing, cut short or altered: an older checkpoint may be whole."""


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of itself."""
    return {**manifest, "crc32": _crc32_of(manifest)}


def _crc32_of(manifest: Mapping[str, Any]) -> int:
    plain = {key: value for key, value in manifest.items() if key != "crc32"}
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


class Checkpoint:
    """A whole checkpoint, open for reading; tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            Damaged: it is missing, incomplete or altered. CheckpointError: it is of another format, or out of reach.
        """
        self.path = path
        self._opened: dict[str, Reader] = {}
        self.manifest = self._json("manifest.json")
        kind = self.manifest.get("format")
        # First: what was altered may be the format.
        if self.manifest.get("crc32") != _crc32_of(self.manifest) and (kind == FORMAT or "crc32" in self.manifest):
            raise Damaged(f"{path}/manifest.json: was altered (its checksum differs); use another checkpoint")
        if kind != FORMAT:
            raise CheckpointError(
                f"{path}/manifest.json: format {kind!r}, this llmscale reads {FORMAT}; use the llmscale that wrote it"
            )
        for name, about in self.manifest["files"].items():
            file, found = path / name, None
            with suppress(FileNotFoundError), reading(file):
                found = file.stat().st_size
            if found != about["bytes"]:
                what = "is missing" if found is None else f"has {found} bytes instead of {about['bytes']}"
                raise Damaged(f"{file}: {what}; use another checkpoint of {path.parent}")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            with reading(file):
                text = file.read_bytes()
            content = json.loads(text)
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"{self.path}: no {name}, so this is not a whole llmscale checkpoint") from None
        except ValueError as error:
            raise Damaged(f"{file}: cannot be read ({error}); use another checkpoint") from None
        if not isinstance(content, dict):
            raise Damaged(f"{file}: a JSON object is wanted; use another checkpoint")
        if name != "manifest.json" and zlib.crc32(text) != self.manifest["files"][name]["head_crc32"]:
            raise Damaged(f"{file}: was altered (its checksum differs); use another checkpoint")
        return content

    @cached_property
    def config(self) -> RunConfig:
        """The config of the run that saved it; model.vocab_size is set."""
        return RunConfig.model_validate(self.manifest["config"])

    @cached_property
    def model(self) -> Model:
        """The model that it holds; its vocab_size is set."""
        return Model.model_validate(self.manifest["config"]["model"])

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """What the run computed in."""
        found: Literal["bf16", "fp32"] = self.manifest["config"].get("training", {}).get("precision", "fp32")
        return found

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Every weight of the model, by name."""
        model = self.model
        if model.vocab_size is None:
            raise CheckpointError(f"{self.path}/manifest.json: no model.vocab_size")
        return {weight.name: weight for weight in families()[model.family].parameters(model, model.vocab_size)}

    @cached_property
    def index(self) -> dict[str, list[Entry]]:
        """The fragments of every weight."""
        return {name: [Entry(**row) for row in rows] for name, rows in self._json("index.json").items()}

    @property
    def states(self) -> tuple[str, ...]:
        """What was saved of each weight: "weight" and the optimizer's state."""
        return tuple(self.manifest["states"])

    def tensor(self, file: str, key: str, crc32: int) -> torch.Tensor:
        """One tensor of one file, compared with its checksum.

        Raises:
            Damaged: it is not there, or was altered. CheckpointError: it is out of reach.
        """
        try:
            with reading(self.path / file):
                result = self._file(file).read(key)
        except (FileNotFoundError, ValueError) as error:
            raise Damaged(f"{self.path / file}: {key} cannot be read ({error}); use another checkpoint") from None
        if zlib.crc32(raw_bytes(result)) != crc32:
            raise Damaged(f"{self.path / file}: {key} was altered (its checksum differs); use another checkpoint")
        return result

    def _file(self, name: str) -> Reader:
        if name not in self._opened:
            self._opened[name] = Reader(self.path / name)
        return self._opened[name]

    def random_state(self, file: str) -> dict[str, torch.Tensor]:
        """The random state in a rank's file, by name."""
        about = self.manifest["files"][file]["random"]
        return {name: self.tensor(file, f"rng/{name}", crc32) for name, crc32 in about.items()}

    def problems(self) -> Iterator[str]:
        """All that is wrong with any byte of it, a line each; reads everything once. Its numbers must be finite."""
        for name, about in self.manifest["files"].items():
            if name.endswith(".safetensors"):
                try:
                    with reading(self.path / name):
                        altered = zlib.crc32(self._file(name).head) != about["head_crc32"]
                except (FileNotFoundError, ValueError):
                    altered = True
                if altered:
                    yield f"{self.path / name}: its header was altered (its checksum differs)"
                    continue
            for part, crc32 in about.get("random", {}).items():
                yield from self._problem(name, f"rng/{part}", crc32)
        try:
            index = self.index
        except Damaged as error:
            yield str(error)
            return
        for weight in self.weights:
            if weight not in index:
                yield f"{self.path}: {weight} is not in it"
            for entry in index.get(weight, ()):
                for state in self.states:
                    yield from self._problem(entry.file, entry.key(state, weight), entry.crc32[state])

    def _problem(self, file: str, key: str, crc32: int) -> Iterator[str]:
        try:
            tensor = self.tensor(file, key, crc32)
        except Damaged as error:
            yield str(error)
            return
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield f"{self.path / file}: {key} holds numbers that are not finite"

    def part(self, name: str, state: str, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """What tensor-parallel rank `tensor_rank` of `tensor_size` holds of a weight, in its local shape.

        fp32, but in the type that was saved where it is one saved tensor: an imported model's may be bf16.
        """
        weight = self.weights[name]
        shape = local_shape(weight, tensor_size)
        saved_size = self.index[name][0].tensor_size
        if saved_size == tensor_size:
            return self.run(name, state, tensor_rank, 0, math.prod(shape)).view(shape)
        local = torch.zeros(shape)
        wanted = pieces(weight, tensor_rank, tensor_size)
        for rank in sorted({entry.tensor_rank for entry in self.index[name]}):
            if shared := [
                (mine, theirs, low, high)
                for theirs in pieces(weight, rank, saved_size)
                for mine in wanted
                if (low := max(mine.whole_start, theirs.whole_start))
                < (high := min(mine.whole_start + mine.length, theirs.whole_start + theirs.length))
            ]:
                saved = self.part(name, state, rank, saved_size)
                for mine, theirs, low, high in shared:
                    local.narrow(mine.dim, mine.local_start + low - mine.whole_start, high - low).copy_(
                        saved.narrow(theirs.dim, theirs.local_start + low - theirs.whole_start, high - low)
                    )
        return local

    def run(self, name: str, state: str, tensor_rank: int, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of a saved, flattened tensor-parallel part, from whatever holds them."""
        own = [entry for entry in self.index[name] if entry.tensor_rank == tensor_rank]
        for entry in own:
            if (entry.start, entry.numel) == (start, numel):  # the usual case, without another copy
                return self.tensor(entry.file, entry.key(state, name), entry.crc32[state])
        result = torch.empty(numel)
        covered = 0
        for entry in own:
            low, high = max(start, entry.start), min(start + numel, entry.start + entry.numel)
            if low < high:
                fragment = self.tensor(entry.file, entry.key(state, name), entry.crc32[state])
                result[low - start : high - start] = fragment[low - entry.start : high - entry.start]
                covered += high - low
        if covered != numel:
            raise Damaged(
                f"{self.path}: {name}: {covered} of {numel} elements of {state} found; use another checkpoint"
            )
        return result

    def whole(self, name: str, state: str = WEIGHT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A weight (or its optimizer state) as one tensor of its global shape, without padding.

        Raises:
            CheckpointError: it is not in the checkpoint, or not all of it.
        """
        if name not in self.weights or name not in self.index:
            raise CheckpointError(f"{self.path}: no weight {name!r}")
        weight, size = self.weights[name], self.index[name][0].tensor_size
        if size == 1:  # padding is at the end of the first dimension
            return self.part(name, state, 0, 1)[: weight.shape[0]].to(dtype)
        result = torch.empty(weight.shape, dtype=dtype)
        for rank in sorted({entry.tensor_rank for entry in self.index[name]}):
            part = self.part(name, state, rank, size)
            for piece in pieces(weight, rank, size):
                result.narrow(piece.dim, piece.whole_start, piece.length).copy_(
                    part.narrow(piece.dim, piece.local_start, piece.length)
                )
        return result

    def read(self, name: str, state: str, tensor_rank: int, tensor_size: int, start: int, numel: int) -> torch.Tensor:
        """What a rank of any layout owns of a weight: elements [start, start + numel) of its flattened part."""
        if name not in self.index:
            raise CheckpointError(f"{self.path}: no weight {name!r}; the checkpoint is of another model")
        entry = self.index[name][0]
        if entry.tensor_size == tensor_size and self.weights[name].cut != "replicated":
            return self.run(name, state, tensor_rank, start, numel)
        if self.weights[name].cut == "replicated":
            return self.run(name, state, 0, start, numel)
        return self.part(name, state, tensor_rank, tensor_size).reshape(-1)[start : start + numel]

"""From a checkpoint to a folder that transformers loads with no code of ours.

A few weights are in memory at a time, whatever the model's size. The folder is written under a hidden name and renamed
when it is whole and, unless told otherwise, proven (`parity.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch

from llmscale.checkpoint.format import Checkpoint
from llmscale.checkpoint.tensor_file import Header, synced_behind, write
from llmscale.convert import card, parity, tokenizer_files
from llmscale.convert.destination import FACTS, destination
from llmscale.convert.transforms import Pair, pairs, to_theirs
from llmscale.errors import ConversionError
from llmscale.models.family import families

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Dtype = Literal["bf16", "fp16", "fp32"]
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Export:
    """What was written. parity: None where it was not proven."""

    output: Path
    architecture: str
    dtype: Dtype
    parameters: int
    bytes: int
    shards: int
    parity: parity.Parity | None

    @property
    def failed(self) -> bool:
        """Whether the proof says that it is not the same model."""
        return self.parity is not None and not self.parity.equal


def to_hf(
    checkpoint: Checkpoint,
    output: Path,
    *,
    dtype: Dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    end_of_document: str | None = None,
    verify: bool = True,
    tolerance: float = parity.TOLERANCE,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Export:
    """Write a checkpoint in Hugging Face's format.

    dtype: of the tensors; when None what the run computed in, or what an imported model's came in. tokenizer: the run's
    own when None; a model without one is written without. end_of_document: as `tokenizer_files.write` has it. report:
    called with (bytes written, bytes in all).

    Raises:
        UsageError: the output is not empty. ConversionError: the format has no place for a part of the model.
        CheckpointError: the checkpoint is broken.
    """
    model = checkpoint.model
    family = families()[model.family]
    types = _types(checkpoint, dtype)
    config = family.hugging_face.to_config(family.settled(model))
    if "token_ids" in (checkpoint.manifest.get("imported") or {}):  # which says all of them
        config = {key: value for key, value in config.items() if key not in tokenizer_files.special_ids(config)}
    files = [tokenizer] if tokenizer else []
    with destination(output, folders=[checkpoint.path], files=files, overwrite=overwrite) as place:
        work = place.work
        special = tokenizer_files.write(checkpoint, work, tokenizer, end_of_document)
        _json(work / "config.json", {
            "architectures": [family.hugging_face.architecture],
            "model_type": family.hugging_face.model_type,
            "dtype": _NAMES[types.most],
            "torch_dtype": _NAMES[types.most],  # the name before transformers 5
            **config,
            **special,
        })  # fmt: skip
        shards = _shards(pairs(family, model, model.vocab_size or 0), types, max_shard_bytes)
        size = _weights(checkpoint, shards, work, report)
        rounded = None if types.others else DTYPES[types.most]  # in several types, each is what it came in
        proof = parity.compare(checkpoint, work, rounded, tolerance) if verify else None
        place.failed = proof is not None and not proof.equal
        export = Export(
            place.final, family.hugging_face.architecture, types.most,
            sum(weight.numel for weight in checkpoint.weights.values()), size, len(shards), proof,
        )  # fmt: skip
        facts = {
            **asdict(export),
            "output": place.final.name,
            "failed": export.failed,
            "checkpoint": card.facts(checkpoint),
        }
        _json(work / FACTS, facts)
        (work / "README.md").write_text(card.text(checkpoint, export.architecture, types.most, proof), encoding="utf-8")
    return export


_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Types:
    """The types of an export's tensors: `most` of them, and those that have others by name."""

    most: Dtype
    others: Mapping[str, Dtype] = field(default_factory=dict)

    def headers(self, pair: Pair) -> list[Header]:
        """The tensors that a weight is there."""
        return [
            Header(name, DTYPES[self.others.get(name, self.most)], shape)
            for name, shape in zip(pair.names, pair.shapes, strict=True)
        ]


def _types(checkpoint: Checkpoint, asked: Dtype | None) -> _Types:
    imported = checkpoint.manifest.get("imported") or {}
    if asked or "dtype" not in imported:
        return _Types(asked or checkpoint.precision)
    return _Types(imported["dtype"], imported["other_dtypes"])


_Shard = list[tuple[Pair, list[Header]]]
"""The weights of a file, each with its tensors there."""


def _shards(found: Iterable[Pair], types: _Types, most: int) -> list[_Shard]:
    """The weights of each file: as many as stay below `most` bytes, one at least."""
    shards: list[_Shard] = [[]]
    size = 0
    for pair in found:
        headers = types.headers(pair)
        own = sum(header.bytes for header in headers)
        if shards[-1] and size + own > most:
            shards.append([])
            size = 0
        shards[-1].append((pair, headers))
        size += own
    return shards


def _weights(checkpoint: Checkpoint, shards: Sequence[_Shard], output: Path, report: Callable[[int, int], None]) -> int:
    """Write all tensors; gives their bytes."""
    total = sum(header.bytes for shard in shards for _, headers in shard for header in headers)
    done = 0

    def tensors(shard: _Shard) -> Iterator[torch.Tensor]:
        nonlocal done
        for pair, headers in shard:
            whole = checkpoint.whole(pair.weight.name, dtype=reduce(torch.promote_types, (h.dtype for h in headers)))
            for part, header in zip(to_theirs(whole, pair.rule, checkpoint.model), headers, strict=True):
                yield part.to(header.dtype)
                done += header.bytes
            report(done, total)

    places: dict[str, str] = {}
    with synced_behind() as sync:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            headers = [header for _, own in shard for header in own]
            content = tensors(shard)
            write(output / name, headers, content, {"format": "pt"}, checksums=False, check=_finite, sync=sync)
            places |= {header.name: name for header in headers}
    if len(shards) > 1:
        _json(output / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return total


def _finite(name: str, tensor: torch.Tensor) -> None:
    if not all(map(torch.isfinite, tensor.aminmax())):  # in one pass; a NaN is both of them
        raise ConversionError(
            f"{name}: holds numbers that are not finite in this type; use an older checkpoint, or --dtype bf16 or fp32"
        )

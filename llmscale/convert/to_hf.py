"""From a checkpoint to a folder that transformers loads with no code of ours.

A few weights are in memory at a time, whatever the model's size. The folder is written under a hidden name and renamed
when it is whole and, unless told otherwise, proven (`parity.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llmscale.checkpoint.format import Checkpoint
from llmscale.checkpoint.tensor_file import Header, synced_behind, write
from llmscale.convert import card, parity
from llmscale.convert.destination import FACTS, destination
from llmscale.convert.transforms import Pair, pairs, to_theirs
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import ConversionError, UsageError
from llmscale.models.family import families

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Dtype = Literal["bf16", "fp16", "fp32"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
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
    verify: bool = True,
    tolerance: float = parity.TOLERANCE,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Export:
    """Write a checkpoint in Hugging Face's format.

    dtype: of the tensors; what the run computed in when None. tokenizer: the run's own when None; a model without one
    is written without. report: called with (bytes written, bytes in all).

    Raises:
        UsageError: the output is not empty. ConversionError: the format has no place for a part of the model.
        CheckpointError: the checkpoint is broken.
    """
    model = checkpoint.model
    family = families()[model.family]
    vocab_size = model.vocab_size or 0
    dtype = dtype or checkpoint.precision
    config = family.hugging_face.to_config(family.settled(model))
    files = [tokenizer] if tokenizer else []
    with destination(output, folders=[checkpoint.path], files=files, overwrite=overwrite) as place:
        work = place.work
        special = _tokenizer(checkpoint, tokenizer, work, model.max_position_embeddings, vocab_size)
        _json(work / "config.json", {
            "architectures": [family.hugging_face.architecture],
            "model_type": family.hugging_face.model_type,
            "dtype": _NAMES[dtype],
            "torch_dtype": _NAMES[dtype],  # the name before transformers 5
            **special,
            **config,
        })  # fmt: skip
        if special and not (work / "generation_config.json").exists():
            _json(work / "generation_config.json", special)
        shards = _shards(list(pairs(family, model, vocab_size)), DTYPES[dtype], max_shard_bytes)
        size = _weights(checkpoint, shards, DTYPES[dtype], work, report)
        proof = parity.compare(checkpoint, work, DTYPES[dtype], tolerance) if verify else None
        place.failed = proof is not None and not proof.equal
        export = Export(
            place.final, family.hugging_face.architecture, dtype, sum(w.numel for w in checkpoint.weights.values()),
            size, len(shards), proof,
        )  # fmt: skip
        facts = {
            **asdict(export),
            "output": place.final.name,
            "failed": export.failed,
            "checkpoint": card.facts(checkpoint),
        }
        _json(work / FACTS, facts)
        (work / "README.md").write_text(card.text(checkpoint, export.architecture, dtype, proof), encoding="utf-8")
    return export


_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _tokenizer(
    checkpoint: Checkpoint, given: Path | None, output: Path, longest: int, vocab_size: int
) -> dict[str, int]:
    """Copy or make the tokenizer's files; gives the ids of special tokens that config.json names."""
    folder = checkpoint.path.parent.parent
    path = given or folder / "tokenizer.json"
    if not path.exists():
        if given:
            raise UsageError(f"{given}: no tokenizer there; name the run's tokenizer.json")
        return {}
    words = Tokenizer(path)
    if words.vocab_size > vocab_size:
        raise UsageError(
            f"{path}: {words.vocab_size} tokens, and the model has {vocab_size}; name the right --tokenizer"
        )
    (output / "tokenizer.json").write_bytes(words.content)
    if given is None:
        for name in TOKENIZER_FILES[1:]:  # an imported model has its own
            if (folder / name).is_file():
                shutil.copyfile(folder / name, output / name)
    token, number = words.end_of_document_token, words.end_of_document
    if not (output / "tokenizer_config.json").exists():
        _json(output / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token,
            "eos_token": token,
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
        })  # fmt: skip
        _json(output / "special_tokens_map.json", {"bos_token": token, "eos_token": token})
    return {"bos_token_id": number, "eos_token_id": number}


def _shards(found: Sequence[Pair], dtype: torch.dtype, most: int) -> list[list[Pair]]:
    """The weights of each file: as many as stay below `most` bytes, one at least."""
    shards: list[list[Pair]] = [[]]
    size = 0
    for pair in found:
        own = pair.weight.numel * dtype.itemsize
        if shards[-1] and size + own > most:
            shards.append([])
            size = 0
        shards[-1].append(pair)
        size += own
    return shards


def _weights(
    checkpoint: Checkpoint,
    shards: Sequence[Sequence[Pair]],
    dtype: torch.dtype,
    output: Path,
    report: Callable[[int, int], None],
) -> int:
    """Write all tensors; gives their bytes."""
    total = sum(pair.weight.numel for shard in shards for pair in shard) * dtype.itemsize
    done = 0

    def tensors(shard: Sequence[Pair]) -> Iterator[torch.Tensor]:
        nonlocal done
        for pair in shard:
            whole = checkpoint.whole(pair.weight.name, dtype=dtype)
            yield from to_theirs(whole, pair.rule, checkpoint.model)
            done += pair.weight.numel * dtype.itemsize
            report(done, total)

    places: dict[str, str] = {}
    with synced_behind() as sync:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            headers = [
                Header(tensor, dtype, shape)
                for pair in shard
                for tensor, shape in zip(pair.names, pair.shapes, strict=True)
            ]
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

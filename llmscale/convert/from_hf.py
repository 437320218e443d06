"""From a folder in Hugging Face's format to a checkpoint that any layout starts from.

    OUT/checkpoints/step_00000000/   weights alone, in the types that they have there
    OUT/model.yaml                   the model, for a run that goes on from them: `model: {preset: OUT/model.yaml}`
    OUT/tokenizer.json …             the tokenizer's files, and generation_config.json

A few weights are in memory at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from llmscale.checkpoint.format import FORMAT, WEIGHT, Entry
from llmscale.checkpoint.save import step_name, write_records
from llmscale.checkpoint.tensor_file import Header, synced_behind, write
from llmscale.config import yaml_text
from llmscale.config.schema import Model
from llmscale.convert.destination import MODEL, destination
from llmscale.convert.source import Source, json_of
from llmscale.convert.to_hf import DTYPES, SHARD_BYTES
from llmscale.convert.tokenizer_files import FILES, GENERATION, copy, special_ids
from llmscale.convert.transforms import Pair, pairs, to_ours
from llmscale.errors import ConversionError, UsageError
from llmscale.models.cut import local_shape
from llmscale.models.family import EMBEDDING, Family, families
from llmscale.models.hugging_face import UNSUPPORTED
from llmscale.models.init import copy_part
from llmscale.versions import versions


@dataclass(frozen=True)
class Import:
    """What was written. checkpoint: its step folder. tokenizer: the files that came with the model."""

    output: Path
    checkpoint: Path
    family: str
    parameters: int
    model: dict[str, Any]
    tokenizer: tuple[str, ...]


def from_hf(
    folder: Path,
    output: Path,
    *,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Import:
    """Import a model. report: called with (parameters done, parameters in all).

    Raises:
        UsageError: there is no model, or the output is not empty. ConversionError: it is of a kind that is not built,
        or its tensors are not those that its config.json speaks of.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no config.json there; name a folder that save_pretrained wrote")
    config = json_of(folder / "config.json")
    family = _family(config)
    model = _model(family, config)
    source = Source(folder)
    found = _match(list(pairs(family, model, model.vocab_size or 0)), source, family, folder)
    with destination(output, folders=[folder], overwrite=overwrite) as place:
        step = place.work / "checkpoints" / step_name(0)
        step.mkdir(parents=True)
        imported = {
            "folder": folder.resolve().name,
            "architecture": family.hugging_face.architecture,
            "token_ids": special_ids(config),
            **_types(found, source),
        }
        _write(found, source, model, step, imported, report)
        keys = model.model_dump(mode="json", exclude_defaults=True, exclude={"preset"})
        (place.work / MODEL).write_text(yaml_text.write(keys), encoding="utf-8")
        copied = copy(folder, place.work, FILES)
        copy(folder, place.work, [GENERATION])
    parameters = sum(pair.weight.numel for pair, _ in found)
    return Import(output, output / "checkpoints" / step_name(0), family.name, parameters, keys, tuple(copied))


def _family(config: Mapping[str, Any]) -> Family:
    known = {family.hugging_face.model_type: family for family in families().values()}
    kind = config.get("model_type")
    if config.get("auto_map"):
        raise ConversionError("config.json: auto_map names code of the model's own, which is never run here")
    if config.get("quantization_config"):
        raise ConversionError("config.json: quantization_config: a quantised model; supported are fp32, fp16 and bf16")
    if not isinstance(kind, str) or kind not in known:
        reason = UNSUPPORTED.get(str(kind), "is not among the families that are built")
        raise ConversionError(f"config.json: model_type {kind!r}: {reason}; supported: {', '.join(sorted(known))}")
    family = known[kind]
    architectures = config.get("architectures") or [family.hugging_face.architecture]
    if architectures != [family.hugging_face.architecture]:
        raise ConversionError(
            f"config.json: architectures is {architectures}; supported is {family.hugging_face.architecture}"
        )
    return family


def _model(family: Family, config: Mapping[str, Any]) -> Model:
    keys = {"family": family.name, **family.hugging_face.from_config(config)}
    try:
        return Model.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConversionError(f"config.json: {where} would be {first['input']!r}: {first['msg']}") from None


def _match(wanted: Sequence[Pair], source: Source, family: Family, folder: Path) -> list[tuple[Pair, tuple[str, ...]]]:
    """Each weight with the names of its tensors in the files."""
    about = family.hugging_face
    there = {name for name in source.names if not name.endswith(about.ignored)} if about.ignored else source.names
    bare = not any(name.startswith(about.prefix) for name in there)
    found = [(pair, tuple(name.removeprefix(about.prefix) if bare else name for name in pair.names)) for pair in wanted]
    names = {name for _, own in found for name in own}
    if missing := sorted(names - there):
        raise ConversionError(f"{folder}: {len(missing)} tensor(s) missing, such as {missing[0]}; download it again")
    outputs = {rule.there[0] for rule in about.rules if rule.here == "output_layer.weight"}  # also where it is tied
    if extra := sorted(there - names - outputs):
        raise ConversionError(
            f"{folder}: {len(extra)} tensor(s) that config.json does not speak of, such as {extra[0]}; a model of "
            f"{about.architecture} has none of this name"
        )
    for pair, own in found:
        for name, shape in zip(own, pair.shapes, strict=True):
            _, has = source.about(name)
            if has != shape:
                raise ConversionError(f"{folder}: {name} is {list(has)}, and by config.json {list(shape)}")
    embedding = next(own[0] for pair, own in found if pair.weight.name == EMBEDDING)
    for name in sorted(outputs & there - names):
        if source.about(name) != source.about(embedding) or not torch.equal(source.read(name), source.read(embedding)):
            raise ConversionError(
                f"{folder}: {name} is not {embedding}, to which config.json ties it; transformers uses both: set "
                "tie_word_embeddings to false, or remove the tensor"
            )
    return found


def _type(names: Sequence[str], source: Source) -> torch.dtype:
    """Of a weight here: one that holds every value of the tensors that it is made of."""
    return reduce(torch.promote_types, (source.about(name)[0] for name in names))


def _types(found: Sequence[tuple[Pair, tuple[str, ...]]], source: Source) -> dict[str, Any]:
    """What the model's tensors came in, so that they leave in it: most of them `dtype`, each other one by name."""
    tensors = [
        (name, source.about(own)[0], math.prod(shape))
        for pair, names in found
        for name, own, shape in zip(pair.names, names, pair.shapes, strict=True)
    ]
    elements: Counter[torch.dtype] = Counter()
    for _, dtype, numel in tensors:
        elements[dtype] += numel
    ((most, _),) = elements.most_common(1)
    names_of = {dtype: name for name, dtype in DTYPES.items()}
    others = {name: names_of[dtype] for name, dtype, _ in tensors if dtype != most}
    return {"dtype": names_of[most], "other_dtypes": others}


def _write(
    found: Sequence[tuple[Pair, tuple[str, ...]]],
    source: Source,
    model: Model,
    step: Path,
    imported: Mapping[str, Any],
    report: Callable[[int, int], None],
) -> None:
    index: dict[str, list[dict[str, Any]]] = {}
    files: dict[str, dict[str, Any]] = {}
    total = sum(pair.weight.numel for pair, _ in found)
    done = 0

    def tensors(part: Sequence[tuple[Pair, tuple[str, ...]]]) -> Iterator[torch.Tensor]:
        nonlocal done
        for pair, names in part:
            whole = to_ours([source.read(name) for name in names], pair.rule, model)
            if (shape := local_shape(pair.weight, 1)) != tuple(whole.shape):
                local = whole.new_empty(shape)
                copy_part(local, whole, pair.weight, 0, 1)
                whole = local
            yield whole.reshape(-1)
            done += pair.weight.numel
            report(done, total)

    with synced_behind() as sync:
        for number, part in enumerate(_files(found, source), 1):
            file = f"weights_{number:05d}.safetensors"
            headers = []
            for pair, names in part:
                numel = math.prod(local_shape(pair.weight, 1))
                key = Entry(file, 0, 1, 0, numel, {}).key(WEIGHT, pair.weight.name)
                headers.append(Header(key, _type(names, source), (numel,)))
            done_file = write(step / file, headers, tensors(part), sync=sync)
            files[file] = {"bytes": done_file.bytes, "head_crc32": done_file.head_crc32}
            for (pair, _), header in zip(part, headers, strict=True):
                entry = Entry(file, 0, 1, 0, header.shape[0], {WEIGHT: done_file.crc32[header.name]})
                index[pair.weight.name] = [asdict(entry)]
    kinds = {_type(names, source) for _, names in found}
    manifest = {
        "format": FORMAT,
        "step": 0,
        "tokens": 0,
        "data": None,
        "layout": {},
        "versions": versions(),
        "config": {
            "model": model.model_dump(mode="json"),
            "training": {"precision": "bf16" if kinds == {torch.bfloat16} else "fp32"},
        },
        "imported": imported,
        "states": [WEIGHT],
    }
    write_records(step, manifest, index, files)


def _files(
    found: Sequence[tuple[Pair, tuple[str, ...]]], source: Source
) -> Iterator[list[tuple[Pair, tuple[str, ...]]]]:
    """The weights of each file, of at most SHARD_BYTES where a weight is no longer."""
    part: list[tuple[Pair, tuple[str, ...]]] = []
    size = 0
    for pair, names in found:
        own = pair.weight.numel * _type(names, source).itemsize
        if part and size + own > SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append((pair, names))
        size += own
    yield part

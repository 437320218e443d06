"""From a folder in Hugging Face's format to a checkpoint that any layout starts from.

    OUT/checkpoints/step_00000000/   weights alone, in the types that they have there
    OUT/model.yaml                   the model, for a run that goes on from them: `model: {preset: OUT/model.yaml}`
    OUT/tokenizer.json …             the tokenizer's files

One weight is in memory at a time. Nothing in the folder is run: no code, no pickle.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from llmscale.checkpoint.format import FORMAT, WEIGHT, Entry
from llmscale.checkpoint.save import step_name, write_records
from llmscale.checkpoint.tensor_file import Header, Reader, synced_behind, write
from llmscale.config import yaml_text
from llmscale.config.schema import Model
from llmscale.convert.destination import MODEL, destination
from llmscale.convert.to_hf import SHARD_BYTES, TOKENIZER_FILES
from llmscale.convert.transforms import Pair, pairs, to_ours
from llmscale.errors import ConversionError, UsageError
from llmscale.models.cut import local_shape
from llmscale.models.family import Family, families
from llmscale.models.hugging_face import UNSUPPORTED
from llmscale.models.init import copy_part
from llmscale.versions import versions

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Import:
    """What was written. checkpoint: its step folder."""

    output: Path
    checkpoint: Path
    family: str
    parameters: int
    model: dict[str, Any]


class Source:
    """The tensors of a folder, by name; read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ConversionError where there are no safetensors files, or broken ones."""
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            places = _json(index).get("weight_map")
            if not isinstance(places, dict):
                raise ConversionError(f"{index}: no weight_map; download the folder again")
            names = sorted(set(places.values()))
            if strange := [name for name in names if Path(name).name != name]:
                raise ConversionError(f"{index}: {strange[0]!r} is no file of this folder")
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            found = f"holds {pickles[0]}, a pickle, which can run any code" if pickles else "holds no .safetensors file"
            raise ConversionError(f"{folder}: {found}; save the model with save_pretrained(safe_serialization=True)")
        self._folder = folder
        self._opened: dict[str, Reader] = {}
        self._file_of: dict[str, str] = {}
        for name in names:
            try:
                self._opened[name] = Reader(folder / name)
            except (OSError, ValueError) as error:
                raise ConversionError(f"{folder / name}: cannot be read ({error}); download it again") from None
            self._file_of |= dict.fromkeys(self._opened[name].names, name)

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._file_of)

    def about(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """(type, shape) of a tensor. Raises ConversionError for a type that no weight has."""
        kind, shape = self._opened[self._file_of[name]].about(name)
        if kind not in _TYPES:
            raise ConversionError(
                f"{self._folder}: {name} is of type {kind}: a quantised model; supported is {', '.join(_TYPES)}"
            )
        return _TYPES[kind], shape

    def read(self, name: str) -> torch.Tensor:
        """A tensor."""
        try:
            return self._opened[self._file_of[name]].read(name)
        except (OSError, ValueError) as error:
            raise ConversionError(f"{self._folder / self._file_of[name]}: {name} cannot be read ({error})") from None


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
    config = _json(folder / "config.json")
    family = _family(config)
    model = _model(family, config)
    source = Source(folder)
    found = _match(list(pairs(family, model, model.vocab_size or 0)), source, family, folder)
    with destination(output, folders=[folder], overwrite=overwrite) as place:
        step = place.work / "checkpoints" / step_name(0)
        step.mkdir(parents=True)
        _write(
            found,
            source,
            model,
            step,
            {"folder": folder.name, "architecture": family.hugging_face.architecture},
            report,
        )
        keys = model.model_dump(mode="json", exclude_defaults=True, exclude={"preset"})
        (place.work / MODEL).write_text(yaml_text.write(keys), encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place.work / name)
    parameters = sum(pair.weight.numel for pair, _ in found)
    return Import(output, output / "checkpoints" / step_name(0), family.name, parameters, keys)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: a JSON object is wanted; download it again")
    return content


def _family(config: Mapping[str, Any]) -> Family:
    known = {family.hugging_face.model_type: family for family in families().values()}
    kind = config.get("model_type")
    if config.get("auto_map"):
        raise ConversionError("config.json: auto_map names code of the model's own, which is never run here")
    if config.get("quantization_config"):
        raise ConversionError("config.json: quantization_config: a quantised model; supported are fp32, fp16 and bf16")
    if kind not in known:
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
    return found


def _write(
    found: Sequence[tuple[Pair, tuple[str, ...]]],
    source: Source,
    model: Model,
    step: Path,
    imported: Mapping[str, str],
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
                headers.append(Header(key, source.about(names[0])[0], (numel,)))
            done_file = write(step / file, headers, tensors(part), sync=sync)
            files[file] = {"bytes": done_file.bytes, "head_crc32": done_file.head_crc32}
            for (pair, _), header in zip(part, headers, strict=True):
                entry = Entry(file, 0, 1, 0, header.shape[0], {WEIGHT: done_file.crc32[header.name]})
                index[pair.weight.name] = [asdict(entry)]
    kinds = {source.about(names[0])[0] for _, names in found}
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
        own = pair.weight.numel * source.about(names[0])[0].itemsize
        if part and size + own > SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append((pair, names))
        size += own
    yield part

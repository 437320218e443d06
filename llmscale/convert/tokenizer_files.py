"""A model's tokenizer and the ids of its special tokens, in imports and exports.

What came with an imported model goes out with it: every file of the tokenizer, generation_config.json, and the ids of
config.json as they stood there, lists and nulls included. An export of a run says that documents end with the id that
its data was built with, `end_of_document` in the checkpoint's manifest, and begin behind it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmscale.checkpoint.format import Checkpoint
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import UsageError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model*",
    "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.*", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Patterns of the names that transformers gives the files of these families' tokenizers."""
GENERATION = "generation_config.json"


def copy(source: Path, target: Path, patterns: Sequence[str]) -> list[str]:
    """Copy what is there; gives the names."""
    found = sorted(path for pattern in patterns for path in source.glob(pattern) if path.is_file())
    names = [path.relative_to(source) for path in found]
    for path, name in zip(found, names, strict=True):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    return [str(name) for name in names]


def special_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of special tokens: bos_token_id and the like."""
    return {key: value for key, value in config.items() if key.endswith("_token_id")}


def write(checkpoint: Checkpoint, output: Path, given: Path | None, end_of_document: str | None) -> dict[str, Any]:
    """Write the files of an export; gives the ids for its config.json.

    given: a tokenizer in place of the run's own. end_of_document: a token in place of the one that the manifest, or of
    an import its config.json, tells.

    Raises:
        UsageError: there is no such tokenizer, it is not the model's, or nothing tells what ends a document.
    """
    model, manifest = checkpoint.model, checkpoint.manifest
    imported, folder = manifest.get("imported") or {}, checkpoint.path.parent.parent
    path = given or folder / "tokenizer.json"
    if given and not given.exists():
        raise UsageError(f"{given}: no tokenizer there; name the run's tokenizer.json")
    if imported:
        copy(folder, output, [GENERATION] if given else [GENERATION, *FILES])
    ids: dict[str, Any] | None = imported.get("token_ids")
    words = None
    told = ids is not None and (output / "tokenizer_config.json").exists()
    if given or end_of_document or (path.exists() and not told):
        known = manifest.get("end_of_document") if ids is None else _first(ids.get("eos_token_id"))
        words = Tokenizer(path, end_of_document or known)
        if words.vocab_size > (model.vocab_size or 0):
            raise UsageError(
                f"{path}: {words.vocab_size} tokens, and the model has {model.vocab_size}; name the right --tokenizer"
            )
    if ids is None:
        end = words.end_of_document if words else manifest.get("end_of_document")
        ids = {} if end is None else {"bos_token_id": end, "eos_token_id": end}
        if ids and not (output / GENERATION).exists():
            _json(output / GENERATION, ids)
    elif words and end_of_document:
        ids = {**ids, "eos_token_id": words.end_of_document}
        if (output / GENERATION).exists():
            said = json.loads((output / GENERATION).read_text(encoding="utf-8"))
            _json(output / GENERATION, {**said, "eos_token_id": words.end_of_document})
    if words and not (output / "tokenizer.json").exists():
        (output / "tokenizer.json").write_bytes(words.content)
    if words and not (output / "tokenizer_config.json").exists():
        numbers = {key: _first(ids.get(f"{key}_id")) for key in ("bos_token", "eos_token", "pad_token")}
        tokens = {key: None if number is None else words.token(number) for key, number in numbers.items()}
        names = {key: token for key, token in tokens.items() if token is not None}
        _json(output / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "model_max_length": model.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        })  # fmt: skip
        _json(output / "special_tokens_map.json", names)
    return ids


def _first(ids: Any) -> int | None:
    """An id, or the first of several."""
    found = ids[0] if isinstance(ids, list) and ids else ids
    return found if isinstance(found, int) else None


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""The tensors of a folder in Hugging Face's format. Nothing in it is run: no code, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llmscale.checkpoint.tensor_file import Reader
from llmscale.errors import ConversionError

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source:
    """The tensors of a folder, by name; read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ConversionError where there are no safetensors files, or broken ones."""
        # In the order in which transformers looks; a folder may hold the model in another form too.
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").is_file():
            names = ["model.safetensors"]
        elif index.is_file():
            places = json_of(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise ConversionError(f"{index}: no weight_map of tensors to files; download the folder again")
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


def json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConversionError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: a JSON object is wanted; download it again")
    return content

"""What a family is in Hugging Face's format: the keys of its config.json and the names of its tensors. No torch.

Every family file has such a value beside its parts. `convert/` reads it in both directions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmscale.config.schema import Model
from llmscale.errors import ConversionError

Form = Literal["same", "qkv", "stacked_qkv", "gate_up"]
"""How one weight here is made of those there.

same: it is the one tensor there. qkv: of three, query, key and value, whose rows are interleaved here by query group.
stacked_qkv: of one, [query; key; value] one below the other, interleaved here likewise. gate_up: [gate; up] of two.
"""


@dataclass(frozen=True)
class Rule:
    """One weight here and what it is there; {layer} stands for the layer's number in all names."""

    here: str
    there: tuple[str, ...]
    form: Form = "same"
    transposed: bool = False
    """Whether the tensors there are [in, out], as GPT-2's matrices are."""


UNSUPPORTED = {
    "mixtral": "mixture-of-experts layers are not built",
    "qwen2_moe": "mixture-of-experts layers are not built",
    "qwen3_moe": "mixture-of-experts layers are not built",
    "deepseek_v3": "mixture-of-experts layers and latent attention are not built",
    "gemma2": "its soft caps, alternating windows and norms behind attention and MLP are not built",
    "gemma3": "it reads images, and its alternating windows are not built",
    "gemma3_text": "its alternating windows and norms behind attention and MLP are not built",
    "gpt_oss": "mixture-of-experts layers and attention sinks are not built",
    "phi3": "its fused projections and long rotary factors are not built",
}
"""model_type -> why it is refused, of families that people ask for."""


@dataclass(frozen=True)
class HuggingFace:
    """A family in Hugging Face's format."""

    model_type: str
    """`model_type` in config.json."""
    architecture: str
    """`architectures` in config.json: the class that transformers loads."""
    prefix: str
    """What names begin with there, but for the output layer's; older files leave it out."""
    rules: tuple[Rule, ...]
    """One for each weight that a model of the family may have; those that a model lacks are passed over."""
    to_config: Callable[[Model], dict[str, Any]]
    """The keys of config.json besides model_type, architectures and dtype, of a model in which nothing is null that the
    family settles (`Family.settled`).

    Raises:
        ConversionError: the format has no key for a part of the model.
    """
    from_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Keys of the config's `model` section, vocab_size among them, from those of config.json.

    Raises:
        ConversionError: the model has a part that is not built here; names the key and its value.
    """
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors that are no weights: masks and rotary tables of older files."""


def require(config: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that change what the model computes. wanted: key -> the values that are built; absent is right.

    Raises:
        ConversionError: names the first key, its value, and what is supported.
    """
    for key, values in wanted.items():
        if key in config and config[key] not in values:
            said = " or ".join(json.dumps(value) for value in values)
            raise ConversionError(f"config.json: {key} is {json.dumps(config[key])}; supported is {said}")


def size_of(config: Mapping[str, Any], key: str, absent: int | None = None) -> int:
    """A size. absent: what it is where the key is not there or null; None: it has to be there.

    Raises:
        ConversionError: it is not, or is none.
    """
    value = config.get(key)
    if value is None:
        value = absent
    if value is None:
        raise ConversionError(f"config.json: no {key}; it is not the config of a {config.get('model_type')} model")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConversionError(f"config.json: {key} is {json.dumps(value)}; a whole number above 0 is wanted")
    return value


def number_of(config: Mapping[str, Any], key: str, absent: float) -> float:
    """A number above 0, `absent` where there is none.

    Raises:
        ConversionError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConversionError(f"config.json: {key} is {json.dumps(value)}; a number above 0 is wanted")
    return float(value)


def flag_of(config: Mapping[str, Any], key: str, absent: bool) -> bool:
    """A truth value, `absent` where there is none; null is false, as in transformers.

    Raises:
        ConversionError: it is something else.
    """
    value = config.get(key, absent)
    if not isinstance(value, bool | None):
        raise ConversionError(f"config.json: {key} is {json.dumps(value)}; true or false is wanted")
    return bool(value)


def dropout_of(config: Mapping[str, Any], keys: Sequence[str], absent: float) -> Any:
    """The one dropout of all these keys, `absent` what each means where it is not there.

    Raises:
        ConversionError: they differ.
    """
    values = [config.get(key, absent) for key in keys]
    if any(value != values[0] for value in values):
        said = ", ".join(f"{key} {json.dumps(value)}" for key, value in zip(keys, values, strict=True))
        raise ConversionError(f"config.json: {said}; supported is one dropout for all: write the same to each")
    return values[0]

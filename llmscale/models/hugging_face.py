"""What a family is in Hugging Face's format: the keys of its config.json and the names of its tensors. No torch.

Every family file has such a value beside its parts. `convert/` reads it in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llmscale.config.schema import Model
    from llmscale.models.family import Family

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
    """Whether the tensors there are [in, out], as GPT-2's are."""


@dataclass(frozen=True)
class HuggingFace:
    """A family in Hugging Face's format."""

    model_type: str
    """`model_type` in config.json."""
    architecture: str
    """`architectures` in config.json: the class that transformers loads."""
    rules: tuple[Rule, ...]
    """One for each weight that a model of the family may have; those that a model lacks are passed over."""
    to_config: Callable[[Family, Model, int], dict[str, Any]]
    """(family, model, vocab_size): the keys of config.json besides model_type, architectures and dtype."""
    from_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Keys of the config's `model` section, vocab_size among them, from those of config.json.

    Raises:
        ConversionError: the model has a part that is not built here; names the key and its value.
    """

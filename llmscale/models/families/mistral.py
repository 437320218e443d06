"""Mistral: Llama's parts. Windows of attention shorter than the longest sequence are not built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmscale.config.schema import Model
from llmscale.errors import ConversionError
from llmscale.models import llama_like
from llmscale.models.family import Family
from llmscale.models.hugging_face import HuggingFace, require, size_of


def _to_config(model: Model) -> dict[str, Any]:
    return {**llama_like.to_config(model), "sliding_window": None}


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, {"hidden_act": ("silu", "swish")})
    longest = size_of(config, "max_position_embeddings")
    null = "sliding_window" in config and config["sliding_window"] is None
    window = longest if null else size_of(config, "sliding_window", 4096)  # transformers' default
    if window < longest:
        raise ConversionError(
            f"config.json: sliding_window is {window}; supported is null, or at least "
            f"max_position_embeddings, {longest}: lower that to {window} for a model of sequences that short"
        )
    return llama_like.from_config(config, groups=8)


FAMILY = Family(
    name="mistral",
    norm="rmsnorm",
    activation="swiglu",
    positions="rope",
    bias=False,
    tie_embeddings=False,
    hugging_face=HuggingFace(
        model_type="mistral",
        architecture="MistralForCausalLM",
        prefix=llama_like.PREFIX,
        rules=llama_like.RULES,
        to_config=_to_config,
        from_config=_from_config,
        ignored=llama_like.IGNORED,
    ),
)

"""Qwen3: Llama's parts, and RMSNorm on each head's query and key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmscale.config.schema import Model
from llmscale.models import llama_like
from llmscale.models.family import Family
from llmscale.models.hugging_face import HuggingFace, require


def _to_config(model: Model) -> dict[str, Any]:
    return {**llama_like.to_config(model), "attention_bias": False, "use_sliding_window": False}


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, {"hidden_act": ("silu", "swish"), "attention_bias": (False,)})
    llama_like.full_attention(config)
    return llama_like.from_config(config, groups=32, head_dim=128)


FAMILY = Family(
    name="qwen3",
    norm="rmsnorm",
    activation="swiglu",
    positions="rope",
    bias=False,
    tie_embeddings=False,
    qk_norm=True,
    hugging_face=HuggingFace(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        prefix=llama_like.PREFIX,
        rules=llama_like.RULES,
        to_config=_to_config,
        from_config=_from_config,
        ignored=llama_like.IGNORED,
    ),
)

"""Llama 2 and 3: RMSNorm, SwiGLU, rotary positions, no biases, grouped queries where the config asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmscale.config.schema import Model
from llmscale.errors import ConversionError
from llmscale.models import llama_like
from llmscale.models.family import Family
from llmscale.models.hugging_face import HuggingFace, require


def _to_config(model: Model) -> dict[str, Any]:
    if model.hidden_size % model.num_attention_heads:
        raise ConversionError(
            f"model.num_attention_heads: {model.num_attention_heads} heads do not divide hidden_size "
            f"{model.hidden_size}, which transformers' Llama wants, whatever head_dim is"
        )
    return {**llama_like.to_config(model), "attention_bias": False, "mlp_bias": False}


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)})
    return llama_like.from_config(config)


FAMILY = Family(
    name="llama",
    norm="rmsnorm",
    activation="swiglu",
    positions="rope",
    bias=False,
    tie_embeddings=False,
    hugging_face=HuggingFace(
        model_type="llama",
        architecture="LlamaForCausalLM",
        prefix=llama_like.PREFIX,
        rules=llama_like.RULES,
        to_config=_to_config,
        from_config=_from_config,
        ignored=llama_like.IGNORED,
    ),
)

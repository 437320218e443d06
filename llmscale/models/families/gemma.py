"""Gemma, the first: Llama's parts with GeGLU, norms by 1 + weight, scaled embeddings and heads of their own size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmscale.config.schema import Model
from llmscale.models import llama_like
from llmscale.models.family import Family
from llmscale.models.hugging_face import HuggingFace, require

GELU = "gelu_pytorch_tanh"


def _to_config(model: Model) -> dict[str, Any]:
    return {
        **llama_like.to_config(model),
        "attention_bias": False,
        "hidden_act": GELU,
        "hidden_activation": GELU,
        # Gemma's own is 0, of which transformers does not train the embedding.
        "pad_token_id": None,
    }


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    # The first files say "gelu" and mean the tanh form; transformers reads them so.
    require(config, {"hidden_act": (GELU, "gelu", None), "hidden_activation": (GELU, None)})
    require(config, {"attention_bias": (False,), "use_bidirectional_attention": (False, None)})
    return llama_like.from_config(config, groups=16, head_dim=256, tied=True)


FAMILY = Family(
    name="gemma",
    norm="rmsnorm_plus_one",
    activation="geglu",
    positions="rope",
    bias=False,
    tie_embeddings=True,
    scaled_embeddings=True,
    hugging_face=HuggingFace(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        prefix=llama_like.PREFIX,
        rules=llama_like.RULES,
        to_config=_to_config,
        from_config=_from_config,
        ignored=llama_like.IGNORED,
    ),
)

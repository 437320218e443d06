"""What Llama, Mistral and Qwen share in Hugging Face's format: names of tensors, keys of config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmscale.config.schema import Model
from llmscale.errors import ConversionError
from llmscale.models.hugging_face import Rule, flag_of, number_of, require, size_of

PREFIX = "model."
IGNORED = ("rotary_emb.inv_freq",)
_LAYER, _THERE = "decoder.layers.{layer}", "model.layers.{layer}"
RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Rule(f"{_LAYER}.input_layernorm.weight", (f"{_THERE}.input_layernorm.weight",)),
    *(
        Rule(
            f"{_LAYER}.self_attention.linear_qkv.{kind}",
            tuple(f"{_THERE}.self_attn.{part}_proj.{kind}" for part in "qkv"),
            "qkv",
        )
        for kind in ("weight", "bias")
    ),
    Rule(f"{_LAYER}.self_attention.q_layernorm.weight", (f"{_THERE}.self_attn.q_norm.weight",)),
    Rule(f"{_LAYER}.self_attention.k_layernorm.weight", (f"{_THERE}.self_attn.k_norm.weight",)),
    Rule(f"{_LAYER}.self_attention.linear_proj.weight", (f"{_THERE}.self_attn.o_proj.weight",)),
    Rule(f"{_LAYER}.pre_mlp_layernorm.weight", (f"{_THERE}.post_attention_layernorm.weight",)),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.weight",
        (f"{_THERE}.mlp.gate_proj.weight", f"{_THERE}.mlp.up_proj.weight"),
        "gate_up",
    ),
    Rule(f"{_LAYER}.mlp.linear_fc2.weight", (f"{_THERE}.mlp.down_proj.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",)),
)


def to_config(model: Model) -> dict[str, Any]:
    """The keys that all of these families have.

    Raises:
        ConversionError: the model has a part that the format has no key for.
    """
    if model.rotary_fraction != 1.0:
        raise ConversionError(
            f"model.rotary_fraction is {model.rotary_fraction}; {model.family} turns whole heads there"
        )
    scaling = None
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    return {
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def from_config(
    config: Mapping[str, Any], *, groups: int | None = None, head_dim: int | None = None, tied: bool = False
) -> dict[str, Any]:
    """The keys of `model`.

    groups, head_dim, tied: what absent num_key_value_heads, head_dim and tie_word_embeddings mean to the family's class
    in transformers; None: as many as heads, and hidden_size / heads.

    Raises:
        ConversionError: a key is missing, or says something that is not built.
    """
    theta, scaling, fraction = rotary(config)
    if fraction not in (None, 1.0):
        raise ConversionError(f"config.json: partial_rotary_factor is {fraction}; supported is 1.0")
    # Where they are null, and not absent, they follow from the others.
    groups = None if "num_key_value_heads" in config else groups
    head_dim = None if "head_dim" in config else head_dim
    hidden, heads = size_of(config, "hidden_size"), size_of(config, "num_attention_heads")
    return {
        "num_layers": size_of(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": size_of(config, "num_key_value_heads", groups or heads),
        "head_dim": size_of(config, "head_dim", head_dim or hidden // heads),
        "ffn_hidden_size": size_of(config, "intermediate_size"),
        "vocab_size": size_of(config, "vocab_size"),
        "max_position_embeddings": size_of(config, "max_position_embeddings"),
        "tie_embeddings": flag_of(config, "tie_word_embeddings", tied),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "init_std": config.get("initializer_range", 0.02),
    }


def full_attention(config: Mapping[str, Any]) -> None:
    """Refuse Qwen's windows of attention, which `use_sliding_window` turns on, for the layers of `layer_types`.

    Raises:
        ConversionError: there are some.
    """
    require(config, {"use_sliding_window": (False, None)})
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ConversionError(f"config.json: layer_types is {json.dumps(kinds)}; a list is wanted")
    if others := sorted({str(kind) for kind in kinds} - {"full_attention"}):
        raise ConversionError(f"config.json: layer_types holds {', '.join(others)}; supported is full_attention")


def rotary(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, float | None]:
    """(theta, Llama 3's stretch if there is one, the share of a head that turns if it is said).

    transformers 5 keeps all in rope_parameters, 4 beside it and in rope_scaling; where there are both, rope_scaling is
    what transformers reads.

    Raises:
        ConversionError: another kind of scaling.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise ConversionError(f"config.json: {key} is {json.dumps(parameters)}; an object is wanted")
    theta = number_of(parameters, "rope_theta", number_of(config, "rope_theta", 10000.0))
    fraction = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if parts := sorted(key for key, value in parameters.items() if isinstance(value, Mapping)):
        raise ConversionError(
            f"config.json: rope_parameters differ between {', '.join(parts)}; supported is one for all"
        )
    if kind == "default":
        return theta, None, fraction
    if kind != "llama3":
        raise ConversionError(f"config.json: rope_type is {kind!r}; supported is 'default' or 'llama3'")
    given = {"original_max_position_embeddings": config.get("max_position_embeddings"), **parameters}
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if given.get(key) is None]:
        raise ConversionError(f"config.json: rope_type is 'llama3', and there is no {', '.join(missing)}")
    return theta, {key: given[key] for key in keys}, fraction

"""What Llama, Mistral and Qwen share in Hugging Face's format: names of tensors, keys of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmscale.config.schema import Model
from llmscale.errors import ConversionError
from llmscale.models.hugging_face import Rule, require, value_of

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


def from_config(config: Mapping[str, Any], tied: bool = False) -> dict[str, Any]:
    """The keys of `model`. tied: what an absent tie_word_embeddings means.

    Raises:
        ConversionError: a key is missing, or says something that is not built.
    """
    require(config, {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1.0, None), "pretraining_tp": (1,)})
    theta, scaling = rotary(config)
    heads = value_of(config, "num_attention_heads")
    return {
        "num_layers": value_of(config, "num_hidden_layers"),
        "hidden_size": value_of(config, "hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_hidden_size": value_of(config, "intermediate_size"),
        "vocab_size": value_of(config, "vocab_size"),
        "max_position_embeddings": value_of(config, "max_position_embeddings"),
        "tie_embeddings": bool(config.get("tie_word_embeddings", tied)),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "init_std": config.get("initializer_range", 0.02),
    }


def rotary(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, Llama 3's stretch if there is one). transformers 5 keeps both in rope_parameters, 4 apart.

    Raises:
        ConversionError: another kind of scaling.
    """
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ConversionError(f"config.json: rope_type is {kind!r}; supported is 'default' or 'llama3'")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return float(theta), {key: value_of(parameters, key) for key in keys}

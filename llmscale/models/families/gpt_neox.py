"""GPT-NeoX and Pythia: LayerNorm, exact GELU, biases, rotary positions on a part of each head, and attention beside the
MLP, both of the same input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmscale.config.schema import Model
from llmscale.errors import ConversionError
from llmscale.models.family import Family
from llmscale.models.hugging_face import HuggingFace, Rule, dropout_of, flag_of, require, size_of
from llmscale.models.llama_like import rotary

_LAYER, _THERE = "decoder.layers.{layer}", "gpt_neox.layers.{layer}"


def _rules() -> Iterator[Rule]:
    yield Rule("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",))
    for kind in ("weight", "bias"):
        for here, there in (
            ("input_layernorm", "input_layernorm"),
            ("self_attention.linear_qkv", "attention.query_key_value"),  # head by head, as here
            ("self_attention.linear_proj", "attention.dense"),
            ("pre_mlp_layernorm", "post_attention_layernorm"),
            ("mlp.linear_fc1", "mlp.dense_h_to_4h"),
            ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
        ):
            yield Rule(f"{_LAYER}.{here}.{kind}", (f"{_THERE}.{there}.{kind}",))
        yield Rule(f"decoder.final_layernorm.{kind}", (f"gpt_neox.final_layer_norm.{kind}",))
    yield Rule("output_layer.weight", ("embed_out.weight",))


def _to_config(model: Model) -> dict[str, Any]:
    heads, hidden = model.num_attention_heads, model.hidden_size
    if model.query_groups != heads or model.head_size * heads != hidden:
        raise ConversionError(
            "model.num_query_groups, model.head_dim: GPT-NeoX's format knows only equal heads that fill hidden_size"
        )
    if model.rope_scaling is not None:
        raise ConversionError("model.rope_scaling: GPT-NeoX's format has none of this kind")
    return {
        "attention_bias": True,
        "attention_dropout": model.dropout,
        "hidden_act": "gelu",
        "hidden_dropout": model.dropout,
        "hidden_size": hidden,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "layer_norm_eps": model.norm_eps,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": heads,
        "num_hidden_layers": model.num_layers,
        "rotary_emb_base": model.rope_theta,
        "rotary_pct": model.rotary_fraction,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": model.vocab_size,
    }


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, {"hidden_act": ("gelu",), "use_parallel_residual": (True,), "attention_bias": (True,)})
    theta, scaling, fraction = rotary({"rope_theta": config.get("rotary_emb_base"), **config})
    if scaling is not None:
        raise ConversionError("config.json: rope_type is 'llama3'; supported for gpt_neox is 'default'")
    if fraction is None:
        fraction = config.get("rotary_pct", 0.25)
    return {
        "num_layers": size_of(config, "num_hidden_layers"),
        "hidden_size": size_of(config, "hidden_size"),
        "num_attention_heads": size_of(config, "num_attention_heads"),
        "ffn_hidden_size": size_of(config, "intermediate_size"),
        "vocab_size": size_of(config, "vocab_size"),
        "max_position_embeddings": size_of(config, "max_position_embeddings"),
        "tie_embeddings": flag_of(config, "tie_word_embeddings", False),
        "dropout": dropout_of(config, ("hidden_dropout", "attention_dropout"), 0.0),
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "rope_theta": theta,
        "rotary_fraction": fraction,
        "init_std": config.get("initializer_range", 0.02),
    }


FAMILY = Family(
    name="gpt_neox",
    norm="layernorm",
    activation="gelu",
    positions="rope",
    bias=True,
    tie_embeddings=False,
    parallel_residual=True,
    hugging_face=HuggingFace(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        prefix="gpt_neox.",
        rules=tuple(_rules()),
        to_config=_to_config,
        from_config=_from_config,
        ignored=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
    ),
)

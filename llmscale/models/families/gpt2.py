"""GPT-2 and GPT-3: LayerNorm, GELU in its tanh form, learned positions, biases everywhere, tied embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmscale.config.schema import Model
from llmscale.errors import ConversionError
from llmscale.models.family import Family
from llmscale.models.hugging_face import HuggingFace, Rule, dropout_of, flag_of, require, size_of

_LAYER, _THERE = "decoder.layers.{layer}", "transformer.h.{layer}"


def _rules() -> Iterator[Rule]:
    yield Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",))
    yield Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",))
    for kind in ("weight", "bias"):
        matrix = kind == "weight"  # Conv1D's are [in, out]
        yield Rule(f"{_LAYER}.input_layernorm.{kind}", (f"{_THERE}.ln_1.{kind}",))
        there = (f"{_THERE}.attn.c_attn.{kind}",)
        yield Rule(f"{_LAYER}.self_attention.linear_qkv.{kind}", there, "stacked_qkv", matrix)
        there = (f"{_THERE}.attn.c_proj.{kind}",)
        yield Rule(f"{_LAYER}.self_attention.linear_proj.{kind}", there, "same", matrix)
        yield Rule(f"{_LAYER}.pre_mlp_layernorm.{kind}", (f"{_THERE}.ln_2.{kind}",))
        yield Rule(f"{_LAYER}.mlp.linear_fc1.{kind}", (f"{_THERE}.mlp.c_fc.{kind}",), "same", matrix)
        yield Rule(f"{_LAYER}.mlp.linear_fc2.{kind}", (f"{_THERE}.mlp.c_proj.{kind}",), "same", matrix)
        yield Rule(f"decoder.final_layernorm.{kind}", (f"transformer.ln_f.{kind}",))
    yield Rule("output_layer.weight", ("lm_head.weight",))


def _to_config(model: Model) -> dict[str, Any]:
    heads, hidden = model.num_attention_heads, model.hidden_size
    if model.query_groups != heads or model.head_size * heads != hidden:
        raise ConversionError(
            "model.num_query_groups, model.head_dim: GPT-2's format knows only equal heads that fill hidden_size"
        )
    return {
        "activation_function": "gelu_new",
        "attn_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "initializer_range": model.init_std,
        "layer_norm_epsilon": model.norm_eps,
        "n_embd": hidden,
        "n_head": heads,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_positions": model.max_position_embeddings,
        "resid_pdrop": model.dropout,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    require(
        config,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    )
    hidden = size_of(config, "n_embd")
    return {
        "num_layers": size_of(config, "n_layer"),
        "hidden_size": hidden,
        "num_attention_heads": size_of(config, "n_head"),
        "ffn_hidden_size": size_of(config, "n_inner", 4 * hidden),
        "vocab_size": size_of(config, "vocab_size"),
        "max_position_embeddings": size_of(config, "n_positions"),
        "tie_embeddings": flag_of(config, "tie_word_embeddings", True),
        "dropout": dropout_of(config, ("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.1),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "init_std": config.get("initializer_range", 0.02),
    }


FAMILY = Family(
    name="gpt2",
    norm="layernorm",
    activation="gelu_tanh",
    positions="learned",
    bias=True,
    tie_embeddings=True,
    hugging_face=HuggingFace(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        rules=tuple(_rules()),
        to_config=_to_config,
        from_config=_from_config,
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
)

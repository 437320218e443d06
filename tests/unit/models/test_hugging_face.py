"""config.json of every family: published ones are read as their models are, and what is not built is refused."""

from __future__ import annotations

from typing import Any

import pytest

from llmscale.config.schema import Model
from llmscale.errors import ConversionError
from llmscale.models.family import families

LLAMA = {
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
MISTRAL = {**LLAMA, "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768}
QWEN2 = {
    **LLAMA, "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "max_window_layers": 24, "use_sliding_window": False,
    "tie_word_embeddings": True, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    **QWEN2, "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "sliding_window": None,
}  # fmt: skip
GEMMA = {
    "hidden_act": "gelu", "head_dim": 256, "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 16384,
    "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "vocab_size": 256000,
}  # fmt: skip
PYTHIA = {
    "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12,
    "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
    "vocab_size": 50257,
}  # fmt: skip
OF_FAMILY = {config["model_type"]: config for config in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, PYTHIA, GPT2)}


def model_of(config: dict[str, Any]) -> Model:
    family = families()[config["model_type"]]
    return Model.model_validate({"family": family.name, **family.hugging_face.from_config(config)})


def parameters(config: dict[str, Any]) -> int:
    model = model_of(config)
    return sum(weight.numel for weight in families()[model.family].parameters(model, config["vocab_size"]))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LLAMA, 8_030_261_248),
        (MISTRAL, 7_241_732_096),
        (QWEN2, 494_032_768),
        (QWEN3, 596_049_920),
        (GEMMA, 2_506_172_416),
        (PYTHIA, 162_322_944),
        (GPT2, 124_439_808),
    ],
    ids=["Llama-3.1-8B", "Mistral-7B-v0.3-shape", "Qwen2.5-0.5B", "Qwen3-0.6B", "gemma-2b", "pythia-160m", "gpt2"],
)
def test_a_published_model_has_its_published_number_of_parameters(config: dict[str, Any], count: int) -> None:
    if config is MISTRAL:
        config = {**config, "sliding_window": None}
    assert parameters(config) == count


def test_every_family_reads_what_it_writes() -> None:
    assert set(OF_FAMILY) == set(families())
    for name, config in OF_FAMILY.items():
        family, model = families()[name], model_of({**config, "sliding_window": None})
        written = family.hugging_face.to_config(family.settled(model))
        assert family.hugging_face.from_config(written) == family.hugging_face.from_config(
            {**config, "sliding_window": None}
        )


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    ],
    ids=["transformers 4", "before 4.43", "transformers 5"],
)
def test_rotary_positions_are_read_in_all_their_forms(keys: dict[str, Any]) -> None:
    model = model_of({**LLAMA, **keys})
    assert model.rope_theta == 500000.0
    assert model.rope_scaling is not None and model.rope_scaling.model_dump() == LLAMA3


def test_a_stretch_without_its_original_length_is_from_the_longest_sequence() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    model = model_of({**LLAMA, "rope_scaling": {"rope_type": "llama3", **scaling}})
    assert model.rope_scaling is not None and model.rope_scaling.original_max_position_embeddings == 131072


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_a_key_that_is_not_there_is_what_transformers_takes_it_for() -> None:
    model = model_of({**MISTRAL, "sliding_window": None, "num_key_value_heads": None})  # null is not absent
    assert model.query_groups == model.num_attention_heads
    model = model_of(without({**MISTRAL, "sliding_window": None}, "num_key_value_heads"))
    assert (model.query_groups, model.head_size) == (8, 128)
    model = model_of(without(QWEN3, "head_dim", "tie_word_embeddings"))
    assert (model.head_size, model.tie_embeddings) == (128, False)
    assert model_of(without(LLAMA, "num_key_value_heads")).query_groups == 32
    assert model_of(without(PYTHIA, "rotary_pct")).rotary_fraction == 0.25
    assert model_of(GPT2).tie_embeddings is True
    model = model_of(without(GEMMA, "num_key_value_heads", "head_dim"))
    assert (model.query_groups, model.head_size, model.tie_embeddings) == (16, 256, True)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "hidden_act": "gelu"}, r'hidden_act is "gelu"; supported is "silu"'),
        ({**LLAMA, "attention_bias": True}, r"attention_bias is true; supported is false"),
        ({**LLAMA, "mlp_bias": True}, r"mlp_bias is true; supported is false"),
        (
            {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_type is 'linear'; supported is 'default'",
        ),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"no low_freq_factor, high_freq_factor"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; supported is 1"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"differ between full_attention"),
        ({**LLAMA, "num_attention_heads": 0}, r"num_attention_heads is 0; a whole number above 0 is wanted"),
        (without(LLAMA, "intermediate_size"), r"no intermediate_size; it is not the config of a llama model"),
        ({**MISTRAL, "sliding_window": 4096}, r"sliding_window is 4096; .* lower that to 4096"),
        (MISTRAL, r"sliding_window is 4096"),  # transformers' default
        ({**MISTRAL, "hidden_act": "relu"}, r'hidden_act is "relu"'),
        ({**QWEN2, "use_sliding_window": True}, r"use_sliding_window is true; supported is false"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, r"layer_types holds sliding_attention"),
        ({**QWEN2, "rope_scaling": YARN}, r"rope_type is 'yarn'"),
        ({**QWEN3, "attention_bias": True}, r"attention_bias is true"),
        ({**GEMMA, "hidden_activation": "relu"}, r'hidden_activation is "relu"'),
        ({**GEMMA, "use_bidirectional_attention": True}, r"use_bidirectional_attention is true"),
        ({**PYTHIA, "use_parallel_residual": False}, r"use_parallel_residual is false; supported is true"),
        ({**PYTHIA, "hidden_act": "gelu_fast"}, r'hidden_act is "gelu_fast"; supported is "gelu"'),
        ({**PYTHIA, "attention_bias": False}, r"attention_bias is false"),
        ({**GPT2, "activation_function": "gelu"}, r'activation_function is "gelu"; supported is "gelu_new"'),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx is true"),
        ({**GPT2, "scale_attn_weights": False}, r"scale_attn_weights is false"),
        ({**GPT2, "add_cross_attention": True}, r"add_cross_attention is true"),
        ({**GPT2, "n_inner": 0}, r"n_inner is 0; a whole number above 0"),
        ({**GPT2, "attn_pdrop": 0.3}, r"attn_pdrop 0\.3, .*; supported is one dropout for all"),
        ({**PYTHIA, "attention_dropout": 0.3}, r"attention_dropout 0\.3; supported is one dropout for all"),
        ({**MISTRAL, "sliding_window": "none"}, r'sliding_window is "none"'),
        ({**QWEN2, "layer_types": 5}, r"layer_types is 5; a list is wanted"),
    ],
)
def test_what_changes_the_model_and_is_not_built_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=rf"^config\.json: .*{message}"):
        model_of(config)


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        (GPT2, {"num_query_groups": 4}, r"num_query_groups, model\.head_dim: GPT-2's format knows only equal heads"),
        (PYTHIA, {"head_dim": 32}, r"GPT-NeoX's format knows only equal heads"),
        (PYTHIA, {"rope_scaling": {"factor": 8.0}}, r"rope_scaling: GPT-NeoX's format has none"),
        (LLAMA, {"rotary_fraction": 0.5}, r"rotary_fraction is 0\.5; llama turns whole heads"),
        (LLAMA, {"num_attention_heads": 24, "head_dim": 128}, r"24 heads do not divide hidden_size 4096"),
    ],
)
def test_a_model_that_the_format_has_no_key_for_is_refused(
    config: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    family = families()[config["model_type"]]
    model = Model.model_validate({**model_of(config).model_dump(), **keys})
    with pytest.raises(ConversionError, match=message):
        family.hugging_face.to_config(family.settled(model))

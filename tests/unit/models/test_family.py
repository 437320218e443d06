"""The table of a model's weights, on which stages, checkpoints and planning rest."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llmscale.config.schema import Model
from llmscale.models.family import Family, Weight, families


def model(**keys: object) -> Model:
    return Model.model_validate(
        {"family": "llama", "num_layers": 3, "hidden_size": 96, "num_attention_heads": 6, **keys}
    )


TIED = {"gemma", "gpt2"}


@pytest.fixture(params=sorted(families()))
def family(request: pytest.FixtureRequest) -> Family:
    return families()[request.param]


def test_families_are_found_by_name() -> None:
    names = ["gemma", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"]
    assert {name: family.name for name, family in families().items()} == dict(zip(names, names, strict=True))


def test_names_are_unique_and_layers_in_order(family: Family) -> None:
    weights = list(family.parameters(model(), 100))
    assert len({weight.name for weight in weights}) == len(weights)
    layers = [weight.layer for weight in weights if weight.layer is not None]
    assert set(layers) == {0, 1, 2}
    assert all(before <= after for before, after in pairwise(layers))
    for weight in weights:
        assert (f".layers.{weight.layer}." in weight.name) == (weight.layer is not None)


def test_norms_and_biases_do_not_decay_and_all_else_does(family: Family) -> None:
    for weight in family.parameters(model(), 100):
        assert weight.decays == (not ("layernorm" in weight.name or weight.name.endswith("bias")))


def test_what_writes_into_the_residual_stream_starts_smaller(family: Family) -> None:
    residual = {weight.name for weight in family.parameters(model(), 100) if weight.init == "residual"}
    parts = ("self_attention.linear_proj", "mlp.linear_fc2")
    assert residual == {f"decoder.layers.{layer}.{part}.weight" for layer in range(3) for part in parts}


def test_tied_embeddings_are_one_weight(family: Family) -> None:
    def outputs(tied: bool | None) -> int:
        weights = family.parameters(model(tie_embeddings=tied), 100)
        return sum(weight.name == "output_layer.weight" for weight in weights)

    assert (outputs(True), outputs(False)) == (0, 1)
    assert outputs(None) == int(family.name not in TIED)


def by_name(family: str, **keys: object) -> dict[str, Weight]:
    return {weight.name: weight for weight in families()[family].parameters(model(**keys), 100)}


def test_shapes_of_llama_with_grouped_queries() -> None:
    weights = by_name("llama", num_query_groups=2, head_dim=8)
    at = "decoder.layers.0"
    assert weights[f"{at}.self_attention.linear_qkv.weight"].shape == (6 * 8 + 2 * 2 * 8, 96)
    assert weights[f"{at}.self_attention.linear_proj.weight"].shape == (96, 48)
    assert weights[f"{at}.mlp.linear_fc1.weight"].shape == (2 * 256, 96)
    assert weights[f"{at}.mlp.linear_fc1.weight"].cut == "gated_rows"
    assert not any("bias" in name or "position" in name for name in weights)


def test_shapes_of_gpt2() -> None:
    weights = by_name("gpt2", max_position_embeddings=32)
    at = "decoder.layers.2"
    assert weights["embedding.position_embeddings.weight"].shape == (32, 96)
    assert weights[f"{at}.mlp.linear_fc1.weight"].shape == (4 * 96, 96)
    assert weights[f"{at}.mlp.linear_fc1.bias"].cut == "rows"
    # The bias of a row-parallel layer is added once, after the sum over the ranks.
    assert weights[f"{at}.mlp.linear_fc2.bias"].cut == "replicated"


def test_shapes_of_what_only_some_families_have() -> None:
    at = "decoder.layers.1"
    weights = by_name("qwen3", num_query_groups=2, head_dim=8)
    for part in ("q_layernorm", "k_layernorm"):
        weight = weights[f"{at}.self_attention.{part}.weight"]
        # Every rank holds it whole, and has the gradient of its own heads.
        assert (weight.shape, weight.cut, weight.per_head) == ((8,), "replicated", True)
    assert {name for name, weight in weights.items() if weight.per_head} == {
        f"decoder.layers.{layer}.self_attention.{part}_layernorm.weight" for layer in range(3) for part in "qk"
    }
    weights = by_name("qwen2", num_query_groups=2)
    assert {name for name in weights if name.endswith("bias")} == {
        f"decoder.layers.{layer}.self_attention.linear_qkv.bias" for layer in range(3)
    }
    assert weights[f"{at}.self_attention.linear_qkv.bias"].cut == "rows"
    weights = by_name("gemma", ffn_hidden_size=64)
    assert weights[f"{at}.mlp.linear_fc1.weight"].shape == (128, 96)
    assert weights[f"{at}.mlp.linear_fc1.weight"].cut == "gated_rows"
    assert {weight.init for name, weight in weights.items() if "layernorm" in name} == {"zeros"}


@pytest.mark.parametrize(("hidden", "ffn"), [(4096, 11008), (5120, 13824), (2048, 5632), (96, 256)])
def test_the_width_of_a_swiglu_mlp_is_llamas(hidden: int, ffn: int) -> None:
    assert families()["llama"].ffn_hidden_size(model(hidden_size=hidden)) == ffn

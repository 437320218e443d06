"""Every family trains on every kind of layout as transformers' model of it does in one process.

The reference is transformers' own code with the weights put in by the family's rules: loss, gradient norm and weights
after each step hold the layers, their gradients over the ranks, and the rules. Tolerances are the layout matrix's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmscale.config.schema import RunConfig
from llmscale.convert.transforms import pairs, to_theirs
from llmscale.models.family import families
from tests.distributed import reference
from tests.distributed.layouts import Case
from tests.distributed.test_matrix import assert_fp32, batches, run_config, train

STEPS = 3
SCALING = {"factor": 4.0, "original_max_position_embeddings": 8}

# A family, a layout, and keys of `model` beside those of the layout matrix.
CASES: list[tuple[Case, dict[str, Any]]] = [
    (Case(2, False, 1, 1, 1, zero=1, family="llama"), {"rope_scaling": SCALING, "rope_theta": 100.0}),
    (Case(1, False, 2, 1, 1, zero=1, family="mistral"), {"num_query_groups": 1, "head_dim": 12}),
    (Case(2, True, 1, 1, 1, zero=3, family="qwen2"), {"num_query_groups": 2}),
    (Case(1, False, 2, 2, 1, zero=2, family="qwen2", tied=True), {"num_query_groups": 2}),
    # Norms of heads: each tensor-parallel rank has the gradient of its own heads, with sequence parallelism or without.
    (Case(2, False, 1, 1, 1, zero=2, family="qwen3"), {"num_query_groups": 2, "head_dim": 12}),
    (Case(2, True, 2, 1, 1, zero=1, family="qwen3", tied=True), {"num_query_groups": 2}),
    (Case(1, False, 2, 2, 1, zero=3, family="qwen3"), {"num_query_groups": 1}),
    # Fewer key/value heads than tensor-parallel ranks, which then share them: with norms, with biases, in each way.
    (Case(2, True, 1, 1, 2, zero=2, family="qwen3"), {"num_query_groups": 1}),
    (Case(4, False, 1, 1, 1, zero=3, family="qwen2"), {"num_query_groups": 2}),
    (Case(4, True, 1, 1, 1, zero=1, family="llama", recompute="full"), {"num_query_groups": 1, "head_dim": 12}),
    (Case(2, False, 2, 1, 1, zero=1, family="gemma", tied=True), {"num_query_groups": 1}),
    (Case(2, True, 2, 1, 1, zero=2, family="gemma", tied=True), {"num_query_groups": 2, "head_dim": 12}),
    (Case(1, False, 1, 1, 2, zero=3, family="gemma"), {"num_query_groups": 1}),
    (Case(2, True, 1, 1, 1, zero=1, family="gpt_neox", mask=True), {"rotary_fraction": 0.25}),
    (Case(2, False, 1, 1, 1, zero=3, family="gpt_neox", recompute="full"), {"rotary_fraction": 0.5}),
    (Case(1, False, 2, 2, 1, zero=1, family="gpt_neox", recompute="selective"), {"rotary_fraction": 0.25}),
]


def transformers_logits(config: RunConfig) -> Callable[[reference.Weights, RunConfig, torch.Tensor], torch.Tensor]:
    """transformers' model of a config, as a function of the weights here."""
    model, family = config.model, families()[config.model.family]
    assert model.vocab_size is not None
    about, table = family.hugging_face, list(pairs(family, model, model.vocab_size))
    keys = about.to_config(family.settled(model))
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(about.model_type, **keys), attn_implementation="sdpa"
    ).eval()
    # The class of transformers 5 has another name for it than the files, which transformers 4 loads too.
    renamed = {"embed_out.weight": "lm_head.weight"}

    def logits(weights: reference.Weights, config: RunConfig, tokens: torch.Tensor) -> torch.Tensor:
        parts = {
            renamed.get(name, name): part
            for pair in table
            for name, part in zip(pair.names, to_theirs(weights[pair.weight.name], pair.rule, model), strict=True)
        }
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if config.data.mask_documents:
            inputs["attention_mask"] = mask = reference.inside_documents(tokens)
            inputs["position_ids"] = mask[:, 0].sum(2) - 1
        found: torch.Tensor = torch.func.functional_call(theirs, parts, (), inputs).logits
        return found

    return logits


@pytest.mark.parametrize(("case", "keys"), CASES, ids=[str(case) for case, _ in CASES])
def test_a_family_trains_as_transformers_does(
    case: Case, keys: dict[str, Any], corpus: Path, short_documents: Path, tmp_path: Path
) -> None:
    config = run_config(case, short_documents if case.mask else corpus, tmp_path / "run", "fp32")
    config["model"] |= keys
    config["training"]["steps"] = config["checkpoint"]["interval"] = STEPS
    rows, checkpoint = train(config, case.world_size, tmp_path)
    run = RunConfig.model_validate(config)
    assert_fp32(rows, checkpoint, *reference.train(run, batches(run), logits_of=transformers_logits(run)))


def test_every_family_is_in_this_table_or_the_layout_matrix() -> None:
    assert {case.family for case, _ in CASES} | {"gpt2"} == set(families())

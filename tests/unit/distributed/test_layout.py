"""Each rule of the table: what breaks it, what it says, and that its fix is one; and where ranks and layers stand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmscale.config.derive import padded_vocab_size, stage_layers
from llmscale.config.schema import Data, DataSource, Model, Parallel, RunConfig, Training
from llmscale.distributed.layout import Layout
from llmscale.distributed.rules import RULES, problems
from llmscale.errors import Problem

GOOD: dict[str, Any] = {
    "model.family": "llama",
    "model.num_layers": 4,
    "model.hidden_size": 96,
    "model.num_attention_heads": 12,
    "model.ffn_hidden_size": 192,
    "model.max_position_embeddings": 64,
    "data.sequence_length": 64,
    "training.steps": 1,
    "training.global_batch_size": 24,
}


def broken(keys: dict[str, Any], world_size: int | None) -> list[Problem]:
    sections: dict[str, dict[str, Any]] = {
        "model": {},
        "data": {"train": [{"path": "x"}]},
        "parallel": {},
        "training": {},
    }
    for key, value in {**GOOD, **keys}.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    return problems(
        Model(**sections["model"]),
        Data(**sections["data"]),
        Parallel(**sections["parallel"]),
        Training(**sections["training"]),
        1,
        world_size,
    )


# What the rule requires -> keys that break it alone, ranks, its message, and what its fix proposes, one by one.
ROWS: dict[str, tuple[dict[str, Any], int | None, str, list[tuple[dict[str, Any], int | None]]]] = {
    "divides hidden_size, where head_dim is null": (
        {"model.num_attention_heads": 10},
        1,
        "model.num_attention_heads: 10 heads do not divide hidden_size 96; use 8 or 12, or set model.head_dim",
        [({"model.num_attention_heads": 8}, 1), ({"model.num_attention_heads": 12}, 1), ({"model.head_dim": 8}, 1)],
    ),
    "divides num_attention_heads": (
        {"model.num_query_groups": 5},
        1,
        "model.num_query_groups: 5 groups do not divide 12 heads; use 4 or 6",
        [({"model.num_query_groups": 4}, 1), ({"model.num_query_groups": 6}, 1)],
    ),
    "is even with rotary positions, which turn pairs of numbers": (
        {"model.head_dim": 7},
        1,
        "model.head_dim: rotary positions turn pairs: a head of 7 is odd; use 6 or 8",
        [({"model.head_dim": 6}, 1), ({"model.head_dim": 8}, 1)],
    ),
    "leaves a pair of numbers of each head to turn, and is 1 without rotary positions": (
        {"model.rotary_fraction": 0.125},
        1,
        "model.rotary_fraction: 0.125 of a head of 8 is less than a pair; use at least 0.25",
        [({"model.rotary_fraction": 0.25}, 1)],
    ),
    "is null without rotary positions": (
        {"model.family": "gpt2", "model.rope_scaling": {"factor": 8}},
        1,
        "model.rope_scaling: gpt2 has no rotary positions; use null",
        [({"model.rope_scaling": None}, 1), ({"model.family": "llama"}, 1)],
    ),
    "is at most model.max_position_embeddings": (
        {"data.sequence_length": 65},
        1,
        "data.sequence_length: 65 is longer than model.max_position_embeddings 64; "
        "use at most 64, or raise model.max_position_embeddings",
        [({"data.sequence_length": 64}, 1), ({"model.max_position_embeddings": 65}, 1)],
    ),
    "is 1: context parallelism is not built yet": (
        {"parallel.context": 2},
        1,
        "parallel.context: context parallelism is not built yet; use 1",
        [({"parallel.context": 1}, 1)],
    ),
    "is 1: there are no mixture-of-experts families yet": (
        {"parallel.expert": 2},
        1,
        "parallel.expert: there are no mixture-of-experts families yet; use 1",
        [({"parallel.expert": 1}, 1)],
    ),
    "divides num_attention_heads: a head is not cut": (
        {"parallel.tensor": 8, "training.global_batch_size": 24},
        24,
        "parallel.tensor: 12 attention heads cannot be shared by 8 ranks; use 6 or 12",
        [({"parallel.tensor": 6}, 24), ({"parallel.tensor": 12}, 24)],
    ),
    "divides num_query_groups, or is a multiple of it: ranks then share a key/value head": (
        {"parallel.tensor": 4, "model.num_query_groups": 6},
        24,
        "parallel.tensor: 6 query groups cannot be shared by 4 ranks; use 3 or 6",
        [({"parallel.tensor": 3}, 24), ({"parallel.tensor": 6}, 24), ({"model.num_query_groups": 2}, 24)],
    ),
    "divides (num_attention_heads + 2 × num_query_groups) × head_dim, the rows of the query, key and value matrix": (
        {"parallel.tensor": 12, "model.num_query_groups": 1, "model.head_dim": 8},
        24,
        "parallel.tensor: 112 rows of query, key and value cannot be shared by 12 ranks; use 4",
        [({"parallel.tensor": 4}, 24), ({"model.num_query_groups": 3}, 24)],
    ),
    "divides ffn_hidden_size": (
        {"parallel.tensor": 4, "model.ffn_hidden_size": 90},
        24,
        "parallel.tensor: ffn_hidden_size 90 cannot be shared by 4 ranks; use 3 or 6",
        [({"parallel.tensor": 3}, 24), ({"parallel.tensor": 6}, 24)],
    ),
    "times parallel.pipeline divides the number of ranks; data parallelism is what is left": (
        {"parallel.tensor": 2, "parallel.pipeline": 4},
        12,
        "parallel.tensor: tensor 2 × pipeline 4 = 8 does not divide 12 rank(s); "
        "start a multiple of 8 ranks (8 or 16), or use a product of 6 or 12",
        [({}, 8), ({}, 16), ({"parallel.pipeline": 3}, 12), ({"parallel.tensor": 3}, 12)],
    ),
    "needs parallel.tensor above 1: it cuts the sequence over the tensor-parallel group": (
        {"parallel.sequence_parallel": True},
        2,
        "parallel.sequence_parallel: it cuts the sequence over the tensor-parallel group, which has one rank; "
        "use false, or set parallel.tensor to 2 or more",
        [({"parallel.sequence_parallel": False}, 2), ({"parallel.tensor": 2}, 2)],
    ),
    "is a multiple of parallel.tensor under sequence parallelism": (
        {"parallel.sequence_parallel": True, "parallel.tensor": 3, "data.sequence_length": 61},
        3,
        "data.sequence_length: sequence parallelism cannot cut 61 tokens into 3 equal parts; use 60 or 63",
        [({"data.sequence_length": 60}, 3), ({"data.sequence_length": 63}, 3)],
    ),
    "needs parallel.pipeline above 1: it interleaves the stages of a pipeline": (
        {"parallel.virtual_pipeline": 2},
        2,
        "parallel.virtual_pipeline: it interleaves the stages of a pipeline, and there is one stage; "
        "use 1, or set parallel.pipeline to 2 or more",
        [({"parallel.virtual_pipeline": 1}, 2), ({"parallel.pipeline": 2}, 2)],
    ),
    "times parallel.virtual_pipeline is at most num_layers: a stage holds a layer (stage_layers may say otherwise)": (
        {"parallel.virtual_pipeline": 3, "parallel.pipeline": 2},
        2,
        "parallel.pipeline: 4 layers do not fill 6 stages (pipeline 2 × virtual_pipeline 3); "
        "use at most 4 stages, or at least 6 layers",
        [
            ({"parallel.virtual_pipeline": 2}, 2),
            ({"model.num_layers": 6}, 2),
            ({"parallel.stage_layers": [0, 1, 1, 1, 1, 0]}, 2),
        ],
    ),
    "has one number for each of the pipeline × virtual_pipeline stages": (
        {"parallel.stage_layers": [2, 1, 1], "parallel.pipeline": 2},
        2,
        "parallel.stage_layers: 3 numbers for 2 stages; use e.g. [2, 2]",
        [({"parallel.stage_layers": [2, 2]}, 2)],
    ),
    "adds up to num_layers": (
        {"parallel.stage_layers": [2, 3], "parallel.pipeline": 2},
        2,
        "parallel.stage_layers: they add up to 5, model.num_layers is 4; use e.g. [2, 2]",
        [({"parallel.stage_layers": [2, 2]}, 2)],
    ),
    "is a multiple of micro_batch_size × data-parallel size": (
        {"training.global_batch_size": 20, "training.micro_batch_size": 4},
        2,
        "training.global_batch_size: 20 is not a multiple of micro_batch_size 4 × 2 data-parallel rank(s); "
        "use 16 or 24",
        [({"training.global_batch_size": 16}, 2), ({"training.global_batch_size": 24}, 2)],
    ),
    "gives every data-parallel rank a multiple of parallel.pipeline micro-batches, with virtual_pipeline above 1": (
        {"training.global_batch_size": 10, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
        4,
        "training.global_batch_size: the interleaved schedule takes micro-batches in rounds of 2 (the stages), "
        "and there are 5; use 8 or 12",
        [({"training.global_batch_size": 8}, 4), ({"training.global_batch_size": 12}, 4)],
    ),
}  # fmt: skip


def test_every_rule_has_a_row_here() -> None:
    assert [rule.requires for rule in RULES] == list(ROWS)


@pytest.mark.parametrize("requires", ROWS)
def test_what_breaks_a_rule_says_so_and_every_fix_it_proposes_is_one(requires: str) -> None:
    keys, world_size, message, fixes = ROWS[requires]
    assert broken({}, 24) == []
    assert [str(problem) for problem in broken(keys, world_size)] == [message]
    assert fixes
    for fix, ranks in fixes:
        assert broken({**keys, **fix}, ranks) == [], fix


def test_rules_about_ranks_wait_until_their_number_is_known() -> None:
    assert broken({"parallel.pipeline": 4, "training.global_batch_size": 7}, None) == []


def test_a_fix_for_a_sequence_that_is_too_short_to_cut() -> None:
    keys = {"parallel.sequence_parallel": True, "parallel.tensor": 4, "data.sequence_length": 3}
    found = broken({**keys, "model.max_position_embeddings": 3}, 4)
    assert [problem.fix for problem in found] == ["use 4, and raise model.max_position_embeddings"]


sizes = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tensor, data, pipeline = draw(sizes), draw(sizes), draw(sizes)
    virtual = draw(sizes) if pipeline > 1 else 1
    layers = draw(st.lists(st.integers(0, 5), min_size=pipeline * virtual, max_size=pipeline * virtual))
    return Layout(tensor * data * pipeline, tensor, pipeline, virtual, False, tuple(layers), 1)


@given(layouts())
def test_every_rank_has_a_place_of_its_own(layout: Layout) -> None:
    places = [layout.position(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert {place.tensor for place in places} == set(range(layout.tensor))
    assert {place.data for place in places} == set(range(layout.data))
    assert {place.pipeline for place in places} == set(range(layout.pipeline))


@given(layouts())
def test_tensor_parallel_ranks_are_neighbours(layout: Layout) -> None:
    for rank in range(layout.world_size):
        first = layout.position(rank - rank % layout.tensor)
        assert (layout.position(rank).data, layout.position(rank).pipeline) == (first.data, first.pipeline)


@given(layouts())
def test_chunks_share_the_layers_out_in_the_models_order(layout: Layout) -> None:
    chunks = [layout.chunk_layers(rank) for rank in range(layout.pipeline)]
    assert all(len(held) == layout.virtual_pipeline for held in chunks)
    in_order = [chunks[rank][chunk] for chunk in range(layout.virtual_pipeline) for rank in range(layout.pipeline)]
    assert [layer for held in in_order for layer in held] == list(range(sum(layout.layers)))
    assert tuple(len(held) for held in in_order) == layout.layers


@given(st.integers(1, 200), st.integers(1, 64))
def test_stages_are_as_even_as_can_be(layers: int, stages: int) -> None:
    assume(layers >= stages)
    held = stage_layers(layers, stages)
    assert (sum(held), len(held)) == (layers, stages)
    assert max(held) - min(held) <= 1
    # The ends, which hold the embedding and the output layer as well, never hold more than the middle.
    assert max(held[0], held[-1]) <= max(held[1:-1], default=max(held))


@given(st.integers(2, 300_000), st.integers(1, 64))
def test_the_padded_vocabulary_can_be_cut_evenly(vocab_size: int, tensor: int) -> None:
    padded = padded_vocab_size(vocab_size, tensor)
    assert padded >= vocab_size
    assert padded % tensor == padded % 128 == 0


def test_a_layout_of_a_config_in_words() -> None:
    config = RunConfig(
        model=Model(family="llama", num_layers=5, hidden_size=64, num_attention_heads=4),
        data=Data(train=(DataSource(path="x"),), sequence_length=64),
        parallel=Parallel(tensor=2, sequence_parallel=True, pipeline=2, virtual_pipeline=2),
        training=Training(steps=1, global_batch_size=24, micro_batch_size=2),
    )
    layout = Layout.of(config, 12, 1)
    assert str(layout) == "tensor 2 with sequence parallelism · pipeline 2 × 2 virtual · data 3"
    assert layout.layers == (1, 1, 2, 1)
    assert layout.micro_batches(config.training) == 4
    assert layout.chunk_layers(1) == (range(1, 2), range(4, 5))

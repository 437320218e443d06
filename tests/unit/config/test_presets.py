"""Presets: as many parameters as was published, and fit for every DeepSpeed file."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.config import deepspeed, shipped
from llmscale.config.load import load, preset, preset_names
from llmscale.config.schema import Model
from llmscale.distributed.rules import problems
from llmscale.models.family import families

PUBLISHED = {
    "gpt2-small": 124.4e6,
    "gpt2-medium": 354.8e6,
    "gpt2-large": 774.0e6,
    "gpt2-xl": 1557.6e6,
    "gpt3-13b": 12.85e9,
    "gpt3-175b": 174.6e9,
    "llama-1b": 1.236e9,
    "llama-7b": 6.738e9,
    "llama-13b": 13.016e9,
    "llama-70b": 68.98e9,
    "llama-3-8b": 8.030e9,
    "llama-3.1-8b": 8.030e9,
    "mistral-7b": 7.248e9,
    "qwen2.5-0.5b": 494.0e6,
    "qwen2.5-7b": 7.616e9,
    "qwen3-0.6b": 596.0e6,
    "qwen3-8b": 8.191e9,
    "gemma-7b": 8.538e9,
    "pythia-160m": 162.3e6,
    "pythia-6.9b": 6.857e9,
}
"""Parameters in the papers and model cards; tied embeddings count once."""
TINY = {"tiny-gpt2", "tiny-llama"}
DEEPSPEED = sorted(path.name for path in shipped.folder("ds_configs").glob("*.json"))
WORLD_SIZE = {"gpt2-xl": (5, 5), "gpt3-175b": (64, 8), "llama-70b": (8, 8)}
"""Ranks, tensor-parallel size; (2, 1) for the others."""


def test_every_preset_is_here() -> None:
    assert set(preset_names()) == set(PUBLISHED) | TINY


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    model = Model.model_validate(preset(name))
    assert model.vocab_size is not None
    count = sum(weight.numel for weight in families()[model.family].parameters(model, model.vocab_size))
    assert count == pytest.approx(PUBLISHED[name], rel=0.002)


@pytest.mark.parametrize("name", [*PUBLISHED, *sorted(TINY)])
def test_every_preset_resolves_with_every_deepspeed_file(name: str, tmp_path: Path) -> None:
    world_size, tensor = WORLD_SIZE.get(name, (2, 1))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{preset: {name}}}\n"
        f"parallel: {{tensor: {tensor}, sequence_parallel: {str(tensor > 1 and 1000 % tensor == 0).lower()}}}\n"
        "data: {train: [{path: data}], sequence_length: 200}\n"
        "training: {steps: 10, global_batch_size: 64}\n"
    )
    for file in DEEPSPEED:
        config = load(path, [f"deepspeed={file}"], world_size, problems)
        assert deepspeed.resolve(config, tmp_path).path.name == file

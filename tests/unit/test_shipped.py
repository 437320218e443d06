"""All that ships works: each preset with each DeepSpeed file on some layouts, each template, each example."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.config import deepspeed, shipped
from llmscale.config.load import load, preset_names
from llmscale.distributed.layout import Layout
from llmscale.distributed.rules import problems
from llmscale.errors import ConfigError
from llmscale.slurm.render import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = sorted(path.name for path in shipped.folder("ds_configs").glob("*.json"))
LAYOUTS = [
    (1, "{}"),
    (8, "{tensor: 2, sequence_parallel: true, pipeline: 2}"),
    (20, "{tensor: 5, pipeline: 2, virtual_pipeline: 2}"),
    (64, "{tensor: 8, sequence_parallel: true, pipeline: 4}"),
]
"""Ranks, and the section `parallel`. 25 heads, as GPT-2 XL has them, are shared by 5 ranks alone."""


def fits(path: Path, preset: str, file: str, world_size: int, parallel: str) -> bool:
    """Whether the rules allow it; where they do, it resolves whole."""
    try:
        config = load(
            path, [f"model.preset={preset}", f"deepspeed={file}", f"parallel={parallel}"], world_size, problems
        )
    except ConfigError:
        return False
    found = deepspeed.resolve(config, None)
    layout = Layout.of(config, world_size, found.stage)
    assert layout.tensor * layout.pipeline * layout.data == world_size
    assert found.path == shipped.folder("ds_configs") / file
    return True


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_fits_several_layouts_with_every_deepspeed_file(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {train: [{path: data}], sequence_length: 256}\ntraining: {steps: 10, global_batch_size: 64}\n"
    )
    for file in DEEPSPEED:
        fitting = [world_size for world_size, parallel in LAYOUTS if fits(path, preset, file, world_size, parallel)]
        assert len(fitting) >= 2, (file, fitting)


def test_every_slurm_template_is_used() -> None:
    """What they are filled to is checked in tests/unit/slurm and by a real sbatch in tests/slurm."""
    names = {path.name for path in shipped.folder("slurm").iterdir()}
    assert names == {*TEMPLATES.values(), "environment.sh.j2"}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("parallel", ["parallel={tensor: 2}", "parallel={pipeline: 2}"])
def test_every_example_is_a_good_config(example: Path, parallel: str) -> None:
    load(example, [parallel], 2, problems)

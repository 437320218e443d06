"""A DeepSpeed file: found where the user looks for it, made whole for the run, and accepted by DeepSpeed itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmscale.config import deepspeed, shipped
from llmscale.config.schema import Data, DataSource, Model, Optimizer, RunConfig, Training
from llmscale.errors import ConfigError

FILES = sorted(path.name for path in shipped.folder("ds_configs").glob("*.json"))


def config(file: str = "zero1.json", precision: str = "bf16", **training: Any) -> RunConfig:
    return RunConfig(
        model=Model(family="llama", num_layers=2, hidden_size=64, num_attention_heads=4),
        data=Data(train=(DataSource(path="data"),), sequence_length=64),
        training=Training(steps=1, global_batch_size=8, micro_batch_size=2, precision=precision, **training),
        optimizer=Optimizer(),
        deepspeed=file,
    )


def values(settings: Any) -> Iterator[Any]:
    """Everything that stands in settings, however deep."""
    if isinstance(settings, dict):
        for inner in settings.values():
            yield from values(inner)
    else:
        yield settings


def test_all_files_of_the_design_are_shipped() -> None:
    assert FILES == [
        "zero0.json", "zero1.json", "zero2.json", "zero2_offload.json", "zero3.json", "zero3_offload.json"
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", FILES)
def test_deepspeed_accepts_every_shipped_file_made_whole(name: str, precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    found = deepspeed.resolve(config(name, precision), None)
    assert "auto" not in values(found.settings)
    assert found.stage == int(name.removeprefix("zero")[0])
    assert found.offload_optimizer == ("cpu" if "offload" in name else None)
    theirs = DeepSpeedConfig(json.loads(json.dumps(found.settings)))
    # Stage 0 is stage 1 over partitions of one rank.
    assert theirs.zero_optimization_stage == max(found.stage, 1)
    assert theirs.bfloat16_config.enabled is (precision == "bf16")
    assert theirs.train_micro_batch_size_per_gpu == 2
    # Megatron's schedule accumulates, and the norm that clips is the true one of gradients.py.
    assert (theirs.gradient_accumulation_steps, theirs.gradient_clipping) == (1, 0.0)
    if precision == "bf16":
        assert theirs.grad_accum_dtype == "fp32"
        assert theirs.bfloat16_config.immediate_grad_update


def test_a_file_beside_the_config_wins_over_the_working_folder_and_that_over_the_packaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "beside", tmp_path / "working"
    beside.mkdir()
    working.mkdir()
    monkeypatch.chdir(working)
    packaged = shipped.folder("ds_configs")
    assert deepspeed.find("zero1.json", beside) == packaged / "zero1.json"
    assert deepspeed.find("ds_configs/zero1.json", beside) == packaged / "zero1.json"
    (working / "zero1.json").write_text("{}")
    assert deepspeed.find("zero1.json", beside).resolve() == working / "zero1.json"
    (beside / "zero1.json").write_text("{}")
    assert deepspeed.find("zero1.json", beside) == beside / "zero1.json"
    assert deepspeed.find(str(working / "zero1.json"), beside) == working / "zero1.json"


def test_a_folder_of_that_name_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero1.json").mkdir()
    monkeypatch.chdir(tmp_path)
    assert deepspeed.find("zero1.json", None) == shipped.folder("ds_configs") / "zero1.json"


def write(folder: Path, content: dict[str, Any]) -> str:
    (folder / "own.json").write_text(json.dumps(content))
    return "own.json"


def test_a_users_own_file_goes_through(tmp_path: Path) -> None:
    """Written for Hugging Face's Trainer, which has the same "auto"."""
    name = write(
        tmp_path,
        {
            "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
            "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8}},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
                "reduce_bucket_size": "auto",
                "sub_group_size": 1e9,
            },
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 1.0,
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": "auto",
            "steps_per_print": 2000,
            "wall_clock_breakdown": False,
        },
    )
    found = deepspeed.resolve(config(name), tmp_path)
    assert "auto" not in values(found.settings)
    assert (found.stage, found.offload) == (3, ", optimizer on cpu")
    assert found.settings["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 1e9
    }  # fmt: skip
    assert found.settings["steps_per_print"] == 2000


def test_an_empty_object_is_stage_0(tmp_path: Path) -> None:
    assert deepspeed.resolve(config(write(tmp_path, {})), tmp_path).stage == 0


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"stage": 2}}')
    assert deepspeed.resolve(config("own.json"), tmp_path).stage == 2


@pytest.mark.parametrize(
    ("content", "theirs", "ours"),
    [
        ({"train_batch_size": 16}, "train_batch_size: 16", "training.global_batch_size is 8"),
        ({"train_micro_batch_size_per_gpu": 1}, "per_gpu: 1", "training.micro_batch_size is 2"),
        ({"gradient_clipping": 0}, "gradient_clipping: 0", "training.gradient_clipping is 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled: false", "training.precision is bf16"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled: 1", "training.precision is bf16"),
        ({"optimizer": {"type": "Lion"}}, 'optimizer.type: "Lion"', "optimizer.name is adamw"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr: 1", "optimizer.lr is 0.0003"),
        ({"optimizer": {"params": {"betas": [0.9, 0.9]}}}, "betas: [0.9, 0.9]", "optimizer.betas is [0.9, 0.95]"),
        ({"optimizer": {"params": {"eps": 1e-6}}}, "eps: 1e-06", "optimizer.eps is 1e-08"),
        ({"optimizer": {"params": {"weight_decay": 0}}}, "weight_decay: 0", "optimizer.weight_decay is 0.1"),
    ],
)
def test_a_contradiction_names_both_values(content: dict[str, Any], theirs: str, ours: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        deepspeed.resolve(config(write(tmp_path, content)), tmp_path)
    (problem,) = error.value.problems
    assert problem.where == "deepspeed"
    assert f"{theirs}, but {ours}" in problem.reason
    assert problem.fix.startswith('use "auto", or change ')

"""Where a run begins: what it goes on from, what it refuses to go on from, and what becomes of other checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.test_matrix import run_config


def config_of(corpus: Path, output: Path, steps: int, size: int = 1, **checkpoint: Any) -> dict[str, Any]:
    config = run_config(Case(data=size, zero=2), corpus, output, "fp32")
    config["training"]["steps"] = steps
    config["checkpoint"] = {"interval": 3, **checkpoint}
    return config


def run(config: dict[str, Any], size: int = 1, function: Callable[..., Any] = command, exit_code: int = 0) -> str:
    """What rank 0 said, in one line."""
    path = Path(config["run"]["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    outcomes = in_processes(size, function, "pretrain", str(path))
    assert [outcome.exit_code for outcome in outcomes] == [exit_code] * size, outcomes[0].output
    assert "Traceback" not in " ".join(outcome.output for outcome in outcomes)
    return " ".join(outcomes[0].output.split())


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of 6 steps with checkpoints at 3 and 6, by the number of their processes."""
    found = {}
    for size in (1, 2):
        found[size] = tmp_path_factory.mktemp("done") / "run"
        run(config_of(corpus, found[size], 6, size), size)
    return found


@pytest.fixture
def output(done: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(done[1], tmp_path / "run"))


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def steps(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_a_broken_checkpoint_pushes_no_whole_one_out(corpus: Path, output: Path) -> None:
    flip(output / "checkpoints" / "step_00000006" / "rank_00000.safetensors")
    said = run(config_of(corpus, output, 5, interval=1, keep=1))
    assert "set aside" in said and "abandoned_step_00000006" in said
    assert names(output) == ["abandoned_step_00000006", "step_00000005"]
    assert "step_00000005 at step 5" in run(config_of(corpus, output, 6))


def test_a_run_that_begins_anew_goes_on_from_itself_and_not_from_the_run_before(corpus: Path, output: Path) -> None:
    run(config_of(corpus, output, 2, interval=1, keep=1, resume="never"))
    assert names(output) == ["abandoned_step_00000003", "abandoned_step_00000006", "step_00000002"]
    assert "step_00000002 at step 2" in run(config_of(corpus, output, 3))


def test_a_run_that_goes_back_leaves_the_other_branch_and_follows_its_own_when_it_is_started_again(
    corpus: Path, output: Path
) -> None:
    back = {"resume": str(output / "checkpoints" / "step_00000003")}
    assert "step_00000003 at step 3" in run(config_of(corpus, output, 4, **back))
    assert names(output) == ["abandoned_step_00000006", "step_00000003", "step_00000004"]
    # The same config, as a job that was preempted is started with: it does not go back again.
    assert "step_00000004 at step 4" in run(config_of(corpus, output, 5, **back))
    assert "step_00000005 at step 5" in run(config_of(corpus, output, 6))
    assert steps(output) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_goes_on_from_another_folder_counts_that_as_its_past(corpus: Path, output: Path) -> None:
    there = output.with_name("there")
    shutil.copytree(output / "checkpoints" / "step_00000006", there / "checkpoints" / "step_00000002")
    elsewhere = {"resume": str(output), "interval": 1}
    assert "step_00000006 at step 6" in run(config_of(corpus, there, 7, **elsewhere))
    assert names(there) == ["abandoned_step_00000002", "step_00000007"]
    assert "step_00000007 at step 7" in run(config_of(corpus, there, 8, **elsewhere))


def another_view(*arguments: str) -> None:
    """The command; rank 1 does not see the newest checkpoint in the folder, as behind a cache of a network's files."""
    from llmscale.checkpoint import retention

    real = retention.checkpoints
    if os.environ["RANK"] == "1":
        retention.checkpoints = lambda folder: real(folder)[:-1]
    command(*arguments)


def another_folder(*arguments: str) -> None:
    """The command; what rank 1 finds under the same name is another checkpoint."""
    from llmscale.checkpoint import format

    real = format.Checkpoint._json
    if os.environ["RANK"] == "1":
        format.Checkpoint._json = lambda self, name: format.seal({**real(self, name), "tokens": 1})  # type: ignore[method-assign]
    command(*arguments)


def test_all_ranks_open_the_checkpoint_that_rank_0_chose(corpus: Path, done: dict[int, Path], tmp_path: Path) -> None:
    config = config_of(corpus, Path(shutil.copytree(done[2], tmp_path / "run")), 7, 2)
    assert "step_00000006 at step 6" in run(config, 2, another_view)
    assert "rank 1 sees another checkpoint there than rank 0" in run(config, 2, another_folder, exit_code=1)


@pytest.mark.parametrize(
    ("key", "value"), [("num_layers", 3), ("num_attention_heads", 2), ("rope_theta", 5e5), ("family", "mistral")]
)
def test_a_run_of_a_model_that_computes_otherwise_is_refused(
    key: str, value: Any, corpus: Path, done: dict[int, Path], tmp_path: Path
) -> None:
    config = config_of(corpus, tmp_path / "run", 7, resume=str(done[1]))
    config["model"][key] = value
    said = run(config, exit_code=1)
    assert f"checkpoint.resume: {done[1]}" in said and f"model.{key} is {value}, and was" in said


@pytest.mark.parametrize(("before", "after"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_a_run_with_another_optimizer_is_refused_with_the_way_out(
    before: str, after: str, corpus: Path, tmp_path: Path
) -> None:
    config = config_of(corpus, tmp_path / "run", 2)
    config["optimizer"]["name"] = before
    run(config)
    config["optimizer"]["name"], config["training"]["steps"] = after, 3
    said = run(config, exit_code=1)
    assert f"optimizer.name: {after} keeps" in said and "checkpoint.start_from" in said


def as_on_a_gpu(*arguments: str) -> None:
    """The command; the random state that it saves has the GPU's part."""
    from llmscale.training import state

    real = state.random_state
    state.random_state = lambda: {**real(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    command(*arguments)


def test_a_run_says_what_is_not_as_it_was_saved(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path / "run", 2)
    run(config, function=as_on_a_gpu)
    config["training"] |= {"steps": 3, "precision": "bf16", "global_batch_size": 2}
    config["optimizer"]["lr"], config["deepspeed"] = 0.5, "zero2_offload.json"
    said = run(config)
    for change in ("training.precision fp32 -> bf16", "training.global_batch_size 8 -> 2", "optimizer.lr 0.01 -> 0.5",
                   "deepspeed zero2.json -> zero2_offload.json"):  # fmt: skip
        assert change in said
    assert "the random state is a new one" in said


def test_a_run_that_goes_on_without_its_saves_fails_where_the_last_one_is_lost(corpus: Path, output: Path) -> None:
    """A file stands where a save wants its folder."""
    for step in (7, 8):
        (output / "checkpoints" / f".step_{step:08d}.tmp").write_text("in the way")
    said = run(config_of(corpus, output, 8, interval=1, on_error="continue"), exit_code=1)
    assert "not saved, going on: " in said and "the last save failed" in said
    assert steps(output) == [1, 2, 3, 4, 5, 6, 7, 8]
    (output / "checkpoints" / ".step_00000008.tmp").unlink()
    said = run(config_of(corpus, output, 8, interval=1, on_error="continue"))
    assert "not saved, going on: " in said and "the last save took" in said

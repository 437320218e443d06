"""Stop at any step, resume: the metrics and weights are those of the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llmscale.checkpoint.format import Checkpoint
from llmscale.data.shards import SplitWriter
from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes, started
from tests.distributed.test_matrix import BF16_TOLERANCE, SEQUENCE, VOCAB, run_config, train

STEPS = 6
SAME = ("step", "tokens", "loss", "grad_norm", "learning_rate")


def config_of(case: Case, corpus: Path, output: Path, precision: str) -> dict[str, Any]:
    config = run_config(case, corpus, output, precision)
    config["model"]["dropout"] = 0.1
    config["training"]["steps"] = STEPS
    config["checkpoint"] = {"interval": 1}
    return config


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in SAME} for row in rows]


def assert_equal_state(one: Checkpoint, two: Checkpoint) -> None:
    assert one.states == two.states and set(one.index) == set(two.index)
    for name in one.weights:
        for state in one.states:
            assert torch.equal(one.whole(name, state), two.whole(name, state)), f"{name} {state}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, False, 1, 1, 2, zero=0),
        Case(2, True, 1, 1, 2, zero=1, family="gpt2", tied=True),
        Case(1, False, 2, 2, 2, zero=2),
        Case(2, False, 2, 1, 1, zero=3, family="gpt2"),
        Case(1, False, 2, 1, 2, zero=2, tied=True, offload=True),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_run_that_never_stopped(case: Case, precision: str, corpus: Path, tmp_path: Path) -> None:
    whole = config_of(case, corpus, tmp_path / "whole", precision)
    train(whole, case.world_size, tmp_path)
    # As if it had been killed after step 4, with the newest save at step 3.
    stopped = config_of(case, corpus, tmp_path / "stopped", precision)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step_{step:08d}")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stopped" / "metrics.jsonl").write_text("".join(lines[:4]))
    _, resumed = train(stopped, case.world_size, tmp_path)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    assert len(rows_of(tmp_path / "whole")) == STEPS
    assert_equal_state(resumed, Checkpoint(tmp_path / "whole" / "checkpoints" / f"step_{STEPS:08d}"))


def test_resume_takes_the_newest_whole_checkpoint_and_says_which_it_passed_over(corpus: Path, tmp_path: Path) -> None:
    config = config_of(Case(1, False, 1, 1, 2, zero=2), corpus, tmp_path / "run", "fp32")
    train(config, 2, tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    broken = folder / f"step_{STEPS:08d}" / "rank_00001.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    (folder / "step_00000005" / "manifest.json").unlink()
    (folder / ".step_00000007.tmp").mkdir()
    path = tmp_path / "run.yaml"
    outcomes = in_processes(2, command, "pretrain", str(path))
    output = " ".join(outcome.output for outcome in outcomes)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert "rank_00001.safetensors" in output and "no manifest.json" in output
    assert "step_00000004 at step 4" in output.replace("\n", "")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_optimizer_resumes_exactly(optimizer: str, corpus: Path, tmp_path: Path) -> None:
    whole = config_of(Case(1, False, 1, 1, 2, zero=2), corpus, tmp_path / "whole", "bf16")
    whole["optimizer"] = {"name": optimizer, "lr": 1e-2}
    train(whole, 2, tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (3, 4, 5, 6):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step_{step:08d}")
    stopped = {**whole, "run": {**whole["run"], "output_dir": str(tmp_path / "stopped")}}
    _, resumed = train(stopped, 2, tmp_path)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    assert_equal_state(resumed, Checkpoint(tmp_path / "whole" / "checkpoints" / f"step_{STEPS:08d}"))


def test_keep_prunes_the_oldest(corpus: Path, tmp_path: Path) -> None:
    config = config_of(Case(), corpus, tmp_path / "run", "fp32")
    config["checkpoint"] = {"interval": 1, "keep": 2}
    train(config, 1, tmp_path)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000005", "step_00000006"]


def test_a_run_of_another_model_is_refused_before_a_weight_is_touched(corpus: Path, tmp_path: Path) -> None:
    config = config_of(Case(), corpus, tmp_path / "run", "fp32")
    train(config, 1, tmp_path)
    config["model"]["hidden_size"] = 64
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (outcome,) = in_processes(1, command, "pretrain", str(tmp_path / "run.yaml"))
    assert outcome.exit_code == 1
    assert "of another model" in outcome.output and "Traceback" not in outcome.output


BEFORE = {
    "tensor": Case(2, True, 1, 1, 1, zero=1),
    "interleaved": Case(1, False, 2, 2, 2, zero=3),
    "offload": Case(1, False, 1, 1, 2, zero=2, offload=True),
    "wide": Case(4, True, 1, 1, 1, zero=0),
    "bf16": Case(1, False, 2, 1, 2, zero=2),
}
# 5 layers: stages of 4 chunks are uneven. Each of tensor, sequence, pipeline, virtual pipeline, data parallelism, ZeRO
# stage and offload comes, goes and changes.
PAIRS = [
    ("tensor", Case(1, False, 2, 1, 1, zero=2)),
    ("tensor", Case(1, False, 1, 1, 2, zero=3)),
    ("tensor", Case(2, False, 1, 1, 2, zero=0)),
    ("tensor", Case(1, False, 2, 2, 1, zero=1)),
    ("interleaved", Case(2, True, 2, 1, 1, zero=1)),
    ("interleaved", Case(1, False, 4, 1, 1, zero=2)),
    ("interleaved", Case(4, True, 1, 1, 1, zero=2)),
    ("interleaved", Case(1, False, 1, 1, 1, zero=1, offload=True)),
    ("offload", Case(1, False, 4, 1, 1, zero=3)),
    ("offload", Case(2, False, 2, 2, 1, zero=0)),
    ("offload", Case(1, False, 1, 1, 4, zero=1)),
    ("offload", Case(1, False, 2, 1, 2, zero=3, offload=True)),
    ("wide", Case(1, zero=1)),
    ("bf16", Case(2, True, 1, 1, 1, zero=1)),
    ("bf16", Case(1, False, 4, 1, 1, zero=3)),
]


def movable(case: Case, corpus: Path, output: Path, precision: str = "fp32") -> dict[str, Any]:
    """A config whose model does not depend on the layout."""
    config = config_of(case, corpus, output, precision)
    config["model"] |= {"dropout": 0.0, "tie_embeddings": True, "num_query_groups": 4}
    config["checkpoint"] = {"interval": 3}
    return config


def precision_of(name: str) -> str:
    return "bf16" if name == "bf16" else "fp32"


@pytest.fixture(scope="module")
def whole_runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that never changed, each with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("whole")
    for name, case in BEFORE.items():
        train(movable(case, corpus, folder / name, precision_of(name)), case.world_size, folder)
    return {name: folder / name for name in BEFORE}


def moved(before: Path, output: Path) -> None:
    """A copy of a run as it was after half of its steps."""
    shutil.copytree(before, output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_a_run_resumes_on_another_layout(
    before: str, after: Case, whole_runs: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    moved(whole_runs[before], tmp_path / "moved")
    train(movable(after, corpus, tmp_path / "moved", precision_of(before)), after.world_size, tmp_path)
    rows = rows_of(tmp_path / "moved")
    assert len(rows) == STEPS
    # bf16 is rounded at other places on other layouts: docs/design.md.
    loss, norm = (BF16_TOLERANCE["loss"], BF16_TOLERANCE["norm"]) if before == "bf16" else (1e-5, 1e-5)
    for one, two in zip(rows_of(whole_runs[before]), rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=loss)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=norm)
        assert two["learning_rate"] == one["learning_rate"]


def test_a_run_resumes_in_another_precision(whole_runs: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """The master weights are fp32 in both: what is restored is the same to the last bit."""
    moved(whole_runs["tensor"], tmp_path / "moved")
    case = Case(1, False, 2, 1, 1, zero=1)
    _, saved = train(movable(case, corpus, tmp_path / "moved", "bf16"), case.world_size, tmp_path)
    assert saved.precision == "bf16"
    for one, two in zip(rows_of(whole_runs["tensor"])[3:], rows_of(tmp_path / "moved")[3:], strict=True):
        assert two["loss"] != one["loss"]
        assert two["loss"] == pytest.approx(one["loss"], rel=5e-3)


def test_damage_that_shows_in_reading_gives_way_to_the_checkpoint_before(
    whole_runs: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """One rank meets the flipped bit; both go back to the older one, and the run is the one that was not damaged."""
    case = BEFORE["tensor"]
    shutil.copytree(whole_runs["tensor"], tmp_path / "moved")
    broken = tmp_path / "moved" / "checkpoints" / f"step_{STEPS:08d}" / "rank_00001.safetensors"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 16
    broken.write_bytes(data)
    config = movable(case, corpus, tmp_path / "moved")
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(config))
    outcomes = in_processes(2, command, "pretrain", str(tmp_path / "moved.yaml"))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    output = " ".join(outcomes[0].output.split())
    assert "passing over a broken checkpoint" in output and "rank_00001.safetensors" in output
    assert "step_00000003 at step 3" in output
    assert rows_of(tmp_path / "moved") == rows_of(whole_runs["tensor"])
    # Named by its path it is not passed over.
    config["checkpoint"]["resume"] = str(broken.parent)
    broken.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    records = whole_runs["tensor"] / "checkpoints" / broken.parent.name
    shutil.copyfile(records / "manifest.json", broken.parent / "manifest.json")
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(config))
    outcomes = in_processes(2, command, "pretrain", str(tmp_path / "moved.yaml"))
    assert [outcome.exit_code for outcome in outcomes] == [1, 1]
    assert "was altered (its checksum differs)" in " ".join(outcomes[0].output.split())


def test_a_run_that_blows_up_ends_in_one_line_and_keeps_what_was_being_saved(corpus: Path, tmp_path: Path) -> None:
    config = config_of(Case(1, False, 1, 1, 2, zero=1), corpus, tmp_path / "run", "fp32")
    config["training"] |= {"steps": 40, "gradient_clipping": 0.0}
    config["optimizer"] = {"name": "sgd", "lr": 1e30}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    outcomes = in_processes(2, command, "pretrain", str(tmp_path / "run.yaml"))
    assert [outcome.exit_code for outcome in outcomes] == [1, 1]
    assert "error: the " in outcomes[0].output and "lower optimizer.lr" in " ".join(outcomes[0].output.split())
    assert "Traceback" not in outcomes[0].output + outcomes[1].output
    steps = len(rows_of(tmp_path / "run"))
    assert 0 < steps < 40
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"step_{step:08d}" for step in range(1, steps + 1)]


def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(corpus: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of steps and saves, to one of two real processes, and then to the other."""
    steps, case = 40, Case(1, False, 1, 1, 2, zero=2)
    configs = []
    for name in ("whole", "killed"):
        config = config_of(case, corpus, tmp_path / name, "bf16")
        config["training"]["steps"] = steps
        config["checkpoint"] = {"interval": 3, "keep": 2}
        configs.append(config)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    train(configs[0], 2, tmp_path)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for victim, rows in ((0, 5), (1, 20)):
        logs = tmp_path / str(victim)
        logs.mkdir()
        processes, pipes = started(2, str(logs), command, "pretrain", str(tmp_path / "killed.yaml"))
        while processes[0].is_alive() and (not metrics.exists() or metrics.read_bytes().count(b"\n") < rows):
            time.sleep(0.005)
        processes[victim].kill()
        for process in processes:
            process.join(60)
        said = [(logs / f"{rank}.log").read_text() for rank in (0, 1)]
        assert processes[victim].exitcode == -signal.SIGKILL, said[victim][-3000:]
        assert pipes[1 - victim].recv() == ("returned", (1, None)), said[1 - victim][-3000:]
        assert "Traceback" not in said[1 - victim], said[1 - victim][-3000:]
    train(configs[1], 2, tmp_path)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    saved = [Checkpoint(tmp_path / name / "checkpoints" / f"step_{steps:08d}") for name in ("killed", "whole")]
    assert_equal_state(*saved)


def killed_before(step: int, rank: int, path: str) -> None:
    """A run that is killed, on one rank, as it begins a step: while the save of the one before is being written."""
    from llmscale.training import run

    rate = run.learning_rate

    def dying(schedule: Any, base: float, number: int, steps: int) -> float:
        if number == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return rate(schedule, base, number, steps)

    run.learning_rate = dying
    command("pretrain", path)


def test_a_run_that_is_killed_at_every_step_on_either_rank_goes_on_as_if_nothing_had_been(
    corpus: Path, tmp_path: Path
) -> None:
    configs = []
    for name in ("whole", "killed"):
        config = config_of(Case(1, False, 1, 1, 2, zero=1), corpus, tmp_path / name, "bf16")
        config["checkpoint"] = {"interval": 2}
        configs.append(config)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    train(configs[0], 2, tmp_path)
    for step in range(1, STEPS + 1):
        with pytest.raises(AssertionError, match=f"rank {step % 2} died"):
            in_processes(2, killed_before, step, step % 2, str(tmp_path / "killed.yaml"))
    train(configs[1], 2, tmp_path)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    saved = [Checkpoint(tmp_path / name / "checkpoints" / f"step_{STEPS:08d}") for name in ("killed", "whole")]
    assert_equal_state(*saved)


def test_a_run_goes_on_with_other_batches_and_other_weights_of_its_sources(corpus: Path, tmp_path: Path) -> None:
    """What each source gave before the stop and after it are its sequences without a gap, whatever was changed."""
    second = tmp_path / "second"
    second.mkdir()
    writer = SplitWriter(second, "uint16", end_of_document=0, sample_tokens=4096, shard_samples=2)
    writer.add(np.arange(9000, dtype=np.uint16) % 90 + 1, True, True)
    writer.finish(b"{}", VOCAB)
    config = config_of(Case(1, False, 1, 1, 2, zero=2), corpus, tmp_path / "run", "fp32")
    config["data"]["train"] = [{"path": str(corpus), "weight": 3}, {"path": str(second)}]
    config["training"]["steps"] = 3
    _, checkpoint = train(config, 2, tmp_path)
    before = checkpoint.manifest["data"]
    batch = config["training"]["global_batch_size"]
    assert before["position"] == 3 * batch
    assert [source["sequences"] for source in before["sources"]] == [
        before["position"] * 3 // 4,
        before["position"] // 4,
    ]
    config["data"]["train"][0]["weight"] = 1
    config["training"] |= {"steps": 5, "global_batch_size": batch * 2, "micro_batch_size": 2}
    rows, checkpoint = train(config, 1, tmp_path)
    after = checkpoint.manifest["data"]
    assert after["since"] == before["position"]
    assert after["position"] == 3 * batch + 2 * 2 * batch
    given = [
        now["sequences"] - then["sequences"] for now, then in zip(after["sources"], before["sources"], strict=True)
    ]
    assert given == [2 * batch, 2 * batch]
    assert [row["tokens"] for row in rows] == [SEQUENCE * batch * n for n in (1, 2, 3, 5, 7)]
    assert checkpoint.manifest["tokens"] == rows[-1]["tokens"]

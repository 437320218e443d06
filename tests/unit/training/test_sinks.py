"""Where the rows go: a file that a resumed run goes on with exactly, TensorBoard, Weights & Biases offline."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmscale.config.schema import RunConfig
from llmscale.errors import LlmscaleError, UsageError
from llmscale.training.sinks.jsonl import Jsonl
from llmscale.training.sinks.loss_plot import LossPlot
from llmscale.training.sinks.tensorboard import TensorBoard
from llmscale.training.sinks.wandb import Wandb, check_available


def config(**logging: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "a run"},
            "model": {"family": "llama", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1},
            "data": {"train": [{"path": "data"}], "sequence_length": 8},
            "training": {"steps": 4, "global_batch_size": 2},
            "logging": logging,
        }
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_floats_come_back_bit_for_bit_and_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324, "rate": 1 / 3, "mfu": None, "much": math.inf}
    sink = Jsonl(path, 0)
    sink.log(values)
    assert rows(path) == [{**values, "much": None}]  # before close: every row is flushed
    sink.close()


def test_a_resumed_run_keeps_what_was_before_byte_for_byte_and_drops_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # Written with other spaces than ours: a row that was parsed and written again would differ.
    kept = b'{"step":1,  "loss": 2.50}\n{"step": 2, "loss": 2.0}\n{"step": 2, "validation_loss": 2.1}\n'
    path.write_bytes(kept + b'{"step": 3, "loss": 1.9}\n{"step": 4, "lo')
    sink = Jsonl(path, 2)
    sink.log({"step": 3, "loss": 1.5})
    sink.close()
    assert path.read_bytes() == kept + b'{"step": 3, "loss": 1.5}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_in_an_old_folder_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    Jsonl(path, 0).close()
    assert path.read_bytes() == b""


def test_a_file_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnotes of mine\n')
    with pytest.raises(LlmscaleError, match="line 2 is no row of metrics"):
        Jsonl(path, 0)
    assert path.read_text() == '{"step": 1}\nnotes of mine\n'


def test_the_plot_is_drawn_at_the_end_from_the_whole_file(tmp_path: Path) -> None:
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "plots" / "loss.png"
    plot, file = LossPlot("a run", metrics, image), Jsonl(metrics, 0)
    for sink in (plot, file):
        sink.log({"step": 1, "tokens": 8, "loss": 3.0})
    assert not image.exists()
    file.close()
    plot.close()
    assert image.read_bytes().startswith(b"\x89PNG")


def test_no_losses_no_plot_and_a_plot_that_fails_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmp_path / "plots" / "loss.png"
    idle = LossPlot("a run", tmp_path / "missing", image)
    idle.close()
    idle.log({"step": 1, "loss": 3.0})
    assert not caplog.records
    idle.close()
    assert not image.exists()
    assert "was not drawn" in caplog.text
    assert "missing" in caplog.text


def test_tensorboard_has_the_figures_and_a_resumed_run_hides_the_steps_run_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 4.0 - step, "mfu": None})
    first.log({"step": 2, "validation_loss": 2.5})
    first.close()
    resumed = TensorBoard(tmp_path, 2)
    resumed.log({"step": 3, "loss": 0.5})
    resumed.close()
    # By name, which begins with the second: two writers of one second differ in a running number.
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss", "validation/validation_loss"]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 0.5)]


def test_wandb_is_asked_for_but_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_available(config())
    with pytest.raises(UsageError, match=r"logging.wandb: 'project' is asked for.*set logging.wandb to null"):
        check_available(config(wandb="project"))


def test_wandb_offline_writes_beside_the_run_and_resumes_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = config(wandb="project")
    check_available(settings)
    identities = []
    for done in (0, 1, 0):
        sink = Wandb(settings, tmp_path, done)
        sink.log({"step": done + 1, "loss": 2.0, "mfu": None})
        sink.close()
        identities.append((tmp_path / "wandb" / "id").read_text())
    assert identities[0] == identities[1] != identities[2]
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3
    assert all(file.stat().st_size > 0 for file in files)

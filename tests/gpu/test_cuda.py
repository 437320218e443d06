"""A small model learns on one GPU, from the command line, as it does on a CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

STEPS, BATCH, SEQUENCE = 60, 16, 128


def llmscale(*arguments: object) -> str:
    """What the program prints; it must end well."""
    command = [sys.executable, "-m", "llmscale", *(str(argument) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of the source text of Python's own `json`, `email` and `asyncio` packages."""
    folder = tmp_path_factory.mktemp("data")
    library = Path(sysconfig.get_paths()["stdlib"])
    text = [str(library / name) for name in ("json", "email", "asyncio")]
    source = ["--input", *text, "--suffix", ".py"]
    llmscale("data", "tokenizer", *source, "--vocab-size", 512, "--output", folder / "tokenizer.json")
    llmscale("data", "build", *source, "--tokenizer", folder / "tokenizer.json", "--output", folder / "text",
             "--validation-fraction", 0.1, "--workers", 1)  # fmt: skip
    return folder / "text"


def config(data: Path, output: Path, **sections: dict[str, Any]) -> Path:
    """Write a run's config beside its output."""
    settings: dict[str, Any] = {
        "run": {"output_dir": str(output), "seed": 5},
        "model": {"preset": "tiny-llama"},
        "data": {
            "train": [{"path": str(data / "train")}],
            "validation": [{"path": str(data / "validation")}],
            "sequence_length": SEQUENCE,
        },
        "training": {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 8, "validation_interval": STEPS},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 5},
        "deepspeed": "zero1.json",
        "logging": {"tensorboard": False},
    }
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_small_model_learns_on_one_gpu(data: Path, tmp_path: Path, precision: str, zero: int) -> None:
    output = tmp_path / "run"
    llmscale("pretrain", config(data, output), f"training.precision={precision}", f"deepspeed=zero{zero}.json")
    rows = metrics(output)
    steps = [row for row in rows if row.get("loss") is not None]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    losses = [row["loss"] for row in steps]
    assert abs(losses[0] - math.log(512)) < 0.5
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    assert all(math.isfinite(row["grad_norm"]) for row in steps)
    assert steps[-1]["memory_gib"] > 0
    assert rows[-1]["validation_loss"] < losses[0] - 1.5


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_small_model_learns_inside_documents(data: Path, tmp_path: Path, dropout: float) -> None:
    output = tmp_path / "run"
    model = {"preset": "tiny-llama", "dropout": dropout}
    llmscale("pretrain", config(data, output, model=model), "data.mask_documents=true", "training.recompute=selective")
    losses = [row["loss"] for row in metrics(output) if row.get("loss") is not None]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5


def test_a_run_that_was_stopped_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dropout = {"preset": "tiny-llama", "dropout": 0.1}
    constant = {"name": "constant", "warmup_steps": 2}
    llmscale("pretrain", config(data, whole, model=dropout, schedule=constant), "training.steps=8")
    path = config(data, parts, model=dropout, schedule=constant, checkpoint={"interval": 4})
    llmscale("pretrain", path, "training.steps=4")
    llmscale("pretrain", path, "training.steps=8")
    found = [
        {row["step"]: row["loss"] for row in metrics(run) if row.get("loss") is not None} for run in (whole, parts)
    ]
    assert found[0] == found[1]

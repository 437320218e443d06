"""The rows of metrics.jsonl: every figure of the contract, from what the loop gives; rank 0 alone writes."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llmscale.config.schema import Logging, RunConfig
from llmscale.distributed.launch import Launch
from llmscale.errors import LlmscaleError
from llmscale.models.family import families
from llmscale.training.flops import flops_per_token
from llmscale.training.loop import StepTimes
from llmscale.training.metrics import Rates, Recorder

CPU = torch.device("cpu")
TOKENS = 4 * 16


class Result(NamedTuple):
    """What an engine's step gives back."""

    loss: float
    grad_norm: float


def config(**training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 100,
            },
            "data": {"train": [{"path": "data"}], "sequence_length": 16},
            "training": {"steps": 10, "global_batch_size": 4, **training},
        }
    )  # fmt: skip


def recorder(output: Path, done: int = 0, rank: int = 0, **training: Any) -> Recorder:
    launch = Launch(rank, 2, rank, 2, "127.0.0.1", 0, "torchrun")
    lines = {"device": "CPU (gloo) × 2", "layout": "data 2"}
    return Recorder(config(**training), families()["llama"], lines, CPU, output, done, done * TOKENS, launch)


def step(recorder: Recorder, number: int) -> None:
    result = Result(loss=1 / 3, grad_norm=2.5)
    recorder.step(number, result, 1e-4, StepTimes(data_seconds=0.125, step_seconds=0.5))


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_step_and_a_validation_give_the_rows_of_the_contract(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "new"
    with recorder(output) as open_recorder:
        step(open_recorder, 3)
        open_recorder.validation(3, 2.0, 0.5)
    first, second = rows(output)
    flops = flops_per_token(config().model, families()["llama"], 100, 16)
    assert first.pop("memory_gib") > 0.01
    assert first == {
        "step": 3,
        "tokens": 3 * TOKENS,
        "loss": 1 / 3,
        "grad_norm": 2.5,
        "learning_rate": 1e-4,
        "step_seconds": 0.5,
        "data_seconds": 0.125,
        "tokens_per_second": 2 * TOKENS,
        "tokens_per_second_per_device": TOKENS,
        "tflops_per_device": TOKENS * flops.with_attention / 1e12,
        "mfu": None,
        "mfu_without_attention": None,
    }
    assert second == {
        "step": 3,
        "tokens": 3 * TOKENS,
        "validation_loss": 2.0,
        "validation_perplexity": math.exp(2.0),
        "validation_seconds": 0.5,
    }
    assert any((output / "tensorboard").iterdir())


def test_the_mfu_is_a_share_of_the_peak_in_the_config_else_of_the_devices() -> None:
    llama = families()["llama"]
    for rates, peak in (
        (Rates.of(config(peak_tflops=50.0), llama, 2, "NVIDIA H100 80GB HBM3"), 50.0),
        (Rates.of(config(), llama, 2, "NVIDIA H100 80GB HBM3"), 989.4),
        (Rates.of(config(precision="fp32"), llama, 2, "NVIDIA H100 80GB HBM3"), 66.9),
    ):
        row = rates.row(0.5)
        assert row["mfu"] == pytest.approx(TOKENS * rates.flops_with_attention / (peak * 1e12))
        assert row["mfu_without_attention"] == pytest.approx(TOKENS * rates.flops_without_attention / (peak * 1e12))


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorder(tmp_path / "run", rank=1) as silent:
        step(silent, 1)
        silent.validation(1, 2.0, 0.5)
        silent.saved(tmp_path)
        silent.note("a note")
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_resumed_run_says_so_and_goes_on_in_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorder(tmp_path) as first:
        for number in (1, 2, 3):
            step(first, number)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    capsys.readouterr()
    with recorder(tmp_path, done=2) as resumed:
        step(resumed, 3)
        resumed.validation(3, 1000.0, 0.5)
        resumed.saved(tmp_path / "checkpoints" / "step_00000003")
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert after[:2] == before[:2]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3]
    assert rows(tmp_path)[-1]["validation_perplexity"] is None  # too large for a float
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[:3] == ["device: CPU (gloo) × 2", "layout: data 2", "resumes after step 2 of 10"]
    assert lines[3].startswith("step  3/10  loss 0.3333  128 tokens/s")
    assert lines[4] == "validation after step 3: loss 1000.0000, perplexity inf"
    assert lines[5] == f"saved {tmp_path / 'checkpoints' / 'step_00000003'}"


def test_a_sink_that_cannot_open_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("notes\n")
    with pytest.raises(LlmscaleError, match="no row of metrics"), recorder(tmp_path):
        pass


def test_a_disk_that_is_full_costs_rows_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel refuses to let files grow, as a full disk does, also in the middle of a row; later there is room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    launch = Launch(0, 2, 0, 2, "127.0.0.1", 0, "torchrun")
    plain = config().model_copy(update={"logging": Logging(tensorboard=False)})
    with Recorder(plain, families()["llama"], {}, CPU, tmp_path, 0, 0, launch) as opened:
        step(opened, 1)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        try:
            step(opened, 2)
            step(opened, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        step(opened, 4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 4]
    assert caplog.text.count("Jsonl cannot write, its rows are lost from step 2 on") == 1

"""A run that is told to stop, at any moment and on any rank: what it leaves is what a run that goes on needs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmscale.distributed.stop import STOPPED
from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.test_matrix import run_config

STEPS = 9
KEYS = ("step", "tokens", "loss", "grad_norm", "learning_rate", "validation_loss")


def write(folder: Path, corpus: Path, **keys: Any) -> Path:
    config = run_config(Case(tensor=1, data=2, zero=2), corpus, folder / "run", "fp32")
    config["data"]["validation"] = [{"path": str(corpus)}]
    config["training"] |= {"steps": STEPS, "validation_interval": 3, "validation_batches": 2}
    config["checkpoint"] = {"interval": 4, **keys}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def figures(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in KEYS if key in row} for row in rows]


def told(moment: str, rank: int, *arguments: str, other: str | None = None) -> None:
    """The command; this rank is sent signals at a moment of its life, or another start claims the run directory."""
    from llmscale.checkpoint import save
    from llmscale.distributed.launch import Launch
    from llmscale.training.engine import Engine
    from llmscale.training.fence import Fence

    calls = 0

    def send() -> None:
        if other is not None:
            Fence(Path(other), Launch(0, 1, 0, 1, "", 0, "single")).claim()
            return
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    def spy(owner: Any, name: str, number: int, seconds: float = 0.0) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                send()
                time.sleep(seconds)
            return real(*args, **kwargs)

        setattr(owner, name, call)

    if int(os.environ["RANK"]) == rank:
        if moment == "step":
            spy(Engine, "train_step", 5)
        elif moment == "validation":
            spy(Engine, "evaluate", 3)  # the first batch of the validation after step 6
        elif moment == "save":
            spy(save, "_write_part", 1, seconds=0.5)  # that of step 4
        elif moment == "start":
            spy(Engine, "__init__", 1)
        elif moment == "end":
            spy(Engine, "train_step", STEPS)
    command(*arguments)


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    in_processes(2, command, "pretrain", str(write(folder, corpus)))
    return figures(folder)


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize(
    ("moment", "rank", "steps"),
    [("step", 1, (5,)), ("validation", 1, (6,)), ("validation", 0, (6,)), ("save", 0, (4, 5, 6)), ("start", 1, (0,))],
)
def test_what_is_left_goes_on_to_the_same_end(
    corpus: Path, expected: list[dict[str, Any]], tmp_path: Path, moment: str, rank: int, steps: tuple[int, ...],
    asynchronous: bool,
) -> None:  # fmt: skip
    path = write(tmp_path, corpus, asynchronous=asynchronous)
    outcomes = in_processes(2, told, moment, rank, "pretrain", str(path))
    assert [outcome.exit_code for outcome in outcomes] == [STOPPED, STOPPED]
    saved = sorted(int(folder.name[5:]) for folder in (tmp_path / "run" / "checkpoints").glob("step_*"))
    rows = figures(tmp_path)
    last = rows[-1]["step"] if rows else 0
    assert last in steps and (saved[-1:] == [last] or last == 0)
    assert rows == [row for row in expected if row["step"] <= last]  # a validation that was due is there too
    assert f"stopped after step {last} of {STEPS}" in outcomes[0].output
    outcomes = in_processes(2, command, "pretrain", str(path))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert figures(tmp_path) == expected


def test_a_signal_in_the_last_step_is_no_stop(corpus: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    outcomes = in_processes(2, told, "end", 0, "pretrain", str(write(tmp_path, corpus)))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert figures(tmp_path) == expected


def test_a_run_that_saves_nothing_stops_all_the_same(corpus: Path, tmp_path: Path) -> None:
    outcomes = in_processes(2, told, "step", 1, "pretrain", str(write(tmp_path, corpus, interval=0)))
    assert [outcome.exit_code for outcome in outcomes] == [STOPPED, STOPPED]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_outcome_is_told_to_who_asks(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "outcome.json"
    told_where = {"LLMSCALE_OUTCOME": str(place)}
    in_processes(2, told, "step", 0, "pretrain", str(write(tmp_path, corpus)), environment=lambda rank: told_where)
    assert json.loads(place.read_text()) == {"status": "stopped", "reason": "SIGUSR1", "step": 5, "retry": True}
    place.unlink()
    in_processes(2, command, "pretrain", str(tmp_path / "run.yaml"), environment=lambda rank: told_where)
    assert json.loads(place.read_text())["status"] == "done"
    place.unlink()
    in_processes(
        2, command, "pretrain", str(tmp_path / "run.yaml"), "training.global_batch_size=3",
        environment=lambda rank: told_where,
    )  # fmt: skip
    found = json.loads(place.read_text())
    assert (found["status"], found["retry"]) == ("failed", False) and "global_batch_size" in found["reason"]


def replaced(moment: str, folder: str, *arguments: str) -> None:
    told(moment, 0, *arguments, other=folder)


@pytest.mark.parametrize(("moment", "last", "saved"), [("step", 4, [4]), ("validation", 6, [4]), ("save", 4, [])])
def test_a_start_whose_run_directory_another_has_taken_writes_no_more(
    corpus: Path, expected: list[dict[str, Any]], tmp_path: Path, moment: str, last: int, saved: list[int]
) -> None:
    place = tmp_path / "outcome.json"
    path = write(tmp_path, corpus, asynchronous=False)
    outcomes = in_processes(
        2, replaced, moment, str(tmp_path / "run"), "pretrain", str(path),
        environment=lambda rank: {"LLMSCALE_OUTCOME": str(place)},
    )  # fmt: skip
    assert [outcome.exit_code for outcome in outcomes] == [1, 1]
    after = [row for row in expected if row["step"] <= last]
    assert figures(tmp_path) == (after[:-1] if moment == "validation" else after)
    assert [int(folder.name[5:]) for folder in (tmp_path / "run" / "checkpoints").glob("step_*")] == saved
    assert "another start writes there now" in outcomes[0].output
    assert json.loads(place.read_text())["status"] == ("failed" if moment == "save" else "replaced")
    outcomes = in_processes(2, command, "pretrain", str(path))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert figures(tmp_path) == expected

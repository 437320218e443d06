"""From a config to the queue: what is stored, and what is said where it fails. Slurm's commands are ours here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmscale.cli.main import main
from llmscale.config.load import load
from llmscale.slurm.records import CONFIG, SCRIPT, find
from tests.unit.slurm.test_render import RUN, write

STUBS = {
    "sbatch": 'echo "${SBATCH_SAYS-41}"',
    "squeue": 'echo "squeue $*" >>"$CALLS"; [ -z "$QUEUED" ] || echo "$QUEUED"',
    "scancel": 'echo "scancel $*" >>"$CALLS"',
}


@pytest.fixture(autouse=True)
def slurm(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "bin").mkdir()
    for name, text in STUBS.items():
        (here / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (here / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "state"))
    monkeypatch.setenv("CALLS", str(here / "calls"))
    monkeypatch.setenv("QUEUED", "")


def typed(*words: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(["slurm", *words])
    return ended.value.code


def test_the_job_runs_what_was_checked(here: Path) -> None:
    (here / "own.json").write_text('{"zero_optimization": {"stage": 2}}')
    (here / "model.yaml").write_text(yaml.safe_dump({**RUN["model"], "num_layers": 7}))
    (here / "cluster.yaml").write_text("partition: gpu\nnodes: 2\n")
    settings = {"cluster": "cluster.yaml", "environment": {"A": 1}}
    path = write(here, settings, model={"preset": "model.yaml"}, deepspeed="own.json")
    assert typed("submit", str(path), "training.steps=50", "parallel.tensor=2") == 0
    for name in ("own.json", "model.yaml", "cluster.yaml", "run.yaml"):
        (here / name).write_text("edited while it waits")
    made = find("41")
    assert made.words == ("pretrain", str(made.folder / CONFIG)) and made.steps == 50
    assert f"-- pretrain {made.folder / CONFIG} &" not in (text := (made.folder / SCRIPT).read_text())
    assert f" -- pretrain {made.folder / CONFIG}\n" in text
    found = load(made.folder / CONFIG)
    assert (found.training.steps, found.model.num_layers, found.slurm.nodes, found.slurm.partition) == (50, 7, 2, "gpu")
    assert json.loads(Path(found.deepspeed).read_text()) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("words", [[], ["slurm.logs=file/logs"]])
def test_a_folder_that_cannot_be_made_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (here / "file").write_text("")
    path = write(here, {}, run={"name": "mine", "output_dir": "runs/mine" if words else "file/run"})
    assert typed("submit", str(path), *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {here}/file") and "Not a directory" in said and said.count("\n") == 1


def test_a_list_of_jobs_that_cannot_be_written_is_one_line_and_leaves_no_job(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "file"))
    assert typed("submit", str(write(here, {}))) == 2
    said = capsys.readouterr().err
    assert "XDG_STATE_HOME" in said and said.count("\n") == 1
    assert "scancel 41" in (here / "calls").read_text() and not list(here.glob("runs/mine/slurm/*"))


def test_what_sbatch_says_in_place_of_a_number(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_SAYS", "wrapped by the site")
    assert typed("submit", str(write(here, {}))) == 1
    assert "sbatch: says 'wrapped by the site' in place of a job's number" in capsys.readouterr().err


def test_the_queue_is_asked_once_for_all_earlier_jobs(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (41, 42, 43):
        monkeypatch.setenv("SBATCH_SAYS", str(number))
        folder = here / "runs" / "mine" / "slurm"
        assert typed("submit", str(write(here, {}))) == 0
        made = find(str(number))
        made.folder.rename(folder / f"2026010{number - 40}-000000-1")
    (here / "calls").unlink()
    monkeypatch.setenv("QUEUED", "42|RUNNING|None|1|n1|1:00|2:00")
    assert typed("submit", str(write(here, {}))) == 2
    assert "job 42 trains there, or waits to" in capsys.readouterr().err
    assert (here / "calls").read_text().count("squeue") == 1 and "--jobs=41,42,43" in (here / "calls").read_text()


def test_a_run_saves_before_it_is_cancelled_unless_it_waits_or_must_go_now(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed("submit", str(write(here, {}))) == 0
    (here / "calls").unlink(missing_ok=True)
    for state, words, expected in (
        ("RUNNING", [], "scancel --signal=USR1 --batch 41"),
        ("RUNNING", ["--now"], "scancel 41"),
        ("PENDING", [], "scancel 41"),
    ):
        monkeypatch.setenv("QUEUED", f"41|{state}|None|1|n1|1:00|2:00")
        assert typed("cancel", "runs/mine", *words) == 0
        assert (here / "calls").read_text().splitlines()[-1] == expected
        assert ("saves first" in capsys.readouterr().out) == ("--batch" in expected)
    assert (find("41").folder / "ended").read_text().startswith("stop: cancelled")


def test_logs_show_what_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("submit", str(write(here, {}))) == 0
    log = find("41").log_of(41)
    log.write_text("one\ntwo\nthree\n")
    capsys.readouterr()
    for words, shown in ((["-n", "2"], "two\nthree\n"), (["-n", "0"], ""), (["-n", "0", "-f"], "")):
        assert typed("logs", "41", *words) == 0
        assert capsys.readouterr().out == shown

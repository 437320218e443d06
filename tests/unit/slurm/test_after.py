"""What a job's script is told when a start has ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmscale.slurm.after import End, decide, exit_code, newest_step
from llmscale.slurm.outcome import VARIABLE, Outcome, read, tell
from llmscale.slurm.records import ENDED, Submission, attempts, find

DONE = Outcome("done", "", 100)
STOPPED = Outcome("stopped", "SIGUSR1", 30)
WRONG = Outcome("failed", "run.yaml: training.steps: is missing", retry=False)
CRASHED = Outcome("failed", "rank 3 on node1 was ended by SIGKILL")


def checkpoint(folder: Path, step: int, whole: bool = True) -> None:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    if whole:
        (path / "manifest.json").write_text("{}")


def end(outcome: Outcome | None, code: int = 85, state: str = "RUNNING", start: int = 0) -> End:
    return End(7, start, code, state, outcome)


@pytest.mark.parametrize(
    ("found", "restart", "word", "reason"),
    [
        (end(DONE, 0), "requeue", "done", "all steps are done"),
        (end(DONE, 137), "requeue", "done", "all steps are done"),
        (end(None, 0), "requeue", "done", "ended well"),
        (end(STOPPED), "requeue", "requeue", "stopped by SIGUSR1 after step 30; goes on from step 30"),
        (end(STOPPED, 137), "requeue", "requeue", "stopped by SIGUSR1"),
        (end(STOPPED), "chain", "next", "goes on from step 30"),
        (end(STOPPED), "never", "stop", "submit it again to go on from step 30"),
        (end(STOPPED, state="CANCELLED"), "requeue", "stop", "cancelled"),
        (end(WRONG, 2), "requeue", "stop", "no other start would mend that"),
        (end(CRASHED, 137), "requeue", "requeue", "ended by SIGKILL"),
        (end(None, 143), "requeue", "requeue", "exit code 143 and no word"),
    ],
)
def test_each_end_has_its_word(tmp_path: Path, found: End, restart: str, word: str, reason: str) -> None:
    checkpoint(tmp_path / "checkpoints", 30)
    got, said = decide(tmp_path, found, str(tmp_path / "checkpoints"), restart, 2)  # type: ignore[arg-type]
    assert got == word and reason in said
    assert (tmp_path / ENDED).exists() == (word in ("done", "stop"))
    (attempt,) = attempts(tmp_path)
    assert (attempt.job, attempt.step, attempt.decision, attempt.reason) == (7, 30, word, said)


def test_starts_without_progress_are_counted_and_progress_forgives(tmp_path: Path) -> None:
    words = []
    steps = [None, 10, None, None, 20, None, None, None]
    for start, step in enumerate(steps):
        if step:
            checkpoint(tmp_path / "checkpoints", step)
        words.append(decide(tmp_path, end(CRASHED, 1, start=start), str(tmp_path / "checkpoints"), "requeue", 2)[0])
    assert words == ["requeue"] * 7 + ["stop"]
    assert "3 starts in a row saved no step beyond 20" in (tmp_path / ENDED).read_text()


def test_a_run_that_goes_on_counts_from_what_it_had(tmp_path: Path) -> None:
    folder = tmp_path / "slurm" / "one"
    folder.mkdir(parents=True)
    Submission(folder, "pretrain", "name", "log", ("pretrain",), step=40).write()
    checkpoint(tmp_path / "checkpoints", 40)
    word, reason = decide(folder, end(STOPPED), str(tmp_path / "checkpoints"), "requeue", 0)
    assert word == "stop" and "1 starts in a row saved no step beyond 40" in reason


def test_nothing_starts_again_after_a_cancel(tmp_path: Path) -> None:
    (tmp_path / ENDED).write_text("stop: cancelled\n")
    assert decide(tmp_path, end(STOPPED), str(tmp_path / "none"), "requeue", 2)[0] == "stop"


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert newest_step(str(tmp_path / "nowhere")) == 0
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, whole=False)
    (tmp_path / ".step_00000030.tmp").mkdir()
    assert newest_step(str(tmp_path)) == 10


def test_exit_codes() -> None:
    assert [exit_code("done", 0), exit_code("next", 85), exit_code("requeue", 1)] == [0, 0, 85]
    assert [exit_code("stop", 2), exit_code("stop", 0)] == [2, 1]


def test_the_first_rank_to_tell_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(DONE)  # nobody asked
    monkeypatch.setenv(VARIABLE, str(tmp_path / "outcome.json"))
    tell(CRASHED)
    tell(STOPPED)
    assert read(tmp_path / "outcome.json") == CRASHED
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    (tmp_path / "outcome.json").write_text('{"status": "do')
    assert read(tmp_path / "outcome.json") is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere" / "outcome.json"))
    tell(DONE)


def test_a_submission_is_found_by_its_folder_and_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name, jobs in (("20260101-000000-1", (4, 5)), ("20260102-000000-1", (6,))):
        folder = tmp_path / "run" / "slurm" / name
        folder.mkdir(parents=True)
        Submission(folder, "pretrain", "tiny", "logs/%x-%j.out", ("pretrain", "a"), steps=9).with_jobs(jobs).write()
    newest = find(str(tmp_path / "run"))
    assert (newest.jobs, newest.words, newest.steps) == ((6,), ("pretrain", "a"), 9)
    assert find("5").jobs == (4, 5) and find("5").run == tmp_path / "run"
    assert find("5").log_of(5) == Path("logs/tiny-5.out")
    content = json.loads((newest.folder / "submission.json").read_text())
    assert content["submitted"]

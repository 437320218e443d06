"""What a job's script is told when a start has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmscale.slurm.after import MOST_INTERRUPTIONS, Decision, End, Rules, begin, decide, newest_step
from llmscale.slurm.commands import JobState
from llmscale.slurm.outcome import VARIABLE, Outcome, read, tell
from llmscale.slurm.records import ENDED, Submission, attempts, find

DONE = Outcome("done", "", 100)
STOPPED = Outcome("stopped", "SIGUSR1", 30)
WRONG = Outcome("failed", "run.yaml: training.steps: is missing", retry=False)
REPLACED = Outcome("replaced", "another start writes there")
CRASHED = Outcome("failed", "rank 3 on node1 was ended by SIGKILL")


def checkpoint(folder: Path, step: int, whole: bool = True) -> None:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    if whole:
        (path / "manifest.json").write_text("{}")


def end(outcome: Outcome | None, code: int = 85, state: str = "RUNNING", start: int = 0, **more: Any) -> End:
    return End(**{"phase": "run", **more}, job=7, start=start, code=code, state=JobState(state), outcome=outcome)


def rules(folder: Path, restart: Any = "requeue", limit: int = 2, exclude: bool = True) -> Rules:
    return Rules(str(folder / "checkpoints"), restart, limit, exclude)


def bad(*names: str) -> dict[str, list[str]]:
    return {name: ["link 3 is down"] for name in names}


@pytest.mark.parametrize(
    ("found", "restart", "word", "reason"),
    [
        (end(DONE, 0), "requeue", "done", "all steps are done"),
        (end(DONE, 137), "requeue", "done", "all steps are done"),
        (end(None, 0), "requeue", "requeue", "exit code 0 and no word"),
        (end(None, 2), "requeue", "stop", "no other start would mend that"),
        (end(STOPPED, state="REQUEUED"), "requeue", "leave", "Slurm has queued the job again"),
        (end(REPLACED, 1), "requeue", "leave", "another start writes there"),
        (end(STOPPED, state="PREEMPTED"), "chain", "next", "goes on from step 30"),
        (end(None, 0, state="NODE_FAIL"), "chain", "next", "goes on from step 30"),
        (end(None, 85, phase="preflight"), "requeue", "requeue", "stopped by a signal"),
        (end(None, 139, phase="preflight"), "requeue", "requeue", "preflight ended with exit code 139 and no word"),
        (end(None, 137, phase="preflight"), "requeue", "requeue", "preflight ended with exit code 137 and no word"),
        (
            end(None, 1, phase="preflight", nodes=1, bad=bad("n1")),
            "requeue",
            "requeue",
            "going on without n1 from step 30",
        ),
        (end(None, 1, phase="preflight", nodes=2, bad=bad("n1")), "never", "stop", "bad node(s): n1: link 3 is down"),
        (end(None, 1, phase="preflight", nodes=3, bad=bad("n1", "n2")), "requeue", "stop", "the check itself"),
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
    made = decide(tmp_path, found, rules(tmp_path, restart))
    assert made.word == word and reason in made.reason
    assert (tmp_path / ENDED).exists() == (word in ("done", "stop"))
    (attempt,) = attempts(tmp_path)
    assert (attempt.job, attempt.step, attempt.decision, attempt.reason) == (7, 30, word, made.reason)


def test_starts_without_progress_are_counted_and_progress_forgives(tmp_path: Path) -> None:
    words = []
    steps = [None, 10, None, None, 20, None, None, None]
    for start, step in enumerate(steps):
        if step:
            checkpoint(tmp_path / "checkpoints", step)
        words.append(decide(tmp_path, end(CRASHED, 1, start=start), rules(tmp_path)).word)
    assert words == ["requeue"] * 7 + ["stop"]
    assert "3 starts in a row saved no step beyond 20" in (tmp_path / ENDED).read_text()


def test_a_run_that_goes_on_counts_from_what_it_had(tmp_path: Path) -> None:
    folder = tmp_path / "slurm" / "one"
    folder.mkdir(parents=True)
    Submission(folder, "pretrain", "name", "log", ("pretrain",), step=40).write()
    checkpoint(tmp_path / "checkpoints", 40)
    made = decide(folder, end(STOPPED), rules(tmp_path, limit=0))
    assert made.word == "stop" and "1 starts in a row saved no step beyond 40" in made.reason


def test_nothing_starts_again_after_a_cancel(tmp_path: Path) -> None:
    (tmp_path / ENDED).write_text("stop: cancelled\n")
    assert decide(tmp_path, end(STOPPED), rules(tmp_path)).word == "cancel"
    assert decide(tmp_path, end(STOPPED, state="CANCELLED", start=1), rules(tmp_path)).word == "stop"
    assert begin(tmp_path, 7, 2, rules(tmp_path))[0] == "stop"


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert newest_step(str(tmp_path / "nowhere")) == 0
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, whole=False)
    (tmp_path / ".step_00000030.tmp").mkdir()
    assert newest_step(str(tmp_path)) == 10


def test_a_start_that_left_no_word_is_lost_and_counts(tmp_path: Path) -> None:
    assert begin(tmp_path, 7, 0, rules(tmp_path, limit=1)) == ("run", "")
    assert begin(tmp_path, 7, 1, rules(tmp_path, limit=1)) == ("run", "")
    (lost,) = attempts(tmp_path)
    assert (lost.job, lost.start, lost.status) == (7, 0, "lost")
    # Its script may live on where only the node's daemon is gone: it has no say any more.
    assert decide(tmp_path, end(STOPPED, start=0), rules(tmp_path)).word == "leave"
    word, said = begin(tmp_path, 7, 2, rules(tmp_path, limit=1))
    assert word == "stop" and "2 starts in a row saved no step beyond 0" in said
    assert [attempt.start for attempt in attempts(tmp_path)] == [0, 1]
    assert begin(tmp_path, 7, 3, rules(tmp_path, limit=1))[0] == "stop"


def test_a_lost_start_of_a_chain_is_one_whose_job_began(tmp_path: Path) -> None:
    folder = tmp_path / "slurm" / "one"
    folder.mkdir(parents=True)
    Submission(folder, "pretrain", "name", str(tmp_path / "%x-%j.out"), (), jobs=(5, 6, 7)).write()
    (tmp_path / "name-6.out").write_text("")
    assert begin(folder, 7, 0, rules(tmp_path, "chain"))[0] == "run"
    assert [(attempt.job, attempt.status) for attempt in attempts(folder)] == [(6, "lost")]


def test_what_slurm_interrupts_is_no_failure_but_has_an_end_too(tmp_path: Path) -> None:
    for start in range(MOST_INTERRUPTIONS):
        assert begin(tmp_path, 7, start, rules(tmp_path, limit=0))[0] == "run"
        decide(tmp_path, end(STOPPED, state="REQUEUED", start=start), rules(tmp_path, limit=0))
    made = decide(tmp_path, end(STOPPED, state="PREEMPTED", start=MOST_INTERRUPTIONS), rules(tmp_path, limit=0))
    assert made.word == "stop" and "21 starts in a row were ended by Slurm" in made.reason


def test_bad_nodes_are_left_out_and_counted(tmp_path: Path) -> None:
    words = []
    for start, name in enumerate(("n1", "n2", "n3")):
        state = JobState("RUNNING", excluded=("n[7-8]", *[f"n{number}" for number in range(1, start + 1)]))
        found = End(7, start, "preflight", 3, state, None, 1, bad(name))
        words.append(decide(tmp_path, found, rules(tmp_path)))
    assert words[0] == Decision("requeue", words[0].reason, ("n[7-8]", "n1"))
    assert words[1].excluded == ("n[7-8]", "n1", "n2")
    assert words[2].word == "stop" and "3 starts in a row" in words[2].reason
    assert [attempt.bad_nodes for attempt in attempts(tmp_path)] == [("n1",), ("n2",), ("n3",)]
    assert decide(tmp_path / "..", end(None, 3, bad=bad("n1")), rules(tmp_path, exclude=False)).word == "stop"


def test_a_chain_tells_its_own_jobs_of_bad_nodes_and_says_when_it_is_used_up(tmp_path: Path) -> None:
    folder = tmp_path / "slurm" / "one"
    folder.mkdir(parents=True)
    Submission(folder, "pretrain", "name", str(tmp_path / "%x-%j.out"), (), jobs=(6, 7, 8, 9)).write()
    made = decide(folder, end(None, 3, bad=bad("n1")), rules(tmp_path, "chain"))
    assert (made.word, made.excluded, made.jobs) == ("next", ("n1",), (8, 9))
    checkpoint(tmp_path / "checkpoints", 30)
    last = End(9, 0, "run", 85, JobState("RUNNING"), STOPPED)
    made = decide(folder, last, rules(tmp_path, "chain"))
    assert made.word == "stop" and "the chain of 4 jobs is used up: submit it again" in made.reason


SHOWN = (
    "JobId=7 JobName=a\n JobState={} Reason={} Dependency=(null)\n Requeue=1 Restarts={} BatchFlag=1\n PreemptTime={} "
)


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        (SHOWN.format("RUNNING", "None", 1, "None"), "RUNNING"),
        (SHOWN.format("COMPLETING", "None", 1, "None"), "CANCELLED"),
        (SHOWN.format("COMPLETING", "TimeLimit", 1, "None"), "TIMEOUT"),
        (SHOWN.format("COMPLETING", "NodeDown", 1, "None"), "NODE_FAIL"),
        (SHOWN.format("COMPLETING", "None", 1, "2026-11-25T02:39:53"), "PREEMPTED"),
        (SHOWN.format("RUNNING", "None", 1, "2026-11-25T02:39:53"), "PREEMPTED"),
        (SHOWN.format("COMPLETING", "None", 2, "None"), "REQUEUED"),
        (SHOWN.format("PENDING", "BeginTime", 2, "None"), "REQUEUED"),
        ("", "unknown"),
    ],
)
def test_what_becomes_of_a_job_is_read_from_scontrol(shown: str, name: str) -> None:
    assert JobState.of(shown, 1).name == name
    assert JobState.of(f"{shown} ReqNodeList=(null) ExcNodeList=node[1-2],node7", 1).excluded == ("node[1-2],node7",)
    assert JobState.of(f"{shown} ExcNodeList=(null)", 1).excluded == ()


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

"""What follows when a start of a job begins and when it has ended: the job's script asks, and acts on the answer.

Before a start (`begin`)
    run        go on
    done       all steps are done: nothing to do
    stop       it is over
After it (`decide`)
    done       all steps are done
    requeue    the run goes on: this job is to be started again, without the nodes that are named after the word
    next       the run goes on in the next job of the chain; jobs named after the nodes are to leave these out
    leave      somebody else sees to the run: Slurm has queued the job again, or another start writes there now
    cancel     it was told to save and end, and has: the job is to be cancelled
    stop       it is over: wrong in a way that no other start mends, or too often without progress

A start gets nowhere when it leaves no newer checkpoint than the one before. What llmscale can help counts towards
slurm.restarts_without_progress; what Slurm does (preemption, requeueing) says nothing of the run, and is borne
MOST_INTERRUPTIONS times in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from llmscale.checkpoint.place import filesystem, is_remote, place_of
from llmscale.distributed.stop import STOPPED
from llmscale.slurm.commands import JobState
from llmscale.slurm.outcome import Outcome
from llmscale.slurm.records import ENDED, SUBMISSION, Attempt, Submission, add_attempt, attempts

Word = Literal["run", "done", "requeue", "next", "leave", "cancel", "stop"]
GONE = ("CANCELLED", "DEADLINE", "REVOKED")
"""States of a job that somebody ended."""
INTERRUPTED = ("REQUEUED", "PREEMPTED")
"""States of a job that Slurm took the nodes from."""
MOST_INTERRUPTIONS = 20
SIGNALLED = (STOPPED, 128 + 10, 128 + 15)
"""Exit codes of what SIGUSR1 or SIGTERM ended, with or without having been listened to."""


@dataclass(frozen=True)
class Rules:
    """Of a run. checkpoints: folder or URL. limit: restarts in a row without progress. exclude: go on without bad
    nodes.
    """

    checkpoints: str
    restart: Literal["requeue", "chain", "never"]
    limit: int
    exclude: bool = True


@dataclass(frozen=True)
class End:
    """How a start ended. phase: what had been reached. code: its exit code. outcome: what the run itself told.

    nodes: how many it had. bad: what preflight found of them.
    """

    job: int
    start: int
    phase: Literal["preflight", "run"]
    code: int
    state: JobState
    outcome: Outcome | None
    nodes: int = 1
    bad: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """excluded: nodes that later starts leave out, those that were left out before among them. jobs: that wait for
    their turn, and must be told.
    """

    word: Word
    reason: str
    excluded: tuple[str, ...] = ()
    jobs: tuple[int, ...] = ()


def begin(folder: Path, job: int, start: int, rules: Rules) -> tuple[Word, str]:
    """Before a start: (what to do, why). Starts before it that left no word are recorded as lost."""
    ended = folder / ENDED
    if ended.exists():
        text = ended.read_text().strip()
        return "done" if text.startswith("done") else "stop", text
    known = {(attempt.job, attempt.start) for attempt in attempts(folder)}
    before = [(job, number) for number in range(start)]
    if (submission := _submission(folder)) is not None:
        jobs = submission.jobs[: submission.jobs.index(job)] if job in submission.jobs else ()
        before = [(other, 0) for other in jobs if submission.log_of(other).exists()] + before
    step = newest_step(rules.checkpoints)
    for other, number in before:
        if (other, number) not in known:
            reason = "lost: its node failed, or it was ended before it could tell"
            word = "next" if rules.restart == "chain" else "requeue"
            add_attempt(folder, Attempt(other, number, -1, "lost", reason, step, word, _now()))
    if said := _too_often(folder, step, rules.limit):
        ended.write_text(f"stop: {said}\n")
        return "stop", said
    return "run", ""


def decide(folder: Path, end: End, rules: Rules) -> Decision:
    """After a start: what to do, and the records of it. folder: the submission's."""
    if any((end.job, end.start) == (attempt.job, attempt.start) for attempt in attempts(folder)):
        # Its node was given up while it still lived, and the next start has recorded that.
        return Decision("leave", "another start of the job is under way")
    step = newest_step(rules.checkpoints)
    interrupted = end.state.name in INTERRUPTED
    attempt = Attempt(
        end.job, end.start, end.code, _status(end), _what(end), step, "", _now(), interrupted, tuple(end.bad)
    )
    made = _decide(folder, end, attempt, rules)
    add_attempt(folder, replace(attempt, decision=made.word, reason=made.reason))
    if made.word in ("done", "stop"):
        (folder / ENDED).write_text(f"{made.word}: {made.reason}\n")
    return made


def _decide(folder: Path, end: End, attempt: Attempt, rules: Rules) -> Decision:
    outcome, what = end.outcome, attempt.reason
    if outcome is not None and outcome.status == "done":
        return Decision("done", f"all steps are done, {outcome.step} of them")
    if end.state.name == "REQUEUED":
        return Decision("leave", f"{what}; Slurm has queued the job again")
    if outcome is not None and outcome.status == "replaced":
        return Decision("leave", what)
    if end.state.name in GONE:
        return Decision("stop", "the job was cancelled")
    if (folder / ENDED).exists():
        return Decision("cancel", f"{what}; the job was cancelled")
    if _in_vain(end):
        return Decision("stop", f"{what}; no other start would mend that")
    if end.bad and not rules.exclude:
        return Decision("stop", f"{what}; slurm.exclude_bad_nodes is false")
    if len(end.bad) > 1 and 2 * len(end.bad) > end.nodes:
        return Decision("stop", f"{what}; so many point at what they share, or at the check itself")
    if rules.restart == "never":
        return Decision("stop", f"{what}; slurm.restart is never: submit it again to go on from step {attempt.step}")
    if said := _too_often(folder, attempt.step, rules.limit, attempt):
        return Decision("stop", f"{what}; {said}")
    excluded = tuple(dict.fromkeys([*end.state.excluded, *end.bad])) if end.bad else ()
    goes_on = f"going on without {','.join(end.bad)} from step" if end.bad else "goes on from step"
    goes_on = f"{what}; {goes_on} {attempt.step}"
    if rules.restart == "requeue":
        return Decision("requeue", goes_on, excluded)
    jobs = submission.jobs if (submission := _submission(folder)) is not None else ()
    if jobs and end.job == jobs[-1]:
        said = f"the chain of {len(jobs)} jobs is used up: submit it again to go on from step {attempt.step}"
        return Decision("stop", f"{what}; {said}")
    return Decision("next", goes_on, excluded, jobs[jobs.index(end.job) + 1 :] if excluded and jobs else ())


def _in_vain(end: End) -> bool:
    """Whether another start would end the same way: the user's mistake."""
    return not end.outcome.retry if end.outcome is not None else end.code == 2


def _status(end: End) -> str:
    if end.bad:
        return "bad_nodes"
    if end.outcome is not None:
        return end.outcome.status
    return "stopped" if end.code in SIGNALLED else "failed" if end.code else "lost"


def _what(end: End) -> str:
    where = "the run" if end.phase == "run" else "preflight"
    why = f" ({end.state.words})" if end.state.words else ""
    if end.bad:
        said = "; ".join(f"{node}: {', '.join(reasons)}" for node, reasons in end.bad.items())
        return f"preflight found bad node(s): {said}"
    if end.outcome is not None and end.outcome.status == "stopped":
        return f"stopped by {end.outcome.reason} after step {end.outcome.step}{why}"
    if end.outcome is not None:
        return f"failed: {end.outcome.reason}{why}"
    ended = f"{where} ended with exit code {end.code} and no word{why}"
    return f"stopped by a signal: {ended}" if end.code in SIGNALLED else f"{ended}; its last lines in the log say more"


def _too_often(folder: Path, step: int, limit: int, attempt: Attempt | None = None) -> str | None:
    """Why the run is given up, where too many starts in a row saved nothing new. attempt: one not yet recorded."""
    submission = _submission(folder)
    before = submission.step or 0 if submission is not None else 0
    failed = interrupted = 0
    for one in [*attempts(folder), *([attempt] if attempt else [])]:
        if one.step > before:
            failed = interrupted = 0
        elif one.interrupted:
            interrupted += 1
        else:
            failed += 1
        before = one.step
    if failed > limit:
        said = f"{failed} starts in a row saved no step beyond {step}"
        return f"{said} (slurm.restarts_without_progress is {limit})"
    if interrupted > MOST_INTERRUPTIONS:
        return f"{interrupted} starts in a row were ended by Slurm before they saved a step beyond {step}"
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _submission(folder: Path) -> Submission | None:
    """None in the first moments, when sbatch has taken a job that is not yet recorded."""
    return Submission.read(folder) if (folder / SUBMISSION).is_file() else None


def newest_step(checkpoints: str) -> int:
    """The step of the newest checkpoint that has a manifest; 0 where there is none."""
    place = place_of(checkpoints)
    if is_remote(place):
        filesystem(place)
    if not place.is_dir():
        return 0
    steps = [
        int(path.name.removeprefix("step_"))
        for path in place.iterdir()
        if path.name.removeprefix("step_").isdigit() and (path / "manifest.json").is_file()
    ]
    return max(steps, default=0)

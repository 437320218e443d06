"""What to do when a start of a job has ended: the job's script asks, and acts on the one word that it is told.

done       all steps are done
requeue    the run goes on: this job is to be started again
next       the run goes on, in the next job of the chain
stop       it is over: cancelled, wrong in a way that no other start mends, or too often without progress
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

from llmscale.checkpoint.place import filesystem, is_remote, place_of
from llmscale.distributed.stop import STOPPED
from llmscale.slurm.outcome import Outcome
from llmscale.slurm.records import ENDED, SUBMISSION, Attempt, Submission, add_attempt, attempts

Word = Literal["done", "requeue", "next", "stop"]
GONE = ("CANCELLED", "DEADLINE", "REVOKED")
"""States of a job that somebody ended."""


@dataclass(frozen=True)
class End:
    """How a start ended. code: srun's. state: the job's in the queue. outcome: what the run itself told."""

    job: int
    start: int
    code: int
    state: str
    outcome: Outcome | None


def decide(
    folder: Path, end: End, checkpoints: str, restart: Literal["requeue", "chain", "never"], limit: int
) -> tuple[Word, str]:
    """(what to do, why), and the records of it. folder: the submission's. limit: restarts in a row without progress."""
    step = newest_step(checkpoints)
    word, reason = _decide(folder, end, step, restart, limit)
    status = end.outcome.status if end.outcome else "lost"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    add_attempt(folder, Attempt(end.job, end.start, end.code, status, reason, step, word, now))
    if word in ("done", "stop"):
        (folder / ENDED).write_text(f"{word}: {reason}\n")
    return word, reason


def _decide(folder: Path, end: End, step: int, restart: str, limit: int) -> tuple[Word, str]:
    outcome = end.outcome
    if outcome is not None and outcome.status == "done":
        return "done", f"all steps are done, {outcome.step} of them"
    if end.code == 0 and outcome is None:
        return "done", "the command ended well"
    if end.state in GONE or (folder / ENDED).exists():
        return "stop", "the job was cancelled"
    what = _what(end)
    if outcome is not None and not outcome.retry:
        return "stop", f"{what}; no other start would mend that"
    if restart == "never":
        return "stop", f"{what}; slurm.restart is never: submit it again to go on from step {step}"
    steps = [_step_at_submission(folder), *(attempt.step for attempt in attempts(folder)), step]
    without = 0
    for before, now in reversed(list(pairwise(steps))):
        if now > before:
            break
        without += 1
    if without > limit:
        said = f"{without} starts in a row saved no step beyond {step}"
        return "stop", f"{what}; {said} (slurm.restarts_without_progress is {limit})"
    word: Word = "requeue" if restart == "requeue" else "next"
    return word, f"{what}; goes on from step {step}"


def _what(end: End) -> str:
    if end.outcome is None:
        return f"the run ended with exit code {end.code} and no word; its last lines above say more"
    if end.outcome.status == "stopped":
        return f"stopped by {end.outcome.reason} after step {end.outcome.step}"
    return f"failed: {end.outcome.reason}"


def _step_at_submission(folder: Path) -> int:
    """The newest checkpoint's step when the job was submitted."""
    return Submission.read(folder).step or 0 if (folder / SUBMISSION).is_file() else 0


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


def exit_code(word: Word, code: int) -> int:
    """What the job's script ends with."""
    if word == "done" or word == "next":
        return 0
    return STOPPED if word == "requeue" else code or 1

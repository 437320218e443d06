"""How a submission stands: the queue's word on its jobs, the starts that ended, and the run's own figures."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmscale.slurm.commands import queue
from llmscale.slurm.records import ENDED, Submission, attempts

METRICS = "metrics.jsonl"
_TAIL_BYTES = 1 << 18
_RECENT = 50
"""Steps whose median gives the time that is left."""


def status(submission: Submission) -> dict[str, Any]:
    """Everything, as plain values; see the keys of the result.

    jobs: of the queue, with its states. starts: that ended. bad_nodes: that preflight found. ended: why it is over,
    None while it is not. step, loss, tokens_per_second: of the newest row of metrics. seconds_left: for the steps that
    are left, while it runs.
    """
    jobs = queue(submission.jobs)
    rows = newest_rows(submission.run / METRICS) if submission.template == "pretrain" else []
    steps = [row for row in rows if "loss" in row]
    newest = steps[-1] if steps else {}
    done = int(newest.get("step", submission.step or 0))
    seconds = [row["step_seconds"] for row in steps[-_RECENT:] if row.get("step_seconds")]
    left = None
    if submission.steps is not None and seconds and done < submission.steps:
        left = (submission.steps - done) * statistics.median(seconds)
    ended = submission.folder / ENDED
    starts = attempts(submission.folder)
    return {
        "run": str(submission.run),
        "template": submission.template,
        "submitted": submission.submitted,
        "jobs": [asdict(job) for job in jobs],
        "ids": list(submission.jobs),
        "starts": [asdict(start) for start in starts],
        "bad_nodes": list(dict.fromkeys(node for start in starts for node in start.bad_nodes)),
        "ended": ended.read_text().strip() if ended.exists() else None,
        "step": done if submission.template == "pretrain" else None,
        "steps": submission.steps,
        "loss": newest.get("loss"),
        "tokens_per_second": newest.get("tokens_per_second"),
        "seconds_left": left,
        "log": str(submission.log_of(current(submission))),
    }


def current(submission: Submission) -> int:
    """The job that runs, or ran last: the last that has a log, else the first."""
    with_log = [job for job in submission.jobs if submission.log_of(job).exists()]
    return with_log[-1] if with_log else submission.jobs[0]


def newest_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of metrics; a row that is being written is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().splitlines()
    rows = []
    for line in lines[1 if size > _TAIL_BYTES else 0 :]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    shown = [f"{found['run']}: {found['template']}, submitted {found['submitted']}"]
    for job in found["jobs"]:
        where = f" on {job['nodelist']}" if job["nodelist"] else ""
        why = f" ({job['reason']})" if job["state"] == "PENDING" else ""
        shown.append(f"job {job['job']}: {job['state']}{why}, {job['nodes']} node(s){where}, {job['used']} used")
    gone = set(found["ids"]) - {int(job["job"].partition("_")[0]) for job in found["jobs"]}
    if gone:
        shown.append(f"job {', '.join(map(str, sorted(gone)))}: no longer in the queue")
    for start in found["starts"]:
        shown.append(f"start {start['start'] + 1} of job {start['job']}: {start['reason']} -> {start['decision']}")
    if found["bad_nodes"]:
        shown.append(f"bad nodes, left out: {', '.join(found['bad_nodes'])}")
    if found["step"] is not None:
        text = f"step {found['step']} of {found['steps']}"
        if found["loss"] is not None:
            text += f", loss {found['loss']:.4f}, {found['tokens_per_second']:,.0f} tokens/s"
        if found["seconds_left"] is not None and not found["ended"]:
            text += f", {duration(found['seconds_left'])} left at that speed"
        shown.append(text)
    if found["ended"]:
        shown.append(f"over: {found['ended']}")
    return [*shown, f"log: {found['log']}"]


def duration(seconds: float) -> str:
    """1 d 02:03:04."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour:02}:{minute:02}:{second:02}"

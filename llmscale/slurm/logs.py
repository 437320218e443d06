"""The logs of a submission: one file a job, in an array one a task; shown, and followed from a job to the next."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from llmscale.slurm.commands import queue
from llmscale.slurm.records import ENDED, Submission
from llmscale.slurm.status import current

POLL_SECONDS = 1.0
ASK_SECONDS = 15.0
ENDED_SECONDS = 2.0
"""How often the queue is asked whether the jobs live, and once the run is over: its daemon serves a whole cluster."""


def existing(submission: Submission, task: int | None = None) -> list[Path]:
    """The logs that are there, jobs and tasks in their order. task: of an array, all of them when None."""
    found = []
    for job in submission.jobs:
        path = submission.log_of(job, task)
        # Only what stands for a task's number is a pattern.
        before, star, after = path.name.rpartition("*")
        pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        if not star:
            found += [path] if path.exists() else []
        elif path.parent.is_dir():
            tasks = [
                (int(match[1]), other) for other in path.parent.iterdir() if (match := pattern.fullmatch(other.name))
            ]
            found += [other for _, other in sorted(tasks)]
    return found


def newest(submission: Submission, task: int | None = None) -> list[Path]:
    """The logs that people ask for: that of the job that runs or ran last; of an array those of all tasks."""
    there, wanted = existing(submission, task), submission.log_of(current(submission), task)
    return there if "*" in wanted.name else [path for path in there if path == wanted]


class Reader:
    """Shows what is new in logs. headers: under their names, as tasks of an array write side by side."""

    def __init__(self, write: Callable[[bytes], None], headers: bool) -> None:
        self._write, self._headers = write, headers
        self._places: dict[Path, int] = {}
        self._last: Path | None = None

    def tail(self, path: Path, count: int) -> None:
        """The last `count` lines of a log."""
        text = path.read_bytes()
        self._places[path] = len(text)
        self._show(path, b"".join(text.splitlines(keepends=True)[-count:] if count else []))

    def skip(self, path: Path) -> None:
        """What a log holds by now is not shown."""
        self._places[path] = path.stat().st_size

    def news(self, path: Path) -> bool:
        """What was added to a log since; whether anything was."""
        with path.open("rb") as file:
            file.seek(self._places.get(path, 0))
            text = file.read()
        self._places[path] = self._places.get(path, 0) + len(text)
        self._show(path, text)
        return bool(text)

    def _show(self, path: Path, text: bytes) -> None:
        if not text:
            return
        if self._headers and path != self._last:
            self._write(f"==> {path.name} <==\n".encode())
        self._last = path
        self._write(text)


def show(submission: Submission, task: int | None, count: int, write: Callable[[bytes], None]) -> Reader:
    """The last lines of the newest logs."""
    paths = newest(submission, task)
    reader = Reader(write, headers="*" in submission.log_of(submission.jobs[0], task).name)
    for path in existing(submission, task):
        if path in paths:
            reader.tail(path, count)
        else:
            reader.skip(path)
    return reader


def follow(submission: Submission, task: int | None, count: int, write: Callable[[bytes], None]) -> None:
    """The same, and whatever is added to any of them until no job of the submission lives."""
    reader = show(submission, task, count, write)
    asked, alive = -ASK_SECONDS, True
    while alive:
        now = time.monotonic()
        if now - asked > (ENDED_SECONDS if (submission.folder / ENDED).exists() else ASK_SECONDS):
            asked, alive = now, any(not job.over for job in queue(submission.jobs))
        # After the question: what was written before the last job ended is shown.
        for path in existing(submission, task):
            reader.news(path)
        if alive:
            time.sleep(POLL_SECONDS)

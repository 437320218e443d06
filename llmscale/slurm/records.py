"""What is known of a submission: a folder of its own in the run directory, and a list of the user's jobs.

OUTPUT_DIR/slurm/20261123-141500-4711/
    submission.json               what was submitted, and the jobs it became
    script.sbatch                 the job script
    config.yaml                   the run's config as it was checked, which the job runs; and the DeepSpeed file
    attempts.jsonl                a line for each start that ended: how, at which step, and what was decided
    ended                         why it is over, once it is: no job of the submission starts again
    outcome_<job>_<start>.json    how a start ended, in the run's own words (outcome.py)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmscale.errors import UsageError

FOLDER = "slurm"
SUBMISSION, SCRIPT, CONFIG = "submission.json", "script.sbatch", "config.yaml"
ATTEMPTS, ENDED = "attempts.jsonl", "ended"


@dataclass(frozen=True)
class Submission:
    """folder: its records. jobs: their numbers, more than one in a chain. log: with %x (name), %A or %j (number), %a
    (task of an array).

    steps: of the whole run, None where the job is no run. step: the newest checkpoint's when it was submitted.
    """

    folder: Path
    template: str
    job_name: str
    log: str
    words: tuple[str, ...]
    jobs: tuple[int, ...] = ()
    steps: int | None = None
    step: int | None = None
    submitted: str = ""

    @property
    def run(self) -> Path:
        """The run directory, or the folder of the logs of what is no run."""
        return self.folder.parent.parent

    def log_of(self, job: int, task: int | None = None) -> Path:
        """The log of a job. task: of an array; where it is None, the name has a star in its place."""
        values = {"%x": self.job_name, "%j": str(job), "%A": str(job), "%a": "*" if task is None else str(task)}
        path = Path(self.log)
        return path.with_name(re.sub("%[xjAa]", lambda found: values[found[0]], path.name))

    def write(self) -> None:
        """Write submission.json, and list the jobs among the user's."""
        content = {**asdict(self), "folder": str(self.folder)}
        work = self.folder / f".{SUBMISSION}.tmp"
        work.write_text(json.dumps(content, indent=1) + "\n")
        work.replace(self.folder / SUBMISSION)
        if self.jobs:
            path = _registry()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps({"job": job, "folder": str(self.folder)}) + "\n" for job in self.jobs)

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """
        Raises:
            UsageError: the records are damaged.
        """
        try:
            content = json.loads((folder / SUBMISSION).read_text())
            return cls(
                **{**content, "folder": folder, "jobs": tuple(content["jobs"]), "words": tuple(content["words"])}
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{folder / SUBMISSION}: cannot be read ({error}); name another run directory") from None

    def with_jobs(self, jobs: tuple[int, ...]) -> Submission:
        """As it is once it was submitted."""
        return replace(self, jobs=jobs, submitted=datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Attempt:
    """One start that ended. step: the newest checkpoint's. decision: the word of `after`.

    interrupted: Slurm ended it, for reasons of its own. bad_nodes: that preflight found.
    """

    job: int
    start: int
    code: int
    status: str
    reason: str
    step: int
    decision: str
    ended: str
    interrupted: bool = False
    bad_nodes: tuple[str, ...] = ()


def attempts(folder: Path) -> list[Attempt]:
    """The starts that ended, oldest first."""
    path = folder / ATTEMPTS
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [Attempt(**{**row, "bad_nodes": tuple(row.get("bad_nodes", ()))}) for row in rows]


def add_attempt(folder: Path, attempt: Attempt) -> None:
    """Append one."""
    with (folder / ATTEMPTS).open("a") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")


def new_folder(output: Path) -> Path:
    """The folder of a submission that is to be made."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    return output / FOLDER / name


def task_of(named: str) -> int | None:
    """The task of an array that "4_1" names; None where it is something else."""
    found = re.fullmatch(r"\d+_(\d+)", named)
    return int(found[1]) if found and not Path(named).is_dir() else None


def find(named: str) -> Submission:
    """The submission of a job's number (in an array also 4_1, a task's), or the newest one of a run directory.

    Raises:
        UsageError: there is none.
    """
    if (job := re.fullmatch(r"(\d+)(_\d+)?", named)) and not Path(named).is_dir():
        for row in _jobs():
            if row["job"] == int(job[1]) and (Path(row["folder"]) / SUBMISSION).is_file():
                return Submission.read(Path(row["folder"]))
        raise UsageError(f"job {named}: not submitted by `llmscale slurm submit` here; name its run directory")
    folders = sorted(path.parent for path in Path(named, FOLDER).glob(f"*/{SUBMISSION}"))
    if not folders:
        raise UsageError(f"{named}: nothing was submitted from there; name a run directory, or a job's number")
    return Submission.read(folders[-1])


def _jobs() -> Iterator[dict[str, Any]]:
    """The newest first."""
    path = _registry()
    if path.is_file():
        for line in reversed(path.read_text().splitlines()):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _registry() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "llmscale" / "jobs.jsonl"

"""Slurm's own commands, called as a user would; what they print, or what they refuse in one line."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from llmscale.errors import LlmscaleError, UsageError

_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
_FIELDS = "%i|%T|%r|%D|%N|%M|%L"


class SlurmError(LlmscaleError):
    """A command of Slurm failed."""


def call(*words: str) -> str:
    """Run a command, and give its standard output.

    Raises:
        UsageError: there is no such command here. SlurmError: it failed; with its own words.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise UsageError(f"{words[0]}: not found; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]}: no answer in 120 s; is Slurm's controller down? (scontrol ping)") from None
    if done.returncode:
        lines = [line.strip().removeprefix(f"{words[0]}: error: ") for line in done.stderr.splitlines()]
        said = "; ".join(line for line in lines if line)
        raise SlurmError(f"{words[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout


@dataclass(frozen=True)
class Queued:
    """A job as the queue shows it. job: with its array task, such as 12_3. reason: why it waits. used, left: times."""

    job: str
    state: str
    reason: str
    nodes: int
    nodelist: str
    used: str
    left: str

    @property
    def over(self) -> bool:
        """Whether it neither waits, nor runs, nor ends to be started again."""
        return self.state in _OVER


def queue(jobs: Sequence[int]) -> list[Queued]:
    """What the queue still knows of these jobs; those that ended some minutes ago are forgotten."""
    if not jobs:
        return []
    listed = ",".join(map(str, jobs))
    try:
        text = call("squeue", "--noheader", "--states=all", f"--jobs={listed}", f"--format={_FIELDS}")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == _FIELDS.count("|")]
    return [Queued(job, state, reason, int(nodes), *rest) for job, state, reason, nodes, *rest in rows]


@dataclass(frozen=True)
class JobState:
    """What becomes of a job whose script still runs. name: RUNNING, or what ends it: REQUEUED, CANCELLED, NODE_FAIL, …

    words: that in words, "" where nothing does. excluded: the nodes that it leaves out.
    """

    name: str
    words: str = ""
    excluded: tuple[str, ...] = ()

    @classmethod
    def of(cls, shown: str, start: int) -> JobState:
        """From what `scontrol show job` says, to start number `start`: a job that ends is COMPLETING, whatever for."""
        found = dict(re.findall(r"(\w+)=(\S*)", shown))
        name = found.get("JobState", "unknown")
        restarts = found.get("Restarts", "0")
        preempted = found.get("PreemptTime", "None")[:1].isdigit()
        if restarts.isdigit() and int(restarts) > start:
            name = "REQUEUED"
        elif preempted:
            name = "PREEMPTED"
        elif name == "COMPLETING":
            reason = found.get("Reason", "None")
            name = {"TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL"}.get(reason, "CANCELLED")
        words = {
            "REQUEUED": "its nodes were taken", "PREEMPTED": "preempted", "TIMEOUT": "out of time",
            "NODE_FAIL": "a node failed",
        }.get(name, "")  # fmt: skip
        excluded = found.get("ExcNodeList", "(null)")
        return cls(name, words, () if excluded in ("", "(null)") else (excluded,))

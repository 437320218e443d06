"""Runs on a real Slurm: preempted, out of time, with ranks and nodes that are lost; each goes on by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import command, in_processes
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d (node\d) (\d+|job) \| .*")

SLURM = ("srun:", "slurmstepd", "Job is pending", "Job step ")
"""How lines begin that Slurm writes itself."""


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the metrics follows from the run alone, and not from the machine's speed."""
    keys = ("step", "tokens", "loss", "grad_norm", "learning_rate", "validation_loss")
    return [{key: row[key] for key in keys if key in row} for row in rows]


def ranks(folder: Path) -> list[int]:
    """The processes of a job that train: those that have its config among their words, but for their watchers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder / "run.yaml").encode() in words and b"task" not in words and b"slurm" not in words:
            found.append(int(path.parent.name))
    return found


def test_a_run_that_was_preempted_three_times_is_the_run_that_was_not(
    cluster: Cluster, tokens: Path, tmp_path: Path
) -> None:
    """Two nodes of two tasks: by a signal, by being requeued, and by a job of higher priority."""
    job = Job(cluster, tmp_path, tokens, {"nodes": 2, "tasks_per_node": 2}, training={"steps": 90})
    job.submit("parallel.tensor=2")
    number = job.number()
    job.until_step(8)
    cluster.call("scancel", "--signal=USR1", number)
    job.until_attempts(1)
    job.until_step(job.attempts()[0].step + 10)
    cluster.call("scontrol", "requeue", number)
    job.until(lambda: job.state() == "PENDING", "the second start to end")
    saved = max(int(path.name[5:]) for path in (job.run / "checkpoints").glob("step_*"))
    job.until(lambda: job.state() == "RUNNING", "the third start")
    job.until_step(saved + 10)
    cluster.call("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert job.until_over() == "done: all steps are done, 90 of them"
    starts = job.log().count(f"==== job {number}, start ")
    assert starts == 4
    reasons = [attempt.reason for attempt in job.attempts()]
    assert reasons[0].startswith("stopped by SIGUSR1 after step ")
    assert "cannot be requeued" not in job.log()
    assert [attempt.decision for attempt in job.attempts()][-1] == "done"
    in_processes(
        4, command, "pretrain", str(tmp_path / "run.yaml"), "parallel.tensor=2", f"run.output_dir={tmp_path}/whole"
    )
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(whole) == 90 + 9
    for ours, theirs in zip(figures(job.rows()), figures(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), ours
    lines = [line for line in job.log().splitlines() if not line.startswith(SLURM)]
    marked = [LINE.fullmatch(line) for line in lines]
    assert all(marked), [line for line, found in zip(lines, marked, strict=True) if not found]
    assert {found[1] for found in marked if found} <= set(cluster.nodes)
    status = json.loads(job.llmscale("slurm", "status", number, "--json").stdout)
    assert (status["step"], status["steps"], status["jobs"][0]["state"]) == (90, 90, "COMPLETED")
    assert status["seconds_left"] is None and status["ended"].startswith("done")
    text = job.llmscale("slurm", "status", "run").stdout
    assert "step 90 of 90, loss " in text and "over: done" in text
    shown = job.llmscale("slurm", "logs", "-f", number, "-n", "3").stdout.splitlines()
    assert shown == job.log().splitlines()[-3:]


def test_out_of_time_and_with_a_rank_that_was_killed(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    job = Job(
        cluster, tmp_path, tokens, 
        {"tasks_per_node": 2, "time": "00:01:00", "signal_seconds": 15, "log_per_rank": True},
        training={"steps": 100_000, "validation_interval": 0}, checkpoint={"interval": 100, "keep": 2},
    )  # fmt: skip
    job.submit()
    number = job.number()
    job.until_attempts(1)
    assert job.attempts()[0].reason.startswith("stopped by SIGUSR1 after step ")
    assert job.attempts()[0].decision == "requeue" and job.attempts()[0].step > 0
    job.until_step(job.attempts()[0].step + 10)
    began = time.monotonic()
    killed = ranks(tmp_path)
    assert len(killed) == 2
    os.kill(killed[1], signal.SIGKILL)
    job.until_attempts(2)
    assert time.monotonic() - began < 30
    assert re.search(r"rank [01] on node\d was ended by SIGKILL", job.attempts()[1].reason), job.attempts()[1]
    assert re.search(r"node\d [01] \| error: rank [01] on node\d was ended by SIGKILL", job.log())
    assert (job.run / "logs" / "rank_00001.log").read_text().count("started by srun") == 0
    assert "loss" in (job.run / "logs" / "rank_00000.log").read_text()
    done = job.llmscale("slurm", "cancel", "run")
    assert done.returncode == 0 and f"job {number} cancelled" in done.stdout
    job.until(lambda: job.state() == "CANCELLED", "the cancel")
    assert "cancelled" in job.until_over()
    assert job.llmscale("slurm", "cancel", "run").stdout.startswith("nothing to cancel")


def test_a_bad_node_is_left_out_and_a_lost_one_is_replaced(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    check = tmp_path / "check"
    # The first node that comes is bad, and stays it.
    check.write_text(
        f"#!/bin/bash\ncd {tmp_path}\nmkdir first 2>/dev/null && echo $SLURMD_NODENAME >bad\n"
        "if [ $SLURMD_NODENAME = $(<bad) ]; then echo 'link 3 is down'; exit 1; fi\n"
    )
    check.chmod(0o755)
    job = Job(
        cluster, tmp_path, tokens, {"nodes": 1, "node_check": "check", "preflight": "all"},
        training={"steps": 100_000, "validation_interval": 0}, checkpoint={"interval": 20, "keep": 2},
    )  # fmt: skip
    job.submit()
    job.until_step(45)
    bad = (tmp_path / "bad").read_text().strip()
    assert re.search(rf"bad node {bad}: .*check: exit code 1: link 3 is down", job.log())
    assert f"going on without {bad}" in job.log()
    assert re.search(r"all-reduce of 1 ranks, 64 MiB: right", job.log())
    number = job.number()
    node = cluster.call("squeue", "-h", "-j", number, "-o", "%N").strip()
    assert node in set(cluster.nodes) - {bad}
    cluster.power_off(node)
    try:
        job.until(lambda: job.state() != "RUNNING", "Slurm to see that the node is gone")
        saved = max(int(path.name[5:]) for path in (job.run / "checkpoints").glob("step_*"))
        job.until(lambda: f"resumes after step {saved}" in job.log(), "the next start")
        assert cluster.call("squeue", "-h", "-j", number, "-o", "%N").strip() not in (node, bad)
    finally:
        job.llmscale("slurm", "cancel", number)
        cluster.power_on(node)
        job.until(lambda: cluster.idle() == set(cluster.nodes), "all nodes to be back")


def test_a_signal_before_there_is_anything_to_save(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    """Twice, by Slurm's SIGTERM; and without progress it is given up as soon as the config says so."""
    job = Job(cluster, tmp_path, tokens, {"restarts_without_progress": 0})
    job.submit()
    job.until(lambda: ranks(tmp_path), "the rank")
    for _ in range(2):
        cluster.call("scancel", "--signal=TERM", job.number())
    ended = job.until_over()
    assert ended.startswith("stop: stopped by SIGTERM after step 0"), (ended, job.log())
    assert "1 starts in a row saved no step beyond 0" in ended
    assert not (job.run / "metrics.jsonl").exists() or job.rows() == []


def test_what_no_start_would_mend_is_not_tried_again(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, tokens, {}, model={"vocab_size": 50})  # smaller than the data's: seen in the job
    job.submit()
    ended = job.until_over()
    assert "model.vocab_size: 50 is smaller than the data's vocabulary" in ended and "no other start" in ended
    assert job.state() == "FAILED" and len(job.attempts()) == 1
    status = job.llmscale("slurm", "status", "run").stdout
    assert "over: stop: failed" in status


def test_a_chain_goes_on_in_its_next_job(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, tokens, {"restart": "chain", "chain": 3}, training={"steps": 120})
    submission = job.submit()
    assert len(submission.jobs) == 3
    first, second, third = map(str, submission.jobs)
    job.until_step(5)
    assert job.state(second) == job.state(third) == "PENDING"
    cluster.call("scancel", "--signal=USR1", first)
    assert job.until_over() == "done: all steps are done, 120 of them"
    job.until(lambda: job.state(third) == "COMPLETED", "the third job")
    assert [attempt.decision for attempt in job.attempts()] == ["next", "done"]
    assert "nothing to do: done: all steps are done" in submission.log_of(int(third)).read_text()
    assert job.state(first) == job.state(second) == "COMPLETED"


def test_fewer_nodes_go_on_where_more_were(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, tokens, {"nodes": 2}, training={"steps": 30})
    job.submit("training.steps=15", "schedule.name=constant")
    job.until_over()
    time.sleep(1.1)  # submissions of one second are told apart by the process alone
    job.submit("slurm.nodes=1", "schedule.name=constant")
    assert job.until_over() == "done: all steps are done, 30 of them"
    assert "at step 15, on another layout (world_size 2 -> 1, data 2 -> 1)" in job.log()
    assert (
        subprocess.run(["grep", "-c", "start 1:", str(job.run / "logs" / f"tiny-{job.number()}.out")]).returncode == 0
    )


def test_what_was_cancelled_stays_cancelled(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    """By Slurm's own scancel, of which llmscale hears nothing but a SIGTERM: it saves, and does not come back."""
    job = Job(cluster, tmp_path, tokens, {"tasks_per_node": 2}, training={"steps": 100_000})
    job.submit()
    job.until_step(5)
    twice = job.llmscale("slurm", "submit", "run.yaml")
    assert twice.returncode == 2 and f"job {job.number()} trains there, or waits to" in twice.stderr
    cluster.call("scancel", job.number())
    assert job.until_over() == "stop: the job was cancelled"
    assert job.state() == "CANCELLED"
    last = job.rows()[-1]["step"]
    assert (job.run / "checkpoints" / f"step_{last:08d}" / "manifest.json").exists()
    time.sleep(2)
    assert job.state() == "CANCELLED"

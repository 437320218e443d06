"""Runs on a real Slurm: preempted, out of time, with ranks and nodes that are lost; each goes on by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmscale.slurm.records import find
from tests.distributed.processes import command, in_processes
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d (node\d) (\d+|job) \| .*")

SLURM = ("srun:", "slurmstepd", "Job is pending", "Job step ")
"""How lines begin that Slurm writes itself."""
ENDED = "SIG(TERM|USR1)"
"""What a rank hears first when Slurm ends a job: its SIGTERM, or that which the job's script hands on."""


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
        if b"task" in words or b"slurm" in words or b"pretrain" not in words:
            continue
        if any(word.startswith(str(folder).encode()) and word.endswith(b".yaml") for word in words):
            found.append(int(path.parent.name))
    return found


def rank_of(process: int) -> int:
    """Of a process, which rank it is."""
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    (found,) = [variable for variable in variables if variable.startswith(b"SLURM_PROCID=")]
    return int(found.partition(b"=")[2])


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
    job.until(lambda: job.log().count("resumes after step ") == 2, "the third start")
    job.until_step(saved + 10)
    cluster.call("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert job.until_over() == "done: all steps are done, 90 of them"
    starts = job.log().count(f"==== job {number}, start ")
    assert starts == 4
    first, second, third, _ = job.attempts()
    assert re.fullmatch(r"stopped by SIGUSR1 after step \d+; goes on from step \d+", first.reason)
    assert re.fullmatch(rf"stopped by {ENDED} after step \d+ \(its nodes were taken\); Slurm has .*", second.reason)
    assert re.fullmatch(rf"stopped by {ENDED} after step \d+ \(preempted\); goes on from step \d+", third.reason)
    assert [attempt.interrupted for attempt in job.attempts()] == [False, True, True, False]
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
    """Out of time, it goes on as if it had not been; then one rank of it is killed; then it is cancelled."""
    job = Job(
        cluster, tmp_path, tokens, {"tasks_per_node": 2, "signal_seconds": 130, "log_per_rank": True},
        training={"steps": 100_000, "validation_interval": 0, "global_batch_size": 64},
        schedule={"name": "constant"}, checkpoint={"interval": 100, "keep": 2},
    )  # fmt: skip
    job.submit()
    number = job.number()
    job.until_step(4)
    # One to two minutes are left from now on, however long the start took; Slurm looks every half minute.
    cluster.call("scontrol", "update", f"JobId={number}", f"TimeLimit={job.minutes_used() + 2}")
    job.until_attempts(1)
    cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    first = job.attempts()[0]
    assert re.fullmatch(r"stopped by SIGUSR1 after step \d+; goes on from step \d+", first.reason)
    assert first.decision == "requeue" and first.step > 0
    end = first.step + 10
    job.until_step(end)
    began = time.monotonic()
    killed = {rank_of(process): process for process in ranks(tmp_path)}
    assert set(killed) == {0, 1}
    os.kill(killed[1], signal.SIGKILL)
    job.until_attempts(2)
    assert time.monotonic() - began < 30
    assert re.search(r"rank 1 on node\d was ended by SIGKILL", job.attempts()[1].reason), job.attempts()[1]
    assert re.search(r"node\d 1 \| error: rank 1 on node\d was ended by SIGKILL", job.log())
    own = job.run / "logs" / "rank_00001.log"
    assert "error: rank 1 on node" in own.read_text() and "started by srun" not in own.read_text()
    assert "loss" in (job.run / "logs" / "rank_00000.log").read_text()
    rows = [row for row in job.rows() if row["step"] <= end]
    whole = [str(tmp_path / "run.yaml"), f"training.steps={end}", f"run.output_dir={tmp_path}/whole"]
    in_processes(2, command, "pretrain", *whole, "checkpoint.interval=0")
    expected = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(figures(rows), figures(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), ours
    # The killed start's steps go out of the metrics before the third one says that: Slurm waits before it starts it.
    job.until(lambda: job.log().count("resumes after step ") == 2, "the third start")
    job.until_step(job.attempts()[1].step + 5)
    done = job.llmscale("slurm", "cancel", "run")
    assert done.returncode == 0 and f"job {number} cancelled\njob {number} saves first" in done.stdout
    job.until(lambda: job.state() == "CANCELLED", "the cancel")
    assert "cancelled" in job.until_over()
    last = job.attempts()[-1]
    assert (last.decision, last.step) == ("cancel", job.rows()[-1]["step"]) and "SIGUSR1" in last.reason
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
    status = job.llmscale("slurm", "status", "run").stdout
    assert f"bad nodes, left out: {bad}" in status
    number, node = job.number(), job.node()
    assert node in set(cluster.nodes) - {bad}
    (third,) = set(cluster.nodes) - {bad, node}
    back = False
    try:
        # The daemon alone: the rank lives on there, and must not write beside the one that takes its place.
        cluster.kill_slurmd(node)
        job.until(lambda: job.state() != "RUNNING", "Slurm to see that the daemon is gone")
        job.until(lambda: job.state() == "RUNNING" and job.node() == third, "the start in its place")
        job.until(lambda: job.log().count("resumes after step ") == 1, "the next start")
        told = find(str(job.run)).folder / f"outcome_{number}_1.json"  # its srun is gone, and nobody logs what it says
        job.until(told.exists, "the orphan to end")
        assert f"another start writes there now (job {number}, start 3, host {third}" in told.read_text()
        job.until_step(job.step() + 50)
        steps = [row["step"] for row in job.rows()]
        assert steps == sorted(set(steps))
        assert [attempt.status for attempt in job.attempts()] == ["bad_nodes", "lost"]
        cluster.power_off(node)
        cluster.power_on(node)
        job.until(lambda: node in cluster.idle(), "the first node to be back")
        back = True
        cluster.power_off(third)
        job.until(lambda: job.state() != "RUNNING", "Slurm to see that the node is gone")
        saved = max(int(path.name[5:]) for path in (job.run / "checkpoints").glob("step_*"))
        job.until(lambda: f"resumes after step {saved}" in job.log(), "the next start")
        assert job.node() == node
        assert [attempt.status for attempt in job.attempts()] == ["bad_nodes", "lost", "lost"]
    finally:
        job.llmscale("slurm", "cancel", "--now", number)
        if back:  # a node that is turned off while a job ends there keeps it for minutes
            job.until(lambda: job.state() not in ("RUNNING", "COMPLETING"), "the job's end")
        for name in (third,) if back else (node, third):
            cluster.power_off(name)
            cluster.power_on(name)
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
    # Smaller than the data's: seen in the job. Which hears of it, though its tasks would get no variable of it.
    here = {"PYTHONPATH": str(Path(__file__).parents[2])}
    job = Job(cluster, tmp_path, tokens, {"extra": ["--export=NONE"], "environment": here}, model={"vocab_size": 50})
    job.submit()
    ended = job.until_over()
    assert "model.vocab_size: 50 is smaller than the data's vocabulary" in ended and "no other start" in ended
    assert job.state() == "FAILED" and len(job.attempts()) == 1
    status = job.llmscale("slurm", "status", "run").stdout
    assert "over: stop: failed" in status


def test_a_chain_outlives_a_lost_node_and_a_preemption(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    """Where Slurm cancels what it preempts, and requeues nothing. Its log is followed from job to job."""
    job = Job(
        cluster, tmp_path, tokens, {"restart": "chain", "chain": 4, "nodes": 2, "partition": "cancelled"},
        training={"steps": 1200, "validation_interval": 0},
    )  # fmt: skip
    submission = job.submit()
    first, second, third, fourth = map(str, submission.jobs)
    followed = (tmp_path / "followed").open("wb")
    reader = subprocess.Popen(
        [sys.executable, "-m", "llmscale", "slurm", "logs", "-f", "-n", "1000", "run"],
        cwd=tmp_path, env=job.environment, stdout=followed,
    )  # fmt: skip
    job.until_step(5)
    assert job.state(second) == job.state(third) == "PENDING"
    other = cluster.call("scontrol", "show", "hostnames", job.node(first)).split()[-1]
    cluster.call("scontrol", "update", f"NodeName={other}", "State=DOWN", "Reason=test")
    job.until_attempts(1)
    # The next job may begin, on other nodes, before the script of this one has come to its end.
    assert re.search(r"\(a node failed\); goes on from step|^lost: its node failed", job.attempts()[0].reason)
    cluster.call("scontrol", "update", f"NodeName={other}", "State=RESUME")
    job.until(lambda: job.state(second) == "RUNNING", "the second job")
    job.until(lambda: job.log().count(" | device: ") == 2, "the second job's run")
    job.until_step(job.attempts()[0].step + 5)
    cluster.call("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.until_attempts(2)
    assert re.fullmatch(rf"stopped by {ENDED} after step \d+ \(preempted\); goes on .*", job.attempts()[1].reason)
    assert job.until_over() == "done: all steps are done, 1200 of them"
    job.until(lambda: job.state(fourth) == "COMPLETED", "the fourth job")
    assert [attempt.decision for attempt in job.attempts()] == ["next", "next", "done"]
    assert "nothing to do: done: all steps are done" in submission.log_of(int(fourth)).read_text()
    assert job.state(third) == "COMPLETED"
    assert reader.wait(60) == 0
    # All of it once; where two jobs overlap, in the order in which it was written.
    assert sorted((tmp_path / "followed").read_text().splitlines()) == sorted(job.log().splitlines())


def test_a_run_that_fails_or_is_told_to_stop_in_preflight_or_while_it_is_decided(
    cluster: Cluster, tokens: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, tokens, {"preflight": "all"}, training={"steps": 400, "validation_interval": 0})
    job.with_stub(
        '"0 "*--all-reduce*) kill -SEGV $$ ;;\n'
        '"1 "*--judge*) touch judges; until [ -e go-1 ]; do sleep 0.1; done ;;\n'
        '"2 "*"slurm after"*) touch decides; until [ -e go-2 ]; do sleep 0.1; done ;;'
    )
    job.submit()
    number = job.number()
    job.until_attempts(1)
    assert job.attempts()[0].reason.startswith("preflight ended with exit code 139 and no word")
    job.until_file("judges")
    cluster.call("scancel", "--signal=USR1", "--batch", number)
    (tmp_path / "go-1").touch()
    job.until_attempts(2)
    assert job.attempts()[1].reason.startswith("stopped by a signal: preflight ended with exit code 85")
    job.until_step(5)
    cluster.call("scancel", "--signal=USR1", "--batch", number)
    job.until_file("decides")
    for _ in range(2):
        cluster.call("scancel", "--signal=USR1", "--full", number)
    (tmp_path / "go-2").touch()
    job.until_attempts(3)
    assert job.attempts()[2].reason.startswith("stopped by SIGUSR1 after step ")
    assert job.until_over() == "done: all steps are done, 400 of them"
    assert [attempt.decision for attempt in job.attempts()] == ["requeue", "requeue", "requeue", "done"]
    assert job.log().count("all-reduce of 1 ranks") == 2


def test_fewer_and_more_nodes_go_on_where_others_were(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    """Two ranks, then one, then three on nodes that have different numbers of them: the figures are one run's."""
    job = Job(
        cluster, tmp_path, tokens, {"nodes": 2}, training={"steps": 30, "global_batch_size": 12},
        schedule={"name": "constant"},
    )  # fmt: skip
    job.submit("training.steps=10")
    job.until_over()
    time.sleep(1.1)  # submissions of one second are told apart by the process alone
    job.submit("slurm.nodes=1", "training.steps=20")
    job.until_over()
    assert "at step 10, on another layout (world_size 2 -> 1, data 2 -> 1)" in job.log()
    time.sleep(1.1)
    job.submit("slurm.gpus=3", "slurm.cpus_per_task=4")
    assert job.until_over() == "done: all steps are done, 30 of them"
    assert "at step 20, on another layout (world_size 1 -> 3, data 1 -> 3)" in job.log()
    log = job.run / "logs" / f"tiny-{job.number()}.out"
    assert "start 1: 2 node(s)" in log.read_text()
    in_processes(1, command, "pretrain", str(tmp_path / "run.yaml"), f"run.output_dir={tmp_path}/whole")
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(figures(job.rows()), figures(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), ours


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

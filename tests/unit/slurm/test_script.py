"""What the job's script does, step by step: with a llmscale and a Slurm of our own, which write down their calls."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from llmscale.distributed.stop import STOPPED
from tests.unit.slurm.test_render import script, write

LLMSCALE = """\
echo "llmscale $*" >>calls
case "$*" in
*"slurm begin"*) echo "${BEGIN-run}" ;;
*"slurm after"*)
    kill -USR1 $$ "$PPID"
    kill -TERM $$ "$PPID"
    cat >shown
    echo "$AFTER" ;;
*--judge*) exit "${JUDGE-0}" ;;
*"task "*"slurm preflight"*) exit "${PREFLIGHT-0}" ;;
*"task "*pretrain*)
    trap 'echo told >>calls; exit 85' USR1
    touch trains
    while [ -n "${TRAINS-}" ]; do sleep 0.02; done
    exit "${RUN-0}" ;;
esac
"""
SRUN = """\
while [ "$1" != "$PWD/llmscale" ]; do shift; done
exec "$@"
"""
SCONTROL = """\
echo "scontrol $*" >>calls
case "$*" in
"show hostnames"*) echo node1; echo node2 ;;
"show job"*) echo "JobState=RUNNING Restarts=0" ;;
requeue*) exit "${REQUEUE-0}" ;;
esac
"""


def started(folder: Path, text: str, **variables: Any) -> subprocess.Popen[str]:
    programs = {"llmscale": LLMSCALE, "srun": SRUN, "scontrol": SCONTROL, "scancel": 'echo "scancel $*" >>calls\n'}
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
        **{name: str(value) for name, value in variables.items()},
    }  # fmt: skip
    (folder / "script").write_text(text)
    return subprocess.Popen(["bash", "script"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def ended(folder: Path, slurm: dict[str, Any], **variables: Any) -> tuple[int, list[str]]:
    """(exit code, calls that matter)."""
    text = script(write(folder, {"program": [str(folder / "llmscale")], "nodes": 2, **slurm}))
    (folder / "calls").unlink(missing_ok=True)
    process = started(folder, text, **variables)
    process.communicate(timeout=60)
    return process.returncode, calls(folder)


def calls(folder: Path) -> list[str]:
    words = [line.split() for line in (folder / "calls").read_text().splitlines()]
    return [" ".join(call) for call in words if call[:2] != ["scontrol", "show"]]


def did(made: list[str], *words: str) -> bool:
    return any(all(word in call.split() for word in words) for call in made)


@pytest.mark.parametrize(("word", "code"), [("done", 0), ("stop", 1)])
def test_what_is_over_is_not_started(here: Path, word: str, code: int) -> None:
    found, made = ended(here, {}, BEGIN=word)
    assert found == code and len(made) == 1


@pytest.mark.parametrize(
    ("word", "run", "code", "call"),
    [
        ("done", 0, 0, None),
        ("stop", 0, 1, None),
        ("stop", 2, 2, None),
        ("leave", 0, 1, None),
        ("cancel", 85, 85, "scancel 7"),
        ("requeue", 85, 0, "scontrol requeue 7"),
        ("next", 85, 0, None),
        ("next node1,node3 8 9", 85, 0, "scontrol update JobId=9 ExcNodeList=node1,node3"),
        ("requeue node1", 85, 0, "scontrol update JobId=7 ExcNodeList=node1"),
    ],
)
def test_each_word_is_carried_out(here: Path, word: str, run: int, code: int, call: str | None) -> None:
    found, made = ended(here, {}, AFTER=word, RUN=run)
    assert found == code
    assert did(made, "after", "--phase", "run", "--code", str(run), "--nodes", "node1,node2")
    assert (here / "shown").read_text().startswith("JobState=")
    assert (made[-1] == call or made[-2] == call) if call else "after" in made[-1]
    if word == "requeue node1":
        assert [one for one in made if one.startswith("scontrol")] == [
            "scontrol requeuehold 7", "scontrol update JobId=7 ExcNodeList=node1", "scontrol release 7",
        ]  # fmt: skip


def test_where_requeueing_is_forbidden_it_says_so(here: Path) -> None:
    assert ended(here, {}, AFTER="requeue", REQUEUE=1)[0] == STOPPED


@pytest.mark.parametrize(
    ("variables", "code", "steps"),
    [({"PREFLIGHT": 139}, 139, 1), ({"PREFLIGHT": 1}, 1, 1), ({"JUDGE": 3}, 3, 1), ({"RUN": 1}, 1, 3)],
)
def test_nothing_comes_after_what_failed(
    here: Path,
    variables: dict[str, Any],
    code: int,
    steps: int,
) -> None:
    found, made = ended(here, {}, AFTER="stop", **variables)
    assert found == code
    assert did(made, "after", "--phase", "run" if steps == 3 else "preflight", "--code", str(code))
    assert sum(" slurm task " in f" {call} " for call in made) == steps


def test_a_signal_is_handed_on_and_ends_no_decision(here: Path) -> None:
    """The `after` above sends more of them, to itself as well."""
    text = script(write(here, {"program": [str(here / "llmscale")], "nodes": 2}))
    process = started(here, text, TRAINS="yes", AFTER="requeue")
    deadline = time.monotonic() + 60
    while not (here / "trains").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert did(calls(here), "told") and did(calls(here), "after", "--code", "85")


def test_no_step_begins_after_a_signal(here: Path) -> None:
    text = script(write(here, {"program": [str(here / "llmscale")], "nodes": 2}))
    process = started(here, text.replace('note "preflight"\n', "kill -USR1 $$\n"), AFTER="requeue")
    process.communicate(timeout=60)
    assert not any(" slurm task " in f" {call} " for call in calls(here))
    assert did(calls(here), "after", "--phase", "preflight", "--code", "85")

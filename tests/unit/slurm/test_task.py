"""A task of srun: every line marked, every end told, signals at any moment of its child's life."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TASK = [sys.executable, "-m", "llmscale", "slurm", "task"]
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d node7 3 \| (.*)")


def environment(tmp_path: Path, stub: str) -> dict[str, str]:
    """A `llmscale` of our own stands before the real one for the child alone: the task starts `-m llmscale` anew."""
    (tmp_path / "stub").mkdir(exist_ok=True)
    (tmp_path / "stub" / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('LLMSCALE_STUB') and 'task' not in sys.orig_argv:\n" + stub
    )
    return {
        **os.environ, "PYTHONPATH": str(tmp_path / "stub"), "LLMSCALE_STUB": "1", "SLURM_PROCID": "3",
        "SLURMD_NODENAME": "node7", "LLMSCALE_OUTCOME": str(tmp_path / "outcome.json"),
    }  # fmt: skip


def run(tmp_path: Path, stub: str, *words: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [*TASK, *words, "--", "pretrain", "x"],
        env=environment(tmp_path, stub),
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = [LINE.fullmatch(line) for line in done.stdout.splitlines()]
    assert all(lines), done.stdout + done.stderr
    return done.returncode, [line[1] for line in lines if line]


@pytest.mark.parametrize("code", [0, 2, 85])
def test_lines_are_marked_and_the_exit_code_is_the_childs(tmp_path: Path, code: int) -> None:
    stub = (
        "    print('out'); print('err', file=sys.stderr); sys.stdout.write('no end'); sys.stdout.flush()\n"
        f"    os._exit({code})\n"
    )
    found, lines = run(tmp_path, stub, "--logs", str(tmp_path / "logs"))
    assert (found, sorted(lines)) == (code, ["err", "no end", "out"])
    assert len((tmp_path / "logs" / "rank_00003.log").read_text().splitlines()) == 3


def test_a_child_that_is_killed_is_told_of(tmp_path: Path) -> None:
    found, lines = run(tmp_path, "    print('last words', flush=True); os.kill(os.getpid(), 9)\n")
    assert (found, lines[0]) == (137, "last words")
    assert lines[1] == "error: rank 3 on node7 was ended by SIGKILL; often the node's memory ran out"
    told = json.loads((tmp_path / "outcome.json").read_text())
    assert told["status"] == "failed" and told["retry"] and "SIGKILL" in told["reason"]


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    found, lines = run(tmp_path, "    import time; time.sleep(60)\n", "--seconds", "0.5")
    assert (found, lines) == (137, ["error: rank 3 on node7 was ended by SIGKILL: pretrain x took longer than 0.5 s"])
    assert json.loads((tmp_path / "outcome.json").read_text())["retry"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
def test_a_signal_before_the_child_listens_stops_it(tmp_path: Path, number: signal.Signals, seconds: float) -> None:
    """The child holds it back until it listens; the real command then says 85 once it is asked."""
    stub = (
        "    import time; time.sleep(0.5)\n"
        "    from llmscale.distributed import stop\n"
        "    stop.listen(); time.sleep(0.2)\n"
        "    print(stop.received(), flush=True); os._exit(stop.STOPPED)\n"
    )
    process = subprocess.Popen(
        [*TASK, "--", "pretrain", "x"], env=environment(tmp_path, stub), stdout=subprocess.PIPE, text=True
    )
    _until_child(process.pid)
    time.sleep(seconds)
    process.send_signal(number)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85
    assert [LINE.fullmatch(line)[1] for line in output.splitlines()] == [number.name]  # type: ignore[index]


def _until_child(pid: int) -> None:
    deadline = time.monotonic() + 20
    while not Path(f"/proc/{pid}/task/{pid}/children").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.005)

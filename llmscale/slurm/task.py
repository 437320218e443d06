"""One task of srun: starts a llmscale command as its child, and marks every line that it prints.

A line becomes `2026-11-23T14:15:00 node7 3 | line`: time, node, rank. Whatever ends the child, this process is still
there to say so; signals are handed on. No torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from llmscale.distributed.stop import SIGNALS, STOPPED
from llmscale.slurm.outcome import Outcome, tell


def run(words: Sequence[str], logs: Path | None = None, seconds: float | None = None) -> int:
    """Run `llmscale WORDS`, and give its exit code; 128 + n where signal n ended it.

    logs: folder of a log a rank. seconds: after which it is killed; it may take any time when None.
    """
    rank = os.environ.get("SLURM_PROCID") or os.environ.get("RANK", "0")
    node = node_name()
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, hand_on)
    # Blocked in the child until it listens: Python's start would be ended by them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = subprocess.Popen(
        [sys.executable, "-m", "llmscale", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    own = open_log(logs, int(rank)) if logs else None
    mark = Marker(node, int(rank), own)
    assert child.stdout is not None
    late = threading.Event()

    def too_late() -> None:
        late.set()
        child.kill()

    watch = threading.Timer(seconds or 0, too_late)
    watch.daemon = True
    if seconds:
        watch.start()
    for line in child.stdout:
        mark(line)
    code = child.wait()
    watch.cancel()
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if -code in received:  # before it could listen
        tell(Outcome("stopped", name, 0))
        return STOPPED
    why = "; often the node's memory ran out" if -code == signal.SIGKILL else ""
    if late.is_set():
        why = f": {' '.join(words[:2])} took longer than {seconds:g} s"
    text = f"rank {rank} on {node} was ended by {name}{why}"
    tell(Outcome("failed", text))
    mark(f"error: {text}\n".encode())
    return 128 - code


def node_name() -> str:
    """This node's, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename.partition(".")[0]


def of_job(text: str) -> str:
    """A line of the job's script itself, marked as those of the ranks are."""
    return f"{_now()} {node_name()} job | {text}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


class Marker:
    """Writes lines to standard output, and to a rank's own log, with their time, node and rank."""

    def __init__(self, node: str, rank: int, own: IO[bytes] | None = None) -> None:
        self._place, self._own = f"{node} {rank}", own

    def __call__(self, line: bytes) -> None:
        """line: with its end; one without gets one."""
        text = f"{_now()} {self._place} | ".encode() + line.rstrip(b"\r\n") + b"\n"
        for file in (sys.stdout.buffer, self._own):
            if file is not None:
                file.write(text)
                file.flush()


def open_log(folder: Path, rank: int) -> IO[bytes]:
    """A rank's own log: restarts append to it."""
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"rank_{rank:05d}.log").open("ab")

"""Run a function in N real processes that meet over gloo.

A fork server imports torch, DeepSpeed and Megatron-core once; every test's processes are forked from it, clean and in
a tenth of a second, in place of six seconds of imports a process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.ports import free_ports

PRELOAD = ["tests.distributed.preload"]
TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Outcome:
    """What one process did: its function's result, or the exit code and output it ended with."""

    result: Any
    exit_code: int
    output: str


def in_processes(
    world_size: int, function: Callable[..., Any], *arguments: Any, environment: Any = None
) -> list[Outcome]:
    """Run function(*arguments) in `world_size` processes, with a torchrun-like environment each.

    `environment(rank)` adds to a process's variables. Fails where a process raises anything but SystemExit.
    """
    with tempfile.TemporaryDirectory(prefix="llmscale-") as folder:
        processes, pipes = started(world_size, folder, function, *arguments, environment=environment)
        try:
            return _collect(pipes, folder)
        finally:
            for process in processes:
                process.kill()
                process.join()


def started(
    world_size: int, folder: str, function: Callable[..., Any], *arguments: Any, environment: Any = None
) -> tuple[list[Any], list[Connection]]:
    """The processes, and the pipes that they answer through; what each says goes to RANK.log in the folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_ports()
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(environment(rank) if environment else {}),
        }
        log = os.path.join(folder, f"{rank}.log")
        process = context.Process(target=_child, args=(theirs, variables, log, function, arguments))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def _collect(pipes: Sequence[Connection], folder: str) -> list[Outcome]:
    found: dict[int, Outcome] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = wait(list(waiting), timeout=TIMEOUT_SECONDS)
        if not ready:
            raise AssertionError(f"no answer in {TIMEOUT_SECONDS} s\n{_logs(folder, len(pipes))}")
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            try:
                kind, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                kind, value = "died", "without a word"
            if kind in ("raised", "died"):
                raise AssertionError(f"rank {rank} {kind}: {value}\n{_logs(folder, len(pipes))}")
            code, result = value
            found[rank] = Outcome(result, code, Path(folder, f"{rank}.log").read_text())
    return [found[rank] for rank in range(len(pipes))]


def _logs(folder: str, count: int) -> str:
    texts = []
    for rank in range(count):
        path = Path(folder, f"{rank}.log")
        texts.append(f"--- rank {rank}\n{path.read_text()[-4000:] if path.exists() else ''}")
    return "\n".join(texts)


def _child(
    pipe: Connection, variables: dict[str, str], log: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # In a session of its own file descriptors: what C++ prints lands in the log as well.
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(variables)
    try:
        answer: tuple[str, Any] = ("returned", (0, function(*arguments)))
    except SystemExit as end:
        answer = ("returned", (end.code if isinstance(end.code, int) else int(end.code is not None), None))
    except BaseException:
        answer = ("raised", traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(answer)
    pipe.close()


def command(*arguments: str) -> None:
    """The command line, as the console script calls it; ends with SystemExit."""
    from llmscale.cli.main import main

    main(list(arguments))

"""The processes that tokenise: they end with the one that started them, whatever ends it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmscale.data.documents import Part
from llmscale.data.encode import Encoder, Job, Position, in_order
from llmscale.data.tokenizer import Tokenizer


@pytest.fixture
def waiting(tokenizer_json: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A build with two workers that has written some shards, and waits for a pipe that gives nothing."""
    pipe = tmp_path / "endless.txt"
    os.mkfifo(pipe)
    (tmp_path / "a.jsonl").write_text('{"text": "the stream reads"}\n' * 150_000)
    words = ["data", "build", "--input", tmp_path / "a.jsonl", pipe, "--tokenizer", tokenizer_json]
    words += ["--output", tmp_path / "out", "--workers", 2, "--shard-size", "64K", "--validation-fraction", 0]
    command = [sys.executable, "-m", "llmscale", *map(str, words)]
    # As typed at a prompt, where SIGINT is heard: what runs in the background inherits that it is not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    with pipe.open("wb"):  # once it is there
        yield process
    process.kill()
    process.communicate(timeout=60)


def children(process: subprocess.Popen[str]) -> list[int]:
    """A handle of each process that this one has started, which can be read once that has ended."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [os.pidfd_open(int(number)) for task in tasks for number in task.read_text().split()]


def test_workers_end_when_the_build_is_killed(waiting: subprocess.Popen[str]) -> None:
    left = set(children(waiting))
    assert len(left) >= 2
    waiting.kill()
    poll = select.poll()
    for handle in left:
        poll.register(handle, select.POLLIN)
    while left and (ended := poll.poll(60_000)):
        for handle, _ in ended:
            poll.unregister(handle)
            left.remove(handle)
            os.close(handle)
    assert not left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_interrupted_says_that_it_can_go_on(waiting: subprocess.Popen[str], number: int) -> None:
    waiting.send_signal(number)
    _, said = waiting.communicate(timeout=60)
    assert said.split("\n")[-2:] == ["interrupted; what was built is kept: the same command goes on", ""]
    assert "Traceback" not in said
    assert waiting.returncode == 130


def test_large_jobs_wait_until_those_before_are_done(tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmscale.data.encode._BYTES_A_WORKER", 1000)
    taken = 0

    def packs() -> Iterator[Job]:
        nonlocal taken
        for _ in range(8):
            taken += 1
            yield Job((Part("here", "text", b"the stream" * 300),), Position())

    seen = []
    for encoded, _ in in_order(Encoder(Tokenizer(tokenizer_json), "text"), packs(), 2):
        seen.append(taken)
        assert len(encoded.lengths) == 1
    assert seen == [2, 3, 4, 5, 6, 7, 8, 8]

"""Files of a split out of a command's standard output: webdataset's pipe:, for stores that only a tool can read.

    pipe:aws s3 cp s3://bucket/train/{name} -       {name} stands for card.json, index.json, shard-00000.tar …

The shell runs it, as whoever wrote the config means it to; the names that the index puts in are plain file names.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import BinaryIO, cast

from llmscale.data.store import Counters, Doubtful, Patience, Store, UrlStore, plain_name
from llmscale.errors import DataError, UsageError

_PART = 2 << 20
"""Bytes that have to come within the seconds of an attempt: 70 kB/s by default."""
_TURN_SECONDS = 0.2
_NO_COMMAND = (126, 127)
"""What a shell ends with when it cannot run a command or find it: trying again does not help."""


class PipeStore(Store):
    """The standard output of a command; whole files alone.

    That a file is missing cannot be told from a store that fails: both are an exit status, and tried again.
    """

    def __init__(self, url: str, patience: Patience, counters: Counters) -> None:
        super().__init__(url, patience, counters)
        self._template = url.removeprefix("pipe:")
        if "{name}" not in self._template:
            raise UsageError(f"{url}: does not say where the file's name goes; write {{name}} in its place")

    def where(self, name: str) -> str:
        """What to call a file in a message."""
        return self.url.replace("{name}", name)

    def copy(self, name: str, file: BinaryIO, size: int) -> None:
        """Write a file of this size into `file`."""

        def call() -> None:
            file.seek(0)
            file.truncate()
            count = self._run(name, file, size)
            if count != size:
                raise Doubtful(f"has {count} bytes, index.json says {size}")

        self.attempt(name, call)

    def read_all(self, name: str, most: int) -> bytes:
        """A whole file of at most so many bytes."""

        def call() -> bytes:
            with tempfile.TemporaryFile() as file:
                if self._run(name, file, most) > most:
                    raise DataError(f"{self.where(name)}: gives more than {most} bytes, which no such file has")
                file.seek(0)
                return file.read()

        return self.attempt(name, call)

    def _run(self, name: str, file: BinaryIO, most: int) -> int:
        """Copy the command's output; gives how many bytes came. One that gives more than `most` is ended."""
        if not plain_name(name):
            raise DataError(f"{self.url}: {name!r} is not a plain file name")
        command = self._template.replace("{name}", shlex.quote(name))
        count = part = 0
        patience = self._patience.attempt_seconds
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
            output = cast(BinaryIO, process.stdout)
            watch = select.poll()
            watch.register(output, select.POLLIN)
            until = time.monotonic() + patience
            try:
                while count <= most:
                    if not self._seen(until, lambda seconds: bool(watch.poll(1000 * seconds))):
                        raise TimeoutError(f"{f'{part} bytes' if part else 'no byte'} within {patience:g} s")
                    if not (data := os.read(output.fileno(), 1 << 20)):
                        break
                    if count == 0 or part >= _PART:  # what comes in drops would never end
                        until, part = time.monotonic() + patience, 0
                    count, part = count + len(data), part + len(data)
                    file.write(data)
                    self._counters.add(bytes_fetched=len(data))
                else:
                    return count
                if not self._seen(time.monotonic() + patience, lambda seconds: _ended(process, seconds)):
                    raise TimeoutError("closed its output and did not end")
                if status := process.returncode:
                    errors.seek(0)
                    said = errors.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
                    reason = f"exit status {status}" + (f": {said[-1]}" if said else "")
                    if status in _NO_COMMAND:
                        problem = UsageError(f"{self.where(name)}: {reason}; correct the command, or install it")
                        problem.everywhere = False  # it may be missing on one node alone
                        raise problem
                    raise OSError(reason)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                output.close()
        return count

    def _seen(self, until: float, look: Callable[[float], bool]) -> bool:
        """Whether something is seen in time. look: for so many seconds; in turns, so that closing is noticed."""
        while (left := until - time.monotonic()) > 0 and not self._closed.is_set():
            if look(min(left, _TURN_SECONDS)):
                return True
        return False


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def open_store(url: str, patience: Patience, counters: Counters) -> UrlStore | PipeStore:
    """The store that a URL names; nothing is read."""
    return PipeStore(url, patience, counters) if url.startswith("pipe:") else UrlStore(url, patience, counters)

"""What is broken in a source: named when it ends the run, counted and written down when it is left out.

A unit is what is left out as one: a sample of token shards, a piece of text shards. The report is one JSON object a
line, {"shard", "sample" or "piece", "reason", "url"}; every rank appends what it met.
"""

from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from llmscale.errors import DataError

OnError = Literal["stop", "skip"]
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What every rank that looks finds. Any other error of the system is this machine's own and breaks no unit: were it
left out, ranks of one tensor-parallel group would read different batches."""


class Broken(Exception):
    """A unit cannot be used. whole: nor can any other of the shard, for the same reason."""

    def __init__(self, unit: int, shard: str, reason: str, whole: bool = False) -> None:
        super().__init__(reason)
        self.unit = unit
        self.shard = shard
        self.reason = reason
        self.whole = whole


class Units(Protocol):
    """What a source is made of, in words."""

    unit: ClassVar[str]
    fix: ClassVar[str]
    """What to do where one is broken."""

    @property
    def units(self) -> int:
        """How many there are."""

    def unit_name(self, number: int) -> str:
        """What to call one beside its shard."""

    def where(self, name: str) -> str:
        """What to call a shard: its path, or its URL."""


def unreadable(where: str, error: OSError) -> DataError:
    """What ends the run where this machine cannot read a shard, whatever stands in it."""
    return DataError(
        f"{where}: cannot be read on this machine: {error.strerror or error}; check its file system and its limit on "
        "open files, and start again"
    )


def message(source: Units, broken: Broken) -> str:
    """What ends the run."""
    return f"{_said(source, broken)}; {source.fix}"


def _said(source: Units, broken: Broken) -> str:
    unit = "" if broken.whole else f"{source.unit} {source.unit_name(broken.unit)}: "
    return f"{source.where(broken.shard)}: {unit}{broken.reason}"


class Quarantine:
    """The broken units of one source, as far as this process has met them. Any thread may add some."""

    def __init__(self, source: Units, on_error: OnError, max_skipped: float, report: Path | None) -> None:
        """max_skipped: the share of the source's units that may be left out; one always may."""
        self._source = source
        self._on_error = on_error
        self._limit = max(1, int(max_skipped * source.units))
        self._report = report
        self._met: set[int] = set()
        self._adding = threading.Lock()

    def __len__(self) -> int:
        return len(self._met)

    def add(self, broken: Broken) -> None:
        """Stop for a broken unit, or leave it out.

        Raises:
            DataError: broken units end the run, or there are too many.
        """
        if self._on_error == "stop":
            raise DataError(message(self._source, broken))
        with self._adding:
            if broken.unit in self._met:
                return
            self._met.add(broken.unit)
            self._write(broken)
            if len(self._met) > self._limit:
                raise DataError(
                    f"{_said(self._source, broken)}; {len(self._met)} {self._source.unit}s are broken, and of "
                    f"{self._source.units} at most {self._limit} may be left out; {self._source.fix}, or raise "
                    "data.max_skipped"
                )

    def _write(self, broken: Broken) -> None:
        if self._report is None:
            return
        line = {
            "shard": broken.shard,
            self._source.unit: self._source.unit_name(broken.unit),
            "reason": broken.reason,
            "url": self._source.where(broken.shard),
        }
        try:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            with self._report.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise DataError(
                f"{self._report}: the report of what is broken cannot be written: {error.strerror}"
            ) from None

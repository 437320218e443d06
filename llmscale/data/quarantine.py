"""What is broken in a source: named when it ends the run, counted and written down when it is left out.

A unit is what is left out as one: a sample of token shards, a piece of text shards. The report is one JSON object a
line, {"shard", "sample" or "piece", "reason", "url"}, each unit once, whichever ranks met it.

How much may be left out is a limit on the run, so what was left out is part of the stream's state: the units, which the
limit bounds, and how many sequences they cost. Each rank knows what it met itself; `merge` tells it of the others. A
unit that is known is looked at all the same by whoever reads it next: whether it is used depends on its bytes alone.
"""

from __future__ import annotations

import fcntl
import json
import logging
import sys
import threading
from array import array
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, Protocol

import numpy as np

from llmscale.errors import DataError

logger = logging.getLogger(__name__)
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
    place: str
    """Where the source is, as the user named it."""

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


@dataclass(frozen=True)
class LeftOut:
    """What was left out, as far as one process knows.

    units: broken ones of the run. unshared: those of them that other ranks have not been told of. replaced: sequences
    that this process read others for. carried: those that all ranks had replaced before the run was resumed.
    """

    units: int = 0
    unshared: int = 0
    replaced: int = 0
    carried: int = 0

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(
            self.units + other.units,
            self.unshared + other.unshared,
            self.replaced + other.replaced,
            self.carried + other.carried,
        )


class Quarantine:
    """The broken units of one source, as far as this process knows of them. Any thread may add some."""

    def __init__(self, source: Units, on_error: OnError, max_skipped: float, report: Path | None) -> None:
        """max_skipped: the share of the source's units that may be left out; one always may."""
        self._source = source
        self._on_error = on_error
        self._limit = max(1, int(max_skipped * source.units))
        self._report = report
        self._units: set[int] = set()
        self._shared: frozenset[int] = frozenset()
        self._replaced = array("q")
        self._carried = 0
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return len(self._units)

    def add(self, broken: Broken) -> None:
        """Stop for a broken unit, or leave it out.

        Raises:
            DataError: broken units end the run, or there are too many.
        """
        if self._on_error == "stop":
            raise DataError(message(self._source, broken))
        with self._changing:
            if broken.unit in self._units:
                return
            self._units.add(broken.unit)
            said = _said(self._source, broken)
            if self._write(broken):  # of all ranks that meet it, one says it
                logger.warning("%s; it is left out (%d of at most %d)", said, len(self._units), self._limit)
            self._refuse_too_many(said)

    def replace(self, ordinal: int) -> None:
        """Told that the source gives another sequence at this ordinal."""
        with self._changing:
            self._replaced.append(ordinal)

    def left_out(self, ordinal: int = sys.maxsize) -> LeftOut:
        """What is known to be broken, and what it cost among the sequences before this ordinal."""
        with self._changing:
            before = int((np.array(self._replaced) < ordinal).sum())
            return LeftOut(len(self._units), len(self._units - self._shared), before, self._carried)

    def state(self, ordinal: int) -> dict[str, Any]:
        """What it takes to count on at this ordinal, as JSON: the broken units, and the sequences they cost before."""
        left = self.left_out(ordinal)
        return {"units": sorted(self._units), "replaced": left.carried + left.replaced}

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The state of all ranks of different sequences, from that of each; this one knows it as well from now on.

        Raises:
            DataError: together they have left out too much.
        """
        self._learn({unit for state in states for unit in state["units"]})
        own = sum(state["replaced"] - self._carried for state in states)
        return {"units": sorted(self._shared), "replaced": self._carried + own}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Count on from a state; from an empty one, from nothing.

        Raises:
            DataError: more had been left out than may be now.
        """
        self._units, self._replaced = set(), array("q")
        self._carried = state.get("replaced", 0)
        self._learn(state.get("units", ()))

    def _learn(self, units: Collection[int]) -> None:
        """Take up what all ranks know."""
        with self._changing:
            self._shared = frozenset(units)
            self._units |= self._shared
            if self._on_error == "skip":
                self._refuse_too_many(self._source.place)

    def _refuse_too_many(self, said: str) -> None:
        if len(self._units) > self._limit:
            raise DataError(
                f"{said}; {len(self._units)} {self._source.unit}s are broken, and of {self._source.units} at most "
                f"{self._limit} may be left out; {self._source.fix}, or raise data.max_skipped"
            )

    def _write(self, broken: Broken) -> bool:
        """Write a unit down; gives whether it was not written down before."""
        if self._report is None:
            return True
        line = {
            "shard": broken.shard,
            self._source.unit: self._source.unit_name(broken.unit),
            "reason": broken.reason,
            "url": self._source.where(broken.shard),
        }
        try:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            with self._report.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self._stands_in(file, line):
                    return False
                file.write(json.dumps(line).encode() + b"\n")
                return True
        except OSError as error:
            raise DataError(
                f"{self._report}: the report of what is broken cannot be written: {error.strerror}"
            ) from None

    def _stands_in(self, report: BinaryIO, line: Mapping[str, str]) -> bool:
        """Whether another rank, or this run before it was resumed, has written the same unit down."""
        report.seek(0)
        for text in report:
            with suppress(ValueError):  # a line that a kill cut short
                found = json.loads(text)
                if all(found.get(key) == line[key] for key in ("url", self._source.unit)):
                    return True
        return False

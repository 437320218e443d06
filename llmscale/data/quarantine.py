"""Samples that are broken: named when they end the run, counted and written down when they are left out.

The report is one JSON object a line, {"shard", "sample", "reason", "url"}; every rank appends the samples that it met.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Literal

from llmscale.data.shards import REBUILD, sample_key
from llmscale.data.split import Split
from llmscale.errors import DataError

OnError = Literal["stop", "skip"]


class Broken(Exception):
    """A sample cannot be used."""

    def __init__(self, sample: int, shard: str, reason: str) -> None:
        super().__init__(reason)
        self.sample = sample
        self.shard = shard
        self.reason = reason


class Quarantine:
    """The broken samples of one source, as far as this process has met them."""

    def __init__(self, split: Split, on_error: OnError, max_skipped: float, report: Path | None) -> None:
        """max_skipped: the share of the split's samples that may be left out; one always may."""
        self._split = split
        self._on_error = on_error
        self._limit = max(1, int(max_skipped * split.card.samples))
        self._report = report
        self._met: set[int] = set()

    def __len__(self) -> int:
        return len(self._met)

    def add(self, broken: Broken) -> None:
        """Stop for a broken sample, or leave it out.

        Raises:
            DataError: broken samples end the run, or there are too many.
        """
        where = self._split.where(broken.shard)
        if self._on_error == "stop":
            raise DataError(self.message(broken))
        if broken.sample in self._met:
            return
        self._met.add(broken.sample)
        self._write(broken, where)
        if len(self._met) > self._limit:
            raise DataError(
                f"{where}: sample {sample_key(broken.sample)}: {broken.reason}; {len(self._met)} samples are broken, "
                f"and of {self._split.card.samples} at most {self._limit} may be left out; {REBUILD}, "
                "or raise max_skipped"
            )

    def message(self, broken: Broken) -> str:
        """What ends the run."""
        return f"{self._split.where(broken.shard)}: sample {sample_key(broken.sample)}: {broken.reason}; {REBUILD}"

    def _write(self, broken: Broken, where: str) -> None:
        if self._report is None:
            return
        line = {"shard": broken.shard, "sample": sample_key(broken.sample), "reason": broken.reason, "url": where}
        try:
            with self._report.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise DataError(
                f"{self._report}: the report of broken samples cannot be written: {error.strerror}"
            ) from None

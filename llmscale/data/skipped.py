"""The report of a build on records that are no documents: OUTPUT/skipped.jsonl, a line for each, in their order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llmscale.data.durable import partial, reopen, sync
from llmscale.errors import DataError

REPORT = "skipped.jsonl"


class Skipped:
    """Counts them, writes them down, and stops at a limit. It can be left and gone on with, like the shards."""

    def __init__(self, folder: Path, limit: int, count: int = 0, kept: int = 0) -> None:
        """limit: how many may be passed over. count, kept: records and bytes of a report that is gone on with."""
        self._path = folder / REPORT
        self._limit = limit
        self.count = count
        self._file = reopen(self._path, kept)

    def check(self, problems: Sequence[str]) -> None:
        """Make sure that so many more may be passed over.

        Raises:
            DataError: they may not.
        """
        if problems and self.count + len(problems) > self._limit:
            raise DataError(
                f"{problems[max(0, self._limit - self.count)]}; "
                f"more than the {self._limit} that --max-skipped allows are so"
            )

    def add(self, problems: Sequence[str]) -> None:
        """Write some down."""
        for problem in problems:
            self._file.write(json.dumps({"problem": problem}).encode() + b"\n")
        self.count += len(problems)

    def save(self) -> int:
        """Bring everything onto the disk; gives the bytes that are there."""
        sync(self._file)
        return self._file.tell()

    def finish(self) -> None:
        """Give the report its name, where there is anything to report."""
        size = self.save()
        self._file.close()
        if size:
            partial(self._path).replace(self._path)
        else:
            partial(self._path).unlink()

    def close(self) -> None:
        """Leave the file as it is."""
        self._file.close()

"""metrics.jsonl: one JSON object a row, the record of a run that plots and tests read.

Floats are written as `repr` writes them, so that two equal runs have equal rows, bit for bit; a number that is not
finite, which JSON has no word for, is null. Each row is written at once: a run that is killed loses none that it
printed. A row that does not fit on the disk leaves no half of itself.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from llmscale.errors import LlmscaleError
from llmscale.training.sinks.base import Row


class Jsonl:
    """Appends to a file. done: steps that the run has behind it; rows of later steps are dropped first."""

    def __init__(self, path: Path, done: int) -> None:
        """
        Raises:
            LlmscaleError: the file is there and holds something else than rows.
        """
        if path.exists():
            _keep(path, done)
        self._file = path.open("ab", buffering=0)

    def log(self, row: Row) -> None:
        """Write one row, or nothing of it. Raises OSError."""
        finite = {name: None if _strange(value) else value for name, value in row.items()}
        line = (json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n").encode()
        before, done = os.fstat(self._file.fileno()).st_size, 0
        try:
            while done < len(line):
                done += self._file.write(line[done:])
        except OSError:
            self._file.truncate(before)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _strange(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _keep(path: Path, done: int) -> None:
    """Cut the file down to the rows up to step `done`, which stay byte for byte: all of it or none of it is cut."""
    before = path.read_bytes()
    kept = []
    for number, line in enumerate(before.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue  # A run that was killed in the middle of a row.
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise LlmscaleError(f"{path}: line {number} is no row of metrics; move the file away to go on") from None
        if step <= done:
            kept.append(line)
    after = b"".join(kept)
    if after == before:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

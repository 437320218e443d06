"""One writer for a run directory: who starts last, writes there, and whoever wrote before ends.

A node that a cluster gives up may live on, with its ranks: the next start would share metrics and checkpoints with
them. So rank 0 leaves its name in the run directory when it starts, looks whether it still stands there at each loss
(which all ranks wait for, and hear of it with) and before each checkpoint is made whole, and ends with all ranks where
it does not. One read of a small file a step.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from llmscale.distributed.launch import Launch, whose
from llmscale.errors import ReplacedError, UsageError

FILE = "writer.json"


class Fence:
    """A rank's view of it. output: the run directory. All ranks but 0 hold what rank 0 holds, and read nothing."""

    def __init__(self, output: Path, launch: Launch) -> None:
        self._path, self._reads = output / FILE, launch.rank == 0
        self._own = json.dumps({**whose(), "id": uuid.uuid4().hex}) + "\n"

    def claim(self) -> None:
        """Take the run directory, from whoever has it.

        Raises:
            UsageError: it cannot be written.
        """
        if not self._reads:
            return
        work = self._path.with_suffix(".tmp")
        try:
            work.parent.mkdir(parents=True, exist_ok=True)
            work.write_text(self._own)
            work.replace(self._path)
        except OSError as error:
            reason = f"run.output_dir: {self._path.parent}: cannot be written: {error.strerror}"
            raise UsageError(f"{reason}; name a folder that can be") from None

    def held(self) -> bool:
        """Whether it is still ours, as far as this rank can tell: a file system that fails for a moment takes none."""
        try:
            return not self._reads or self._path.read_text() == self._own
        except OSError:
            return True

    def check(self) -> None:
        """
        Raises:
            ReplacedError: it is not.
        """
        if not self.held():
            raise self.lost()

    def lost(self) -> ReplacedError:
        """What to raise where it is not ours any more."""
        try:
            now = json.loads(self._path.read_text())
            who = ", ".join(f"{name} {value}" for name, value in now.items() if name != "id")
        except (OSError, ValueError, AttributeError):
            who = "unknown"
        return ReplacedError(
            f"{self._path.parent}: another start writes there now ({who}); this one ends, and leaves it alone"
        )

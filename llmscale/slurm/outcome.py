"""How one start of a job ended, as the run itself tells it: a small file that the job's script is asked about.

Exit codes alone do not tell: srun ends with the highest one of all tasks, and kills the others when one ends badly.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

VARIABLE = "LLMSCALE_OUTCOME"
"""Environment variable that names the file; nothing is written where it is not set."""


@dataclass(frozen=True)
class Outcome:
    """done: all steps. stopped: by a signal, with steps left. failed: retry says whether another start may help.

    replaced: another start has taken over the run directory.
    """

    status: Literal["done", "stopped", "failed", "replaced"]
    reason: str
    step: int | None = None
    retry: bool = True


def tell(outcome: Outcome) -> None:
    """Write it, unless another rank has told before: the first one knows why. Never raises."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    path = Path(name)
    work = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        work.write_text(json.dumps(asdict(outcome)) + "\n")
        os.link(work, path)  # fails where there is one
    except OSError:
        pass
    finally:
        work.unlink(missing_ok=True)


def told(default: Path) -> Outcome | None:
    """What the run of this job told; default: where, if the variable does not say."""
    return read(Path(os.environ.get(VARIABLE) or default))


def read(path: Path) -> Outcome | None:
    """What was told; None where nothing was, or nothing whole."""
    try:
        return Outcome(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None

"""The exceptions that llmscale raises on purpose.

    LlmscaleError           exit code 1: a failure while running
    ├── UsageError          exit code 2: the user asked for something that cannot be
    │   └── ConfigError     every problem found in a run's config, at once
    ├── DataError           shards, tokenizers, indexes
    ├── CheckpointError     a checkpoint that is missing, broken or does not fit
    └── TrainingError       the run itself: a loss that is not finite, a rank that is lost
        └── ReplacedError   another start of the run has taken its run directory

Each message says what is wrong, where, and what would be right; the command line prints it without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LlmscaleError(Exception):
    """Base of all errors that llmscale raises on purpose."""

    exit_code = 1
    everywhere = False
    """Whether all ranks of a run raise it together, so that one of them may speak for all."""
    consequence = False
    """Set where it follows from another rank's failure, and that one knows why."""
    quiet = False
    """Set where another rank says it."""


class UsageError(LlmscaleError):
    """The user asked for something that cannot be; nothing was started."""

    exit_code = 2
    everywhere = True


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a config.

    where: the key, dotted (``parallel.tensor``); reason: what is wrong; fix: the nearest right value.
    """

    where: str
    reason: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f"; {self.fix}" if self.fix else "")


class ConfigError(UsageError):
    """All problems of one config file."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class DataError(LlmscaleError):
    """Something is wrong with shards, an index or a tokenizer."""

    everywhere = False


class CheckpointError(LlmscaleError):
    """A checkpoint is missing, broken, or does not fit this run."""

    everywhere = True


class TrainingError(LlmscaleError):
    """The run cannot go on."""

    everywhere = True


class ReplacedError(TrainingError):
    """Another start of the run writes in its run directory now."""


class ConversionError(LlmscaleError):
    """A model cannot be brought from one format into the other, or did not come out equal."""


def shown(name: object) -> str:
    """A name for a message, on one line and in any encoding: what cannot be printed is escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(name))

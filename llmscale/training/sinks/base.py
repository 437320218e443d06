"""What a metric sink is: a place that the rows of a run's figures go to. One file each; rank 0 alone has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

Row = Mapping[str, Any]
"""The figures of one step or of one validation, by name; "step" is always there, and None stands for a figure that
there is not."""


class Sink(Protocol):
    """Takes rows in the order of their steps."""

    def log(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """Write what is still held back."""


def figures(row: Row) -> dict[str, float]:
    """The numbers of a row, without its step: what trackers plot over the steps."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def group(row: Row) -> str:
    """Which panel a row belongs to: train or validation."""
    return "validation" if "validation_loss" in row else "train"

"""What a metric sink is: a place that the rows of a run's figures go to. One file each; rank 0 alone has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
"""The figures of one step or of one validation, by name; "step" is always there, and None stands for a figure that
there is not."""


class Sink(Protocol):
    """Takes rows in the order of their steps. OSError of either method does not end the run: see `Patient`."""

    def log(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """Write what is still held back."""


class Patient:
    """A sink for which a full disk is no reason to end a run: what it cannot write is left out, with a warning."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink, self._failing = name, sink, False

    def log(self, row: Row) -> None:
        """Take one row; says so when rows begin to be lost."""
        try:
            self._sink.log(row)
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "metrics: %s cannot write, its rows are lost from step %s on: %s", self._name, row["step"], error
                )
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """Close the sink."""
        try:
            self._sink.close()
        except OSError as error:
            logger.warning("metrics: %s cannot write its end: %s", self._name, error)


def figures(row: Row) -> dict[str, float]:
    """The numbers of a row, without its step: what trackers plot over the steps."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def group(row: Row) -> str:
    """Which panel a row belongs to: train or validation."""
    return "validation" if "validation_loss" in row else "train"

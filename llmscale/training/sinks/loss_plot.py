"""plots/loss.png, drawn from metrics.jsonl when the run ends, well or not."""

from __future__ import annotations

import logging
from pathlib import Path

from llmscale.training.plot import plot_loss
from llmscale.training.sinks.base import Row

log = logging.getLogger(__name__)


class LossPlot:
    """Draws once, when it is closed: close it after the sink that writes `metrics`."""

    def __init__(self, name: str, metrics: Path, output: Path) -> None:
        self._name, self._metrics, self._output, self._any = name, metrics, output, False

    def log(self, row: Row) -> None:
        """Note that there is something to draw."""
        self._any = self._any or row.get("loss", row.get("validation_loss")) is not None

    def close(self) -> None:
        """Draw; a plot that fails is a warning: the run and its figures are whole without it."""
        if not self._any:
            return
        try:
            plot_loss([(self._name, self._metrics)], self._output)
        except Exception as error:
            log.warning("%s was not drawn: %s", self._output, error)

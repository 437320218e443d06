"""TensorBoard: the figures as scalars under train/ and validation/, in OUTPUT_DIR/tensorboard/.

A resumed run opens a new event file that tells TensorBoard to hide what older files hold of the steps run again.
"""

from __future__ import annotations

from pathlib import Path

from llmscale.training.sinks.base import Row, figures, group


class TensorBoard:
    """Writes event files. done: steps that the run has behind it."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        older = folder.is_dir() and any(folder.iterdir())
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if older else None)

    def log(self, row: Row) -> None:
        """Add the figures of one row."""
        for name, value in figures(row).items():
            self._writer.add_scalar(f"{group(row)}/{name}", value, row["step"])

    def close(self) -> None:
        """Write out what is queued."""
        self._writer.close()

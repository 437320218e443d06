"""What a run shows while it runs, on standard error: a live bar on a terminal, a plain line per logged step elsewhere.

    step   120/1000  loss 3.4512  4,213 tokens/s  lr 2.95e-04  grad norm 0.812  ETA 0:03:29

The remaining time is from the median of the last steps, so that neither the first steps nor a validation distort it;
validations and saves count as the clock sees them once they have happened.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import IO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from llmscale.training.sinks.base import Row

WINDOW = 50
"""Logged steps that the remaining time is judged by."""


class Display:
    """The run's face. A context manager; steps: of the whole run; done: those before this start."""

    def __init__(self, name: str, steps: int, done: int, stream: IO[str] | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._name, self._steps, self._done = name, steps, done
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._bar: _Bar | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal and self._steps > self._done:
            self._bar = _Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                TaskProgressColumn(),
                TextColumn("{task.fields[state]}"),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            state = f"{self._done}/{self._steps}"
            self._task = self._bar.add_task(self._name, total=self._steps, completed=self._done, state=state)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def table(self, lines: Mapping[str, str]) -> None:
        """Show named lines: a table on a terminal, `name: text` elsewhere."""
        if not self._console.is_terminal:
            for name, text in lines.items():
                self.line(f"{name}: {text}")
            return
        table = Table(title=self._name, title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in lines.items():
            table.add_row(name, Text(text))
        self._console.print(table)

    def line(self, text: str) -> None:
        """Show a line; on a terminal above the bar."""
        self._console.print(Text(text), soft_wrap=True)

    def step(self, row: Row) -> None:
        """Show the figures of a step."""
        self._seconds.append(row["step_seconds"])
        step = row["step"]
        width = len(str(self._steps))
        state = f"{step:>{width}}/{self._steps}"
        eta = f"ETA {clock(median(self._seconds) * (self._steps - step))}"
        figures = (
            f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"lr {row['learning_rate']:.2e}  grad norm {row['grad_norm']:.3f}"
        )
        if skipped := row.get("data_skipped_samples"):
            figures += f"  skipped {skipped} samples"
        if self._bar is None:
            self.line(f"step {state}  {figures}  {eta}")
        else:
            self._bar.figures = Text(figures)
            self._bar.update(self._task, completed=step, state=f"{state}  {eta}")


class _Bar(Progress):
    """A bar with the figures on a line of their own, so that both fit into 80 columns."""

    figures = Text("starting", style="dim")

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield self.figures


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 0:03:29, or 2 d 04:10:00."""
    days, rest = divmod(round(seconds), 86400)
    hours, minutes = rest // 3600, rest % 3600 // 60
    return (f"{days} d {hours:02d}" if days else f"{hours}") + f":{minutes:02d}:{rest % 60:02d}"

"""plots/loss.png: the loss over the tokens seen, from the metrics.jsonl of runs, with validation points."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmscale.errors import UsageError

COLOURS = ("#2563a8", "#d1622b", "#2f8f6b", "#8a4fa3", "#b8862d", "#5c6b7a")
"""Told apart by most colour-blind eyes too; a seventh run begins again."""
GREY = "#6b7280"
RUNNING_MEAN = 0.04
"""Share of a run's points that the smooth curve is the mean of; the points themselves stand pale behind it."""


@dataclass(frozen=True)
class Curve:
    """What is drawn of one run: tokens seen and loss, of training and of validation."""

    name: str
    train: list[tuple[float, float]]
    validation: list[tuple[float, float]]

    @property
    def label(self) -> str:
        """The name with the last losses."""
        named = (("train", self.train), ("validation", self.validation))
        return f"{self.name}: {', '.join(f'{name} {points[-1][1]:.3f}' for name, points in named if points)}"


def read(name: str, path: Path) -> Curve:
    """A run's curve. path: its metrics.jsonl, or the run directory.

    Raises:
        UsageError: there is no such file, or it holds no losses.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    train: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; give a run directory or its metrics.jsonl") from None
    for number, line in enumerate(lines, 1):
        try:
            row: dict[str, Any] = json.loads(line)
            for points, key in ((train, "loss"), (validation, "validation_loss")):
                if row.get(key) is not None:
                    points.append((float(row["tokens"]), float(row[key])))
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                break  # A run that is being written, or was killed in the middle of a row.
            raise UsageError(f"{file}: line {number} is no row of metrics; give the metrics.jsonl of a run") from None
    if not train and not validation:
        raise UsageError(f"{file}: no losses to plot; give a run that has done a step")
    return Curve(name, train, validation)


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of a point and its neighbours, RUNNING_MEAN of all: as many before it as after it, but at the end."""
    half = round(RUNNING_MEAN * len(points) / 2)
    result = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index)
        part = [y for _, y in points[index - reach : index + reach + 1]]
        result.append((x, sum(part) / len(part)))
    return result


def plot_loss(runs: Sequence[tuple[str, Path]], output: Path, baseline: tuple[str, float] | None = None) -> None:
    """Draw the losses of runs into a PNG, which appears whole or not at all.

    runs: name, and metrics.jsonl or run directory. baseline: name and loss of a level line.

    Raises:
        UsageError: there is nothing to draw.
    """
    if not runs:
        raise UsageError("no runs to plot; give at least one")
    curves = [read(name, path) for name, path in runs]

    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10.5, "axes.edgecolor": GREY, "text.color": "#1f2937"}):
        figure = Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _draw(axes, curves, baseline)
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(output.name + ".tmp")
        figure.savefig(temporary, format="png")
        temporary.replace(output)


def _draw(axes: Any, curves: Sequence[Curve], baseline: tuple[str, float] | None) -> None:
    unit, sign = _unit(max(x for curve in curves for x, _ in (*curve.train, *curve.validation)))
    dashes = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        # Curves that fall on each other stay seen: the later ones are dashed and lie on top.
        style = {"color": colour, "linestyle": dashes[number % len(dashes)], "linewidth": 2.0, "zorder": 3 + number}
        x, y = _axes(curve.train, unit)
        means = smooth(curve.train)
        if means != curve.train:
            axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3, zorder=2)
        axes.plot(*_axes(means, unit), label=curve.label, **style)
        axes.plot(
            *_axes(curve.validation, unit), linestyle="none", marker="o", markersize=6.0,
            markerfacecolor="white", markeredgecolor=colour, markeredgewidth=1.6, zorder=20 + number,
        )  # fmt: skip
    if baseline is not None:
        name, loss = baseline
        axes.axhline(loss, color=GREY, linewidth=1.2, linestyle=(0, (6, 4)), zorder=1, label=f"{name}: {loss:.3f}")
    if any(curve.validation for curve in curves):
        axes.plot(
            [], [], linestyle="none", marker="o", markersize=6.0, markerfacecolor="white",
            markeredgecolor=GREY, markeredgewidth=1.6, label="validation",
        )  # fmt: skip
    axes.set_xlabel(f"tokens seen{sign}")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=GREY, labelcolor="#374151")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="best")


def _axes(points: Sequence[tuple[float, float]], unit: float) -> tuple[list[float], list[float]]:
    return [x / unit for x, _ in points], [y for _, y in points]


def _unit(largest: float) -> tuple[float, str]:
    """What the tokens are counted in, so that the axis has short numbers."""
    for unit, name in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= unit:
            return unit, f" ({name})"
    return 1.0, ""

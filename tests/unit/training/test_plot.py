"""The picture of the loss: what it says, what it refuses, and that it is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmscale.errors import UsageError
from llmscale.training import plot
from llmscale.training.plot import plot_loss, read, smooth


def write_run(folder: Path, steps: int = 30) -> Path:
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "tokens": 512 * step, "loss": 2 + 4 / step})
        if step % 10 == 0:
            rows.append({"step": step, "tokens": 512 * step, "validation_loss": 2.25 + 4 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_and_a_baseline_become_a_png(tmp_path: Path) -> None:
    output = tmp_path / "plots" / "loss.png"
    runs = [("one", write_run(tmp_path / "one")), ("two", write_run(tmp_path / "two") / "metrics.jsonl")]
    plot_loss(runs, output, ("unigram model", 5.5))
    assert output.read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in output.parent.iterdir()] == ["loss.png"]


def test_the_picture_shows_every_run_its_validations_and_the_baseline(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    curves = [read("one", write_run(tmp_path / "one")), read("two", write_run(tmp_path / "two"))]
    axes = Figure().subplots()
    plot._draw(axes, curves, ("unigram model", 5.5))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "one: train 2.133, validation 2.383",
        "two: train 2.133, validation 2.383",
        "unigram model: 5.500",
        "validation",
    ]
    drawn = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in drawn] == [[5.12, 10.24, 15.36]] * 2
    assert axes.get_xlabel() == "tokens seen (thousands)"


def test_the_label_gives_the_last_losses_of_the_run(tmp_path: Path) -> None:
    curve = read("run", write_run(tmp_path / "run"))
    assert len(curve.train) == 30
    assert curve.validation[-1] == (15360, 2.25 + 4 / 30)


def test_a_row_cut_short_at_the_end_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "tok')
    assert len(read("run", run).train) == 30


def test_a_short_run_is_drawn_as_it_is_and_a_long_one_keeps_its_mean() -> None:
    short = [(float(x), float(x % 3)) for x in range(12)]
    assert smooth(short) == short
    noisy = [(float(x), 1.0 + (-1) ** x) for x in range(400)]
    assert all(0.8 < y < 1.2 for _, y in smooth(noisy)[20:-20])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; give a run directory or its metrics.jsonl"),
        ("", "no losses to plot; give a run that has done a step"),
        ('{"step": 1}\n', "no losses to plot"),
        ("a\nb\n", "line 1 is no row of metrics"),
        ('[1]\n{"step": 1, "tokens": 1, "loss": 2}\n', "line 1 is no row of metrics"),
    ],
)
def test_what_is_no_run_is_refused_with_its_name(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "metrics.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        plot_loss([("run", file)], tmp_path / "loss.png")
    assert str(file) in str(error.value)
    assert not (tmp_path / "loss.png").exists()


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no runs"):
        plot_loss([], tmp_path / "loss.png")

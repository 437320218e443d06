"""What a run shows: a line per step where nobody watches, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from llmscale.training.progress import Display, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(step: int, seconds: float = 2.0) -> dict[str, float]:
    return {
        "step": step, "loss": 3.14159, "grad_norm": 0.5, "learning_rate": 2.5e-4,
        "tokens_per_second": 12345.6, "step_seconds": seconds,
    }  # fmt: skip


def test_without_a_terminal_each_step_is_a_plain_line() -> None:
    stream = io.StringIO()
    with Display("run", 100, 10, stream) as display:
        display.table({"device": "CPU (gloo) × 2", "model": "llama [7b], 12 parameters"})
        display.step(row(11))
        display.line("validation after step 11: loss 3.0000, perplexity 20.09")
    assert stream.getvalue().splitlines() == [
        "device: CPU (gloo) × 2",
        "model: llama [7b], 12 parameters",
        "step  11/100  loss 3.1416  12,346 tokens/s  lr 2.50e-04  grad norm 0.500  ETA 0:02:58",
        "validation after step 11: loss 3.0000, perplexity 20.09",
    ]


def test_a_run_that_leaves_samples_out_says_so_at_each_step() -> None:
    stream = io.StringIO()
    with Display("run", 100, 10, stream) as display:
        display.step({**row(11), "data_skipped_samples": 0})
        display.step({**row(12), "data_skipped_samples": 3})
    first, second = stream.getvalue().splitlines()
    assert "skipped" not in first
    assert "grad norm 0.500  skipped 3 samples  ETA" in second


def test_one_slow_step_does_not_move_the_remaining_time() -> None:
    stream = io.StringIO()
    with Display("run", 100, 0, stream) as display:
        for step, seconds in ((1, 600.0), (2, 2.0), (3, 2.0)):
            display.step(row(step, seconds))
    assert "ETA 0:03:14" in stream.getvalue().splitlines()[-1]


def test_a_long_line_is_not_broken() -> None:
    stream = io.StringIO()
    with Display("run", 1, 0, stream) as display:
        display.line("saved " + "x" * 300)
    assert stream.getvalue() == "saved " + "x" * 300 + "\n"


def test_on_a_terminal_there_is_a_bar_with_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with Display("demo", 10, 0, stream) as display:
        display.table({"device": "CPU"})
        display.step(row(4))
        display.line("saved checkpoints/step_00000004")
    text = stream.getvalue()
    assert "━" in text
    assert "40%" in text
    assert " 4/10  ETA 0:00:12" in text
    assert "loss 3.1416  12,346 tokens/s  lr 2.50e-04  grad norm 0.500" in text
    assert text.index("saved checkpoints") < text.rindex("loss 3.1416")
    assert "\x1b[?25h" in text  # the cursor is back


def test_a_run_that_is_already_done_shows_no_bar() -> None:
    stream = Terminal()
    with Display("demo", 10, 10, stream) as display:
        display.line("nothing to do")
    assert "━" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (86400 * 2 + 15000, "2 d 04:10:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text

"""The learning rate at the steps that matter: the first, the end of the warm-up, the middle, the last."""

from __future__ import annotations

import itertools
import math

import pytest

from llmscale.config.schema import Schedule
from llmscale.training.learning_rate import learning_rate

PEAK, STEPS = 3e-4, 110


def rate(name: str, step: int, **settings: float) -> float:
    schedule = Schedule.model_validate({"name": name, "warmup_steps": 10, "min_lr_ratio": 0.1, **settings})
    return learning_rate(schedule, PEAK, step, STEPS)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_the_warm_up_rises_in_a_line_to_the_peak(name: str) -> None:
    assert [rate(name, step) for step in (1, 5, 10)] == pytest.approx([PEAK / 10, PEAK / 2, PEAK], rel=1e-15)


@pytest.mark.parametrize(
    ("name", "step", "share"),
    [
        ("cosine", 35, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("linear", 35, 0.775),
        ("linear", 60, 0.55),
        ("linear", 110, 0.1),
        ("wsd", 11, 1.0),
        ("wsd", 88, 1.0),
        ("wsd", 99, 0.55),
        ("wsd", 110, 0.1),
        ("constant", 11, 1.0),
        ("constant", 110, 1.0),
    ],
)
def test_the_formula_after_the_warm_up(name: str, step: int, share: float) -> None:
    settings = {"decay_ratio": 0.2} if name == "wsd" else {}
    assert rate(name, step, **settings) == pytest.approx(PEAK * share, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_it_never_rises_after_the_warm_up_nor_leaves_its_bounds(name: str) -> None:
    rates = [rate(name, step) for step in range(10, STEPS + 1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert max(rates) == PEAK
    assert min(rates) >= 0.1 * PEAK * (1 - 1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_without_a_warm_up_it_still_ends_at_the_minimum(name: str) -> None:
    assert rate(name, STEPS, warmup_steps=0, min_lr_ratio=0.0) == pytest.approx(0.0, abs=1e-18)


def test_wsd_decays_after_a_warm_up_that_reaches_into_its_decay() -> None:
    assert rate("wsd", 80, warmup_steps=80, decay_ratio=0.5) == PEAK
    assert rate("wsd", 95, warmup_steps=80, decay_ratio=0.5) == pytest.approx(0.55 * PEAK)
    assert rate("wsd", STEPS, decay_ratio=0.0) == PEAK


def test_a_run_that_is_all_warm_up_never_reaches_the_peak() -> None:
    assert rate("cosine", STEPS, warmup_steps=220) == pytest.approx(PEAK / 2)

"""The learning rate of a step: a pure function of its number. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from llmscale.config.schema import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """The learning rate that step `step` (from 1) of `steps` uses.

    Warm-up: peak × step / warmup_steps. Then, with x going from 0 to 1 at the last step and m = min_lr_ratio:
    cosine: peak × (m + (1 - m) (1 + cos πx) / 2) (Loshchilov and Hutter, 2017); linear: peak × (1 - (1 - m) x);
    wsd: constant, then linear down to m over the last decay_ratio of all steps (Hu et al., 2024); constant: peak.
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    low = schedule.min_lr_ratio
    return peak * (low + (1.0 - low) * SHAPES[schedule.name](schedule, step, steps))


def _done(first: int, step: int, steps: int) -> float:
    """How far step is on the way from `first` to `steps`, in [0, 1]."""
    return min(1.0, max(0.0, (step - first) / max(1, steps - first)))


def _cosine(schedule: Schedule, step: int, steps: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * _done(schedule.warmup_steps, step, steps)))


def _linear(schedule: Schedule, step: int, steps: int) -> float:
    return 1.0 - _done(schedule.warmup_steps, step, steps)


def _wsd(schedule: Schedule, step: int, steps: int) -> float:
    decay = max(1, round(schedule.decay_ratio * steps)) if schedule.decay_ratio > 0 else 0
    first = max(schedule.warmup_steps, steps - decay)
    return 1.0 if step <= first else 1.0 - _done(first, step, steps)


SHAPES: dict[str, Callable[[Schedule, int, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": lambda schedule, step, steps: 1.0,
}
"""Schedule name -> share of the way from min_lr_ratio (0) to the peak (1), after the warm-up."""

"""The training loop: batches in, steps done, figures and checkpoints out. It knows neither models nor DeepSpeed.

A step's batch, its learning rate and its dropout follow from the step's number (and the random state), so a run that
was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from llmscale.config.schema import RunConfig


class StepResult(Protocol):
    """What a step gives back."""

    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...


class Steps(Protocol):
    """What the loop needs of an engine."""

    def set_learning_rate(self, rate: float) -> None: ...
    def train_step(self, batches: Any) -> StepResult: ...
    def evaluate(self, batches: Any) -> float: ...
    @property
    def stopping(self) -> bool:
        """Whether any rank had been asked to stop when the last loss was known, the same on all of them."""
        ...


@dataclass(frozen=True)
class StepTimes:
    """Of this rank. data_seconds: waited for the batch. step_seconds: the whole step, that wait included."""

    data_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Events:
    """What the loop calls; all of it on every rank.

    always: after each step. step: after each step that is logged. validation: (step, mean loss, seconds). save: write a
    checkpoint of this step.
    """

    step: Callable[[int, StepResult, float, StepTimes], None]
    validation: Callable[[int, float, float], None]
    save: Callable[[int], None]
    always: Callable[[], None]


def train(
    engine: Steps,
    batches: Iterator[Any],
    validation: Callable[[], Iterable[Any]] | None,
    learning_rate: Callable[[int], float],
    config: RunConfig,
    done: int,
    events: Events,
) -> int:
    """Run the steps after `done` up to training.steps, or until a rank was asked to stop. Gives the last step done.

    batches: one item a step, from step done + 1 on. A stop leaves a step behind it as whole as any other: logged,
    validated where that was due, and saved unless checkpoint.interval is 0.
    """
    training, steps = config.training, config.training.steps
    for step in range(done + 1, steps + 1):
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        rate = learning_rate(step)
        engine.set_learning_rate(rate)
        result = engine.train_step(batch)
        events.always()
        times = StepTimes(data_seconds=waited, step_seconds=time.perf_counter() - begin)
        if _due(step, config.logging.interval, steps):
            events.step(step, result, rate, times)
        if validation is not None and _due(step, training.validation_interval, steps):
            begin = time.perf_counter()
            losses = [engine.evaluate(batch) for batch in validation()]
            events.validation(step, sum(losses) / len(losses), time.perf_counter() - begin)
        if _due(step, config.checkpoint.interval, steps) or (engine.stopping and config.checkpoint.interval):
            events.save(step)
        if engine.stopping:
            return step
    return max(done, steps)


def _due(step: int, interval: int, steps: int) -> bool:
    """Every `interval` steps and at the end; never when it is 0."""
    return interval > 0 and (step % interval == 0 or step == steps)

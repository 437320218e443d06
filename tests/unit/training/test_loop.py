"""How long a step waited for its batch, by a clock that moves when a batch is made and at no other time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from llmscale.config.schema import RunConfig
from llmscale.data.prefetch import Prefetch
from llmscale.training import loop
from llmscale.training.loop import Events, StepTimes, train

STEPS, MAKING = 5, 3.0


class Clock:
    """Moves by MAKING with each batch that is made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.asked, self.made = threading.Semaphore(0), threading.Semaphore(0)
        patch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def batches(self) -> Iterator[int]:
        for number in range(STEPS + 1):
            assert self.asked.acquire(timeout=20)
            self.now += MAKING
            self.made.release()
            yield number

    def make(self) -> None:
        """Let one more batch be made, and wait until it is."""
        self.asked.release()
        assert self.made.acquire(timeout=20)


class Engine:
    """Steps that take as long as making the next batch does, where that is made meanwhile."""

    stopping = False

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock

    def set_learning_rate(self, rate: float) -> None: ...

    def train_step(self, batches: Any) -> Any:
        if self._clock:
            self._clock.make()

    def evaluate(self, batches: Any) -> float:
        raise NotImplementedError


def times_of(engine: Engine, batches: Iterator[int]) -> list[StepTimes]:
    config = RunConfig.model_validate(
        {
            "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
            "data": {"train": [{"path": "data"}], "sequence_length": 16},
            "training": {"steps": STEPS, "global_batch_size": 4},
            "checkpoint": {"interval": 0},
            "logging": {"interval": 1},
        }
    )
    found: list[StepTimes] = []
    events = Events(
        step=lambda step, result, rate, times: found.append(times),
        validation=lambda step, loss: None,
        save=lambda step: None,
        always=lambda: None,
    )
    assert train(engine, batches, None, lambda step: 0.1, config, 0, events) == STEPS
    return found


def test_a_batch_that_is_made_when_it_is_asked_for_shows_in_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.asked.release(STEPS)
    assert times_of(Engine(None), clock.batches()) == [StepTimes(data_seconds=MAKING, step_seconds=MAKING)] * STEPS


def test_a_batch_that_is_made_during_the_step_before_shows_in_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    batches = Prefetch(clock.batches(), 1)
    clock.make()
    assert times_of(Engine(clock), batches) == [StepTimes(data_seconds=0.0, step_seconds=MAKING)] * STEPS
    batches.close()

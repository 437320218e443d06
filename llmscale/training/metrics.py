"""A run's figures: makes the rows of metrics.jsonl and hands them to the sinks and the display, on rank 0 alone.

A row of a step: step, tokens (seen so far), loss (mean over the global batch, nats), grad_norm (before clipping),
learning_rate, step_seconds, data_seconds (of it: the longest that any rank waited for its batch), tokens_per_second,
tokens_per_second_per_device, tflops_per_device (model FLOPs with attention, `flops.py`), mfu and mfu_without_attention
(shares of the device's peak; null where the peak is not known), memory_gib; data_epochs (passes over each source so
far, of text in windows that were read); with remote data data_bytes_fetched, data_retries and the like, of rank 0's
process; with data.on_error: skip data_skipped_samples and data_replaced_sequences, of the run so far and all ranks.
After a save checkpoint_pause_seconds (how long training stood still for it) and checkpoint_seconds (until it was whole
on the disk), in the rows that follow.
A row of a validation: step, tokens, validation_loss, validation_perplexity, validation_seconds.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmscale.config.schema import RunConfig
from llmscale.distributed.launch import Launch
from llmscale.models.family import Family
from llmscale.training.flops import flops_per_token, peak_tflops
from llmscale.training.loop import StepResult, StepTimes
from llmscale.training.progress import Display
from llmscale.training.sinks.base import Patient, Sink
from llmscale.training.sinks.jsonl import Jsonl
from llmscale.training.sinks.loss_plot import LossPlot
from llmscale.training.sinks.tensorboard import TensorBoard
from llmscale.training.sinks.wandb import Wandb

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Rates:
    """What turns a step's time into figures. peak: dense peak of one device in TFLOP/s, None where it is not known."""

    tokens_per_step: int
    devices: int
    flops_with_attention: float
    flops_without_attention: float
    peak: float | None

    @classmethod
    def of(cls, config: RunConfig, family: Family, devices: int, device_name: str | None) -> Rates:
        """The rates of a run. model.vocab_size must be settled; device_name: None on a CPU."""
        training, length = config.training, config.data.sequence_length
        if config.model.vocab_size is None:
            raise ValueError("model.vocab_size must be settled before FLOPs are counted")
        flops = flops_per_token(config.model, family, config.model.vocab_size, length)
        return cls(
            tokens_per_step=training.global_batch_size * length,
            devices=devices,
            flops_with_attention=flops.with_attention,
            flops_without_attention=flops.without_attention,
            peak=training.peak_tflops or peak_tflops(device_name, training.precision),
        )

    def row(self, step_seconds: float) -> dict[str, float | None]:
        """The figures of a step that took so long."""
        speed = self.tokens_per_second(step_seconds)
        tflops = speed / self.devices * self.flops_with_attention / 1e12
        without = speed / self.devices * self.flops_without_attention / 1e12
        return {
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / self.devices,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak if self.peak else None,
            "mfu_without_attention": without / self.peak if self.peak else None,
        }

    def tokens_per_second(self, step_seconds: float) -> float:
        """Tokens of the global batch over the step's time."""
        return self.tokens_per_step / step_seconds


class Recorder:
    """Writes and shows a run's figures, as a context manager on every rank; all but rank 0 do nothing.

    lines: the start report. output: the run directory, made when it does not exist. done, tokens: steps that the run
    has behind it, and the tokens of them.
    """

    def __init__(
        self,
        config: RunConfig,
        family: Family,
        lines: Mapping[str, str],
        device: torch.device,
        output: Path,
        done: int,
        tokens: int,
        launch: Launch,
    ) -> None:
        self._config, self._lines, self._device = config, lines, device
        self._output, self._done, self._tokens_done, self._speaks = output, done, tokens, launch.rank == 0
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._rates = Rates.of(config, family, launch.world_size, name)
        self._sinks: list[Sink] = []
        self._stack = ExitStack()
        self._display = Display(config.run.name, config.training.steps, done)

    def __enter__(self) -> Recorder:
        if not self._speaks:
            return self
        with ExitStack() as stack:
            self._output.mkdir(parents=True, exist_ok=True)
            for opened in self._open():
                sink = Patient(type(opened).__name__, opened)
                stack.callback(sink.close)
                self._sinks.append(sink)
            self._display.table(self._lines)
            if self._done:
                self._display.line(f"resumes after step {self._done} of {self._config.training.steps}")
            stack.enter_context(self._display)
            self._stack = stack.pop_all()
        return self

    def _open(self) -> Iterator[Sink]:
        # The first one opened is the last one closed: the plot is drawn from the whole file.
        yield LossPlot(self._config.run.name, self._output / FILE, self._output / "plots" / "loss.png")
        yield Jsonl(self._output / FILE, self._done)
        if self._config.logging.tensorboard:
            yield TensorBoard(self._output / "tensorboard", self._done)
        if self._config.logging.wandb is not None:
            yield Wandb(self._config, self._output, self._done)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def step(
        self, step: int, result: StepResult, rate: float, times: StepTimes, data: Mapping[str, Any] | None = None
    ) -> None:
        """A step was done. rate: its learning rate. data: further figures, of what the batches came from."""
        if not self._speaks:
            return
        row = {
            "step": step,
            "tokens": self._tokens(step),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "step_seconds": times.step_seconds,
            "data_seconds": times.data_seconds,
            **self._rates.row(times.step_seconds),
            "memory_gib": peak_memory_gib(self._device),
            **(data or {}),
        }
        self._log(row)
        self._display.step(row)

    def validation(self, step: int, loss: float, seconds: float) -> None:
        """A validation after step `step` gave this mean loss, in nats a token, and took so long."""
        if not self._speaks:
            return
        perplexity = perplexity_of(loss)
        self._log(
            {
                "step": step,
                "tokens": self._tokens(step),
                "validation_loss": loss,
                "validation_perplexity": perplexity,
                "validation_seconds": seconds,
            }
        )
        self._display.line(f"validation after step {step}: loss {loss:.4f}, perplexity {perplexity:,.2f}")

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""
        self.note(f"saved {path}")

    def note(self, text: str) -> None:
        """Show a line."""
        if self._speaks:
            self._display.line(text)

    def _tokens(self, step: int) -> int:
        return self._tokens_done + (step - self._done) * self._rates.tokens_per_step

    def _log(self, row: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.log(row)


def perplexity_of(loss: float) -> float:
    """exp(loss), and infinity where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held so far: torch's allocations on a GPU, all of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

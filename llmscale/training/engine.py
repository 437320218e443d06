"""One training step: Megatron-core's pipeline schedule, DeepSpeed's ZeRO, and `gradients.complete` between them.

Gradients take one route on every layout: the schedule runs the backward passes, DeepSpeed accumulates and reduces
them over data parallelism, and just before its optimizer steps, `gradients.complete` does the rest. For ZeRO-2 and 3
each micro-batch's backward must run DeepSpeed's prologue and epilogue; a hook on the stage's output sees to that,
because a pipeline runs many backward passes in a row, which DeepSpeed's own hooks (armed by a forward) do not expect.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from llmscale.distributed import stop
from llmscale.distributed.groups import Groups, Mpu
from llmscale.errors import TrainingError
from llmscale.models.stage import Stage
from llmscale.training.batches import Batch
from llmscale.training.fence import Fence
from llmscale.training.gradients import GradientBuffers, complete, parameter_groups
from llmscale.training.zero import Zero

CALMER = "lower optimizer.lr or lengthen schedule.warmup_steps, and resume"


@dataclass(frozen=True)
class StepResult:
    """loss: mean over all tokens of the global batch, in nats. grad_norm: global L2 norm before clipping."""

    loss: float
    grad_norm: float


class _Chunks(torch.nn.Module):
    """The model as DeepSpeed sees it: all chunks of this rank, called by number."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(stages)

    def forward(self, index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self.chunks[index](*args, **kwargs)
        return output


class _Hooked(torch.nn.Module):
    """A stage as the schedule sees it. `module` is what Megatron unwraps to find the stage's config and inputs."""

    def __init__(self, stage: Stage, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.module = stage
        self.vp_stage = stage.vp_stage
        self._call = call

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._call(*args, **kwargs)


class Engine:
    """DeepSpeed over Megatron's schedule for the stages of this rank."""

    def __init__(
        self,
        stages: Sequence[Stage],
        groups: Groups,
        settings: dict[str, Any],
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        weight_decay: float,
        clip: float,
        fence: Fence | None = None,
    ) -> None:
        """settings: DeepSpeed's config, nothing "auto". clip: largest gradient norm, 0 for none.

        fence: of the run directory, which is looked after with each loss.
        """
        self.stages = list(stages)
        self.groups = groups
        self.clip = clip
        self._grad_norm = math.nan
        self._fence = fence
        self.stopping = False
        self._schedule = get_forward_backward_func()
        base = make_optimizer(parameter_groups(self.stages, groups, weight_decay))
        kinds = [group["kind"] for group in base.param_groups]
        self.deepspeed, _, _, _ = deepspeed.initialize(
            model=_Chunks(self.stages), optimizer=base, config=settings, mpu=Mpu(groups), dist_init_required=False
        )
        self.zero = Zero(self.deepspeed.optimizer, base, kinds)
        self.zero.before_step(self._complete)
        self._models = self._hook_stages()

    def _hook_stages(self) -> list[torch.nn.Module]:
        stage = self.groups.layout.zero_stage
        if stage < 2:
            return list(self.stages)
        engine, optimizer = self.deepspeed, self.zero.optimizer
        prologue = engine._backward_prologue

        def fresh_prologue() -> None:
            # Without this the epilogue of several backward passes in a row would run once.
            optimizer.clear_backward_seen_flag()
            prologue()

        engine._backward_prologue = fresh_prologue
        # Through the engine ZeRO-3 traces and prefetches, but its trace check is a world-wide collective in each
        # forward: stages of a pipeline, which run different numbers of them at a time, would hang.
        traced = stage == 3 and self.groups.layout.pipeline == 1
        return [
            _Hooked(chunk, self._traced(index) if traced else self._direct(chunk, fresh_prologue))
            for index, chunk in enumerate(self.stages)
        ]

    def _traced(self, index: int) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: self.deepspeed(index, *args, **kwargs)

    @staticmethod
    def _direct(stage: Stage, prologue: Callable[[], None]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            output: torch.Tensor = stage(*args, **kwargs)
            if output.requires_grad:
                output.register_hook(lambda gradient: prologue())
            return output

        return call

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Raises:
            TrainingError: the loss or the gradient norm is not finite; no weight was changed. ReplacedError: nor was
            one where another start has taken the run directory.
        """
        self.deepspeed.train()
        losses = self._run(batches, forward_only=False)
        loss = self._mean_loss(losses)
        self.deepspeed.step()
        self.zero.end_step()
        return StepResult(loss=loss, grad_norm=self._grad_norm)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss per token, in nats, over the micro-batches of all data-parallel ranks."""
        self.deepspeed.eval()
        return self._mean_loss(self._run(batches, forward_only=True))

    def _run(self, batches: Sequence[Batch], forward_only: bool) -> list[torch.Tensor]:
        micro_batch, sequence = batches[0].tokens.shape
        interleaved = self.groups.layout.virtual_pipeline > 1
        reports = self._schedule(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in self.stages] if interleaved else iter(batches),
            model=self._models if interleaved else self._models[0],
            num_microbatches=len(batches),
            seq_length=sequence,
            micro_batch_size=micro_batch,
            forward_only=forward_only,
        )
        return [report["loss"] for report in reports]

    def _mean_loss(self, losses: list[torch.Tensor]) -> float:
        """The mean over micro-batches and data-parallel ranks; the last stages have it, every rank gets it.

        Whether a rank was asked to stop goes along, and whether the run directory is another's by now: all ranks hear
        of it in the same step.
        """
        total = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
        if losses:
            total[0] += torch.stack(losses).double().mean()
        total[1] = stop.received() is not None
        total[2] = self._fence is not None and not self._fence.held()
        dist.all_reduce(total, group=self.groups.world)
        summed, asked, lost = total.tolist()
        if lost and self._fence is not None:
            raise self._fence.lost()
        self.stopping = asked > 0
        loss = summed / (self.groups.layout.tensor * self.groups.layout.data)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss}; {CALMER}")
        return loss

    def _complete(self, buffers: list[GradientBuffers]) -> None:
        self._grad_norm = complete(buffers, self.groups, self.clip)
        if not math.isfinite(self._grad_norm):
            raise TrainingError(f"the gradient's norm is {self._grad_norm}; {CALMER}")

    def set_learning_rate(self, rate: float) -> None:
        """The learning rate of the next step, for all parameter groups."""
        for group in self.zero.base.param_groups:
            group["lr"] = rate

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()


def _forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    batch: Batch = next(batches)
    # By name: DeepSpeed looks for tensors in what it is handed by place, and warns of types that it does not know.
    return model(batch.tokens, batch.labels, packing=batch.packing), _loss


def _loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.mean()
    return loss, {"loss": loss.detach().clone()}


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's start-up talk out of the log (warnings stay), and its compiler out of the start-up.

    On CPUs it compiles an all-reduce over shared memory that only its inference uses: half a minute, and a C++
    compiler.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # By its name: the package deepspeed.comm has an attribute `torch` that is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None

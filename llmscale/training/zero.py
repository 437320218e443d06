"""DeepSpeed's ZeRO optimizers through one face: where this rank's gradients, master weights and optimizer state are.

All private DeepSpeed names (0.19.8) that llmscale relies on stand in this file. Three classes lie behind an engine:
BF16_Optimizer (stage 1 in bf16), DeepSpeedZeroOptimizer (stage 1 in fp32, stage 2), DeepSpeedZeroOptimizer_Stage3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llmscale.training.gradients import GradientBuffers


@dataclass(frozen=True)
class Owned:
    """A run of a parameter that this rank owns: elements [start, start + numel) of the flattened parameter.

    master: the fp32 weights, a view. flat: the optimizer's own tensor, and at: where the run starts in it.
    """

    parameter: torch.nn.Parameter
    start: int
    numel: int
    flat: torch.Tensor
    at: int

    @property
    def master(self) -> torch.Tensor:
        return self.flat.data.narrow(0, self.at, self.numel)


class Zero:
    """One face for the optimizer behind a DeepSpeed engine."""

    def __init__(self, optimizer: Any, base: torch.optim.Optimizer, kinds: Sequence[Any]) -> None:
        self.optimizer = optimizer
        self.base = base
        self.kinds = list(kinds)
        self.is_bf16 = hasattr(optimizer, "fp32_groups_gradient_flat_partition")
        self.is_stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.offloads = bool(getattr(optimizer, "cpu_offload", False))
        self._silence_norm()

    def _silence_norm(self) -> None:
        """Switch off DeepSpeed's gradient norm: `gradients.complete` has taken the true one, and clipped by it."""
        nothing = torch.zeros((), device=torch.cuda.current_device())
        if self.is_bf16:
            self.optimizer.get_grads_for_norm = lambda for_clipping=False: (
                [nothing] if for_clipping else ([nothing], {})
            )
        elif self.is_stage3:
            self.optimizer._get_norm_groups = lambda: [nothing]
        else:
            self.optimizer.scaled_global_norm = lambda norm_type=2: nothing

    def before_step(self, complete: Callable[[list[GradientBuffers]], None]) -> None:
        """Have `complete` called with the reduced gradients before each optimizer step.

        Stage 3 with offload copies its gradients away at the accumulation boundary, so there it must come before that.
        """
        name = "finalize_gradient_accumulation_boundary" if self.is_stage3 else "step"
        then = getattr(self.optimizer, name)

        def completed(*args: Any, **kwargs: Any) -> Any:
            complete(list(self._buffers()))
            return then(*args, **kwargs)

        setattr(self.optimizer, name, completed)

    def _buffers(self) -> Iterator[GradientBuffers]:
        optimizer = self.optimizer
        for index, kind in enumerate(self.kinds):
            if self.is_bf16:
                yield GradientBuffers(kind, [optimizer.fp32_groups_gradient_flat_partition[index]])
            elif self.is_stage3:
                yield GradientBuffers(kind, self._stage3_gradients(index))
            elif self.offloads:
                yield GradientBuffers(kind, [optimizer.single_partition_of_fp32_groups[index].grad])
            else:
                reduced = optimizer.averaged_gradients[index]
                flat = getattr(reduced, "flat_partition", None)
                yield GradientBuffers(kind, list(reduced) if flat is None else [flat])

    def _stage3_gradients(self, group: int) -> list[torch.Tensor]:
        optimizer, partitions = self.optimizer, self._stage3_partitions()
        sub_groups = sorted(i for i, owner in optimizer.sub_group_to_group_id.items() if owner == group)
        return [partitions[parameter.ds_id] for i in sub_groups for parameter in optimizer.fp16_groups[i]]

    def _stage3_partitions(self) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return found

    def end_step(self) -> None:
        """Clear what stage 3 would add to: of several model chunks it replaces only the first one's gradients."""
        if self.is_stage3:
            for buffer in self._stage3_partitions().values():
                buffer.zero_()
            self.optimizer.micro_step_id = 1

    def owned(self) -> Iterator[Owned]:
        """All that this rank owns, in the optimizer's order."""
        if self.is_stage3:
            yield from self._owned_stage3()
            return
        lists = self.optimizer.bf16_groups if self.is_bf16 else self.optimizer.bit16_groups
        flats = (
            self.optimizer.fp32_groups_flat_partition
            if self.is_bf16
            else self.optimizer.single_partition_of_fp32_groups
        )
        for parameters, flat in zip(lists, flats, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Owned(parameter, low.start, low.numel, flat, high.start)

    def _owned_stage3(self) -> Iterator[Owned]:
        optimizer = self.optimizer
        rank = dist.get_rank(optimizer.dp_process_group)
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            for parameter in parameters:
                _, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = rank * parameter.partition_numel()
                numel = min(size, parameter.ds_numel - start)
                if numel > 0:
                    yield Owned(parameter, start, numel, flat, at)

    def state(self, owned: Owned) -> dict[str, torch.Tensor]:
        """The optimizer's state of a run, as views: exp_avg, exp_avg_sq, ... Empty before the first step."""
        state = self.base.state.get(owned.flat, {})
        return {
            name: value.narrow(0, owned.at, owned.numel)
            for name, value in state.items()
            if torch.is_tensor(value) and value.numel() == owned.flat.numel() and value.dim() == 1
        }

    def make_state(self, names: Sequence[str], step: int) -> None:
        """Make the optimizer's state before its first step, as torch would, for a checkpoint to be loaded into."""
        for flat in {id(o.flat): o.flat for o in self.owned()}.values():
            state = self.base.state[flat]
            for name in names:
                state[name] = torch.zeros_like(flat.data)
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=self._step_device(flat))

    def _step_device(self, flat: torch.Tensor) -> torch.device:
        """torch keeps the step count on the CPU, but for fused and capturable optimizers beside the weights."""
        defaults = self.base.defaults
        return flat.device if defaults.get("fused") or defaults.get("capturable") else torch.device("cpu")

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Copy the master weights, after they were changed, to the weights that compute."""
        optimizer = self.optimizer
        if not self.is_stage3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

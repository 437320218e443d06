"""What must happen to gradients between DeepSpeed's data-parallel reduction and the optimizer, and why.

DeepSpeed knows data parallelism. What it does not know, it gets wrong in silence, so here stands, for every ZeRO
stage alike:
1. weights that each tensor-parallel rank saw on a part of the sequence only (norms and row-parallel biases under
   sequence parallelism), or for its own heads (norms of query and key): sum over the tensor-parallel group - else the
   norm is 3 % off and the copies drift apart;
2. a tied embedding on the first and the last stage: sum over the two - and count it once in the norm (else 18 % too
   large);
3. ZeRO-0: the mean over the data-parallel group, in fp32 (DeepSpeed's own ZeRO-0 in bf16 accumulates in bf16, 17 %
   off);
4. the true global norm: each weight once over all ranks, one all-reduce. DeepSpeed reduces once per parameter group,
   which hangs when stages have unequal numbers of them;
5. clipping by that norm.

Weights that need the same treatment share a parameter group of the optimizer: partitions then line up across the
ranks that are summed over, and one collective on the partition serves ZeRO-1, 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from llmscale.distributed.groups import Groups
from llmscale.models.family import Weight
from llmscale.models.stage import EMBEDDING, Stage

Kind = Literal["cut", "copied", "partial", "tied"]
KINDS: tuple[Kind, ...] = ("cut", "copied", "partial", "tied")


@dataclass(frozen=True)
class GradientBuffers:
    """The reduced gradients, fp32, of what this rank owns of one parameter group."""

    kind: Kind
    tensors: Sequence[torch.Tensor]


def kind_of(weight: Weight, parameter: torch.nn.Parameter, stage: Stage, groups: Groups) -> Kind:
    """How the gradient of a weight must be treated.

    cut: each tensor-parallel rank has its own part. copied: all ranks have the same weight and gradient. partial: the
    same weight, and a gradient that must be summed. tied: an embedding that lives on two stages.
    """
    if stage.tied and weight.name == EMBEDDING and groups.layout.pipeline > 1:
        return "tied"
    if groups.layout.tensor == 1:
        return "cut"
    if weight.per_head or getattr(parameter, "sequence_parallel", False):
        return "partial"
    return "copied" if weight.cut == "replicated" else "cut"


def parameter_groups(stages: Iterable[Stage], groups: Groups, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: one a kind and a weight decay, in the same order on every rank."""
    found: dict[tuple[Kind, bool], list[torch.nn.Parameter]] = {(k, d): [] for k in KINDS for d in (True, False)}
    for stage in stages:
        for weight, parameter in stage.weights():
            found[kind_of(weight, parameter, stage, groups), weight.decays].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "kind": kind}
        for (kind, decays), parameters in found.items()
        if parameters
    ]


@torch.no_grad()
def complete(buffers: Sequence[GradientBuffers], groups: Groups, clip: float) -> float:
    """Finish reduced gradients in place, and clip them. Returns their global L2 norm before clipping.

    clip: the largest norm, 0 for none. As torch's clip_grad_norm_, the factor is clip / (norm + 1e-6).
    """
    layout = groups.layout
    for part in buffers:
        if part.kind == "partial":
            _sum(part.tensors, groups.tensor)
        elif part.kind == "tied" and groups.embedding is not None:
            _sum(part.tensors, groups.embedding)
        if layout.zero_stage == 0 and layout.data > 1:
            _sum(part.tensors, groups.data)
            torch._foreach_div_(list(part.tensors), layout.data)
    norm = _global_norm(buffers, groups)
    if 0.0 < clip < norm:
        factor = clip / (norm + 1e-6)
        for part in buffers:
            torch._foreach_mul_(list(part.tensors), factor)
    return norm


def _sum(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce in one message; the tensors add up to equal sizes on all ranks, in whatever pieces."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0], group=group)
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))


def _counts(kind: Kind, groups: Groups) -> bool:
    """Whether this rank's copy of a weight is the one that the norm counts."""
    if kind in ("copied", "partial"):
        return groups.position.tensor == 0
    return kind == "cut" or groups.position.pipeline == 0


def _global_norm(buffers: Sequence[GradientBuffers], groups: Groups) -> float:
    device = torch.cuda.current_device()
    counted = [run for part in buffers if _counts(part.kind, groups) for run in _runs(part.tensors)]
    square = torch.zeros((), dtype=torch.float64, device=device)
    if counted:
        square += torch.stack(torch._foreach_norm(counted)).double().square().sum().to(device)
    # Under ZeRO-0 every data-parallel rank holds all of its gradients.
    dist.all_reduce(square, group=groups.model if groups.layout.zero_stage == 0 else groups.world)
    return float(square.sqrt())


def _runs(tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    """The tensors in runs that a norm can take exactly enough.

    On a CPU torch adds squares one after the other in fp32: over 2^25 numbers its norm is 1.8e-3 off, over runs of 2^12
    3e-9, in three times the time (36 ms). A GPU adds in a tree.
    """
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        yield from tensor.reshape(-1).split(1 << 12) if tensor.device.type == "cpu" else (tensor,)

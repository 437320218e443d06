"""Cross entropy over a vocabulary that is cut over the tensor-parallel group, block by block through the logits.

Megatron-core's own takes the logits to fp32 whole, and goes over them once each for max, subtraction, exp, sum and
division, and keeps the result for the backward pass. Here a block of rows that fits the cache is taken at a time: the
forward pass reads the logits once, and keeps nothing but them and one number a token; the backward pass turns them
into their gradient in place. Nothing of the logits' size is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

BLOCK = {"cpu": 1 << 17, "cuda": 1 << 27}
"""Logits of one block. On a CPU half a MiB in fp32, in the second-level cache; on a GPU few launches, 512 MiB."""


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK.get(logits.device.type, BLOCK["cuda"]) // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        flat = logits.detach().reshape(-1, logits.shape[-1])
        columns = labels.reshape(-1, 1)
        if group is not None:
            columns = columns - dist.get_rank(group) * flat.shape[1]
        held = (columns >= 0) & (columns < flat.shape[1])
        columns = torch.where(held, columns, 0)
        log_sum = torch.empty(flat.shape[0], 1, dtype=torch.float32, device=flat.device)
        for rows in _blocks(flat):
            log_sum[rows] = flat[rows].float().logsumexp(-1, keepdim=True)
        own = torch.where(held, flat.gather(1, columns).float(), 0.0)
        if group is not None:
            log_sum, own = _over_ranks(log_sum, own, group)
        ctx.save_for_backward(flat, columns, held, log_sum)
        ctx.shape = logits.shape
        return (log_sum - own).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """(softmax - one-hot) × gradient, written over the logits."""
        flat, columns, held, log_sum = ctx.saved_tensors
        scale = gradients[0].reshape(-1, 1).float()
        taken = torch.where(held, -scale, 0.0)
        for rows in _blocks(flat):
            block = flat[rows]
            # In fp32 both names are the same memory, and all of it happens in place.
            wide = block.float()
            wide.sub_(log_sum[rows]).exp_().mul_(scale[rows]).scatter_add_(1, columns[rows], taken[rows])
            if wide is not block:
                block.copy_(wide)
        return flat.view(ctx.shape), None, None


def _over_ranks(
    log_sum: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all ranks: the log of the sum of exponentials, and the label's logit, which one rank has."""
    largest = log_sum.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(log_sum - largest).exp(), own])
    dist.all_reduce(sums, group=group)
    return largest + sums[0].log(), sums[1]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The loss of each token in nats, fp32 [*labels.shape], the same on all ranks of the group.

    logits [*labels.shape, vocab / tensor]: this rank's part, rank r's starting at id r × vocab / tensor; columns of
    padding at minus infinity. labels: ids over the whole vocabulary. group: the tensor-parallel group, or None for one
    rank.

    The backward pass destroys the logits: it can run once, and nothing else may read them afterwards.
    """
    losses: torch.Tensor = _CrossEntropy.apply(logits, labels, group)
    return losses

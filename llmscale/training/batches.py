"""From the stream's global order to the micro-batches of one data-parallel rank.

Sequence number `step × global_batch_size + i` belongs to step `step`; micro-batch m of data-parallel rank d takes
micro_batch_size of them from (m × data_parallel + d) × micro_batch_size on. Nothing else decides what a rank sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from llmscale.config.schema import Training
from llmscale.distributed.layout import Layout

Batch = tuple[torch.Tensor, torch.Tensor]


class Sequences(Protocol):
    """Random access to the global order: positions -> int64 [len(positions), sequence_length + 1]."""

    def read(self, positions: Sequence[int]) -> np.ndarray: ...


def positions(step: int, training: Training, layout: Layout, data_rank: int) -> list[range]:
    """Positions in the global order of each micro-batch of a step (steps count from 0)."""
    size = training.micro_batch_size
    first = step * training.global_batch_size
    starts = [first + (micro * layout.data + data_rank) * size for micro in range(layout.micro_batches(training))]
    return [range(start, start + size) for start in starts]


def micro_batches(
    stream: Sequences, step: int, training: Training, layout: Layout, data_rank: int, device: torch.device
) -> list[Batch]:
    """Tokens and labels of each micro-batch of a step, each int64 [micro_batch, sequence], on the device."""
    runs = positions(step, training, layout, data_rank)
    tokens = torch.from_numpy(stream.read([position for run in runs for position in run]))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(training.micro_batch_size)]

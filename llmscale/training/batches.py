"""From the stream's global order to the micro-batches of one data-parallel rank.

Sequence number `step × global_batch_size + i` belongs to step `step`; micro-batch m of data-parallel rank d takes
micro_batch_size of them from (m × data_parallel + d) × micro_batch_size on. Nothing else decides what a rank sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from llmscale.config.schema import Training
from llmscale.distributed.layout import Layout
from llmscale.models.packing import Packing


class Batch(NamedTuple):
    """One micro-batch: tokens and labels, each int64 [micro_batch, sequence], and the documents not to be mixed."""

    tokens: torch.Tensor
    labels: torch.Tensor
    packing: Packing | None = None


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
    stream: Sequences,
    step: int,
    training: Training,
    layout: Layout,
    data_rank: int,
    device: torch.device,
    end_of_document: int | None = None,
) -> list[Batch]:
    """The micro-batches of a step, on the device.

    end_of_document: keep attention inside the documents that end with this id. The label of that id is the first
    token of the next document, and counts in the loss as any other.
    """
    size = training.micro_batch_size
    runs = positions(step, training, layout, data_rank)
    read = torch.from_numpy(stream.read([position for run in runs for position in run]))
    packings: list[Packing | None] = [None] * len(runs)
    if end_of_document is not None:
        packings = [Packing.of(part[:, :-1], end_of_document, device) for part in read.split(size)]
    tokens = read.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else read
    return [
        Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), packing)
        for part, packing in zip(tokens.split(size), packings, strict=True)
    ]

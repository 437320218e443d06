"""From the rows that a data-parallel rank reads to the micro-batches of its step."""

from __future__ import annotations

import torch

from llmscale.data.source import Integers

Batch = tuple[torch.Tensor, torch.Tensor]
"""tokens and labels of one micro-batch, each int64 [micro_batch, sequence]."""


def micro_batches(rows: Integers, size: int, device: torch.device) -> list[Batch]:
    """The micro-batches of `size` sequences on the device. rows: [sequences, sequence_length + 1]."""
    tokens = torch.from_numpy(rows)
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(size)]

"""From the rows that a data-parallel rank reads to the micro-batches of its step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmscale.data.source import Integers
from llmscale.models.packing import Packing


class Batch(NamedTuple):
    """One micro-batch: tokens and labels, each int64 [micro_batch, sequence], and the documents not to be mixed."""

    tokens: torch.Tensor
    labels: torch.Tensor
    packing: Packing | None = None


def micro_batches(rows: Integers, size: int, device: torch.device, end_of_document: int | None = None) -> list[Batch]:
    """The micro-batches of `size` sequences on the device. rows: [sequences, sequence_length + 1].

    end_of_document: keep attention inside the documents that end with this id. The label of that id is the first
    token of the next document, and counts in the loss as any other.
    """
    read = torch.from_numpy(rows)
    parts = read.split(size)
    packings: list[Packing | None] = [None] * len(parts)
    if end_of_document is not None:
        packings = [Packing.of(part[:, :-1], end_of_document, device) for part in parts]
    tokens = read.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else read
    return [
        Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), packing)
        for part, packing in zip(tokens.split(size), packings, strict=True)
    ]

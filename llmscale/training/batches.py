"""From the rows that a data-parallel rank reads to the micro-batches of its step.

The ranks of one tensor- and pipeline-parallel group read the same rows, each for itself, and would train on nonsense in
silence if one of them read others: of a file that is damaged on its node alone, say. So each batch's checksum is
compared within the group, in one reduction of two numbers a step.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from llmscale.data.source import Integers
from llmscale.errors import DataError
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


class Checked(NamedTuple):
    """The micro-batches of a step, and the CRC-32 of the rows that they were made of."""

    batches: list[Batch]
    checksum: int

    @classmethod
    def of(cls, rows: Integers, size: int, device: torch.device, end_of_document: int | None = None) -> Checked:
        """As `micro_batches`."""
        return cls(micro_batches(rows, size, device, end_of_document), zlib.crc32(rows.data))


def compared(read: Iterator[Checked], group: dist.ProcessGroup, device: torch.device) -> Iterator[list[Batch]]:
    """The micro-batches of each step, which all ranks of a tensor- and pipeline-parallel group have alike.

    Raises:
        DataError: on all ranks of the group, where one of them read something else.
    """
    alone = dist.get_world_size(group) == 1
    for batches, checksum in read:
        if not alone:
            extremes = torch.tensor([checksum, -checksum], device=device)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
            largest, smallest = extremes.tolist()
            if largest != -smallest:
                raise DataError(
                    "the ranks of a tensor- and pipeline-parallel group read different batches: a sample is broken for "
                    "some of them and not for others; the warnings above and the report of what was left out name it; "
                    "mend that copy of the data, or leave its node out, and start again"
                )
        yield batches

"""Where the documents of a micro-batch lie, when attention must stay inside them (`data.mask_documents`).

It travels with its micro-batch, down to the attention of each layer, as the argument that Megatron-core calls
`packed_seq_params`: Megatron-core binds that to the forward pass it belongs to, so that recomputation, which in a
pipeline runs when later micro-batches have long passed through the same layers, finds its own. State on a module
would be another micro-batch's by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Packing:
    """The documents of a micro-batch, [micro_batch, sequence] read row by row.

    A document that began in an earlier sequence counts as one that begins here: nothing before it can be seen.
    """

    positions: torch.Tensor
    """Of each token in its document, from 0; int64 [micro_batch, sequence]."""
    lengths: tuple[int, ...]
    """Of each document, in tokens; they add up to micro_batch × sequence."""
    boundaries: torch.Tensor
    """The first token of each document, and the end of the last; int32 [documents + 1]."""
    qkv_format: ClassVar[str] = "sbhd"
    """Tells Megatron-core that queries, keys and values keep their [sequence, batch, heads, head_dim]."""

    @classmethod
    def of(cls, tokens: torch.Tensor, end_of_document: int, device: torch.device) -> Packing:
        """The packing of tokens, [micro_batch, sequence] on the host: what follows the end-of-document id begins a
        document. Tensors go to the device; lengths stay on the host, where launching kernels needs them."""
        begins = torch.ones_like(tokens, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == end_of_document
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        positions = places - torch.where(begins, places, 0).cummax(1).values
        boundaries = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([tokens.numel()])])
        lengths = tuple(boundaries.diff().tolist())
        return cls(_to(positions, device), lengths, _to(boundaries.int(), device))


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

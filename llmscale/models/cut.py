"""How tensor parallelism cuts a weight: which part of the whole tensor a rank holds. No torch.

Initial weights, checkpoints and conversion all go through `pieces`, so that a weight has one meaning on every layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmscale.config.derive import padded_vocab_size
from llmscale.models.family import Weight


@dataclass(frozen=True)
class Piece:
    """A run of rows (dim 0) or columns (dim 1): where it starts in the whole tensor, where in the rank's own."""

    dim: int
    whole_start: int
    local_start: int
    length: int


def local_shape(weight: Weight, size: int) -> tuple[int, ...]:
    """Shape of the rank's own tensor in a tensor-parallel group of `size` ranks."""
    shape = list(weight.shape)
    if weight.cut == "vocab":
        shape[0] = padded_vocab_size(shape[0], size) // size
    elif weight.cut in ("rows", "gated_rows"):
        shape[0] //= size
    elif weight.cut == "columns":
        shape[1] //= size
    return tuple(shape)


def pieces(weight: Weight, rank: int, size: int) -> tuple[Piece, ...]:
    """The parts of the whole that tensor-parallel rank `rank` of `size` holds; what no piece covers is padding."""
    dim = 1 if weight.cut == "columns" else 0
    if weight.cut == "replicated" or (size == 1 and weight.cut != "vocab"):
        return (Piece(dim, 0, 0, weight.shape[dim]),)
    length = local_shape(weight, size)[dim]
    if weight.cut == "gated_rows":
        half = length // 2
        return tuple(Piece(0, part * weight.shape[0] // 2 + rank * half, part * half, half) for part in (0, 1))
    start = rank * length
    held = max(0, min(length, weight.shape[dim] - start))
    return (Piece(dim, start, 0, held),) if held else ()

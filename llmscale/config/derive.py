"""Values that follow from others, each in one place. No torch."""

from __future__ import annotations

import math

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this (and of the tensor-parallel size): full tiles for the tensor cores."""


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding, padding included; every tensor-parallel rank holds the same number.

    Padding rows are zero, and their logits are left out of the softmax: they never change the loss.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, tensor_parallel)
    return -(-vocab_size // multiple) * multiple


def stage_layers(num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each (virtual) pipeline stage, in the model's order, as even as possible.

    What is left over goes to the middle stages: the first one also holds the embedding, the last one the output layer.
    """
    base, extra = divmod(num_layers, stages)
    first = (stages - extra + 1) // 2
    return tuple(base + (1 if first <= stage < first + extra else 0) for stage in range(stages))

"""Initial weights that depend on (seed, name) alone, so that every layout starts from the same model.

Each weight is drawn whole by a generator of its own, and each rank keeps its part: that costs one weight's worth of
memory for a moment, and makes layouts comparable to the last bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from llmscale.config.schema import Model
from llmscale.models.cut import pieces
from llmscale.models.family import Weight


def initial_tensor(weight: Weight, model: Model, seed: int, device: torch.device) -> torch.Tensor:
    """The whole initial tensor of a weight, fp32, unpadded: [*weight.shape].

    "residual" is N(0, init_std / sqrt(2 × num_layers)), GPT-2's rule for what is added to the residual stream.
    """
    if weight.init == "ones":
        return torch.ones(weight.shape, device=device)
    if weight.init == "zeros":
        return torch.zeros(weight.shape, device=device)
    digest = hashlib.sha256(f"{seed}/{weight.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    std = model.init_std / (math.sqrt(2 * model.num_layers) if weight.init == "residual" else 1.0)
    return torch.empty(weight.shape, device=device).normal_(0.0, std, generator=generator)


def copy_part(local: torch.Tensor, whole: torch.Tensor, weight: Weight, rank: int, size: int) -> None:
    """Copy what tensor-parallel rank `rank` of `size` holds of the whole tensor into its own; padding becomes zero."""
    if weight.cut == "vocab":
        local.zero_()
    for piece in pieces(weight, rank, size):
        local.narrow(piece.dim, piece.local_start, piece.length).copy_(
            whole.narrow(piece.dim, piece.whole_start, piece.length)
        )


@torch.no_grad()
def initialize(
    weights: Iterable[tuple[Weight, torch.nn.Parameter]], model: Model, seed: int, tensor_rank: int, tensor_size: int
) -> None:
    """Set parameters to their initial values."""
    for weight, parameter in weights:
        whole = initial_tensor(weight, model, seed, parameter.device)
        copy_part(parameter, whole, weight, tensor_rank, tensor_size)

"""Llama 3's stretch of rotary positions, with all of its numbers: Megatron-core's takes the factor alone."""

from __future__ import annotations

import math

import torch

from llmscale.config.schema import RopeScaling


def stretched(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Angular frequencies [head_dim / 2], radians a token, after the stretch.

    With wavelength w = 2π / frequency and original length n: w < n / high_freq_factor stays, w > n / low_freq_factor is
    divided by factor, and in between the two are mixed linearly in n / w (Llama 3 herd, section 3; the formula is that
    of its published code).
    """
    ratio = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((ratio - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)

"""LayerNorm and RMSNorm that know sequence parallelism.

Megatron-core's WrappedTorchNorm refuses sequence parallelism and leaves its weights unmarked; under it each
tensor-parallel rank sees a part of the sequence only, and the gradients of these weights must be summed over the
group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


def _mark(module: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm over the last dimension, [..., hidden]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        _mark(self, config)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm over the last dimension, [..., hidden]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        _mark(self, config)


class RMSNormPlusOne(RMSNorm):
    """RMSNorm by 1 + weight, in fp32 as Gemma's is: in bf16 the sum would round small weights away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]"""
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


NORMS: dict[str, type[torch.nn.Module]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "rmsnorm_plus_one": RMSNormPlusOne,
}

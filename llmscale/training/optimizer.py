"""The optimizer under ZeRO. DeepSpeed hands it flat fp32 partitions, so it must work element by element.

That rules Muon out: it orthogonalises whole matrices, and DeepSpeed 0.19.8 refuses its own under model parallelism.
Fused kernels where torch has them: on a GPU, and on a CPU too, where AdamW over 32M weights takes 40 ms in place of
171 (one core).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmscale.config.schema import Optimizer
from llmscale.errors import UsageError

Groups = list[dict[str, Any]]
STATES: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
}
"""What each optimizer keeps for a weight, in fp32."""


def moments(config: Optimizer) -> int:
    """fp32 numbers that the optimizer keeps for each weight, besides the weight itself."""
    return len(STATES[config.name])


def build_optimizer(config: Optimizer, groups: Groups, device: torch.device, offloaded: bool) -> torch.optim.Optimizer:
    """The optimizer over parameter groups that carry their own weight_decay.

    Raises:
        UsageError: its kernel cannot be built here.
    """
    return _BUILDERS[config.name](config, groups, torch.device("cpu") if offloaded else device)


def _adamw(config: Optimizer, groups: Groups, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _adam(config: Optimizer, groups: Groups, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _sgd(config: Optimizer, groups: Groups, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0], fused=True)


def _lion(config: Optimizer, groups: Groups, device: torch.device) -> torch.optim.Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    kernel = FusedLion if device.type == "cuda" else DeepSpeedCPULion
    try:
        optimizer: torch.optim.Optimizer = kernel(groups, lr=config.lr, betas=config.betas)
    except Exception as error:
        cause = error.__cause__ or error  # DeepSpeed's own words say only that the build failed.
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise UsageError(
            f"optimizer.name: lion is DeepSpeed's {kernel.__name__}, which could not be built here ({reason}); "
            f"install ninja and {'the CUDA toolkit' if device.type == 'cuda' else 'g++'}, or use adamw"
        ) from error
    if kernel is DeepSpeedCPULion:
        optimizer.register_step_post_hook(_drop_unused)
    return optimizer


def _drop_unused(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    """DeepSpeed 0.19.8's Lion on the CPU makes a second moment that it never reads: 4 bytes a weight."""
    for state in optimizer.state.values():
        state.pop("exp_avg_sq", None)


_BUILDERS: dict[str, Callable[[Optimizer, Groups, torch.device], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "lion": _lion,
}

"""What a run says when it starts: what was chosen, and what it costs in memory on each rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llmscale.config.schema import RunConfig
from llmscale.distributed.launch import Launch
from llmscale.models.attention import varlen_fits
from llmscale.models.family import Family
from llmscale.models.transformer import DTYPES
from llmscale.training.engine import Engine


@dataclass(frozen=True)
class Memory:
    """What one rank holds all the time, in GiB; activations come on top."""

    parameters_gib: float
    gradients_gib: float
    optimizer_gib: float

    @property
    def total_gib(self) -> float:
        return self.parameters_gib + self.gradients_gib + self.optimizer_gib


def memory(engine: Engine, moments: int) -> Memory:
    """Memory of this rank. moments: fp32 numbers the optimizer keeps for each weight.

    ZeRO-0 and 1 keep fp32 gradients of all local weights, ZeRO-2 and 3 of the owned part; ZeRO-3 keeps the owned part
    of the compute weights. The optimizer's part is the fp32 master weights and the moments of what is owned.
    """
    parameters = [parameter for stage in engine.stages for parameter in stage.parameters()]
    stage = engine.groups.layout.zero_stage
    local = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    owned = sum(part.numel for part in engine.zero.owned())
    item = parameters[0].element_size()
    return Memory(
        parameters_gib=(owned if stage == 3 else local) * item / 2**30,
        gradients_gib=(owned if stage >= 2 else local) * 4 / 2**30,
        optimizer_gib=owned * 4 * (1 + moments) / 2**30,
    )


def start_report(
    config: RunConfig,
    family: Family,
    engine: Engine,
    launch: Launch,
    device: torch.device,
    offload: str,
    moments: int,
) -> Mapping[str, str]:
    """The lines of the start report, by name, on every rank (a collective gathers the memory)."""
    layout, training = engine.groups.layout, config.training
    mine = memory(engine, moments)
    everyone: list[Memory] = [mine] * launch.world_size
    dist.all_gather_object(everyone, mine)
    largest = max(everyone, key=lambda one: one.total_gib)
    vocab_size = config.model.vocab_size or 0
    count = sum(weight.numel for weight in family.parameters(config.model, vocab_size))
    stages = f", layers {list(layout.layers)}" if layout.pipeline > 1 else ""
    accumulation = f"{layout.micro_batches(training)} micro-batches of {training.micro_batch_size}"
    return {
        "device": f"{device_name(device)} × {launch.world_size}, started by {launch.launcher}",
        "layout": f"{layout}{stages}",
        "model": f"{config.model.family}, {count:,} parameters, {config.model.num_layers} layers",
        "attention": _attention(config, device),
        "norm": f"torch {'LayerNorm' if family.norm == 'layernorm' else 'RMSNorm'}",
        "precision": _precision(training.precision),
        "ZeRO": f"stage {layout.zero_stage}{offload}",
        "batch": f"{training.global_batch_size} sequences = "
        f"{training.global_batch_size * config.data.sequence_length:,} tokens a step; "
        f"{accumulation} a data-parallel rank",
        "memory": f"largest rank: parameters {largest.parameters_gib:.3f} GiB, "
        f"gradients {largest.gradients_gib:.3f} GiB, optimizer {largest.optimizer_gib:.3f} GiB; activations on top",
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU (gloo)"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (gloo)"


def _precision(precision: str) -> str:
    return "bf16 compute, fp32 master weights and gradients" if precision == "bf16" else "fp32"


def _attention(config: RunConfig, device: torch.device) -> str:
    model = config.model
    kernel = f"torch scaled_dot_product_attention ({_backends(device)})"
    if not config.data.mask_documents:
        return kernel
    if varlen_fits(device, DTYPES[config.training.precision], model.head_size, model.dropout):
        return "inside documents: torch varlen_attn (flash)"
    return f"inside documents: {kernel}, one call a document"


def _backends(device: torch.device) -> str:
    if device.type == "cpu":
        return "flash kernel of the CPU"
    backends = torch.backends.cuda
    names = (("cuDNN", backends.cudnn_sdp_enabled()), ("flash", backends.flash_sdp_enabled()))
    return "/".join(name for name, enabled in names if enabled) or "math"

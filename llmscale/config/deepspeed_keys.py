"""What may stand in a DeepSpeed file: what follows from the run's config, what the engine fixes, what is refused.

DeepSpeed itself passes over a key that it does not know. Here every key is known by name and type, so that a slip of
the pen is an error and not a default.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
Wrong = tuple[tuple[str, ...], str, str]
"""A key's path, the reason, the fix."""


@dataclass(frozen=True)
class Follows:
    """A value of the file that follows from the run's config: "auto", or equal to it."""

    path: tuple[str, ...]
    key: str
    value: Callable[[Mapping[str, Any]], Any]


FOLLOWS: tuple[Follows, ...] = (
    Follows(("train_batch_size",), "training.global_batch_size", lambda c: c["training"].global_batch_size),
    Follows(("train_micro_batch_size_per_gpu",), "training.micro_batch_size", lambda c: c["training"].micro_batch_size),
    Follows(("gradient_clipping",), "training.gradient_clipping", lambda c: c["training"].gradient_clipping),
    Follows(("bf16", "enabled"), "training.precision", lambda c: c["training"].precision == "bf16"),
    Follows(("optimizer", "params", "lr"), "optimizer.lr", lambda c: c["optimizer"].lr),
    Follows(("optimizer", "params", "betas"), "optimizer.betas", lambda c: list(c["optimizer"].betas)),
    Follows(("optimizer", "params", "eps"), "optimizer.eps", lambda c: c["optimizer"].eps),
    Follows(("optimizer", "params", "weight_decay"), "optimizer.weight_decay", lambda c: c["optimizer"].weight_decay),
)


@dataclass(frozen=True)
class Fixed:
    """A value that the engine needs as it is: "auto", or this one."""

    path: tuple[str, ...]
    value: Any
    reason: str


FIXED: tuple[Fixed, ...] = (
    Fixed(("gradient_accumulation_steps",), 1, "Megatron's schedule accumulates, and divides by the micro-batches"),
    Fixed(("managed_gradient_accumulation",), False, "llmscale decides when a step ends"),
    Fixed(("communication_data_type",), "fp32", "gradients in bf16 are 1.4e-2 of an update off"),
    Fixed(("data_types", "grad_accum_dtype"), "fp32", "gradients added in bf16 are 1.4e-2 of an update off"),
    Fixed(("bf16", "immediate_grad_update"), True, "without it ZeRO-1 in bf16 accumulates nothing under a pipeline"),
    Fixed(("fp16", "enabled"), False, "fp16 with loss scaling is not built; use training.precision bf16"),
    Fixed(("prescale_gradients",), False, "the mean is taken once, after the reduction"),
    Fixed(("sparse_gradients",), False, "embeddings have dense gradients here"),
    Fixed(("zero_allow_untested_optimizer",), True, "the optimizer is torch's"),
    Fixed(("zero_force_ds_cpu_optimizer",), False, "the optimizer is torch's fused one on the CPU as well"),
    Fixed(("zero_optimization", "zero_quantized_weights"), False, "ZeRO++ is not tested"),
    Fixed(("zero_optimization", "zero_quantized_gradients"), False, "ZeRO++ is not tested"),
    Fixed(("zero_optimization", "zero_hpz_partition_size"), 1, "ZeRO++ is not tested"),
    Fixed(("zero_optimization", "round_robin_gradients"), False, "partitions must line up over tensor-parallel ranks"),
)
REFUSED = {
    "scheduler": "the learning rate is the run's: see the section schedule",
    "pipeline": "the pipeline is Megatron's: see parallel.pipeline",
    "activation_checkpointing": "recomputation is Megatron's: see training.recompute",
    "tensorboard": "figures are the run's: see logging.tensorboard",
    "wandb": "figures are the run's: see logging.wandb",
    "autotuning": "llmscale does not autotune",
    "elasticity": "a resumed run keeps its global batch on any number of ranks by itself",
}
SIZE, NUMBER, SWITCH, TEXT = "a whole number", "a number", "true or false", "text"
OBJECT, ANY = "a JSON object", "anything"
"""The types of values, in words."""
PASSED: dict[str, Any] = {
    "wall_clock_breakdown": SWITCH, "memory_breakdown": SWITCH, "dump_state": SWITCH, "steps_per_print": SIZE,
    "comms_logger": OBJECT, "aio": OBJECT,
}  # fmt: skip
"""Top-level keys that go to DeepSpeed as they are -> their type."""
ZERO: dict[str, Any] = {
    "stage": SIZE, "overlap_comm": SWITCH, "contiguous_gradients": SWITCH, "reduce_scatter": SWITCH,
    "reduce_bucket_size": SIZE, "allgather_partitions": SWITCH, "allgather_bucket_size": SIZE, "sub_group_size": SIZE,
    "stage3_prefetch_bucket_size": SIZE, "stage3_param_persistence_threshold": SIZE,
    "stage3_model_persistence_threshold": SIZE, "stage3_max_live_parameters": SIZE, "stage3_max_reuse_distance": SIZE,
    "stage3_gather_16bit_weights_on_model_save": SWITCH, "round_robin_gradients": SWITCH,
    "zero_quantized_weights": SWITCH, "zero_quantized_gradients": SWITCH, "zero_hpz_partition_size": SIZE,
    "use_multi_rank_bucket_allreduce": SWITCH, "memory_efficient_linear": SWITCH, "ignore_unused_parameters": SWITCH,
    "offload_optimizer": {
        "device": TEXT, "pin_memory": SWITCH, "ratio": NUMBER, "fast_init": SWITCH, "nvme_path": TEXT,
        "buffer_count": SIZE, "pipeline_read": SWITCH, "pipeline_write": SWITCH,
    },
    "offload_param": {
        "device": TEXT, "pin_memory": SWITCH, "nvme_path": TEXT, "buffer_count": SIZE, "buffer_size": SIZE,
        "max_in_cpu": SIZE,
    },
}  # fmt: skip
FP16 = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale", "auto_cast")
KEYS: dict[str, Any] = {
    **PASSED,
    # Their values are compared with the run's, or with what the engine needs: what type they have is said there.
    **{path[0]: ANY for path in (*(r.path for r in FOLLOWS), *(r.path for r in FIXED)) if len(path) == 1},
    "bf16": {"enabled": ANY, "immediate_grad_update": ANY},
    "fp16": {"enabled": ANY, **dict.fromkeys(FP16, ANY)},
    "data_types": {"grad_accum_dtype": ANY},
    "optimizer": {"type": ANY, "params": {"lr": ANY, "betas": ANY, "eps": ANY, "weight_decay": ANY}},
    "zero_optimization": ZERO,
}
"""Every key of a file: a type, or the keys of an object."""


def sound(content: dict[str, Any]) -> tuple[dict[str, Any], list[Wrong]]:
    """A file without the keys that do not exist and the values of a wrong type; and these, with reason and fix."""
    wrong: list[Wrong] = []
    return _sound((), content, KEYS, wrong), wrong


def _sound(at: tuple[str, ...], given: dict[str, Any], keys: dict[str, Any], wrong: list[Wrong]) -> dict[str, Any]:
    kept = {}
    for key, value in given.items():
        path, kind = (*at, key), keys.get(key)
        if not at and key in REFUSED:
            wrong.append((path, f"llmscale does not use it: {REFUSED[key]}", "remove it"))
        elif kind is None:
            close = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.6)
            fix = f"did you mean {close[0]}?" if close else "remove it"
            wrong.append((path, "is not a DeepSpeed key that llmscale knows", fix))
        elif isinstance(kind, dict) and isinstance(value, dict):
            kept[key] = _sound(path, value, kind, wrong)
        elif isinstance(kind, dict):
            wrong.append((path, f"{OBJECT} is wanted, not {shown(value)}", f'e.g. {{"{next(iter(kind))}": ...}}'))
        elif value != AUTO and not _is(kind, value):
            wrong.append((path, f"{kind} is wanted, not {shown(value)}", "change it"))
        else:
            kept[key] = value
    return kept


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind in (SWITCH, ANY)
    if kind == SIZE:
        # DeepSpeed's own files write 5e8.
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    wanted: dict[str, Any] = {NUMBER: (int, float), TEXT: str, SWITCH: bool, OBJECT: dict, ANY: object}
    return isinstance(value, wanted[kind])


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

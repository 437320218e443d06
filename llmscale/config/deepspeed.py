"""DeepSpeed's JSON file: found, checked against the run's config, and made whole.

What the run's config decides is "auto" in the file. A value that says something else is an error that names both: two
places that disagree are how wrong runs happen. What llmscale's engine needs of DeepSpeed is set here, for every file alike.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmscale.config import shipped
from llmscale.config.schema import RunConfig
from llmscale.errors import ConfigError, Problem

AUTO = "auto"
KEY = "deepspeed"


@dataclass(frozen=True)
class File:
    """A DeepSpeed file as it was read."""

    path: Path
    content: dict[str, Any]


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A DeepSpeed file made whole for one run. settings: what DeepSpeed gets; nothing in it is "auto".

    stage: the ZeRO stage of the file. Stage 0 reaches DeepSpeed as stage 1 over partitions of one rank, see
    `training/gradients.py`. offload_*: None, "cpu" or "nvme".
    """

    path: Path
    stage: int
    offload_optimizer: str | None
    offload_param: str | None
    settings: dict[str, Any]

    @property
    def offload(self) -> str:
        """The offload in words, for the start report."""
        parts = [("optimizer", self.offload_optimizer), ("parameters", self.offload_param)]
        return "".join(f", {what} on {where}" for what, where in parts if where)


def find(name: str, beside: Path | None) -> Path:
    """Look a file up beside the run's config, in the working folder, then among the packaged ones.

    Raises:
        ConfigError: it is in none of them.
    """
    packaged = shipped.folder("ds_configs")
    places = [Path(name)] if Path(name).is_absolute() else [
        *([beside / name] if beside else []), Path(name), packaged / name, packaged.parent / name
    ]  # fmt: skip
    for place in places:
        if place.is_file():
            return place
    names = sorted(path.name for path in packaged.glob("*.json"))
    close = difflib.get_close_matches(Path(name).name, names, n=1, cutoff=0.5)
    fix = f"did you mean {close[0]}? Packaged are {', '.join(names)}" if close else f"packaged are {', '.join(names)}"
    where = "beside the config, in the working folder and among the packaged files"
    raise ConfigError(name, [Problem(KEY, f"no file {name!r}, looked for {where}", fix)])


def read(name: str, beside: Path | None) -> File:
    """Find and parse a DeepSpeed file.

    Raises:
        ConfigError: there is none, or it is not JSON with a mapping at the top.
    """
    path = find(name, beside)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(name, [Problem(KEY, f"{path}: not valid JSON at {where}: {error.msg}", "mend it")]) from None
    except (OSError, ValueError) as error:
        raise ConfigError(name, [Problem(KEY, f"{path}: cannot be read: {error}", "mend it")]) from None
    if not isinstance(content, dict):
        raise ConfigError(name, [Problem(KEY, f"{path}: a JSON object is wanted", 'e.g. {"zero_optimization": {"stage": 1}}')])
    return File(path, content)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"the key {sorted(twice)[0]!r} is given twice")
    return dict(pairs)


def stage_of(file: File) -> int:
    """The file's ZeRO stage; 1 where it is not a stage (which `problems` reports)."""
    stage = _zero(file).get("stage", 0)
    return stage if stage in (0, 1, 2, 3) and not isinstance(stage, bool) else 1


def _zero(file: File) -> dict[str, Any]:
    zero = file.content.get("zero_optimization", {})
    return zero if isinstance(zero, dict) else {}


def _device(file: File, part: str) -> str | None:
    value = _zero(file).get(part)
    device = value.get("device", "none") if isinstance(value, dict) else None
    return None if device in (None, "none") else str(device)


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
PASSED = {"wall_clock_breakdown", "memory_breakdown", "steps_per_print", "comms_logger", "aio", "dump_state"}
"""Top-level keys that go to DeepSpeed as they are."""
REFUSED = {
    "scheduler": "the learning rate is the run's: see the section schedule",
    "pipeline": "the pipeline is Megatron's: see parallel.pipeline",
    "activation_checkpointing": "recomputation is Megatron's: see training.recompute",
    "tensorboard": "figures are the run's: see logging.tensorboard",
    "wandb": "figures are the run's: see logging.wandb",
    "autotuning": "llmscale does not autotune",
    "elasticity": "a resumed run keeps its global batch on any number of ranks by itself",
}
ZERO_KEYS = {
    "stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients", "reduce_scatter",
    "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "round_robin_gradients",
    "zero_quantized_weights", "zero_quantized_gradients", "zero_hpz_partition_size", "use_multi_rank_bucket_allreduce",
    "memory_efficient_linear", "ignore_unused_parameters",
}  # fmt: skip


def problems(file: File, config: Mapping[str, Any]) -> list[Problem]:
    """All that is wrong with a file for this run. config: the sections of the run's config that are valid, by name."""
    found = [*_unknown_keys(file), *_shapes(file)]
    if found:
        return found
    return [*_follow_problems(file, config), *_fixed_problems(file), *_zero_problems(file)]


def _problem(file: File, path: tuple[str, ...] | str, reason: str, fix: str) -> Problem:
    name = path if isinstance(path, str) else ".".join(path)
    return Problem(KEY, f"{file.path.name}: {name}: {reason}", fix)


def _unknown_keys(file: File) -> Iterator[Problem]:
    sections = {p.path[0] for p in (*FOLLOWS, *FIXED)} | {"zero_optimization"}
    for key in file.content:
        if key in REFUSED:
            yield _problem(file, key, f"llmscale does not use it: {REFUSED[key]}", "remove it")
        elif key not in sections | PASSED:
            yield _unknown(file, key, key, sections | PASSED)
    for key in _zero(file):
        if key not in ZERO_KEYS:
            yield _unknown(file, f"zero_optimization.{key}", key, ZERO_KEYS)


def _unknown(file: File, where: str, key: str, known: set[str]) -> Problem:
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else "remove it"
    return _problem(file, where, "is not a DeepSpeed key that llmscale knows", fix)


def _shapes(file: File) -> Iterator[Problem]:
    for key in ("zero_optimization", "bf16", "fp16", "data_types", "optimizer", "aio"):
        value = file.content.get(key, {})
        if not isinstance(value, dict):
            yield _problem(file, key, f"a JSON object is wanted, not {value!r}", 'e.g. {"enabled": "auto"}')
    for part in ("offload_optimizer", "offload_param"):
        value = _zero(file).get(part, {})
        if not isinstance(value, dict):
            yield _problem(file, ("zero_optimization", part), f"a JSON object is wanted, not {value!r}", '{"device": "cpu"}')


def _get(content: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = content
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return AUTO
        value = value[part]
    return value


def _follow_problems(file: File, config: Mapping[str, Any]) -> Iterator[Problem]:
    for rule in FOLLOWS:
        given = _get(file.content, rule.path)
        if given == AUTO or rule.key.partition(".")[0] not in config:
            continue
        expected = rule.value(config)
        if given != expected or isinstance(given, bool) is not isinstance(expected, bool):
            section, _, name = rule.key.partition(".")
            says = f"{rule.key} is {getattr(config[section], name)}"
            yield _problem(file, rule.path, f"{json.dumps(given)}, but {says}", f'use "auto", or change {rule.key}')
    kind = _get(file.content, ("optimizer", "type"))
    if kind != AUTO and "optimizer" in config and str(kind).lower() != config["optimizer"].name:
        reason = f"{kind!r}, but optimizer.name is {config['optimizer'].name}"
        yield _problem(file, ("optimizer", "type"), reason, 'use "auto", or change optimizer.name')


def _fixed_problems(file: File) -> Iterator[Problem]:
    for rule in FIXED:
        given = _get(file.content, rule.path)
        if given != AUTO and (given != rule.value or isinstance(given, bool) is not isinstance(rule.value, bool)):
            reason = f"{json.dumps(given)}, and llmscale needs {json.dumps(rule.value)}: {rule.reason}"
            yield _problem(file, rule.path, reason, f'use "auto" or {json.dumps(rule.value)}')


def _zero_problems(file: File) -> Iterator[Problem]:
    zero, at = _zero(file), "zero_optimization"
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield _problem(file, (at, "stage"), f"{json.dumps(stage)} is no ZeRO stage", "use 0, 1, 2 or 3")
        return
    if zero.get("overlap_comm") is True and stage < 2:
        yield _problem(file, (at, "overlap_comm"), f"cannot be true under stage {stage}", "use false, or stage 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        device = _device(file, part)
        if device not in (None, "cpu", "nvme"):
            yield _problem(file, (at, part, "device"), f"{device!r} is no device to offload to", "use none or cpu")
        elif device == "nvme":
            reason = "NVMe is not supported: what lies there cannot be saved in llmscale's checkpoints"
            yield _problem(file, (at, part, "device"), reason, "use cpu")
        elif device == "cpu" and part == "offload_param":
            reason = "parameters on the CPU are not supported: Megatron's layers want them on the device"
            yield _problem(file, (at, part), reason, "remove it; offload_optimizer works")
        elif device == "cpu" and stage == 0:
            yield _problem(file, (at, part), "needs stage 1 or higher", "use stage 1, 2 or 3, or remove it")


def resolve(config: RunConfig, beside: Path | None) -> DeepSpeedConfig:
    """The run's DeepSpeed file with every "auto" filled in.

    Raises:
        ConfigError: with all that contradicts the run's config.
    """
    file = read(config.deepspeed, beside)
    found = problems(file, {name: getattr(config, name) for name in RunConfig.model_fields})
    if found:
        raise ConfigError(config.deepspeed, found)
    stage = stage_of(file)
    bf16 = config.training.precision == "bf16"
    zero = {key: value for key, value in _zero(file).items() if value != AUTO}
    settings: dict[str, Any] = {key: value for key, value in file.content.items() if key in PASSED and value != AUTO}
    settings.setdefault("steps_per_print", 2**31)
    settings |= {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Clipping needs the true global norm, which gradients.py takes.
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**zero, "stage": max(stage, 1)},
    }
    if bf16:
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return DeepSpeedConfig(file.path, stage, _device(file, "offload_optimizer"), _device(file, "offload_param"), settings)

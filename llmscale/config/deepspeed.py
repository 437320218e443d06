"""DeepSpeed's JSON file: found, checked against the run's config, and made whole.

What the run's config decides is "auto" in the file. A value that says something else is an error that names both: two
places that disagree are how wrong runs happen. What llmscale's engine needs is set here, for every file alike.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmscale.config import shipped
from llmscale.config.deepspeed_keys import AUTO, FIXED, FOLLOWS, PASSED, shown, sound
from llmscale.config.schema import RunConfig
from llmscale.errors import ConfigError, Problem

EXAMPLE = '{"zero_optimization": {"stage": 1}}'
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
    places = [packaged / name, packaged.parent / name]
    looked = " beside the config, in the working folder or among the packaged files"
    if Path(name).is_absolute():
        places, looked = [Path(name)], ""
    else:
        places = [*([beside / name] if beside else []), Path(name), *places]
    for place in places:
        # Not Path.is_file, which raises where a name is too long or a folder may not be read.
        if os.path.isfile(place):
            return place
    if any(os.path.isdir(place) for place in places):
        raise ConfigError(name, [Problem(KEY, f"{name!r} is a folder", "name a JSON file in it")])
    names = sorted(path.name for path in packaged.glob("*.json"))
    close = difflib.get_close_matches(Path(name).name, names, n=1, cutoff=0.5)
    packaged_names = f"packaged: {', '.join(names)}"
    fix = f"did you mean {close[0]}? ({packaged_names})" if close else packaged_names
    raise ConfigError(name, [Problem(KEY, f"no file {shown(name)}{looked}", fix)])


def read(name: str, beside: Path | None) -> File:
    """Find and parse a DeepSpeed file.

    Raises:
        ConfigError: there is none, or it is not JSON with an object at the top.
    """
    path = find(name, beside)

    def refuse(reason: str, fix: str) -> ConfigError:
        return ConfigError(name, [Problem(KEY, f"{path}: {reason}", fix)])

    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise refuse("it is empty", f"e.g. {EXAMPLE}") from None
        where = f"line {error.lineno}, column {error.colno}"
        raise refuse(f"not valid JSON at {where}: {error.msg}", "mend it there") from None
    except UnicodeDecodeError as error:
        raise refuse(f"it is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise refuse(f"it cannot be read: {error.strerror}", "name a readable file") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise refuse(f"not valid JSON: {reason}", "mend it") from None
    if not isinstance(content, dict):
        raise refuse(f"a JSON object is wanted, not {shown(content)}", f"e.g. {EXAMPLE}")
    return File(path, content)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"the key {sorted(twice)[0]!r} is given twice")
    return dict(pairs)


def stage_of(file: File) -> int:
    """The file's ZeRO stage; 1 where it is not a stage (which `problems` reports)."""
    stage = _zero(file).get("stage", 0)
    return int(stage) if stage in (0, 1, 2, 3) and not isinstance(stage, bool) else 1


def _zero(file: File) -> dict[str, Any]:
    zero = file.content.get("zero_optimization", {})
    return zero if isinstance(zero, dict) else {}


def _device(file: File, part: str) -> str | None:
    value = _zero(file).get(part)
    device = value.get("device", "none") if isinstance(value, dict) else None
    return None if device in (None, "none") else str(device)


def problems(file: File, config: Mapping[str, Any]) -> list[Problem]:
    """All that is wrong with a file for this run. config: the sections of the run's config that are valid, by name."""
    # The rules look at what is sound: over a value of the wrong type they would say the same again, or nonsense.
    content, wrong = sound(file.content)
    found = [_problem(file, path, reason, fix) for path, reason, fix in wrong]
    checked = File(file.path, content)
    found += [*_follow_problems(checked, config), *_fixed_problems(checked)]
    stage_is_sound = ("stage" in _zero(checked)) == ("stage" in _zero(file))
    return [*found, *_zero_problems(checked)] if stage_is_sound else found


def _problem(file: File, path: tuple[str, ...], reason: str, fix: str) -> Problem:
    return Problem(KEY, f"{file.path.name}: {'.'.join(path)}: {reason}", fix)


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
            value = getattr(config[section], name)
            says = f"{rule.key} is {list(value) if isinstance(value, tuple) else value}"
            yield _problem(file, rule.path, f"{shown(given)}, but {says}", f'use "auto", or change {rule.key}')
    kind = _get(file.content, ("optimizer", "type"))
    if kind != AUTO and "optimizer" in config and str(kind).lower() != config["optimizer"].name:
        reason = f"{shown(kind)}, but optimizer.name is {config['optimizer'].name}"
        yield _problem(file, ("optimizer", "type"), reason, 'use "auto", or change optimizer.name')


def _fixed_problems(file: File) -> Iterator[Problem]:
    for rule in FIXED:
        given = _get(file.content, rule.path)
        if given != AUTO and (given != rule.value or isinstance(given, bool) is not isinstance(rule.value, bool)):
            reason = f"{shown(given)}, and llmscale needs {json.dumps(rule.value)}: {rule.reason}"
            yield _problem(file, rule.path, reason, f'use "auto" or {json.dumps(rule.value)}')


def _zero_problems(file: File) -> Iterator[Problem]:
    zero, at = _zero(file), "zero_optimization"
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        yield _problem(file, (at, "stage"), f"{shown(stage)} is no ZeRO stage", "use 0, 1, 2 or 3")
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


def _without_auto(content: dict[str, Any]) -> dict[str, Any]:
    """Without what is "auto" still: there DeepSpeed's defaults hold."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if value != AUTO
    }


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
    given = _without_auto(file.content)
    settings: dict[str, Any] = {key: value for key, value in given.items() if key in PASSED}
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
        "zero_optimization": {**given.get("zero_optimization", {}), "stage": max(stage, 1)},
    }
    if bf16:
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    offload = _device(file, "offload_optimizer"), _device(file, "offload_param")
    return DeepSpeedConfig(file.path, stage, *offload, settings)

"""From a YAML file and overrides to a whole, frozen RunConfig, or to the list of all that is wrong with it.

Sections are validated one by one, so that one broken section hides no other; the rules that tie sections together run
on whatever is valid. Nothing here knows the rules of layouts: they come in as `check`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmscale.config import deepspeed, messages, shipped, yaml_text
from llmscale.config.schema import Data, Model, Parallel, RunConfig, Training
from llmscale.config.section import Section
from llmscale.config.slurm import Slurm
from llmscale.errors import ConfigError, Problem

Check = Callable[[Model, Data, Parallel, Training, int, int | None], list[Problem]]
"""The layout rules: (model, data, parallel, training, ZeRO stage, world size) -> problems."""


def load(
    path: Path, overrides: Sequence[str] = (), world_size: int | None = None, check: Check | None = None
) -> RunConfig:
    """Read a run's config.

    overrides: "training.steps=50", the value in YAML. world_size None leaves out the rules that need it.

    Raises:
        ConfigError: with every problem of the file and the overrides.
    """
    raw = _read(path)
    problems = _apply(raw, overrides)
    missing_keys_are_known = _apply_preset(raw, path.parent, problems)
    _apply_cluster(raw, path.parent, problems)
    values: dict[str, Any] = {}
    for name in raw:
        if name not in RunConfig.model_fields:
            key = name if isinstance(name, str) else messages.shown(name, whole=True)
            problems.append(messages.unknown(key, list(RunConfig.model_fields), key))
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            forgiven = {"missing"} if name == "model" and missing_keys_are_known else set()
            _section(name, field.annotation, raw, values, problems, forgiven)
    _deepspeed(raw, values, problems)
    problems += _across(values, path, world_size, check)
    if problems:
        raise ConfigError(str(path), sorted(problems, key=_order))
    return RunConfig(**values)


def dump(config: RunConfig, path: Path) -> None:
    """Write a config as YAML that `load` reads back to the same config; all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.tmp")
    text = yaml_text.write(config.model_dump(mode="json"))
    work.write_text("# The resolved config of this run.\n" + text, encoding="utf-8")
    os.replace(work, path)


def _read(path: Path) -> dict[Any, Any]:
    def refuse(reason: str, fix: str, where: str | None = None) -> ConfigError:
        return ConfigError(str(path), [Problem(where or "file", reason, fix)])

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = messages.nearest(path.name, names)
        fix = f"did you mean {path.parent / close}?" if close else "check the path"
        raise refuse("there is no such file", fix) from None
    except UnicodeDecodeError as error:
        raise refuse(f"it is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise refuse(f"it cannot be read: {error.strerror}", "name a readable YAML file") from None
    try:
        raw = yaml_text.parse(text)
    except yaml_text.Invalid as error:
        fix = "mend it there" if error.place else "mend it"
        raise refuse(f"not valid YAML: {error.reason}", fix, error.place) from None
    sections = "it needs at least the sections model, data and training"
    if raw is None:
        raise refuse("it is empty", sections)
    if not isinstance(raw, dict):
        raise refuse(f"a mapping of sections is wanted, not {messages.shown(raw)}", sections)
    return raw


def _apply(raw: dict[Any, Any], overrides: Sequence[str]) -> list[Problem]:
    """Set what the overrides say; returns what is wrong with them."""
    problems = []
    for override in overrides:
        where = f"override {override!r}"
        key, equals, text = override.partition("=")
        *parents, last = key.strip().split(".")
        if not equals or not all([*parents, last]):
            problems.append(Problem(where, "key=value is wanted", "e.g. training.steps=50"))
            continue
        try:
            value = yaml_text.parse(text)
        except yaml_text.Invalid as error:
            problems.append(Problem(where, f"the value is not valid YAML: {error.reason}", "put it in quotes"))
            continue
        at: Any = raw
        for depth, parent in enumerate(parents, 1):
            inner = at.get(parent)
            if inner is None or isinstance(inner, dict):
                # A copy: by an alias of YAML, two sections may be one mapping.
                inner = at[parent] = dict(inner or {})
            else:
                at, name = None, ".".join(parents[:depth])
                if isinstance(inner, list):
                    problems.append(Problem(where, f"{name} is a list", f"give all of it: {name}=[...]"))
                else:
                    problems.append(Problem(where, f"{name} is not a section", f"set it whole: {name}=..."))
                break
            at = inner
        if at is not None:
            at[last] = value
    return problems


def preset_names() -> list[str]:
    """The presets that `model.preset` may name."""
    return sorted(path.stem for path in shipped.folder("presets").glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """The keys of a preset."""
    keys: dict[str, Any] = yaml_text.parse((shipped.folder("presets") / f"{name}.yaml").read_text(encoding="utf-8"))
    return keys


def _apply_preset(raw: dict[Any, Any], folder: Path, problems: list[Problem]) -> bool:
    """Put the preset's keys below those given. True where it names none: then no key counts as missing."""
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return False
    name, names = model["preset"], preset_names()
    if isinstance(name, str) and name in names:
        raw["model"] = {**preset(name), **model}
        return False
    if isinstance(name, str) and name.endswith((".yaml", ".yml")):
        file = next((place for place in (folder / name, Path(name)) if place.is_file()), None)
        if file is not None:
            raw["model"] = {**_read(file), **model}
            return False
        problems.append(Problem("model.preset", f"there is no file {name}", "name one that `convert from-hf` wrote"))
        raw["model"] = {**model, "preset": None}
        return True
    given = messages.shown(name)
    reason = f"there is no preset {given}" if isinstance(name, str) else f"a name is wanted, not {given}"
    close = messages.nearest(str(name), names)
    presets = f"presets: {', '.join(names)}"
    fix = f"did you mean {close}? ({presets})" if close else presets
    problems.append(Problem("model.preset", reason, fix))
    raw["model"] = {**model, "preset": None}
    return True


def _apply_cluster(raw: dict[Any, Any], folder: Path, problems: list[Problem]) -> None:
    """Put the keys of the cluster's file below those given."""
    section = raw.get("slurm")
    name = section.get("cluster") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(name, str):
        return
    file = next((place for place in (folder / name, Path(name)) if place.is_file()), None)
    if file is None:
        problems.append(Problem("slurm.cluster", f"there is no file {name}", "check the path"))
        return
    raw["slurm"] = {**_cluster_keys(file), **section}


def _cluster_keys(path: Path) -> dict[Any, Any]:
    """A cluster's file: keys of the section `slurm`, under that name or by themselves."""
    found = _read(path)
    inner = found.get("slurm")
    return inner if isinstance(inner, dict) else found


def load_slurm(path: Path, overrides: Sequence[str] = ()) -> Slurm:
    """The settings of a cluster's file, or of the section `slurm` of a run's config, of which nothing else is read.

    overrides: "slurm.nodes=2".

    Raises:
        ConfigError: with every problem of them.
    """
    raw: dict[Any, Any] = {"slurm": _cluster_keys(path)}
    problems = _apply(raw, overrides)
    _apply_cluster(raw, path.parent, problems)
    values: dict[str, Any] = {}
    _section("slurm", Slurm, raw, values, problems, set())
    if problems:
        raise ConfigError(str(path), problems)
    found: Slurm = values["slurm"]
    return found


def _section(
    name: str,
    model: type[Section],
    raw: Mapping[Any, Any],
    values: dict[str, Any],
    problems: list[Problem],
    forgiven: set[str],
) -> None:
    """Validate a section into `values`. forgiven: types of pydantic's errors that are not said again."""
    value = raw.get(name)
    if value is None:
        # A section of which every key is commented out is as good as none.
        value = {}
        required = [key for key, field in model.model_fields.items() if field.is_required()]
        if required and not forgiven:
            fix = f"it needs {', '.join(required)}" + ("; or a preset" if "preset" in model.model_fields else "")
            problems.append(Problem(name, f"the section is {'empty' if name in raw else 'missing'}", fix))
            return
    try:
        values[name] = model.model_validate(value)
    except ValidationError as error:
        details = [d for d in error.errors(include_url=False) if d["type"] not in forgiven]
        problems += messages.of_section(name, model, details)


def _deepspeed(raw: Mapping[Any, Any], values: dict[str, Any], problems: list[Problem]) -> None:
    key = deepspeed.KEY
    value = raw.get(key, RunConfig.model_fields[key].default)
    if isinstance(value, str) and value:
        values[key] = value
    else:
        given = messages.shown(value)
        problems.append(Problem(key, f"the path of a DeepSpeed JSON file is wanted, not {given}", "e.g. zero1.json"))


def _across(values: Mapping[str, Any], path: Path, world_size: int | None, check: Check | None) -> list[Problem]:
    """Rules over several sections, as far as these are valid."""
    problems: list[Problem] = []
    training, schedule, data = values.get("training"), values.get("schedule"), values.get("data")
    if training and schedule and schedule.warmup_steps > training.steps > 0:
        reason = f"{schedule.warmup_steps} is longer than the run, training.steps {training.steps}"
        problems.append(Problem("schedule.warmup_steps", reason, f"use at most {training.steps}"))
    if training and data and training.validation_interval and not data.validation:
        reason = f"{training.validation_interval}, but data.validation names no source"
        problems.append(Problem("training.validation_interval", reason, "name one, or use 0"))
    resume = values["checkpoint"].resume if "checkpoint" in values else "auto"
    close = messages.nearest(resume, ("auto", "never"))
    if close not in (None, resume) and not Path(resume).exists():
        reason = f"there is nothing at {messages.shown(resume)}"
        problems.append(Problem("checkpoint.resume", reason, f"did you mean {close}?"))
    stage = 1
    if deepspeed.KEY in values:
        try:
            file = deepspeed.read(values[deepspeed.KEY], path.parent)
            stage = deepspeed.stage_of(file)
            problems += deepspeed.problems(file, values)
        except ConfigError as error:
            problems += error.problems
    if check is not None and all(name in values for name in ("model", "data", "parallel", "training")):
        problems += check(values["model"], values["data"], values["parallel"], values["training"], stage, world_size)
    return problems


def _order(problem: Problem) -> tuple[int, str]:
    """The order of the schema's sections; what is about the file or an override comes first."""
    sections = list(RunConfig.model_fields)
    name = re.split(r"[.\[ ]", problem.where)[0]
    return (sections.index(name) if name in sections else -1, problem.where)

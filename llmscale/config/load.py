"""From a YAML file and overrides to a whole, frozen RunConfig, or to the list of all that is wrong with it.

Sections are validated one by one, so that one broken section hides no other; the rules that tie sections together run on
whatever is valid. Nothing here knows the rules of layouts: they come in as `check`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from llmscale.config import deepspeed, shipped
from llmscale.config.schema import Data, Model, Parallel, RunConfig, Section, Training
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
    _apply_preset(raw, problems)
    values: dict[str, Any] = {}
    for name in raw.keys() - RunConfig.model_fields.keys():
        problems.append(_unknown(str(name), [], str(name)))
    for name, field in RunConfig.model_fields.items():
        _section(name, field.annotation, raw, field.is_required(), values, problems)
    problems += _across(values, path, world_size, check)
    if problems:
        raise ConfigError(str(path), sorted(problems, key=_order))
    return RunConfig(**values)


def dump(config: RunConfig, path: Path) -> None:
    """Write a config as YAML that `load` reads back to the same config; all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.tmp")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    work.write_text("# The resolved config of this run.\n" + text, encoding="utf-8")
    os.replace(work, path)


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: a key given twice is an error, and 1e-3 is a number (YAML 1.1 wants 1.0e-3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool | None) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str | int | float | bool | None):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read(path: Path) -> dict[str, Any]:
    def refuse(reason: str, fix: str, where: str = "file") -> ConfigError:
        return ConfigError(str(path), [Problem(where, reason, fix)])

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        close = _nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
        raise refuse("there is no such file", f"did you mean {path.parent / close}?" if close else "check the path") from None
    except UnicodeDecodeError as error:
        raise refuse(f"it is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise refuse(f"it cannot be read: {error.strerror}", "name a readable YAML file") from None
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        hint = "indent with spaces" if "\\t" in str(error.problem) else "mend the YAML there"
        raise refuse(f"not valid YAML: {error.problem}", hint, where) from None
    except yaml.YAMLError as error:
        raise refuse(f"not valid YAML: {str(error).splitlines()[0]}", "save it as plain text") from None
    if raw is None:
        raise refuse("it is empty", "start from a config in examples/")
    if not isinstance(raw, dict):
        raise refuse(f"a mapping of sections is wanted, not {_kind(raw)}", "start with e.g. `model:`")
    return raw


def _apply(raw: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(Problem(f"override {override!r}", "key=value is wanted", "e.g. training.steps=50"))
            continue
        try:
            value = yaml.load(text, Loader=_Loader) if text.strip() else None
        except yaml.YAMLError:
            problems.append(Problem(f"override {override!r}", "the value is not valid YAML", "quote it"))
            continue
        *parents, last = key.split(".")
        at = raw
        for depth, parent in enumerate(parents):
            inner = at.setdefault(parent, {})
            if inner is None:
                inner = at[parent] = {}
            if not isinstance(inner, dict):
                where = ".".join(parents[: depth + 1])
                problems.append(Problem(f"override {override!r}", f"{where} is not a section", "name a key of a section"))
                break
            at = inner
        else:
            at[last] = value
    return problems


def preset_names() -> list[str]:
    """The presets that `model.preset` may name."""
    return sorted(path.stem for path in shipped.folder("presets").glob("*.yaml"))


def _apply_preset(raw: dict[str, Any], problems: list[Problem]) -> None:
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return
    name = model["preset"]
    if not isinstance(name, str) or name not in preset_names():
        close = _nearest(str(name), preset_names())
        fix = (f"did you mean {close}? " if close else "") + f"There are {', '.join(preset_names())}"
        problems.append(Problem("model.preset", f"no preset {name!r}", fix))
        raw["model"] = None
        return
    preset = yaml.safe_load((shipped.folder("presets") / f"{name}.yaml").read_text(encoding="utf-8"))
    raw["model"] = {**preset, **model}


def _section(
    name: str, annotation: Any, raw: Mapping[str, Any], required: bool, values: dict[str, Any], problems: list[Problem]
) -> None:
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    value = raw.get(name)
    if value is None and is_section:
        if name in raw and name == "model" and any(p.where == "model.preset" for p in problems):
            return
        if required and name not in raw:
            keys = ", ".join(key for key, field in annotation.model_fields.items() if field.is_required())
            problems.append(Problem(name, "the section is missing", f"it needs {keys}"))
            return
        value = {}
    try:
        if is_section:
            values[name] = annotation.model_validate(value)
        elif name in raw:
            if not isinstance(value, str) or not value:
                problems.append(Problem(name, f"a path is wanted, not {_kind(value)}", "e.g. zero1.json"))
            else:
                values[name] = value
        else:
            values[name] = RunConfig.model_fields[name].default
    except ValidationError as error:
        problems += [_problem(name, annotation, detail) for detail in error.errors(include_url=False)]


def _problem(section: str, model: type[BaseModel], detail: Any) -> Problem:
    """pydantic's error in plain words, with the nearest right value."""
    location = [part for part in detail["loc"] if not str(part).startswith(("function-", "constrained-"))]
    where = section + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "extra_forbidden":
        holder = _model_at(model, location[:-1])
        return _unknown(where, list(holder.model_fields) if holder else [], str(location[-1]))
    if kind == "missing":
        return Problem(where, "is missing", f"give {_wanted(_annotation(model, location))}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return Problem(where, f"a section with keys is wanted, not {_kind(given)}", "indent its keys below it")
    if kind in ("tuple_type", "list_type"):
        return Problem(where, f"a list is wanted, not {_kind(given)}", "write it as [...] or with leading dashes")
    if kind in ("too_short", "string_too_short"):
        return Problem(where, "is empty", "give at least one" if kind == "too_short" else "give a name or path")
    if kind == "too_long":
        return Problem(where, f"has {context.get('actual_length')} items", f"give {context.get('max_length')}")
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(_annotation(model, location))]
        close = _nearest(str(given), choices)
        return Problem(where, f"{given!r} is none of {', '.join(choices)}", f"did you mean {close}?" if close else "use one")
    limits = {
        "greater_than": "above {gt}", "greater_than_equal": "at least {ge}",
        "less_than": "below {lt}", "less_than_equal": "at most {le}",
    }  # fmt: skip
    if kind in limits:
        wanted = limits[kind].format(**{k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()})
        return Problem(where, f"{given} is out of range", f"use a value {wanted}")
    if kind == "value_error":
        return Problem(where, str(context.get("error", detail["msg"])), f"give {_wanted(_annotation(model, location))}")
    wanted = _wanted(_annotation(model, location))
    return Problem(where, f"{wanted} is wanted, not {_kind(given)}", _retype(given))


def _retype(given: Any) -> str:
    if isinstance(given, str) and given.strip().isdigit():
        return f"write {given.strip()} without quotes"
    return f"write true or false without quotes" if str(given).lower() in ("yes", "no", "on", "off") else "change its type"


def _annotation(model: type[BaseModel], location: Sequence[Any]) -> Any:
    annotation: Any = model
    for part in location:
        if isinstance(part, str) and isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(part)
            annotation = field.annotation if field else None
        elif isinstance(part, int):
            inner = [arg for arg in get_args(annotation) if arg is not type(None)]
            annotation = next(iter(get_args(inner[0]) or inner), None) if inner else None
    return annotation


def _model_at(model: type[BaseModel], location: Sequence[Any]) -> type[BaseModel] | None:
    found = _annotation(model, location) if location else model
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _wanted(annotation: Any) -> str:
    """A type in plain words."""
    text = str(annotation)
    for type_name, words in (("bool", "true or false"), ("tuple", "a list"), ("int", "a whole number")):
        if type_name in text:
            return words
    if "float" in text:
        return "a number"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section with " + ", ".join(k for k, f in annotation.model_fields.items() if f.is_required())
    return "text"


def _kind(value: Any) -> str:
    """A value in plain words, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _nearest(name: str, names: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return found[0] if found else None


def _all_keys() -> dict[str, str]:
    """Every dotted key, by its last part: where a key that stands in the wrong section belongs."""
    keys = {}
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys.update({key: f"{section}.{key}" for key in field.annotation.model_fields})
    return keys


def _unknown(where: str, siblings: Sequence[str], name: str) -> Problem:
    everywhere = _all_keys()
    close = _nearest(name, siblings)
    if close is not None:
        fix = f"did you mean {where.removesuffix(name)}{close}?"
    elif name in everywhere:
        fix = f"did you mean {everywhere[name]}?"
    else:
        near = _nearest(name, [*RunConfig.model_fields, *everywhere])
        fix = f"did you mean {everywhere.get(near, near)}?" if near else "see docs/config.md"
    return Problem(where, "is not a key of the config", fix)


def _across(
    values: Mapping[str, Any], path: Path, world_size: int | None, check: Check | None
) -> list[Problem]:
    """Rules over several sections, as far as these are valid."""
    problems: list[Problem] = []
    training, schedule, data = values.get("training"), values.get("schedule"), values.get("data")
    if training and schedule and schedule.warmup_steps > training.steps > 0:
        problems.append(
            Problem(
                "schedule.warmup_steps",
                f"{schedule.warmup_steps} is longer than the run, training.steps {training.steps}",
                f"use at most {training.steps}",
            )
        )
    if training and data and training.validation_interval and not data.validation:
        problems.append(
            Problem(
                "training.validation_interval",
                f"{training.validation_interval}, but data.validation names no source",
                "name one, or use 0",
            )
        )
    stage = 1
    if "deepspeed" in values:
        try:
            file = deepspeed.read(values["deepspeed"], path.parent)
            stage = deepspeed.stage_of(file)
            problems += deepspeed.problems(file, values)
        except ConfigError as error:
            problems += error.problems
    parts = [values.get(name) for name in ("model", "data", "parallel", "training")]
    if check is not None and all(part is not None for part in parts):
        problems += check(*parts, stage, world_size)  # type: ignore[arg-type]
    return problems


def _order(problem: Problem) -> tuple[int, str]:
    """The order of the schema's sections; what is about the file or an override comes first."""
    sections = list(RunConfig.model_fields)
    name = re.split(r"[.\[ ]", problem.where)[0]
    return (sections.index(name) if name in sections else -1, problem.where)

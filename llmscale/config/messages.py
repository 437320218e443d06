"""What is wrong with a key, in a user's words: what, where, and the nearest right value.

pydantic says "Input should be a valid integer"; a user wants to hear which key, what stands there and what to write.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llmscale.config.schema import RunConfig
from llmscale.config.section import Section
from llmscale.errors import Problem

SYNONYMS = {
    "tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context", "ep": "expert",
    "learning_rate": "lr", "max_steps": "steps", "train_iters": "steps", "batch_size": "global_batch_size",
    "seq_len": "sequence_length", "seq_length": "sequence_length", "max_seq_len": "sequence_length",
    "grad_clip": "gradient_clipping", "clip_grad": "gradient_clipping", "max_grad_norm": "gradient_clipping",
    "heads": "num_attention_heads", "num_heads": "num_attention_heads", "num_kv_heads": "num_query_groups",
    "num_key_value_heads": "num_query_groups", "layers": "num_layers", "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size", "dtype": "precision", "warmup": "warmup_steps", "output": "output_dir",
}  # fmt: skip
"""What others call a key -> its name here."""
LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def of_section(section: str, model: type[Section], details: Sequence[ErrorDetails]) -> list[Problem]:
    """pydantic's errors of one section as problems."""
    places = [detail["loc"] for detail in details]
    # pydantic calls a list too short when its items are wrong: the items are said already.
    kept = [d for d in details if d["type"] != "too_short" or not any(_inside(p, d["loc"]) for p in places)]
    return [_problem(section, model, detail) for detail in kept]


def _inside(place: tuple[Any, ...], parent: tuple[Any, ...]) -> bool:
    return len(place) > len(parent) and place[: len(parent)] == parent


def _problem(section: str, model: type[Section], detail: ErrorDetails) -> Problem:
    location, given, reason = detail["loc"], detail["input"], detail["type"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    if reason == "invalid_key":
        return unknown(_dotted(section, (*location[:-1], shown(given))), _keys_at(model, location[:-1]), shown(given))
    where = _dotted(section, location)
    if reason == "extra_forbidden":
        return unknown(where, _keys_at(model, location[:-1]), str(location[-1]))
    annotation, field = _at(model, location)
    if reason == "missing":
        or_preset = "preset" in model.model_fields and len(location) == 1
        return Problem(where, "is missing", _give(where, annotation, field, or_preset))
    if reason == "slurm_value":
        what, _, fix = str(context["reason"]).rpartition("; ")
        return Problem(where, what, fix)
    if reason in ("too_short", "string_too_short"):
        return Problem(where, "is empty", _give(where, annotation, field))
    if reason == "too_long":
        return Problem(where, f"has {context['actual_length']} items", f"give {context['max_length']}")
    if reason == "literal_error" and given is not None:
        choices = [str(choice) for choice in get_args(bare_type(annotation))]
        close = nearest(str(given), choices)
        fix = f"did you mean {close}?" if close else f"e.g. {choices[0]}"
        return Problem(where, f"{shown(given)} is none of {', '.join(choices)}", fix)
    if reason == "finite_number" or (isinstance(given, float) and not math.isfinite(given)):
        return Problem(where, f"{given} is not a finite number", _example(annotation, field))
    if reason in LIMITS:
        name, words = LIMITS[reason]
        limit = context[name]
        number = f"{limit:g}" if isinstance(limit, float) else limit
        return Problem(where, f"{shown(given)} is out of range", f"use a value {words} {number}")
    return Problem(where, f"{_wanted(annotation)} is wanted, not {shown(given)}", _retype(annotation, field, given))


def _dotted(section: str, location: Iterable[Any]) -> str:
    return section + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)


def _at(model: type[BaseModel], location: Sequence[Any]) -> tuple[Any, FieldInfo | None]:
    """The type at a place of a section, and its field where it is one."""
    annotation: Any = model
    field = None
    for part in location:
        annotation, field = bare_type(annotation), None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif isinstance(part, int):
            annotation = next(iter(get_args(annotation)), None)
    return annotation, field


def bare_type(annotation: Any) -> Any:
    """A type without `| None` and without its constraints."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    return annotation


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    found = bare_type(_at(model, location)[0])
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []


def _wanted(annotation: Any) -> str:
    """A type in plain words."""
    bare = bare_type(annotation)
    if get_origin(bare) is tuple:
        return "a list"
    if get_origin(bare) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(bare))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(bare, "a section with keys")


def _example(annotation: Any, field: FieldInfo | None) -> str:
    """A value that would do: the schema's example, or the default."""
    if field is not None and field.examples:
        return f"e.g. {shown(field.examples[0], whole=True)}"
    if field is None or field.is_required() or field.default in (None, ()):
        return f"give {_wanted(annotation)}"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"e.g. {shown(value, whole=True)}"


def _give(where: str, annotation: Any, field: FieldInfo | None, or_preset: bool = False) -> str:
    """An example as it would stand in the file."""
    if field is None or not field.examples:
        return f"give {_wanted(annotation)}"
    text = f"e.g. {where.rpartition('.')[2]}: {shown(field.examples[0], whole=True)}"
    return text + (", or name a preset in model.preset" if or_preset else "")


def _retype(annotation: Any, field: FieldInfo | None, given: Any) -> str:
    """How to write a value of the wrong type."""
    bare = bare_type(annotation)
    if given is None and field is not None and not field.is_required():
        return f"{_example(annotation, field)}, or leave the key out"
    if bare is bool:
        return "write true or false"
    if bare in (int, float) and isinstance(given, str):
        text = given.strip()
        number = re.fullmatch(r"[-+]?[0-9_]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?", text)
        return f"write {text} without quotes" if number else _example(annotation, field)
    if bare is int and isinstance(given, float) and not given.is_integer():
        return f"use {math.floor(given)} or {math.ceil(given)}"
    if bare is str and isinstance(given, int | float):
        # YAML reads no, off and the like as false: then what was written is not known any more.
        quoted = "write it in quotes" if isinstance(given, bool) else f'write it in quotes: "{shown(given)}"'
        return quoted + (", or null" if NoneType in get_args(annotation) else "")
    if get_origin(bare) is tuple and given is not None:
        item = bare_type(get_args(bare)[0])
        if isinstance(given, dict):
            return "begin each of its items with a dash"
        return f"write [{_as_section(item, given) or shown(given)}]"
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        section = _as_section(bare, given)
        return f"write {section}" if section else "indent its keys below it"
    return _example(annotation, field)


def _as_section(model: Any, given: Any) -> str | None:
    """{path: data} for the text "data" where a section is wanted whose first key is a path or a preset."""
    if not (isinstance(given, str) and isinstance(model, type) and issubclass(model, BaseModel)):
        return None
    key = next((key for key in ("preset", "path") if key in model.model_fields), None)
    return f"{{{key}: {given}}}" if key else None


def shown(value: Any, whole: bool = False) -> str:
    """A value as a config would write it, shortened. whole: lists and mappings as well."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) and whole:
        return "{" + ", ".join(f"{key}: {shown(inner, whole)}" for key, inner in value.items()) + "}"
    if isinstance(value, list) and whole:
        return "[" + ", ".join(shown(inner, whole) for inner in value) + "]"
    if value is None or isinstance(value, dict | list):
        return {NoneType: "nothing", dict: "a mapping", list: "a list"}[type(value)]
    text = str(value) if whole else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that is most like `name`, whatever its case; None where none is."""
    names = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name.lower(), names, n=1, cutoff=cutoff)
    return names[found[0]] if found else None


def unknown(where: str, siblings: Sequence[str], name: str) -> Problem:
    """A key that does not exist. siblings: the keys that may stand there."""
    elsewhere = _places()
    meant = SYNONYMS.get(name.lower(), name)
    parent = where.removesuffix(name)
    close = meant if meant in siblings else nearest(name, siblings)
    # tensor_parallel_size means tensor, though its letters are more like those of sequence_parallel.
    part = next((key for key in siblings if name.lower().startswith(f"{key}_")), None)
    if part or (close and close != name):
        fix = f"did you mean {parent}{part or close}?"
    elif meant in elsewhere:
        fix = f"did you mean {' or '.join(elsewhere[meant])}?"
    elif near := nearest(name, elsewhere, 0.75):
        fix = f"did you mean {' or '.join(elsewhere[near])}?"
    else:
        fix = f"there {'are' if len(siblings) > 1 else 'is'} {', '.join(siblings)}"
    return Problem(where, "is not a key of the config", fix)


def _places() -> dict[str, list[str]]:
    """Where each key of a section stands: "interval" -> checkpoint.interval, logging.interval."""
    found: dict[str, list[str]] = {}
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for key in field.annotation.model_fields:
                found.setdefault(key, []).append(f"{section}.{key}")
    return found

"""YAML as people mean it: 1e-3 is a number, 010 is ten, 1:30 and 2026-01-31 are text, and a key stands once.

PyYAML follows YAML 1.1, where 1e-3 is text, 010 is eight, 1:30 is ninety and the second of two equal keys wins.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_DIGITS = list("-+.0123456789")
_NUMBERS = (
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), _DIGITS),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
        ),
        _DIGITS,
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own way)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before merge keys are resolved: what a merge brings may be given again.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either YAML 1.1 or this module's would read as something else."""


for _tag, _pattern, _first in _NUMBERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Between single quotes PyYAML writes exotic line ends as they are, and reads them back as spaces.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)


class Invalid(ValueError):
    """The text is not YAML. place: "line 2, column 1", or None."""

    def __init__(self, reason: str, place: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.place = place


def parse(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        Invalid: it is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else None
        reason = str(error.problem or error.context)
        if "'\\t'" in reason:
            reason = "a tab; YAML is indented with spaces"
        elif reason == "but found another document":
            reason = "a second document begins here"
        raise Invalid(reason, place) from None
    except yaml.YAMLError as error:
        raise Invalid(str(error).splitlines()[0]) from None
    except RecursionError:
        raise Invalid("it is nested too deeply") from None
    except ValueError as error:
        # A tag that its value does not fit: !!int x.
        raise Invalid(str(error).splitlines()[0]) from None


def write(value: Any) -> str:
    """A value as a YAML document that `parse` reads back to the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

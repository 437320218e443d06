"""docs/config.md out of the schema, the presets and the DeepSpeed files: one source, so that the page cannot be wrong.

`make docs` writes it, `tests/unit/test_docs.py` holds it to the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from llmscale.config import deepspeed_keys, messages, shipped
from llmscale.config.load import preset, preset_names
from llmscale.config.schema import DataSource, Model, RopeScaling, RunConfig
from llmscale.config.section import LARGEST, Section
from llmscale.config.slurm import Container

INTRO = """\
# Config reference

A run is a YAML file of sections, given to `llmscale pretrain CONFIG [key=value ...]`. Only `model`, `data` and
`training` are needed. An override names a key with dots and gives its value in YAML: `training.steps=50`,
`optimizer.lr=1e-3`, `parallel.stage_layers=[3,4,4,3]`, `data.train='[{path: a}, {path: b, weight: 2}]'`. It wins over
the file, the file over the preset, the preset over the defaults. A key that does not exist, a value of the wrong type
or out of range, and what cannot be combined ([layouts.md](layouts.md)) are refused before anything starts, all of them
at once. The config as it was resolved is `OUTPUT_DIR/config.yaml`, which is a config itself.

Numbers are read as people write them: `1e-3` is a number, `1e3` may stand where a whole number is wanted, `010` is ten.
A number in quotes is text and refused; so is a key that is given twice.

This page is made from the code; `make docs` writes it.
"""
DEEPSPEED_INTRO = """\
## DeepSpeed files

`deepspeed` names a JSON file: beside the config, in the working folder, or one of these.

{files}

Your own file may say `"auto"` wherever the run's config decides, as with other programs, or leave the key out. Where
it says something else it must agree; if it does not, the error names both values.

{follows}

What llmscale's engine needs is set for every file; another value is refused.

{fixed}

These are refused, for their place is elsewhere:

{refused}

The rest of `zero_optimization` (bucket sizes, `overlap_comm` under stages 2 and 3, the `stage3_*` limits) goes to
DeepSpeed as it is, and so do
{passed}.
Any other key is refused, with the nearest one that there is. What else cannot be combined: [layouts.md](layouts.md).
"""


def markdown(parameters: Callable[[Model], int]) -> str:
    """The whole page. parameters: how many a model has."""
    parts = [INTRO]
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            needed = " Needed." if field.is_required() else ""
            parts += [f"## {name}", f"{field.annotation.__doc__}{needed}", _section(field.annotation)]
            if name == "data":
                parts += ["Each source of `data.train` and `data.validation`:", _section(DataSource)]
            elif name == "model":
                parts += [f"`model.rope_scaling`: {RopeScaling.__doc__}", _section(RopeScaling)]
            elif name == "slurm":
                parts += [f"`slurm.container`: {Container.__doc__}", _section(Container)]
    parts += ["## Presets", _presets(parameters), _deepspeed()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _section(section: type[Section]) -> str:
    rows = [
        (f"`{key}`", _type(field.annotation), _default(field), _range(field), field.description or "")
        for key, field in section.model_fields.items()
    ]
    return _table(("key", "type", "default", "range", "meaning"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _type(annotation: Any) -> str:
    bare = messages.bare_type(annotation)
    if get_origin(bare) is Literal:
        words = ", ".join(f"`{choice}`" for choice in get_args(bare))
    elif get_origin(bare) is tuple:
        item = messages.bare_type(get_args(bare)[0])
        words = "list of " + {int: "whole numbers", float: "numbers", str: "texts"}.get(item, "sources")
    elif get_origin(bare) is dict:
        words = "texts by name"
    else:
        words = {
            bool: "true or false",
            int: "whole number",
            float: "number",
            RopeScaling: "section",
            Container: "section",
        }.get(bare, "text")
    return words + (" or null" if NoneType in get_args(annotation) else "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    value = list(value) if isinstance(value, tuple) else value
    return "null" if value is None else f"`{messages.shown(value, whole=True)}`"


def _range(field: FieldInfo) -> str:
    metadata, each = list(field.metadata), ""
    bare = messages.bare_type(field.annotation)
    if get_origin(bare) is tuple:
        parts = [part for part in get_args(get_args(bare)[0]) if isinstance(part, FieldInfo)]
        metadata, each = [limit for part in parts for limit in part.metadata], "each "
    limits = {type(limit).__name__: limit for limit in metadata}
    signs = (("Ge", "ge", "≥"), ("Gt", "gt", ">"), ("Le", "le", "≤"), ("Lt", "lt", "<"))
    found = [
        f"{sign} {_number(getattr(limits[kind], attribute))}"
        for kind, attribute, sign in signs
        if kind in limits and getattr(limits[kind], attribute) != LARGEST
    ]
    return each + ", ".join(found) if found else ""


def _number(limit: float) -> str:
    return "2^63" if limit == 2**63 else f"{limit:g}"


def _presets(parameters: Callable[[Model], int]) -> str:
    models = {name: Model.model_validate(preset(name)) for name in preset_names()}
    counts = {name: parameters(model) if model.vocab_size else 0 for name, model in models.items()}
    rows = []
    for name, model in sorted(models.items(), key=lambda item: (item[1].family, counts[item[0]])):
        sizes = (model.num_layers, model.hidden_size, model.num_attention_heads, model.query_groups)
        count = _count(counts[name]) if counts[name] else "by the tokenizer"
        rows.append((f"`{name}`", model.family, *map(str, sizes), str(model.max_position_embeddings), count))
    head = ("preset", "family", "layers", "hidden", "heads", "key/value heads", "positions", "parameters")
    return _table(head, rows)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _deepspeed() -> str:
    files = []
    for path in sorted(shipped.folder("ds_configs").glob("*.json")):
        zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        cut = ["nothing", "optimizer state", "optimizer state, gradients", "optimizer state, gradients, weights"]
        offload = "optimizer state and its step" if "offload_optimizer" in zero else ""
        files.append((f"`{path.name}`", str(zero["stage"]), cut[zero["stage"]], offload))
    follows = [(f"`{'.'.join(rule.path)}`", f"`{rule.key}`") for rule in deepspeed_keys.FOLLOWS]
    follows.append(("`optimizer.type`", "`optimizer.name`"))
    fixed = [(f"`{'.'.join(rule.path)}`", f"`{json.dumps(rule.value)}`", rule.reason) for rule in deepspeed_keys.FIXED]
    refused = [(f"`{key}`", reason) for key, reason in deepspeed_keys.REFUSED.items()]
    return DEEPSPEED_INTRO.format(
        files=_table(("file", "ZeRO stage", "cut over the data-parallel ranks", "in the CPU's memory"), files),
        follows=_table(("key of the file", "follows from"), follows),
        fixed=_table(("key of the file", "must be", "because"), fixed),
        refused=_table(("key of the file", "instead"), refused),
        passed=", ".join(f"`{key}`" for key in deepspeed_keys.PASSED),
    )

"""Weights between the two formats, by the rules of a family (`models/hugging_face.py`), whole tensor by whole tensor.

Here the rows of query, key and value are interleaved by query group, [q … q, k, v] for each, so that tensor parallelism
cuts between groups; there they stand apart, or one below the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llmscale.config.schema import Model
from llmscale.models.family import Family, Weight
from llmscale.models.hugging_face import Rule

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One weight here, and the tensors there: names and shapes."""

    weight: Weight
    rule: Rule
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]


def pairs(family: Family, model: Model, vocab_size: int) -> Iterator[Pair]:
    """All weights of a model with what they are there, in the model's order."""
    rules = {rule.here: rule for rule in family.hugging_face.rules}
    for weight in family.parameters(model, vocab_size):
        generic = weight.name
        if weight.layer is not None:
            generic = generic.replace(f"layers.{weight.layer}.", "layers.{layer}.", 1)
        rule = rules[generic]
        names = tuple(name.format(layer=weight.layer) for name in rule.there)
        yield Pair(weight, rule, names, _shapes(weight, rule, model))


def _shapes(weight: Weight, rule: Rule, model: Model) -> tuple[Shape, ...]:
    rows, *rest = weight.shape
    if rule.form == "qkv":
        heads, groups = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
        found: list[Shape] = [(size, *rest) for size in (heads, groups, groups)]
    elif rule.form == "gate_up":
        found = [(rows // 2, *rest)] * 2
    else:
        found = [weight.shape]
    return tuple(shape[::-1] if rule.transposed else shape for shape in found)


def to_theirs(tensor: torch.Tensor, rule: Rule, model: Model) -> list[torch.Tensor]:
    """What a whole weight here is there."""
    if rule.form == "qkv":
        found = _apart(tensor, model)
    elif rule.form == "stacked_qkv":
        found = [torch.cat(_apart(tensor, model))]
    elif rule.form == "gate_up":
        found = list(tensor.chunk(2))
    else:
        found = [tensor]
    return [part.t() for part in found] if rule.transposed else found


def to_ours(tensors: Sequence[torch.Tensor], rule: Rule, model: Model) -> torch.Tensor:
    """The whole weight here that these tensors are there."""
    found = [part.t() for part in tensors] if rule.transposed else list(tensors)
    if rule.form == "qkv":
        return _together(found, model)
    if rule.form == "stacked_qkv":
        heads, groups = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
        return _together(list(found[0].split([heads, groups, groups])), model)
    return torch.cat(found) if rule.form == "gate_up" else found[0]


def _apart(tensor: torch.Tensor, model: Model) -> list[torch.Tensor]:
    """Query, key and value, [heads × head_dim, ...] and twice [groups × head_dim, ...]."""
    per_group = model.num_attention_heads // model.query_groups
    rest = tensor.shape[1:]
    grouped = tensor.reshape(model.query_groups, per_group + 2, model.head_size, *rest)
    parts = grouped.split([per_group, 1, 1], 1)
    return [part.reshape(-1, *rest) for part in parts]


def _together(parts: Sequence[torch.Tensor], model: Model) -> torch.Tensor:
    """The reverse of `_apart`."""
    rest = parts[0].shape[1:]
    grouped = [part.reshape(model.query_groups, -1, model.head_size, *rest) for part in parts]
    return torch.cat(grouped, 1).reshape(-1, *rest)

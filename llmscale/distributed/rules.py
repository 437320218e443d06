"""The table of what can be combined. No torch.

A rule is a row of RULES: the key it is about, what is wrong when it is broken, and the nearest right value. Errors
quote the table, `docs/layouts.md` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmscale.config.derive import stage_layers
from llmscale.config.schema import Data, Model, Parallel, Training
from llmscale.errors import Problem
from llmscale.models.family import Family, families


@dataclass(frozen=True)
class Facts:
    """What the rules look at. None: a family that there is not, a world size that is not known yet (a login node)."""

    model: Model
    data: Data
    parallel: Parallel
    training: Training
    family: Family | None
    zero_stage: int
    world_size: int | None

    @property
    def model_parallel(self) -> int:
        return self.parallel.tensor * self.parallel.pipeline

    @property
    def stages(self) -> int:
        return self.parallel.pipeline * self.parallel.virtual_pipeline

    @property
    def data_parallel(self) -> int | None:
        if self.world_size is None or self.world_size % self.model_parallel:
            return None
        return self.world_size // self.model_parallel

    @property
    def ffn(self) -> int | None:
        return self.family.ffn_hidden_size(self.model) if self.family else None


@dataclass(frozen=True)
class Rule:
    """One row: broken says whether the facts break it; reason and fix are filled in from the facts."""

    key: str
    requires: str
    """The rule in words, for the docs."""
    broken: Callable[[Facts], bool]
    reason: Callable[[Facts], str]
    fix: Callable[[Facts], str]


def _divisors(number: int) -> set[int]:
    low = {divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0}
    return low | {number // divisor for divisor in low}


def _nearest(values: Iterable[int], wanted: int) -> str:
    """The values on both sides of what was asked for: "2 or 4"."""
    ordered = sorted(set(values))
    below = [value for value in ordered if value <= wanted][-1:]
    above = [value for value in ordered if value > wanted][:1]
    return " or ".join(str(value) for value in below + above)


def _nearest_multiple(of: int, wanted: int, limit: int | None = None) -> str:
    multiples = {wanted // of * of or of, (wanted // of + 1) * of}
    return _nearest({multiple for multiple in multiples if limit is None or multiple <= limit}, wanted)


def _legal_tensor(f: Facts) -> str:
    """The tensor-parallel sizes that cut the model evenly and, where there are such, fill the ranks."""
    sizes = {
        size
        for size in _divisors(f.model.num_attention_heads)
        if not _groups_do_not_fit(f.model.query_groups, size) and _qkv_width(f) % size == 0
    }
    if f.ffn is not None:
        sizes &= _divisors(f.ffn)
    if f.world_size is not None:
        filling = {size for size in sizes if f.world_size % (size * f.parallel.pipeline) == 0}
        sizes = filling or sizes
    return f"use {_nearest(sizes, f.parallel.tensor)}"


def _groups_do_not_fit(groups: int, tensor: int) -> bool:
    """Whether ranks would hold neither whole key/value heads nor equal parts of the queries of one."""
    return groups % tensor > 0 and tensor % groups > 0


def _qkv_width(f: Facts) -> int:
    """Rows of the query, key and value projection."""
    return (f.model.num_attention_heads + 2 * f.model.query_groups) * f.model.head_size


def _rotary(f: Facts) -> bool | None:
    """Whether the family has rotary positions; None where there is no such family."""
    return None if f.family is None else f.family.positions == "rope"


def _turns_too_little(f: Facts) -> bool:
    """Whether a part of each head is to turn, and it is no pair, or the family turns none."""
    if f.family is None or f.model.rotary_fraction == 1:
        return False
    return not _rotary(f) or int(f.model.head_size * f.model.rotary_fraction) < 2 <= f.model.head_size


def _example_stages(f: Facts) -> str:
    """One number a stage: as many as a line can show."""
    if f.stages > 64:
        return f"give {f.stages} numbers that add up to {f.model.num_layers}"
    return f"use e.g. {list(stage_layers(f.model.num_layers, f.stages))}"


def _micro_batches(f: Facts) -> int | None:
    per_pass = f.training.micro_batch_size * (f.data_parallel or 0)
    if not per_pass or f.training.global_batch_size % per_pass:
        return None
    return f.training.global_batch_size // per_pass


RULES: tuple[Rule, ...] = (
    Rule(
        "model.num_attention_heads",
        "divides hidden_size, where head_dim is null",
        lambda f: f.model.head_dim is None and f.model.hidden_size % f.model.num_attention_heads > 0,
        lambda f: f"{f.model.num_attention_heads} heads do not divide hidden_size {f.model.hidden_size}",
        lambda f: f"use {_nearest(_divisors(f.model.hidden_size), f.model.num_attention_heads)}, or set model.head_dim",
    ),
    Rule(
        "model.num_query_groups",
        "divides num_attention_heads",
        lambda f: f.model.num_attention_heads % f.model.query_groups > 0,
        lambda f: f"{f.model.query_groups} groups do not divide {f.model.num_attention_heads} heads",
        lambda f: f"use {_nearest(_divisors(f.model.num_attention_heads), f.model.query_groups)}",
    ),
    Rule(
        "model.head_dim",
        "is even with rotary positions, which turn pairs of numbers",
        lambda f: (
            _rotary(f) is True
            and (f.model.head_dim is not None or f.model.hidden_size % f.model.num_attention_heads == 0)
            and f.model.head_size % 2 > 0
        ),
        lambda f: f"rotary positions turn pairs: a head of {f.model.head_size} is odd",
        lambda f: f"use {_nearest_multiple(2, f.model.head_size)}",
    ),
    Rule(
        "model.rotary_fraction",
        "leaves a pair of numbers of each head to turn, and is 1 without rotary positions",
        _turns_too_little,
        lambda f: (
            f"{f.model.rotary_fraction} of a head of {f.model.head_size} is less than a pair"
            if _rotary(f)
            else f"{f.model.family} has no rotary positions"
        ),
        lambda f: f"use at least {2 / f.model.head_size:g}" if _rotary(f) else "use 1",
    ),
    Rule(
        "model.rope_scaling",
        "is null without rotary positions",
        lambda f: _rotary(f) is False and f.model.rope_scaling is not None,
        lambda f: f"{f.model.family} has no rotary positions",
        lambda f: "use null",
    ),
    Rule(
        "data.sequence_length",
        "is at most model.max_position_embeddings",
        lambda f: f.data.sequence_length > f.model.max_position_embeddings,
        lambda f: (
            f"{f.data.sequence_length} is longer than model.max_position_embeddings {f.model.max_position_embeddings}"
        ),
        lambda f: f"use at most {f.model.max_position_embeddings}, or raise model.max_position_embeddings",
    ),
    Rule(
        "parallel.context",
        "is 1: context parallelism is not built yet",
        lambda f: f.parallel.context > 1,
        lambda f: "context parallelism is not built yet",
        lambda f: "use 1",
    ),
    Rule(
        "parallel.expert",
        "is 1: there are no mixture-of-experts families yet",
        lambda f: f.parallel.expert > 1,
        lambda f: "there are no mixture-of-experts families yet",
        lambda f: "use 1",
    ),
    Rule(
        "parallel.tensor",
        "divides num_attention_heads: a head is not cut",
        lambda f: f.model.num_attention_heads % f.parallel.tensor > 0,
        lambda f: f"{f.model.num_attention_heads} attention heads cannot be shared by {f.parallel.tensor} ranks",
        _legal_tensor,
    ),
    Rule(
        "parallel.tensor",
        "divides num_query_groups, or is a multiple of it: ranks then share a key/value head",
        lambda f: (
            f.model.num_attention_heads % f.parallel.tensor == 0
            and _groups_do_not_fit(f.model.query_groups, f.parallel.tensor)
        ),
        lambda f: f"{f.model.query_groups} query groups cannot be shared by {f.parallel.tensor} ranks",
        _legal_tensor,
    ),
    Rule(
        "parallel.tensor",
        "divides (num_attention_heads + 2 × num_query_groups) × head_dim, the rows of the query, key and value matrix",
        lambda f: (
            f.model.num_attention_heads % f.parallel.tensor == 0
            and not _groups_do_not_fit(f.model.query_groups, f.parallel.tensor)
            and _qkv_width(f) % f.parallel.tensor > 0
        ),
        lambda f: f"{_qkv_width(f)} rows of query, key and value cannot be shared by {f.parallel.tensor} ranks",
        _legal_tensor,
    ),
    Rule(
        "parallel.tensor",
        "divides ffn_hidden_size",
        lambda f: (f.ffn or 0) % f.parallel.tensor > 0,
        lambda f: f"ffn_hidden_size {f.ffn} cannot be shared by {f.parallel.tensor} ranks",
        _legal_tensor,
    ),
    Rule(
        "parallel.tensor",
        "times parallel.pipeline divides the number of ranks; data parallelism is what is left",
        lambda f: f.world_size is not None and f.world_size % f.model_parallel > 0,
        lambda f: (
            f"tensor {f.parallel.tensor} × pipeline {f.parallel.pipeline} = {f.model_parallel} "
            f"does not divide {f.world_size} rank(s)"
        ),
        lambda f: (
            f"start a multiple of {f.model_parallel} ranks ({_nearest_multiple(f.model_parallel, f.world_size or 1)}), "
            f"or use a product of {_nearest(_divisors(f.world_size or 1), f.model_parallel)}"
        ),
    ),
    Rule(
        "parallel.sequence_parallel",
        "needs parallel.tensor above 1: it cuts the sequence over the tensor-parallel group",
        lambda f: f.parallel.sequence_parallel and f.parallel.tensor == 1,
        lambda f: "it cuts the sequence over the tensor-parallel group, which has one rank",
        lambda f: "use false, or set parallel.tensor to 2 or more",
    ),
    Rule(
        "data.sequence_length",
        "is a multiple of parallel.tensor under sequence parallelism",
        lambda f: f.parallel.sequence_parallel and f.data.sequence_length % f.parallel.tensor > 0,
        lambda f: (
            f"sequence parallelism cannot cut {f.data.sequence_length} tokens into {f.parallel.tensor} equal parts"
        ),
        lambda f: (
            "use "
            + (
                _nearest_multiple(f.parallel.tensor, f.data.sequence_length, f.model.max_position_embeddings)
                or f"{f.parallel.tensor}, and raise model.max_position_embeddings"
            )
        ),
    ),
    Rule(
        "parallel.virtual_pipeline",
        "needs parallel.pipeline above 1: it interleaves the stages of a pipeline",
        lambda f: f.parallel.virtual_pipeline > 1 and f.parallel.pipeline == 1,
        lambda f: "it interleaves the stages of a pipeline, and there is one stage",
        lambda f: "use 1, or set parallel.pipeline to 2 or more",
    ),
    Rule(
        "parallel.pipeline",
        "times parallel.virtual_pipeline is at most num_layers: a stage holds a layer (stage_layers may say otherwise)",
        lambda f: f.parallel.stage_layers is None and f.model.num_layers < f.stages,
        lambda f: (
            f"{f.model.num_layers} layers do not fill {f.stages} stages "
            f"(pipeline {f.parallel.pipeline} × virtual_pipeline {f.parallel.virtual_pipeline})"
        ),
        lambda f: f"use at most {f.model.num_layers} stages, or at least {f.stages} layers",
    ),
    Rule(
        "parallel.stage_layers",
        "has one number for each of the pipeline × virtual_pipeline stages",
        lambda f: f.parallel.stage_layers is not None and len(f.parallel.stage_layers) != f.stages,
        lambda f: f"{len(f.parallel.stage_layers or ())} numbers for {f.stages} stages",
        _example_stages,
    ),
    Rule(
        "parallel.stage_layers",
        "adds up to num_layers",
        lambda f: (
            f.parallel.stage_layers is not None
            and len(f.parallel.stage_layers) == f.stages
            and sum(f.parallel.stage_layers) != f.model.num_layers
        ),
        lambda f: f"they add up to {sum(f.parallel.stage_layers or ())}, model.num_layers is {f.model.num_layers}",
        _example_stages,
    ),
    Rule(
        "training.global_batch_size",
        "is a multiple of micro_batch_size × data-parallel size",
        lambda f: (
            f.data_parallel is not None
            and f.training.global_batch_size % (f.training.micro_batch_size * f.data_parallel) > 0
        ),
        lambda f: (
            f"{f.training.global_batch_size} is not a multiple of micro_batch_size {f.training.micro_batch_size} "
            f"× {f.data_parallel} data-parallel rank(s)"
        ),
        lambda f: (
            "use "
            + _nearest_multiple(f.training.micro_batch_size * (f.data_parallel or 1), f.training.global_batch_size)
        ),
    ),
    Rule(
        "training.global_batch_size",
        "gives every data-parallel rank a multiple of parallel.pipeline micro-batches, with virtual_pipeline above 1",
        lambda f: f.parallel.virtual_pipeline > 1 and (_micro_batches(f) or 0) % f.parallel.pipeline > 0,
        lambda f: (
            f"the interleaved schedule takes micro-batches in rounds of {f.parallel.pipeline} (the stages), "
            f"and there are {_micro_batches(f)}"
        ),
        lambda f: (
            "use "
            + _nearest_multiple(
                f.training.micro_batch_size * (f.data_parallel or 1) * f.parallel.pipeline, f.training.global_batch_size
            )
        ),
    ),
)


def problems(
    model: Model, data: Data, parallel: Parallel, training: Training, zero_stage: int, world_size: int | None
) -> list[Problem]:
    """All rules that are broken. world_size None leaves out the rules that need it."""
    family = families().get(model.family)
    facts = Facts(model, data, parallel, training, family, zero_stage, world_size)
    found = [Problem(rule.key, rule.reason(facts), rule.fix(facts)) for rule in RULES if rule.broken(facts)]
    if family is None:
        known = ", ".join(sorted(families()))
        found.append(Problem("model.family", f"there is no family {model.family!r}", f"use one of {known}"))
    return found


def table() -> str:
    """The rules as a Markdown table."""
    rows = [f"| `{rule.key}` | {rule.requires} |" for rule in RULES]
    return "\n".join(["| key | what must hold: it |", "|---|---|", *rows]) + "\n"

"""The state of a run in memory, as a checkpoint's fragments, and back.

Weights and optimizer state are copied to and from where DeepSpeed keeps them; random state belongs to a rank, and is
restored where the layout is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from llmscale.checkpoint.format import WEIGHT, Checkpoint, Fragment
from llmscale.config.schema import Model, RunConfig
from llmscale.errors import CheckpointError, LlmscaleError
from llmscale.models.family import families
from llmscale.models.stage import EMBEDDING
from llmscale.training.engine import Engine
from llmscale.training.optimizer import STATES
from llmscale.training.zero import Owned

ANEW = "give the run another output_dir, or set checkpoint.resume to never"


def fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank saves: what it owns, less the copies that another rank saves."""
    groups = engine.groups
    layout, position = groups.layout, groups.position
    if layout.zero_stage == 0 and position.data > 0:
        return
    for part, owned in _parts(engine):
        weight = part.weight
        copied = weight.cut == "replicated" and position.tensor > 0
        tied_copy = weight.name == EMBEDDING and position.pipeline > 0
        if not copied and not tied_copy:
            yield Fragment(
                weight,
                part.tensor_rank,
                part.tensor_size,
                part.start,
                {WEIGHT: owned.master, **engine.zero.state(owned)},
            )


def _parts(engine: Engine) -> Iterator[tuple[Fragment, Owned]]:
    groups = engine.groups
    weights = {id(parameter): weight for stage in engine.stages for weight, parameter in stage.weights()}
    for owned in engine.zero.owned():
        weight = weights[id(owned.parameter)]
        yield Fragment(weight, groups.position.tensor, groups.layout.tensor, owned.start, {WEIGHT: owned.master}), owned


@torch.no_grad()
def restore(engine: Engine, checkpoint: Checkpoint, config: RunConfig) -> None:
    """Load weights and optimizer state, from a checkpoint of any layout.

    Raises:
        CheckpointError: it is of another model, or of another optimizer; names the keys.
    """
    _check_computation(checkpoint, config.model, "resume", f"set it so, {ANEW}")
    states = [state for state in checkpoint.states if state != WEIGHT]
    kept = STATES[config.optimizer.name]
    if states and set(states) != set(kept):
        raise CheckpointError(
            f"checkpoint.resume: {checkpoint.path} holds {' and '.join(states)} of its optimizer, and optimizer.name: "
            f"{config.optimizer.name} keeps {' and '.join(kept)}; set the one it was saved with, or begin "
            "a new run with its weights by checkpoint.start_from"
        )
    if states:
        engine.zero.make_state(states, checkpoint.step)
    _load(engine, checkpoint, checkpoint.states, ANEW)


@torch.no_grad()
def start_from(engine: Engine, checkpoint: Checkpoint, model: Model) -> None:
    """Load weights alone, for a new run of the model `model`.

    Raises:
        CheckpointError: it is of another model; names the keys.
    """
    _check_computation(checkpoint, model, "start_from", "set it so, or name its model.yaml as model.preset")
    _load(engine, checkpoint, (WEIGHT,), "name its model.yaml as model.preset")


def _check_computation(checkpoint: Checkpoint, model: Model, key: str, fix: str) -> None:
    ours, theirs = _computation(model), _computation(checkpoint.model)
    if changed := [
        f"model.{name} is {ours[name]}, and was {theirs[name]}" for name in ours if ours[name] != theirs[name]
    ]:
        raise CheckpointError(
            f"checkpoint.{key}: {checkpoint.path} is of another model: {'; '.join(changed[:3])}; {fix}"
        )


def _computation(model: Model) -> dict[str, Any]:
    """The keys that say what a model computes; a table of positions must fit by its shape."""
    settled = families()[model.family].settled(model)
    return settled.model_dump(exclude={"preset", "dropout", "init_std", "max_position_embeddings"})


def _check_weights(engine: Engine, checkpoint: Checkpoint, fix: str) -> None:
    if others := sorted(set(checkpoint.index) ^ set(checkpoint.weights)):
        raise CheckpointError(
            f"{checkpoint.path}: its weights are not those of its model: {', '.join(others[:3])}; {fix}"
        )
    expected = {weight.name: weight for stage in engine.stages for weight, _ in stage.weights()}
    for name, weight in expected.items():
        saved = checkpoint.weights.get(name)
        if saved is None or saved.shape != weight.shape:
            found = "is not in it" if saved is None else f"has the shape {list(saved.shape)} in it"
            raise CheckpointError(
                f"{checkpoint.path}: of another model: {name} {found}, and is {list(weight.shape)} here; {fix}"
            )


def _load(engine: Engine, checkpoint: Checkpoint, states: Sequence[str], fix: str) -> None:
    def read() -> None:
        _check_weights(engine, checkpoint, fix)
        for part, owned in _parts(engine):
            targets = {WEIGHT: owned.master, **engine.zero.state(owned)}
            for state in states:
                values = checkpoint.read(
                    part.weight.name, state, part.tensor_rank, part.tensor_size, part.start, owned.numel
                )
                targets[state].copy_(values)

    on_all_ranks(read)
    engine.zero.publish_masters()


def on_all_ranks(read: Callable[[], object]) -> None:
    """What is wrong on one rank is raised on all: they go on together, or not at all."""
    problem: LlmscaleError | None = None
    try:
        read()
    except LlmscaleError as error:
        problem = error
    problems: list[LlmscaleError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise found


def random_state() -> dict[str, torch.Tensor]:
    """This rank's random state: torch's generator, the GPU's, and Megatron's tracked ones (dropout)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, value in get_cuda_rng_tracker().get_states().items():
        state[f"tracker.{name}"] = value
    return state


def restore_random_state(checkpoint: Checkpoint, rank: int) -> bool:
    """Put this rank's random state back as it was saved; False where it is of another kind of device or generator."""
    saved: dict[str, torch.Tensor] = {}
    on_all_ranks(lambda: saved.update(checkpoint.random_state(f"rank_{rank:05d}.safetensors")))
    if _kinds(saved) != _kinds(random_state()):
        return False
    torch.set_rng_state(saved["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: saved[f"tracker.{name}"] for name in tracker.get_states()})
    return True


def _kinds(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}

"""Putting a run together: the one place that knows all the parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from llmscale.checkpoint.format import Checkpoint
from llmscale.checkpoint.place import place_of
from llmscale.checkpoint.retention import open_checkpoint, prune
from llmscale.checkpoint.save import Saved, Saver
from llmscale.config.deepspeed import DeepSpeedConfig, resolve
from llmscale.config.load import dump
from llmscale.config.schema import DataSource, RunConfig
from llmscale.data.durable import write_whole
from llmscale.data.loader import Loader
from llmscale.data.parts import expanded, is_pattern
from llmscale.data.stream import Reading, Stream
from llmscale.data.tokenizer import tokenizer_json
from llmscale.distributed import cpu, stop
from llmscale.distributed.groups import Groups, form_groups
from llmscale.distributed.launch import Launch, device_of, leave, start
from llmscale.distributed.layout import Layout
from llmscale.errors import CheckpointError, ConfigError, Problem, TrainingError
from llmscale.models.family import Family, families
from llmscale.models.stage import build_stages
from llmscale.training import report, state
from llmscale.training.batches import Batch, Checked, compared
from llmscale.training.engine import Engine, quiet_deepspeed
from llmscale.training.fence import Fence
from llmscale.training.learning_rate import learning_rate
from llmscale.training.loop import Events, StepResult, StepTimes, train
from llmscale.training.metrics import Recorder
from llmscale.training.optimizer import build_optimizer, moments
from llmscale.training.resume import agreed, layout_changes, load_newest, set_others_aside, what_changed
from llmscale.training.sinks.wandb import check_available
from llmscale.versions import versions

logger = logging.getLogger(__name__)
SKIPPED = "skipped.jsonl"
PREFETCH = 2
"""Batches read ahead of the step that needs them."""


@dataclass(frozen=True)
class Run:
    """What is settled before the first process group: the same on every rank."""

    config: RunConfig
    layout: Layout
    family: Family
    deepspeed: DeepSpeedConfig
    train: Stream
    validation: Stream | None


def prepare(config: RunConfig, path: Path, world_size: int, readers: int = 1) -> Run:
    """Settle what the config leaves open, and open the data.

    path: the config's file, which errors name. readers: processes of this node, which share a cache of remote data.

    Raises:
        ConfigError: the data's vocabulary does not fit the model.
        DataError: the data is missing or broken.
    """
    check_available(config)
    deepspeed = resolve(config, path.parent)
    stream = _open(config, "train", path, readers)
    validation = None
    if config.data.validation and config.training.validation_interval:
        validation = _open(config, "validation", path, readers)
    vocab_size = config.model.vocab_size
    for part in (stream, validation):
        if part is not None and vocab_size is not None and part.vocab_size > vocab_size:
            reason = f"{vocab_size} is smaller than the data's vocabulary, {part.vocab_size}"
            raise ConfigError(
                str(path), [Problem("model.vocab_size", reason, f"use at least {part.vocab_size}, or null")]
            )
    model = config.model.model_copy(update={"vocab_size": vocab_size or stream.vocab_size})
    config = config.model_copy(update={"model": model})
    layout = Layout.of(config, world_size, deepspeed.stage)
    return Run(config, layout, families()[model.family], deepspeed, stream, validation)


def _open(config: RunConfig, key: Literal["train", "validation"], path: Path, readers: int) -> Stream:
    """The stream of the sources under data.<key>."""
    sources: tuple[DataSource, ...] = getattr(config.data, key)
    data = config.data
    reading = Reading(
        shuffle_window=data.shuffle_window,
        verify=data.verify,
        on_error=data.on_error,
        max_skipped=data.max_skipped,
        report=Path(config.run.output_dir) / SKIPPED,
        cache=Path(data.cache) if data.cache else None,
        cache_bytes=int(data.cache_gib * 2**30),
        readers=readers,
        workers=data.workers,
    )
    parts = [
        (number, *part)
        for number, source in enumerate(sources)
        for part in (
            expanded(source.path, source.weight) if is_pattern(source.path) else [(source.path, source.weight)]
        )
    ]
    stream = Stream([(path, weight) for _, path, weight in parts], data.sequence_length, config.run.seed, reading)
    problems = [
        Problem(
            f"data.{key}[{number}].format", f"is {sources[number].format}, and {place} holds {found}", f"use {found}"
        )
        for (number, place, _), found in zip(parts, stream.formats, strict=True)
        if sources[number].format not in (None, found)
    ]
    if problems:
        raise ConfigError(str(path), problems)
    return stream


def pretrain(run: Run, launch: Launch) -> Ended:
    """Run (or go on with) a pretraining run on this rank.

    Raises:
        TrainingError: the loss or the gradient is not finite. CheckpointError: saving or resuming failed.
    """
    device = device_of(launch)
    start(launch, device)
    try:
        cpu.redirect()
        quiet_deepspeed()
        with form_groups(run.layout, run.config.run.seed) as groups, ExitStack() as stack:
            return _train(run, launch, device, groups, stack)
    except RuntimeError as error:
        if _peer_is_gone(error):
            lost = TrainingError(
                "another rank ended while this one waited for it; the first message of that rank says why"
            )
            lost.consequence = True
            raise lost from None
        raise
    finally:
        leave()


def _peer_is_gone(error: RuntimeError) -> bool:
    """Whether a collective failed because of the process at its other end: gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _train(run: Run, launch: Launch, device: torch.device, groups: Groups, stack: ExitStack) -> Ended:
    config, output = run.config, Path(run.config.run.output_dir)
    fence = Fence(output, launch)
    fence.claim()
    stages = build_stages(config.model, run.family, config.training, groups, config.run.seed)
    engine = Engine(
        stages,
        groups,
        run.deepspeed.settings,
        lambda parts: build_optimizer(config.optimizer, parts, device, run.deepspeed.offload_optimizer is not None),
        config.optimizer.weight_decay,
        config.training.gradient_clipping,
        fence,
    )
    stack.callback(engine.close)
    folder = place_of(config.checkpoint.folder or output / "checkpoints")
    checkpoint, loaded = load_newest(
        config.checkpoint.resume, folder, lambda found: _resume(engine, found, run, launch.rank)
    )
    seen = loaded or Seen()
    beginning = None
    if checkpoint is None and config.checkpoint.start_from:
        beginning = agreed(partial(open_checkpoint, config.checkpoint.start_from))
    if beginning is not None:
        state.start_from(engine, beginning, config.model)
    described = _described(run.layout)
    lines = report.start_report(
        config, run.family, engine, launch, device, run.deepspeed.offload, moments(config.optimizer)
    )
    recorder = stack.enter_context(Recorder(config, run.family, lines, device, output, seen.steps, seen.tokens, launch))
    if launch.rank == 0:
        dump(config, output / "config.yaml")
        # Beside the checkpoints, so that they can be used where the data is not.
        own = config.data.tokenizer
        write_whole(output / "tokenizer.json", tokenizer_json(Path(own)) if own else run.train.read_tokenizer())
    if beginning is not None:
        recorder.note(f"begins with the weights of {beginning.path}")
    if checkpoint is not None:
        for note in what_changed(checkpoint, described, config, seen.random):
            recorder.note(note)
        for note in seen.notes:
            recorder.note(f"data: {note}")

    def loader(stream: Stream, position: int, batches: int) -> Loader[Checked]:
        end = stream.end_of_document if config.data.mask_documents else None
        return Loader(
            stream,
            config.training.global_batch_size,
            rank=groups.position.data,
            world_size=run.layout.data,
            position=position,
            batches=batches,
            prefetch=PREFETCH,
            collate=lambda rows: Checked.of(rows, config.training.micro_batch_size, device, end),
        )

    for path in set_others_aside(folder, checkpoint) if config.checkpoint.interval else ():
        recorder.note(f"set aside, as this run has not come from it; remove it when it is not wanted: {path}")
    saver = Saver(folder, config.checkpoint.asynchronous, partial(prune, folder, config.checkpoint.keep), fence.check)
    figures: dict[str, float] = {}
    unsaved: str | None = None
    skips = config.data.on_error == "skip"

    def ended(saved: Saved | None) -> None:
        nonlocal unsaved
        if saved is None:
            return
        unsaved = saved.error
        if saved.error is None:
            figures["checkpoint_seconds"] = saved.seconds
            recorder.saved(saved.path)
        elif config.checkpoint.on_error == "continue":
            recorder.note(f"warning: not saved, going on: {saved.error}")
        else:
            raise CheckpointError(saved.error)

    def write(step: int) -> None:
        began = time.monotonic()
        facts = manifest(run, step, seen, _of_all_ranks(run.train, ahead.state(), run.layout), described, versions())
        ended(saver.save(step, list(state.fragments(engine)), state.random_state(), facts))
        figures["checkpoint_pause_seconds"] = time.monotonic() - began
        if not config.checkpoint.asynchronous:
            ended(saver.wait())

    def validation(stream: Stream) -> Iterator[list[Batch]]:
        with loader(stream, 0, config.training.validation_batches) as batches:
            yield from compared(batches, groups.model, device)
        if skips:
            _left_out(stream, 0, run.layout)

    def rate(step: int) -> float:
        return learning_rate(config.schedule, config.optimizer.lr, step, config.training.steps)

    ahead = stack.enter_context(loader(run.train, seen.sequences, config.training.steps - seen.steps))
    for stream in filter(None, (run.train, run.validation)):
        stack.callback(stream.close)  # before the loader: a store that does not answer would hold it up
    if config.training.steps == 0 and config.checkpoint.interval and checkpoint is None:
        write(0)

    def step(number: int, result: StepResult, rate: float, times: StepTimes) -> None:
        position = seen.sequences + (number - seen.steps) * config.training.global_batch_size
        # All ranks wait for the one whose batch comes last.
        times = replace(times, data_seconds=_most_of_ranks(times.data_seconds))
        data = _data_figures(run.train, position)
        if skips:
            data["data_skipped_samples"], data["data_replaced_sequences"] = _left_out(run.train, position, run.layout)
        recorder.step(number, result, rate, times, {**data, **figures})
        figures.clear()

    events = Events(step=step, validation=recorder.validation, save=write, always=lambda: ended(saver.poll()))
    validate = partial(validation, run.validation) if run.validation else None
    last = seen.steps
    # Asked before there was a step to save: the ranks end at once, together.
    early = _most_of_ranks(stop.received() is not None) > 0
    if not early:
        try:
            read = compared(ahead, groups.model, device)
            last = train(engine, read, validate, rate, config, seen.steps, events)
        except TrainingError:  # on all ranks alike: what is being saved is worth its time
            saver.wait()
            raise
        ended(saver.wait())
    if unsaved is not None:
        raise CheckpointError(f"the last save failed, and with it the newest steps are lost: {unsaved}")
    if seconds := figures.get("checkpoint_seconds"):  # no row of metrics follows
        paused = figures.get("checkpoint_pause_seconds", 0.0)
        recorder.note(f"the last save took {seconds:.2f} s, of which training stood still {paused:.2f} s")
    if last < config.training.steps and (early or engine.stopping):
        recorder.note(f"stopped after step {last} of {config.training.steps}: {stop.received() or 'another rank'}")
        return Ended(last, stopped=True)
    return Ended(last, stopped=False)


@dataclass(frozen=True)
class Ended:
    """How a run ended that did not fail. step: the last one done. stopped: it was asked to, with steps left."""

    step: int
    stopped: bool


def _most_of_ranks(value: float) -> float:
    """The largest that any rank gives; called by all of them."""
    found = torch.tensor(float(value), dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


@dataclass(frozen=True)
class Seen:
    """What lies behind a run. notes: how its data is not as it was when that was saved. random: no random state is
    missing that the layout would allow."""

    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    notes: tuple[str, ...] = ()
    random: bool = True


def _resume(engine: Engine, checkpoint: Checkpoint, run: Run, rank: int) -> Seen:
    """Load a checkpoint, and this rank's random state where the layout is the same."""
    saved = checkpoint.manifest
    if saved["data"] is None:
        raise CheckpointError(
            f"checkpoint.resume: {checkpoint.path} holds weights alone; name it in checkpoint.start_from"
        )
    notes = run.train.resume(saved["data"])
    state.restore(engine, checkpoint, run.config)
    random = layout_changes(checkpoint, _described(run.layout)) or state.restore_random_state(checkpoint, rank)
    return Seen(checkpoint.step, saved["data"]["position"], saved["tokens"], tuple(notes), bool(random))


def _described(layout: Layout) -> dict[str, Any]:
    return {**asdict(layout), "data": layout.data}


def _of_all_ranks(stream: Stream, own: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The stream's state: each data-parallel rank knows the sequences that it read."""
    states: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return stream.merge([state for rank, state in enumerate(states) if _first_of_replica(layout, rank)])


def _first_of_replica(layout: Layout, rank: int) -> bool:
    """One rank of those that read the same sequences."""
    position = layout.position(rank)
    return position.tensor == position.pipeline == 0


def _left_out(stream: Stream, position: int, layout: Layout) -> tuple[int, int]:
    """(broken samples, sequences of the first `position` ones that they cost) over all ranks; all of them call it.

    Raises:
        DataError: on all ranks, where together they have left out more than may be.
    """
    own, first = stream.left_out(position), _first_of_replica(layout, dist.get_rank())
    counts = torch.tensor([own.unshared, own.replaced]) * first
    counts = counts.to(torch.cuda.current_device())
    dist.all_reduce(counts)
    unshared, replaced = counts.tolist()
    if unshared:
        _of_all_ranks(stream, stream.state(position), layout)
    return stream.left_out(position).units, own.carried + replaced


def _data_figures(stream: Stream, position: int) -> dict[str, Any]:
    """What the rows of metrics say of the data: passes over each source, and what this rank fetched."""
    own = stream.counters()
    fetched = {name: value for name, value in own.items() if not name.startswith(("skipped_", "replaced_"))}
    row: dict[str, Any] = {"data_epochs": list(stream.epochs(position))}
    if fetched.get("requests"):
        row |= {f"data_{name}": value for name, value in fetched.items()}
    return row


def manifest(
    run: Run, step: int, seen: Seen, data: dict[str, Any], layout: dict[str, Any], versions: dict[str, str]
) -> dict[str, Any]:
    """What a checkpoint says besides its tensors. tokens: seen so far. data: the stream's state."""
    sequences = data["position"] - seen.sequences
    return {
        "tokens": seen.tokens + sequences * run.config.data.sequence_length,
        "data": data,
        "end_of_document": run.train.end_of_document,
        "layout": layout,
        "versions": versions,
        "config": run.config.model_dump(mode="json", exclude={"slurm"}),
    }

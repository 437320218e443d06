"""From a config to a job in the queue: what is checked on a login node, and what is recorded."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmscale.config.load import load, load_slurm
from llmscale.config.schema import RunConfig
from llmscale.config.slurm import seconds_of
from llmscale.distributed.rules import problems
from llmscale.errors import LlmscaleError, Problem, UsageError
from llmscale.slurm.after import newest_step
from llmscale.slurm.commands import SlurmError, call, queue
from llmscale.slurm.records import SCRIPT, SUBMISSION, Submission, new_folder
from llmscale.slurm.render import Job, job_name, render
from llmscale.slurm.status import METRICS, newest_rows

COMMANDS = {"evaluate": ("evaluate",), "convert": ("convert",), "data_build": ("data", "build"), "check": ()}
"""Kind of job -> the llmscale command that the words after CONFIG go to."""
_REFUSED = (
    "mend the section slurm of the config; `sinfo` lists partitions and nodes, `scontrol ping` asks the controller"
)


def plan(kind: str, config: Path, words: Sequence[str], array: int = 0) -> tuple[Job, RunConfig | None]:
    """What is to be submitted; its config is right. words: overrides of a run's config, or another command's arguments.

    Raises:
        ConfigError: with all that is wrong. UsageError: the command needs words, or an array.
    """
    here = Path.cwd()
    if kind == "pretrain":
        return _plan_run(config, words, here)
    overrides = [word for word in words if word.startswith("slurm.") and "=" in word]
    arguments = [word for word in words if word not in overrides]
    settings = load_slurm(config, overrides)
    if kind != "check" and not arguments:
        raise UsageError(f"--template {kind}: give the arguments of `llmscale {' '.join(COMMANDS[kind])}` after CONFIG")
    if array and kind != "data_build":
        raise UsageError(f"--array: a job of the kind {kind} is no array; only data_build is")
    logs = here / (settings.logs or "slurm-logs")
    command = (*COMMANDS[kind], *arguments)
    name = job_name(settings, f"llmscale-{kind}")
    return Job(
        kind, settings, name, command, new_folder(logs), logs, here, array=array or (1 if kind == "data_build" else 0)
    ), None


def _plan_run(path: Path, overrides: Sequence[str], here: Path) -> tuple[Job, RunConfig]:
    # The sizes of the section decide how many ranks there are.
    size = load(path, overrides).slurm.world_size
    config = load(path, overrides, size, problems)
    settings = config.slurm
    output = here / config.run.output_dir
    checkpoints = config.checkpoint.folder or "checkpoints"
    if "://" not in checkpoints:
        checkpoints = str(here / checkpoints) if config.checkpoint.folder else str(output / checkpoints)
    job = Job(
        kind="pretrain",
        settings=settings,
        name=job_name(settings, config.run.name),
        command=("pretrain", str(here / path), *overrides),
        records=new_folder(output),
        logs=here / settings.logs if settings.logs else output / "logs",
        folder=here,
        checkpoints=checkpoints,
    )
    return job, config


def foreseen(config: RunConfig) -> list[Problem]:
    """What of a run would go wrong on the cluster, as far as a login node can tell."""
    settings, found, here = config.slurm, [], Path.cwd()
    if settings.restart != "never" and not config.checkpoint.interval:
        reason = "0 saves nothing, and a job that is started again would begin anew"
        found.append(Problem("checkpoint.interval", reason, "set it, or slurm.restart to never"))
    seconds = seconds_of(settings.time) or 0
    if 0 < seconds <= settings.signal_seconds:
        reason = f"{settings.time} is not longer than slurm.signal_seconds, {settings.signal_seconds}"
        found.append(Problem("slurm.time", reason, "raise it, or save faster"))
    rows = newest_rows(here / config.run.output_dir / METRICS)
    step = max((row.get("step_seconds") or 0.0 for row in rows), default=0.0)
    save = max((row.get("checkpoint_seconds") or 0.0 for row in rows), default=0.0)
    if step + save > settings.signal_seconds:
        reason = (
            f"{settings.signal_seconds}, and in {config.run.output_dir} a step took {step:.0f} s and a save {save:.0f}"
        )
        found.append(Problem("slurm.signal_seconds", reason, f"use at least {2 * (step + save):.0f}"))
    if config.checkpoint.resume == "never" and settings.restart != "never":
        reason = "never, and a job that is started again would begin anew"
        found.append(Problem("checkpoint.resume", reason, "use auto"))
    for key in ("train", "validation"):
        for number, source in enumerate(getattr(config.data, key)):
            remote = "://" in source.path or source.path.startswith("pipe:")
            if not remote and not (here / source.path).exists() and not glob.glob(str(here / source.path)):
                where = f"data.{key}[{number}].path"
                found.append(Problem(where, f"there is nothing at {source.path}", "build the data, or mend the path"))
    for where, text in (
        ("data.tokenizer", config.data.tokenizer),
        ("checkpoint.start_from", config.checkpoint.start_from),
    ):
        if text and "://" not in text and not (here / text).exists():
            found.append(Problem(where, f"there is nothing at {text}", "mend the path"))
    for number, file in enumerate(settings.source):
        if not (here / file).is_file():
            found.append(Problem(f"slurm.source[{number}]", f"there is no file {file}", "mend the path"))
    check = settings.node_check
    if check is not None and not os.access(here / check, os.X_OK):
        found.append(Problem("slurm.node_check", f"{check} is no program that can be run", "chmod +x"))
    return found + _room(config, here)


def _room(config: RunConfig, here: Path) -> list[Problem]:
    """Whether two checkpoints fit where they are to be written: fp32 weights and two moments of each."""
    if config.checkpoint.folder and "://" in config.checkpoint.folder:
        return []
    place = here / (config.checkpoint.folder or config.run.output_dir)
    while not place.exists():
        place = place.parent
    vocab_size = config.model.vocab_size
    if not config.checkpoint.interval or vocab_size is None:
        return []
    from llmscale.models.family import families

    family = families()[config.model.family]
    needed = 2 * 12 * sum(weight.numel for weight in family.parameters(config.model, vocab_size))
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    reason = f"{free / 2**30:.1f} GiB are free in {place}, and two checkpoints take {needed / 2**30:.1f}"
    return [Problem("run.output_dir", reason, "name a file system with more room, or checkpoint.folder")]


def submit(job: Job, config: RunConfig | None) -> Submission:
    """Write the script, hand it to sbatch, and record what it became: all of it, or nothing is left behind.

    Raises:
        SlurmError: sbatch refuses it; with its own words.
    """
    _alone(job)
    chain = job.settings.chain if job.kind == "pretrain" and job.settings.restart == "chain" else 1
    text = render(job)
    job.records.mkdir(parents=True)
    submitted: list[int] = []
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
        script = job.records / SCRIPT
        script.write_text(text)
        record = Submission(
            folder=job.records,
            template=job.kind,
            job_name=job.name,
            log=job.log,
            words=job.command,
            steps=config.training.steps if config else None,
            step=newest_step(job.checkpoints) if config else None,
        )
        for _ in range(chain):
            try:
                said = call("sbatch", "--parsable", str(script))
            except SlurmError as error:
                raise SlurmError(f"{error}; {_REFUSED}") from None
            submitted.append(int(said.strip().partition(";")[0]))
        record = record.with_jobs(tuple(submitted))
        record.write()
    except (LlmscaleError, OSError, ValueError):
        for number in submitted:
            call("scancel", str(number))
        shutil.rmtree(job.records, ignore_errors=True)
        raise
    return record


def _alone(job: Job) -> None:
    """
    Raises:
        UsageError: another submission of the run directory waits or runs: both would write into it.
    """
    if job.kind != "pretrain":
        return
    for path in sorted(job.records.parent.glob(f"*/{SUBMISSION}")):
        before = Submission.read(path.parent)
        if alive := [queued.job for queued in queue(before.jobs) if not queued.over]:
            raise UsageError(
                f"run.output_dir {before.run}: job {', '.join(alive)} trains there, or waits to; cancel it first "
                f"(llmscale slurm cancel {alive[0]}), or name another run.output_dir"
            )


def test_only(job: Job) -> str:
    """What sbatch says of the script without submitting it: when and where it would run.

    Raises:
        SlurmError: it would be refused.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(render(job))
        file.flush()
        try:
            done = subprocess.run(
                ["sbatch", "--test-only", file.name], capture_output=True, text=True, timeout=120, check=False
            )
        except FileNotFoundError:
            raise UsageError("sbatch: not found; run this on a login node of the cluster") from None
    said = " ".join(line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip())
    if done.returncode:
        raise SlurmError(f"{said}; {_REFUSED}")
    return said.removeprefix("sbatch: ")

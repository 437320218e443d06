"""From a config to a job in the queue: what is checked on a login node, and what is recorded."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmscale.config import deepspeed
from llmscale.config.load import dump, load, load_slurm
from llmscale.config.schema import RunConfig
from llmscale.distributed.rules import problems
from llmscale.errors import LlmscaleError, UsageError
from llmscale.slurm.after import newest_step
from llmscale.slurm.commands import SlurmError, call, queue
from llmscale.slurm.records import CONFIG, SCRIPT, SUBMISSION, Submission, new_folder
from llmscale.slurm.render import Job, job_name, render

COMMANDS = {"evaluate": ("evaluate",), "convert": ("convert",), "data_build": ("data", "build"), "check": ()}
"""Kind of job -> the llmscale command that the words after CONFIG go to."""
_REFUSED = (
    "mend the section slurm of the config; `sinfo` lists partitions and nodes, `scontrol ping` asks the controller"
)

_ELSEWHERE = "name another run.output_dir or slurm.logs; for the list of your jobs, XDG_STATE_HOME"


def plan(kind: str, config: Path, words: Sequence[str], array: int = 0) -> tuple[Job, RunConfig | None]:
    """What is to be submitted; its config is right. words: overrides of a run's config, or another command's arguments.

    Raises:
        ConfigError: with all that is wrong. UsageError: the command needs words, or an array.
    """
    here = Path.cwd()
    if array and kind != "data_build":
        raise UsageError(f"--array: a job of the kind {kind} is no array; only data_build is")
    if kind == "pretrain":
        return _plan_run(config, words, here)
    overrides = [word for word in words if word.startswith("slurm.") and "=" in word]
    arguments = [word for word in words if word not in overrides]
    settings = load_slurm(config, overrides)
    if kind != "check" and not arguments:
        raise UsageError(f"--template {kind}: give the arguments of `llmscale {' '.join(COMMANDS[kind])}` after CONFIG")
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
    records, name = new_folder(output), job_name(settings, config.run.name)
    if settings.restart == "chain":  # its jobs wait for those of their name
        name += f"-{records.name}"
    job = Job(
        kind="pretrain",
        settings=settings,
        name=name,
        command=("pretrain", str(here / path), *overrides),
        records=records,
        logs=here / settings.logs if settings.logs else output / "logs",
        folder=here,
        checkpoints=checkpoints,
    )
    return job, config


def submit(job: Job, config: RunConfig | None) -> Submission:
    """Write the script, hand it to sbatch, and record what it became: all of it, or nothing is left behind.

    Raises:
        SlurmError: sbatch refuses it; with its own words.
    """
    _alone(job)
    chain = job.settings.chain if job.kind == "pretrain" and job.settings.restart == "chain" else 1
    text = render(job)
    submitted: list[int] = []
    try:
        job.records.mkdir(parents=True)
        job.logs.mkdir(parents=True, exist_ok=True)
        if config is not None:
            job = _with_config(job, config)
            text = render(job)
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
            number = said.strip().partition(";")[0]
            if not number.isdigit():
                raise SlurmError(f"sbatch: says {said.strip()!r} in place of a job's number; {_REFUSED}")
            submitted.append(int(number))
        record = record.with_jobs(tuple(submitted))
        record.write()
    except (LlmscaleError, OSError) as error:
        for one in submitted:
            call("scancel", str(one))
        shutil.rmtree(job.records, ignore_errors=True)
        if isinstance(error, OSError):
            raise UsageError(f"{error.filename}: cannot be written: {error.strerror}; {_ELSEWHERE}") from None
        raise
    return record


def _with_config(job: Job, config: RunConfig) -> Job:
    """The job of what was checked, whatever becomes of the files that it was read from.

    Relative paths mean what they meant: the job runs in the folder that it was submitted from.
    """
    file = deepspeed.find(config.deepspeed, Path(job.command[1]).parent)
    copy = job.records / file.name
    shutil.copyfile(file, copy)
    resolved = config.model_copy(
        update={
            "deepspeed": str(copy),
            # What these name is resolved into the keys beside them.
            "model": config.model.model_copy(update={"preset": None}),
            "slurm": config.slurm.model_copy(update={"cluster": None}),
        }
    )
    dump(resolved, job.records / CONFIG)
    return replace(job, command=("pretrain", str(job.records / CONFIG)))


def _alone(job: Job) -> None:
    """
    Raises:
        UsageError: another submission of the run directory waits or runs: both would write into it.
    """
    if job.kind != "pretrain":
        return
    before = [Submission.read(path.parent) for path in job.records.parent.glob(f"*/{SUBMISSION}")]
    jobs = sorted(number for submission in before for number in submission.jobs)
    if alive := [queued.job for queued in queue(jobs) if not queued.over]:
        raise UsageError(
            f"run.output_dir {before[0].run}: job {', '.join(alive)} trains there, or waits to; cancel it first "
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

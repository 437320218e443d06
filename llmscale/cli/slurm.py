"""`llmscale slurm`: from a config to a job on a cluster, and how it fares. Runs on a login node: no torch."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Literal

import click

from llmscale.errors import ConfigError, LlmscaleError, UsageError

KINDS = ("pretrain", "evaluate", "convert", "data_build", "check")
_POLL_SECONDS = 1.0

config_argument = click.argument("config", type=click.Path(path_type=Path))
words_argument = click.argument("words", nargs=-1, metavar="[KEY=VALUE | ARGUMENT]...")
template_option = click.option(
    "--template", "kind", type=click.Choice(KINDS), default="pretrain", show_default=True, help="What the job does."
)
array_option = click.option("--array", type=click.IntRange(0), default=0, help="Tasks of a data_build; 1 by default.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
WORDS = {"ignore_unknown_options": True}
"""Arguments of another command may begin with a dash."""


@click.group(epilog="Example: llmscale slurm submit run.yaml slurm.nodes=4")
def command() -> None:
    """Submit runs to a Slurm cluster, and look after them.

    The section `slurm` of the config says what the job asks for; docs/slurm.md tells all of it.
    """


@command.command("render", context_settings=WORDS, epilog="Example: llmscale slurm render run.yaml slurm.nodes=4")
@config_argument
@words_argument
@template_option
@array_option
@click.option("--dry-run", is_flag=True, help="Check and print nothing but what is wrong.")
@json_option
def render_command(config: Path, words: tuple[str, ...], kind: str, array: int, dry_run: bool, as_json: bool) -> None:
    """Print the job script that `submit` would submit, and as warnings for what reasons it would not.

    CONFIG: a run's config; for other templates also a file with the keys of its section `slurm` alone. What follows
    overrides keys, and is for other templates the command's arguments.
    """
    from llmscale.slurm.render import render
    from llmscale.slurm.submit import foreseen, plan

    job, run = plan(kind, config, words, array)
    text = render(job)
    for problem in foreseen(run) if run else ():
        click.echo(f"warning: {config}: {problem}", err=True)
    if as_json:
        click.echo(json.dumps({"script": text, "log": job.log, "records": str(job.records)}))
    elif not dry_run:
        click.echo(text, nl=False)


@command.command("submit", context_settings=WORDS, epilog="Example: llmscale slurm submit run.yaml slurm.nodes=4")
@config_argument
@words_argument
@template_option
@array_option
@click.option("--dry-run", is_flag=True, help="Ask sbatch whether it would take the job, and submit nothing.")
@json_option
def submit_command(config: Path, words: tuple[str, ...], kind: str, array: int, dry_run: bool, as_json: bool) -> None:
    """Check CONFIG, and submit it as a job.

    The job starts again by itself, from the newest checkpoint, when it is preempted, runs out of time or loses a node
    (slurm.restart). Other templates: --template evaluate, convert, data_build (an array) or check, with the arguments
    of that command after CONFIG.
    """
    from llmscale.slurm.submit import foreseen, plan, submit, test_only

    job, run = plan(kind, config, words, array)
    if run and (found := foreseen(run)):
        raise ConfigError(str(config), found)
    if dry_run:
        said = test_only(job)
        click.echo(json.dumps({"dry_run": True, "sbatch": said, "log": job.log}) if as_json else said)
        return
    made = submit(job, run)
    log = str(made.log_of(made.jobs[0]))
    if as_json:
        click.echo(json.dumps({"jobs": made.jobs, "records": str(made.folder), "log": log, "run": str(made.run)}))
        return
    click.echo(f"job {', '.join(map(str, made.jobs))} submitted")
    click.echo(f"log: {log}")
    click.echo(f"see: llmscale slurm status {made.jobs[0]}")


@command.command("status", epilog="Example: llmscale slurm status runs/mine")
@click.argument("named", metavar="RUN|JOB")
@json_option
def status_command(named: str, as_json: bool) -> None:
    """How a run directory's newest submission, or a job, stands: queue, restarts, step, loss, time left."""
    from llmscale.slurm.records import find
    from llmscale.slurm.status import lines, status

    found = status(find(named))
    click.echo(json.dumps(found) if as_json else "\n".join(lines(found)))


@command.command("logs", epilog="Example: llmscale slurm logs -f runs/mine")
@click.argument("named", metavar="RUN|JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on until the submission is over; Ctrl-C ends only the reading.")
@click.option("-n", "--lines", "count", type=click.IntRange(0), default=50, show_default=True, help="Last lines.")
@json_option
def logs_command(named: str, follow: bool, count: int, as_json: bool) -> None:
    """Show the log of a run directory's newest submission, or of a job."""
    from llmscale.slurm.commands import queue
    from llmscale.slurm.records import ENDED, find
    from llmscale.slurm.status import current

    submission = find(named)
    path = submission.log_of(current(submission))
    if as_json:
        click.echo(json.dumps({"logs": [str(submission.log_of(job)) for job in submission.jobs], "newest": str(path)}))
        return
    if not path.exists() and not follow:
        raise UsageError(f"{path}: is not there yet; the job waits (llmscale slurm status {named}), or use --follow")
    place, waited = 0, False
    while True:
        path = submission.log_of(current(submission))
        if path.exists():
            with path.open("rb") as file:
                if not waited and place == 0:
                    text = b"".join(file.readlines()[-count:] if count else [])
                    place = file.tell()
                    file.seek(0, 2)
                else:
                    file.seek(place)
                    text = file.read()
                    place += len(text)
            click.echo(text, nl=False)
        if not follow:
            return
        alive = any(not job.over for job in queue(submission.jobs))
        if waited and (not alive or (submission.folder / ENDED).exists()) and not text_left(path, place):
            return
        waited = True
        time.sleep(_POLL_SECONDS)


def text_left(path: Path, place: int) -> bool:
    """Whether a log has grown beyond what was shown."""
    return path.exists() and path.stat().st_size > place


@command.command("cancel", epilog="Example: llmscale slurm cancel runs/mine")
@click.argument("named", metavar="RUN|JOB")
@click.option("--dry-run", is_flag=True, help="Say what would be cancelled.")
@json_option
def cancel_command(named: str, dry_run: bool, as_json: bool) -> None:
    """Cancel all jobs of a submission; it does not start again. A run that is under way saves first."""
    from llmscale.slurm.commands import call, queue
    from llmscale.slurm.records import ENDED, find

    submission = find(named)
    alive = [job.job for job in queue(submission.jobs) if not job.over]
    if not dry_run:
        if alive:
            (submission.folder / ENDED).write_text("stop: cancelled by llmscale slurm cancel\n")
        for job in alive:
            call("scancel", job)
    if as_json:
        click.echo(json.dumps({"cancelled": alive, "dry_run": dry_run}))
    else:
        verb = "would be cancelled" if dry_run else "cancelled"
        click.echo(f"job {', '.join(alive)} {verb}" if alive else "nothing to cancel: no job of it waits or runs")


@command.command("preflight", epilog="Example: llmscale slurm preflight --gpus 8")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Shared folder; needed in a job.")
@click.option("--gpus", type=click.IntRange(0), default=0, show_default=True, help="GPUs that a node must have.")
@click.option("--check", type=click.Path(), help="A program of your own that a bad node fails.")
@click.option("--all-reduce", "reduce", is_flag=True, hidden=True)
@click.option("--judge", metavar="NODES", hidden=True)
@json_option
def preflight_command(
    folder: Path | None, gpus: int, check: str | None, reduce: bool, judge: str | None, as_json: bool
) -> int:
    """Look at this node as a job does before every start: GPUs, versions, disk, clock. Exit code 3 for a bad one."""
    from llmscale.distributed import stop
    from llmscale.slurm import preflight
    from llmscale.slurm.task import of_job

    stop.listen()  # a look takes seconds: it ends before the job does
    if folder is not None and judge is not None:
        bad = preflight.judge(folder, preflight.nodes_of(judge))
        for node, reasons in bad.items():
            for reason in reasons:
                click.echo(of_job(f"bad node {node}: {reason}"), err=True)
        if bad:
            click.echo(json.dumps(bad) if as_json else ",".join(bad))
        return 3 if bad else 0
    if folder is not None and reduce:
        from llmscale.distributed.launch import Launch, quiet_imports

        launch = Launch.from_environment()
        launch.export()
        quiet_imports()
        figures = preflight.all_reduce(folder, launch, timedelta(seconds=120))
        if figures:
            text = f"{figures['ranks']} ranks, {figures['mib']} MiB: right, {figures['bus_gib_per_second']:.2f} GiB/s"
            click.echo(json.dumps(figures) if as_json else f"all-reduce of {text} on the bus")
        return 0
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmscale-")))
        report = preflight.look(place, gpus, check)
    for reason in report.wrong:
        click.echo(f"bad node {report.node}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps({"node": report.node, "wrong": report.wrong, "gpus": report.gpus, **report.same}))
    elif not report.wrong and folder is None:
        click.echo(f"{report.node}: {len(report.gpus)} GPU(s), {report.memory_gib:.0f} GiB of memory, nothing wrong")
    # In a job every node reports, and the judgement comes after.
    return 3 if report.wrong and folder is None else 0


@command.command("task", hidden=True, context_settings=WORDS)
@click.option("--logs", type=click.Path(path_type=Path))
@click.argument("words", nargs=-1, required=True)
def task_command(logs: Path | None, words: tuple[str, ...]) -> int:
    """A task of srun: runs `llmscale WORDS`, each line with its time, node and rank."""
    from llmscale.slurm.task import run

    return run(words, logs)


@command.command("after", hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--job", type=int, required=True)
@click.option("--start", type=int, required=True)
@click.option("--code", type=int, required=True)
@click.option("--state", required=True)
@click.option("--checkpoints", required=True)
@click.option("--restart", type=click.Choice(["requeue", "chain", "never"]), required=True)
@click.option("--limit", type=int, required=True)
def after_command(
    folder: Path,
    job: int,
    start: int,
    code: int,
    state: str,
    checkpoints: str,
    restart: Literal["requeue", "chain", "never"],
    limit: int,
) -> None:
    """What the job's script does next: prints one word, and the reason on standard error."""
    from llmscale.slurm.after import End, decide
    from llmscale.slurm.outcome import told
    from llmscale.slurm.task import of_job

    outcome = told(folder / f"outcome_{job}_{start}.json")
    try:
        word, reason = decide(folder, End(job, start, code, state, outcome), checkpoints, restart, limit)
    except OSError as error:
        raise LlmscaleError(f"{folder}: the records cannot be written: {error.strerror}") from None
    click.echo(of_job(f"{reason}: {word}"), err=True)
    click.echo(word)

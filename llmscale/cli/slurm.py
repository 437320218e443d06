"""`llmscale slurm`: from a config to a job on a cluster, and how it fares. Runs on a login node: no torch."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import click

from llmscale.errors import ConfigError, LlmscaleError, UsageError

KINDS = ("pretrain", "evaluate", "convert", "data_build", "check")

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
    from llmscale.slurm.foreseen import foreseen
    from llmscale.slurm.render import render
    from llmscale.slurm.submit import plan

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
    from llmscale.slurm.foreseen import foreseen
    from llmscale.slurm.submit import plan, submit, test_only

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
    from llmscale.slurm import logs
    from llmscale.slurm.records import find, task_of
    from llmscale.slurm.status import current

    submission, task = find(named), task_of(named)
    wanted = submission.log_of(current(submission), task)
    if as_json:
        there = [str(path) for path in logs.existing(submission, task)]
        click.echo(json.dumps({"logs": there, "newest": str(wanted)}))
        return

    def write(text: bytes) -> None:
        click.echo(text, nl=False)

    if follow:
        logs.follow(submission, task, count, write)
    elif logs.newest(submission, task):
        logs.show(submission, task, count, write)
    else:
        raise UsageError(f"{wanted}: is not there yet; the job waits (llmscale slurm status {named}), or use --follow")


@command.command("cancel", epilog="Example: llmscale slurm cancel runs/mine")
@click.argument("named", metavar="RUN|JOB")
@click.option("--now", is_flag=True, help="Do not let a run that is under way save first.")
@click.option("--dry-run", is_flag=True, help="Say what would be cancelled.")
@json_option
def cancel_command(named: str, now: bool, dry_run: bool, as_json: bool) -> None:
    """Cancel all jobs of a submission; it does not start again.

    A run that is under way saves after its step, however long that takes, and then ends.
    """
    from llmscale.slurm.commands import call, queue
    from llmscale.slurm.records import ENDED, find

    submission = find(named)
    alive = [job for job in queue(submission.jobs) if not job.over]
    saving = [job.job for job in alive if job.state == "RUNNING" and submission.template == "pretrain" and not now]
    if alive and not dry_run:
        ended = submission.folder / ENDED
        if not ended.exists():  # of a chain that is done, jobs may wait yet
            ended.write_text("stop: cancelled by llmscale slurm cancel\n")
        for job in alive:
            # Its script hands the signal on, and cancels the job once it has saved.
            call("scancel", *(("--signal=USR1", "--batch") if job.job in saving else ()), job.job)
    names = [job.job for job in alive]
    if as_json:
        click.echo(json.dumps({"cancelled": names, "saving": saving, "dry_run": dry_run}))
        return
    verb = "would be cancelled" if dry_run else "cancelled"
    click.echo(f"job {', '.join(names)} {verb}" if names else "nothing to cancel: no job of it waits or runs")
    if saving and not dry_run:
        click.echo(f"job {', '.join(saving)} saves first, and then ends; --now does not wait for that")


@command.command("preflight", epilog="Example: llmscale slurm preflight --gpus 8")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Shared folder; needed in a job.")
@click.option("--gpus", type=click.IntRange(0), default=0, show_default=True, help="GPUs that a node must have.")
@click.option("--check", type=click.Path(), help="A program of your own that a bad node fails.")
@click.option("--exclusive", is_flag=True, help="No other job may hold its memory.")
@click.option("--all-reduce", "reduce", is_flag=True, hidden=True)
@click.option("--judge", metavar="NODES", hidden=True)
@json_option
def preflight_command(
    folder: Path | None,
    gpus: int,
    check: str | None,
    exclusive: bool,
    reduce: bool,
    judge: str | None,
    as_json: bool,
) -> int:
    """Look at this node as a job does before every start: GPUs, versions, disk, clock. Exit code 3 for a bad one."""
    from llmscale.distributed import stop
    from llmscale.slurm import preflight
    from llmscale.slurm.task import of_job

    if folder is not None and judge is not None:
        bad = preflight.judge(folder, preflight.nodes_of(judge))
        for node, reasons in bad.items():
            for reason in reasons:
                click.echo(of_job(f"bad node {node}: {reason}"), err=True)
        return 3 if bad else 0
    stop.listen()  # what takes seconds ends before the job does
    if folder is not None and reduce:
        figures = _all_reduce(folder)
        if figures:
            text = f"{figures['ranks']} ranks, {figures['mib']} MiB: right, {figures['bus_gib_per_second']:.2f} GiB/s"
            click.echo(json.dumps(figures) if as_json else f"all-reduce of {text} on the bus")
        return _stopped()
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmscale-")))
        report = preflight.look(place, gpus, check, exclusive)
    for reason in report.wrong:
        click.echo(f"bad node {report.node}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps({"node": report.node, "wrong": report.wrong, "gpus": report.gpus, **report.same}))
    elif not report.wrong and folder is None:
        click.echo(f"{report.node}: {len(report.gpus)} GPU(s), {report.memory_gib:.0f} GiB of memory, nothing wrong")
    # In a job every node reports, and the judgement comes after.
    return 3 if report.wrong and folder is None else _stopped()


def _all_reduce(folder: Path) -> dict[str, Any] | None:
    from llmscale.distributed.launch import Launch, quiet_imports
    from llmscale.slurm import preflight
    from llmscale.slurm.outcome import Outcome, tell

    try:
        launch = Launch.from_environment()
        launch.export()
        quiet_imports()
        return preflight.all_reduce(folder, launch, timedelta(seconds=120))
    except LlmscaleError as error:
        tell(Outcome("failed", str(error), retry=error.exit_code != 2))
        raise
    except Exception as error:
        tell(Outcome("failed", f"all-reduce: {type(error).__name__}: {error}"))
        raise


def _stopped() -> int:
    """The exit code of what may have been asked to stop meanwhile."""
    from llmscale.distributed import stop
    from llmscale.slurm.outcome import Outcome, tell

    if (name := stop.received()) is None:
        return 0
    tell(Outcome("stopped", name, 0))
    return stop.STOPPED


@command.command("task", hidden=True, context_settings=WORDS)
@click.option("--logs", type=click.Path(path_type=Path))
@click.option("--seconds", type=float)
@click.argument("words", nargs=-1, required=True)
def task_command(logs: Path | None, seconds: float | None, words: tuple[str, ...]) -> int:
    """A task of srun: runs `llmscale WORDS`, each line with its time, node and rank."""
    from llmscale.slurm.task import run

    return run(words, logs, seconds)


def of_a_start(function: Callable[..., None]) -> Callable[..., None]:
    """The options by which a job's script says which start it is, and by which rules the run goes on."""
    for option in (
        click.option("--folder", type=click.Path(path_type=Path), required=True),
        click.option("--job", type=int, required=True),
        click.option("--start", type=int, required=True),
        click.option("--checkpoints", required=True),
        click.option("--restart", type=click.Choice(["requeue", "chain", "never"]), required=True),
        click.option("--limit", type=int, required=True),
        click.option("--exclude/--no-exclude", default=True),
    ):
        function = option(function)
    return function


@command.command("begin", hidden=True)
@of_a_start
def begin_command(folder: Path, job: int, start: int, **rules: Any) -> None:
    """Whether the job's script goes on: prints one word, and the reason on standard error where it does not."""
    from llmscale.slurm.after import Rules, begin
    from llmscale.slurm.task import of_job

    with _records(folder):
        word, reason = begin(folder, job, start, Rules(**rules))
    if word != "run":
        click.echo(of_job(f"nothing to do: {reason}"), err=True)
    click.echo(word)


@command.command("after", hidden=True)
@of_a_start
@click.option("--phase", type=click.Choice(["preflight", "run"]), required=True)
@click.option("--code", type=int, required=True)
@click.option("--checks", type=click.Path(path_type=Path), required=True)
@click.option("--nodes", required=True)
def after_command(
    folder: Path,
    job: int,
    start: int,
    phase: Literal["preflight", "run"],
    code: int,
    checks: Path,
    nodes: str,
    **rules: Any,
) -> None:
    """What the job's script does next. Reads what `scontrol show job` says; prints a word, and the reason on standard
    error. After the word may stand nodes to leave out, and jobs that are to be told of them.
    """
    from llmscale.slurm.after import SIGNALLED, End, Rules, decide
    from llmscale.slurm.commands import JobState
    from llmscale.slurm.outcome import told
    from llmscale.slurm.preflight import judge
    from llmscale.slurm.task import of_job

    names = [name for name in nodes.split(",") if name]
    end = End(
        job=job,
        start=start,
        phase=phase,
        code=code,
        state=JobState.of(sys.stdin.read(), start),
        outcome=told(folder / f"outcome_{job}_{start}.json"),
        nodes=len(names),
        bad=judge(checks, names) if phase == "preflight" and code not in (0, *SIGNALLED) else {},
    )
    click.echo(of_job(f"==== the start ended with exit code {code}; the job is {end.state.name}"), err=True)
    with _records(folder):
        made = decide(folder, end, Rules(**rules))
    click.echo(of_job(f"{made.reason}: {made.word}"), err=True)
    click.echo(" ".join([made.word, ",".join(made.excluded), *map(str, made.jobs)]).strip())


@contextmanager
def _records(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LlmscaleError(f"{folder}: the records cannot be written: {error.strerror}") from None

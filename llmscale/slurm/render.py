"""The job script: a template of slurm/, filled in. What stands in it is quoted for the shell, or for sbatch.

    options            lines of #SBATCH, as a list
    command            the words of the llmscale command
    program, one       the words that start llmscale in a task, and alone on the job's first node
    on_all             words of srun before these
    records            the submission's folder
    task_options, preflight_options   words of `llmscale slurm task` and `preflight`
    after_options      words of `llmscale slurm begin` and `after`
    stopped            the exit code of what was asked to stop
and every key of the section `slurm`. The filters `q` and `words` quote a text, and a list of them.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2

from llmscale.config import shipped
from llmscale.config.slurm import Slurm
from llmscale.distributed.stop import STOPPED
from llmscale.errors import UsageError

TEMPLATES = {
    "pretrain": "pretrain.sbatch.j2",
    "evaluate": "command.sbatch.j2",
    "convert": "command.sbatch.j2",
    "data_build": "data_build.sbatch.j2",
    "check": "check.sbatch.j2",
}
"""Kind of job -> its template."""
SUFFIXES = {"data_build": "-%A_%a.out"}


@dataclass(frozen=True)
class Job:
    """What a script is made from. logs: folder of the logs. records: the submission's folder.

    command: words after `llmscale`. checkpoints: folder or URL of the run's. array: tasks of an array, 0 for none.
    """

    kind: str
    settings: Slurm
    name: str
    command: tuple[str, ...]
    records: Path
    logs: Path
    folder: Path
    checkpoints: str = ""
    array: int = 0

    @property
    def log(self) -> str:
        """The pattern of the log's path."""
        return str(self.logs / ("%x" + SUFFIXES.get(self.kind, "-%j.out")))

    @property
    def on_one_node(self) -> bool:
        """Whether it takes one node, whatever slurm.nodes says."""
        return self.kind not in ("pretrain", "check")


def job_name(settings: Slurm, name: str) -> str:
    """slurm.job_name, or the name of the run without what Slurm's patterns and shells would read."""
    return settings.job_name or re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "llmscale"


def render(job: Job) -> str:
    """The script.

    Raises:
        UsageError: the template is missing, or not a template; or a path cannot stand in a job's option.
    """
    settings = job.settings
    folders = [shipped.folder("slurm")]
    name = TEMPLATES[job.kind]
    if settings.template is not None:
        own = job.folder / settings.template
        folders.insert(0, own.parent)
        name = own.name
        if not own.is_file():
            raise UsageError(f"slurm.template: there is no file {own}; copy one from {folders[1]}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters |= {"q": shlex.quote, "words": shlex.join}
    keys = {key: getattr(settings, key) for key in type(settings).model_fields}
    program, on_all = _program(settings)
    alone = ["srun", "--nodes=1", "--ntasks=1", *on_all] if _pyxis(settings) else []
    try:
        return environment.get_template(name).render(
            keys
            | {
                "options": options(job),
                "command": job.command,
                "program": program,
                "on_all": on_all,
                "one": [*alone, *program],
                "records": str(job.records),
                "source": [str(job.folder / file) for file in settings.source],
                "stopped": STOPPED,
                "task_options": ["--logs", str(job.logs)] if settings.log_per_rank else [],
                "after_options": [
                    "--checkpoints", job.checkpoints, "--restart", settings.restart,
                    "--limit", str(settings.restarts_without_progress),
                    *([] if settings.exclude_bad_nodes else ["--no-exclude"]),
                ],
                "preflight_options": [
                    "--gpus", "1" if settings.gpus else str(settings.gpus_per_node),
                    *(["--exclusive"] if settings.exclusive else []),
                    *(["--check", str(job.folder / settings.node_check)] if settings.node_check else []),
                ],
            }
        )  # fmt: skip
    except jinja2.TemplateError as error:
        where = getattr(error, "lineno", None)
        raise UsageError(f"{name}{f', line {where}' if where else ''}: {error}; mend the template") from None


def _pyxis(settings: Slurm) -> bool:
    return settings.container is not None and settings.container.runtime == "pyxis"


def _program(settings: Slurm) -> tuple[list[str], list[str]]:
    """(the words that start llmscale in a task, words of srun)."""
    on_all = list(settings.srun)
    if settings.cpus_per_task:  # not handed on from sbatch by every version
        on_all.append(f"--cpus-per-task={settings.cpus_per_task}")
    container = settings.container
    if container is None:
        return list(settings.program or (sys.executable, "-m", "llmscale")), on_all
    program = list(settings.program or ("llmscale",))
    if container.runtime == "pyxis":
        on_all.append(f"--container-image={container.image}")
        if container.mounts:
            on_all.append(f"--container-mounts={','.join(container.mounts)}")
        return program, [*on_all, *container.options]
    words = ["apptainer", "exec", *(["--nv"] if settings.gpus or settings.gpus_per_node else [])]
    for mount in container.mounts:
        words += ["--bind", mount]
    return [*words, *container.options, container.image, *program], on_all


def options(job: Job) -> list[str]:
    """The options of sbatch, without #SBATCH."""
    settings = job.settings
    nodes = 1 if job.on_one_node else settings.nodes
    tasks = 1 if job.on_one_node else settings.tasks
    gpus = 0 if job.kind == "data_build" else settings.gpus_per_node
    typed = f"{settings.gpu_type}:" if settings.gpu_type else ""
    spread = None if job.on_one_node else settings.gpus
    found: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("partition", settings.partition),
        ("account", settings.account),
        ("qos", settings.qos),
        ("reservation", settings.reservation),
        ("nodes", nodes),
        ("ntasks", spread),
        ("gpus-per-task", f"{typed}1" if spread else None),
        ("ntasks-per-node", None if spread else tasks),
        ("gpus-per-node", f"{typed}{gpus}" if gpus and not spread else None),
        ("cpus-per-task", settings.cpus_per_task),
        ("mem", settings.memory),
        ("time", settings.time),
        ("constraint", settings.constraint),
        ("exclude", settings.exclude),
        ("nodelist", settings.nodelist),
        ("array", f"0-{job.array - 1}" if job.array else None),
        ("chdir", _directive(str(job.folder))),
        ("output", _directive(_literal(str(job.logs)) + "/" + Path(job.log).name)),
        ("open-mode", "append"),
    ]
    if job.kind == "pretrain":
        found.append(("signal", f"B:USR1@{settings.signal_seconds}"))
        if settings.restart == "chain":
            found.append(("dependency", "singleton"))
    lines = [f"--{name}={value}" for name, value in found if value is not None]
    if settings.exclusive and not job.on_one_node:
        lines.append("--exclusive")
    lines.append("--requeue" if job.kind == "data_build" or settings.restart == "requeue" else "--no-requeue")
    return [*lines, *settings.extra]


def _literal(path: str) -> str:
    """A path in which Slurm replaces nothing."""
    return path.replace("%", "%%")


def _directive(value: str) -> str:
    """A value in a line of #SBATCH, quoted where it must be."""
    if "\\" in value or any(ord(letter) < 32 for letter in value):  # Slurm reads a backslash in a log's path
        raise UsageError(f"{value!r}: a path with a backslash or a line break cannot stand in a job script; rename it")
    if re.fullmatch(r"[A-Za-z0-9_.:/=,@%+-]+", value):
        return value
    return '"' + value.replace('"', '\\"') + '"'

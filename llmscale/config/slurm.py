"""The section `slurm`: what of a cluster a job asks for, and how its job script lives.

Every value ends in a script that others run: control characters are refused everywhere, and what stands in an sbatch
option may hold no blank, quote or shell character. `slurm/render.py` quotes the rest.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from llmscale.config.section import Bool, Int, Section

_OPTION = re.compile(r"[A-Za-z0-9_.:/=,@%+\[\]&|*!()^-]+")
_EXTRA = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.:/=,@%+\[\]&|*!()^-]+)?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(?:(?P<d>\d+)-(?=\d))?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
_OURS = {
    "job-name": "job_name", "nodes": "nodes", "ntasks": "tasks_per_node", "ntasks-per-node": "tasks_per_node",
    "gpus": "gpus", "gpus-per-task": "gpus", "gpus-per-node": "gpus_per_node", "gres": "gpus_per_node", "time": "time",
    "partition": "partition", "account": "account", "qos": "qos", "mem": "memory", "constraint": "constraint",
    "exclude": "exclude", "nodelist": "nodelist", "reservation": "reservation", "cpus-per-task": "cpus_per_task",
    "output": "logs", "error": "logs", "requeue": "restart", "no-requeue": "restart", "signal": "signal_seconds",
    "exclusive": "exclusive", "chdir": "", "open-mode": "", "array": "", "dependency": "restart", "wrap": "",
    "test-only": "", "parsable": "", "wait": "", "help": "", "usage": "", "version": "",
}  # fmt: skip
"""Options of sbatch that are llmscale's -> the key that sets them."""


def _refuse(reason: str) -> PydanticCustomError:
    return PydanticCustomError("slurm_value", "{reason}", {"reason": reason})


def _plain(value: str) -> str:
    if not value or any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise _refuse("is empty, or holds a line break or another control character; write it in one line")
    return value


def _option(value: str) -> str:
    if not _OPTION.fullmatch(value):
        raise _refuse("holds a blank, a quote or another character that no option of sbatch takes; leave it out")
    return value


def _job_name(value: str) -> str:
    if re.search(r"[/%]", value):
        raise _refuse("holds / or %, which the name of a log file cannot; write - in its place")
    return value


def _extra(value: str) -> str:
    if not _EXTRA.fullmatch(value):
        raise _refuse("is no option of the form --name or --name=value; write each option as an item of its own")
    name = value[2:].partition("=")[0]
    if name in _OURS:
        if not _OURS[name]:
            raise _refuse(f"--{name} is for llmscale to say; leave it out")
        raise _refuse(f"would say twice what stands in the script already; set slurm.{_OURS[name]}")
    return value


def _time(value: str) -> str:
    if seconds_of(value) is None:
        raise _refuse('is no time limit; write "days-hours:minutes:seconds", e.g. "24:00:00", in quotes')
    return value


def _memory(value: str) -> str:
    if not re.fullmatch(r"\d+[KMGT]?", value):
        raise _refuse('is no amount of memory; write e.g. "480G", or "0" for all of a node')
    return value


def _value(value: Any) -> Any:
    """A number without quotes is what people write for OMP_NUM_THREADS; of other values YAML's word is not theirs."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | bool) or value is None:
        shown = "null" if value is None else str(value).lower()
        raise _refuse(f'is read as YAML\'s {shown}, not as text; write it in quotes: "{shown}"')
    return value


def _names(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if not _NAME.fullmatch(name):
            raise _refuse(f"{name!r} is no name of an environment variable; use letters, digits and _")
    return value


def seconds_of(time: str) -> int | None:
    """Seconds of a time limit as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:...]."""
    found = _TIME.fullmatch(time)
    if not found:
        return None
    parts = [int(found[name]) for name in "abc" if found[name] is not None]
    if found["d"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(found["d"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


Text = Annotated[str, AfterValidator(_plain)]
Option = Annotated[str, AfterValidator(_option)]
Extra = Annotated[str, AfterValidator(_extra)]
Value = Annotated[str, BeforeValidator(_value), AfterValidator(_plain)]
Environment = Annotated[dict[str, Value], AfterValidator(_names)]


class Container(Section):
    """The container that the job's processes run in."""

    runtime: Literal["apptainer", "pyxis"] = Field(description="apptainer; or pyxis, Slurm's plugin for enroot.")
    image: Text = Field(description="The image: a file, or what the runtime can pull.", examples=["llmscale.sif"])
    mounts: tuple[Text, ...] = Field((), description="Folders to mount, as SOURCE or SOURCE:TARGET.")
    options: tuple[Text, ...] = Field((), description="Further options of the runtime (apptainer exec, or srun).")


class Slurm(Section):
    """The job on a Slurm cluster. `cluster` fills in what is not given."""

    cluster: Text | None = Field(
        None,
        description="A YAML file with keys of this section that many runs share, beside the config or in the working "
        "folder; keys given beside it win.",
        examples=["cluster.yaml"],
    )
    job_name: Annotated[Option, AfterValidator(_job_name)] | None = Field(
        None, description="Name of the job; run.name when null, cleaned of odd letters."
    )
    partition: Option | None = Field(None, description="Partition (--partition).", examples=["gpu"])
    account: Option | None = Field(None, description="Account (--account).", examples=["project"])
    qos: Option | None = Field(None, description="Quality of service (--qos).")
    reservation: Option | None = Field(None, description="Reservation (--reservation).")
    nodes: Int = Field(1, ge=1, description="Nodes.")
    gpus_per_node: Int = Field(8, ge=0, description="GPUs of a node: one task each; 0 for a job on CPUs.")
    gpus: Int | None = Field(
        None,
        ge=1,
        description="GPUs of the whole job, one task each, for nodes that have different numbers of them; in place of "
        "gpus_per_node and tasks_per_node.",
    )
    gpu_type: Option | None = Field(None, description="Type of the GPUs, as the cluster calls it.", examples=["h100"])
    tasks_per_node: Int | None = Field(None, ge=1, description="Tasks of a node; gpus_per_node, or 1, when null.")
    cpus_per_task: Int | None = Field(None, ge=1, description="Cores of a task; the cluster decides when null.")
    memory: Annotated[str, AfterValidator(_memory)] | None = Field(
        "0",
        description="Memory of a node; 0 is all of it. null leaves it to the cluster, or to --mem-per-cpu in extra.",
    )
    time: Annotated[str, AfterValidator(_time)] = Field("24:00:00", description="Time limit of one start of the job.")
    constraint: Option | None = Field(None, description="Features that the nodes must have (--constraint).")
    exclude: Option | None = Field(None, description="Nodes to leave out (--exclude).", examples=["node[07-09]"])
    nodelist: Option | None = Field(None, description="Nodes to take (--nodelist).")
    exclusive: Bool = Field(True, description="Share the nodes with no other job.")
    extra: tuple[Extra, ...] = Field(
        (), description="Further options of sbatch.", examples=[["--switches=1", "--mail-type=FAIL"]]
    )
    srun: tuple[Extra, ...] = Field((), description="Further options of srun.", examples=[["--cpu-bind=none"]])
    modules: tuple[Text, ...] = Field((), description="Environment modules to load.", examples=[["cuda/12.8"]])
    source: tuple[Text, ...] = Field(
        (),
        description="Shell files to source, such as an environment's bin/activate.",
        examples=[["venv/bin/activate"]],
    )
    environment: Environment = Field(
        default_factory=dict, description="Environment variables of the job.", examples=[{"NCCL_DEBUG": "WARN"}]
    )
    network_interface: Option | None = Field(
        None, description="Network interface of NCCL's and gloo's sockets, on every node.", examples=["ib0"]
    )
    program: tuple[Text, ...] | None = Field(
        None,
        min_length=1,
        description="The words that start llmscale on a node; when null the Python that submits, and `llmscale` in a "
        "container.",
        examples=[["/opt/llmscale/bin/llmscale"]],
    )
    container: Container | None = Field(
        None, description="Container: {runtime, image, mounts, options}.", examples=[{"runtime": "pyxis", "image": "i"}]
    )
    template: Text | None = Field(None, description="A job script template of your own, in place of the shipped one.")
    logs: Text | None = Field(None, description="Folder of the job's logs; OUTPUT_DIR/logs when null.")
    log_per_rank: Bool = Field(False, description="Also write a log file of every rank.")
    signal_seconds: Int = Field(
        300,
        ge=1,
        le=65535,
        description="How long before the time limit the run is told to save and end: longer than a step, a validation "
        "and a save.",
    )
    restart: Literal["requeue", "chain", "never"] = Field(
        "requeue",
        description="How a run goes on that was preempted, ran out of time or failed: requeue its job; a chain of "
        "jobs, submitted together, for clusters that forbid requeueing; or not at all.",
    )
    chain: Int = Field(4, ge=1, le=1000, description="Jobs of a chain.")
    restarts_without_progress: Int = Field(
        2, ge=0, description="Restarts in a row that save no further step, before the run is given up."
    )
    preflight: Literal["none", "nodes", "all"] = Field(
        "all",
        description="What is checked before each start: nothing; every node; or also that all of them compute one "
        "all-reduce.",
    )
    node_check: Text | None = Field(
        None,
        description="A program of your own that preflight runs on every node; one that ends with another exit code "
        "than 0 makes the node a bad one.",
    )
    exclude_bad_nodes: Bool = Field(
        True, description="Go on without the nodes that preflight found bad; else the job ends and names them."
    )

    @property
    def tasks(self) -> int:
        """Tasks of a node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.gpus or self.nodes * self.tasks

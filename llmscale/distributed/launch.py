"""Who am I: rank, world size and rendezvous, from whatever started this process. The one reader of the environment.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets SLURM_*,
one task a device; without a launcher the process is a world of its own, and picks a free port.
"""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from llmscale.errors import UsageError

if TYPE_CHECKING:
    import torch

TIMEOUT = timedelta(minutes=30)
"""How long a collective may wait: longer than the slowest rank's start-up, data read or checkpoint write."""

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "CUDA_DEVICE_MAX_CONNECTIONS", "DS_ACCELERATOR",
)  # fmt: skip
"""What Launch.export may write."""


@dataclass(frozen=True)
class Launch:
    """This process among all of them. launcher: torchrun (or DeepSpeed's), srun or single."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    launcher: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Launch:
        """Read the launcher's variables.

        Raises:
            UsageError: they are incomplete or contradict each other.
        """
        env = os.environ if environment is None else environment
        if "RANK" in env or "WORLD_SIZE" in env:
            return cls._from_torchrun(env)
        if "SLURM_PROCID" in env and _integer(env, "SLURM_NTASKS", 1) > 1 and "SLURM_STEP_ID" in env:
            return cls._from_srun(env)
        return cls(0, 1, 0, 1, "127.0.0.1", 0, "single")

    @classmethod
    def _from_torchrun(cls, env: Mapping[str, str]) -> Launch:
        needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in env]
        if missing:
            raise UsageError(
                f"environment: RANK or WORLD_SIZE is set, but {', '.join(missing)} is not; "
                "start with torchrun, srun or the deepspeed launcher, or unset RANK and WORLD_SIZE to run one process"
            )
        launch = cls(
            rank=_integer(env, "RANK"),
            world_size=_integer(env, "WORLD_SIZE"),
            local_rank=_integer(env, "LOCAL_RANK", 0),
            local_world_size=_integer(env, "LOCAL_WORLD_SIZE", _integer(env, "LOCAL_SIZE", 1)),
            master_address=env["MASTER_ADDR"],
            master_port=_integer(env, "MASTER_PORT"),
            launcher="torchrun",
        )
        return launch._checked()

    @classmethod
    def _from_srun(cls, env: Mapping[str, str]) -> Launch:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
        address = env.get("MASTER_ADDR") or (first_host(nodes) if nodes else "")
        if not address:
            raise UsageError("environment: srun set no SLURM_JOB_NODELIST; set MASTER_ADDR to the first node's name")
        job, step = _integer(env, "SLURM_JOB_ID", 0), _integer(env, "SLURM_STEP_ID", 0)
        restarts = _integer(env, "SLURM_RESTART_COUNT", 0)
        tasks = tasks_of_nodes(env)
        node = _integer(env, "SLURM_NODEID", 0)
        launch = cls(
            rank=_integer(env, "SLURM_PROCID"),
            world_size=_integer(env, "SLURM_NTASKS"),
            local_rank=_integer(env, "SLURM_LOCALID", 0),
            local_world_size=tasks[node] if node < len(tasks) else 1,
            master_address=address,
            # From the job and step, so that two jobs on one node, or two steps of one job, do not meet; and from the
            # start, so that the next one meets elsewhere where a port was taken.
            master_port=_integer(env, "MASTER_PORT", 20000 + (job * 31 + step + restarts * 101) % 12000),
            launcher="srun",
        )
        return launch._checked()

    def _checked(self) -> Launch:
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"environment: rank {self.rank} is not below the number of ranks, {self.world_size}")
        if self.world_size > self.local_world_size > 0 and _means_this_machine(self.master_address):
            raise UsageError(
                f"environment: {self.world_size} ranks, {self.local_world_size} of them on this node, would meet at "
                f"{self.master_address}, which every node takes for itself; set MASTER_ADDR to the first node's name"
            )
        return self

    def export(self, environment: MutableMapping[str, str] | None = None) -> None:
        """Write the variables that torch, DeepSpeed and CUDA read, before any of them is imported.

        Without them DeepSpeed goes looking for MPI; with more than one hardware queue a GPU may start Megatron's
        matrix products before the communication that should run beside them.
        """
        env = os.environ if environment is None else environment
        port = self.master_port or _free_port()
        env.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_address,
            MASTER_PORT=str(port),
        )
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not _has_gpu():
            # DeepSpeed would look for itself, and warn that it found none.
            env.setdefault("DS_ACCELERATOR", "cpu")


def whose() -> dict[str, str]:
    """What tells this process from those of other starts of its run: the job and its start, the host, the process."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    start = str(int(restarts) + 1) if restarts.isdigit() else restarts
    names = {"job": job, "start": start} if job else {}
    return {**names, "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "process": str(os.getpid())}


def _means_this_machine(address: str) -> bool:
    """Whether a name or an address is every machine's own. Debian gives a machine's own name 127.0.1.1."""
    return address in ("localhost", "localhost.localdomain", "::1") or address.startswith("127.0.")


def tasks_of_nodes(environment: Mapping[str, str] | None = None) -> list[int]:
    """Tasks of each node of the step, in the nodes' order: of Slurm's "2(x3),1" they are 2, 2, 2, 1."""
    env = os.environ if environment is None else environment
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[07-09,12],cpu1" -> "gpu07"."""
    # Up to the first comma that is not inside brackets; of each bracket the first number.
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first.group()) if first else ""


def device_of(launch: Launch) -> torch.device:
    """This rank's device: its own GPU, or the CPU.

    Raises:
        UsageError: more ranks on this node than GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # srun with --gpus-per-task shows each task its own GPU only.
    index = 0 if count == 1 and launch.local_world_size > 1 and launch.launcher == "srun" else launch.local_rank
    if index >= count:
        raise UsageError(f"local rank {launch.local_rank} has no GPU: this node shows {count}; start one rank a GPU")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def start(launch: Launch, device: torch.device) -> None:
    """Form the world's process group: nccl on GPUs (gloo for what stays on the CPU), gloo on CPUs."""
    import torch.distributed as dist

    launch.export()
    # Alone there is nobody to meet: a free port that was found a moment ago may be another's by now.
    alone: dict[str, Any] = {}
    if launch.launcher == "single":
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device, **alone)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT, **alone)


def leave() -> None:
    """Leave the world's process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[torch.device]:
    """A world of this process only, on its device, and no trace of it afterwards.

    Whatever is called later in this process would take variables of a rank that stayed behind for a launcher's own:
    accelerate, for one, would form the world again.
    """
    launch = Launch(0, 1, 0, 1, "127.0.0.1", 0, "single")
    before = {name: os.environ.get(name) for name in VARIABLES}
    device = device_of(launch)
    try:
        start(launch, device)
        yield device
    finally:
        leave()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def quiet_imports() -> None:
    """Leave out what Megatron-core warns of when it is imported: packages that `llmscale doctor` reports on."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # DeepSpeed calls torch's collectives by their older names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def one_thread_for_tokenizers() -> None:
    """Where every core has a process of its own, tokenizers starts no thread for each core in each of them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def huge_pages() -> None:
    """Where tensors of hundreds of MiB come and go, torch asks for them in pages of 2 MiB: fewer page faults.

    Torch reads this at its first large allocation.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise UsageError(f"environment: {name}={value!r} is not a whole number") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

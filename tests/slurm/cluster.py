"""A real Slurm cluster on this machine's loopback: munged, slurmctld, and a slurmd for each node.

Every node has its own mount, UTS and PID namespace: a host name, an address in 127.0.0.0/8, an /etc/hosts that knows
all nodes, and a first process whose end is a power cut. Nothing of the machine itself is touched. Needs root, for the
namespaces, and the packages slurmctld, slurmd, slurm-client and munge of Debian.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.ports import free_ports

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "unshare")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
LONGEST_FOLDER = 60
"""Below it lie sockets, whose paths may have 107 bytes."""

_CONFIG = """\
ClusterName=test{port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.own
SlurmdPidFile={folder}/spool/%n/slurmd.own
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
CompleteWait=0
MinJobAge=3600
FirstJobId={first}
GresTypes=gpu
"""
_PARTITIONS = """\
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=cancelled Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
_NODE = """\
mount --bind "$1/etc/hosts" /etc/hosts && hostname "$2" || exit 1
slurmd -D -N "$2" &
while :; do wait; sleep 0.2; done
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "a cluster of nodes with namespaces of their own needs root"
    programs = [program for program in PROGRAMS if shutil.which(program) is None]
    if programs:
        return f"no {', '.join(programs)} here (Debian's packages {', '.join(PACKAGES)})"
    if subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this container may make no namespaces"
    return None


class Cluster:
    """nodes: names node1, node2, ... Each has 8 CPUs and 8 GPUs that are device files of nothing."""

    def __init__(self, folder: Path, nodes: int) -> None:
        if len(str(folder)) > LONGEST_FOLDER:
            raise ValueError(f"{folder}: longer than {LONGEST_FOLDER} letters")
        self.folder = folder
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.environment = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring it up, and wait until all nodes are idle."""
        for name in ("etc", "munge", "state", "spool", "log", "run", "dev"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o755)
        self._configure()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._run("munged", "munged", "--foreground", "--force", f"--key-file={key}",
                  *(f"--{name}={self.folder}/munge/{file}" for name, file in
                    (("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))))  # fmt: skip
        self._until(lambda: (self.folder / "munge" / "sock").exists(), "munged")
        self._run("slurmctld", "slurmctld", "-D", "-c", "-i")
        for node in self.nodes:
            self.power_on(node)
        self._until(lambda: self.idle() == set(self.nodes), "the nodes")

    def _configure(self) -> None:
        draw = random.SystemRandom()  # tests seed the other one, and two clusters may run
        port, net = free_ports(len(self.nodes) + 1), draw.randint(1, 250)
        host = socket.gethostname().partition(".")[0]
        addresses = {node: f"127.{net}.0.{number + 1}" for number, node in enumerate(self.nodes)}
        etc = self.folder / "etc"
        (etc / "hosts").write_text(
            f"127.0.0.1 localhost {host}\n" + "".join(f"{address} {node}\n" for node, address in addresses.items())
        )
        for number in range(8):
            os.mknod(self.folder / "dev" / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
        text = _CONFIG.format(port=port, host=host, folder=self.folder, first=draw.randint(1, 30_000))
        gres = ""
        for number, (node, address) in enumerate(addresses.items()):
            kind = ("h100", "a100")[number % 2]
            text += (
                f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port + 1 + number} CPUs=8 "
                f"RealMemory=64000 Gres=gpu:{kind}:8 Feature={kind} State=UNKNOWN\n"
            )
            gres += f"NodeName={node} Name=gpu Type={kind} File={self.folder}/dev/gpu[0-7]\n"
        (etc / "slurm.conf").write_text(text + _PARTITIONS)
        (etc / "gres.conf").write_text(gres)
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _run(self, name: str, *words: str) -> None:
        # A daemon's jobs inherit what it was started with.
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root"), **self.environment}
        log = (self.folder / "log" / f"{name}.out").open("ab")
        self._processes[name] = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def power_on(self, node: str) -> None:
        """Boot a node."""
        shutil.rmtree(self.folder / "spool" / node, ignore_errors=True)
        (self.folder / "spool" / node).mkdir()
        self._run(node, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "bash",
                  "-c", _NODE, "node", str(self.folder), node)  # fmt: skip

    def power_off(self, node: str) -> None:
        """End everything on a node at once, if it runs."""
        if (process := self._processes.pop(node, None)) is not None:
            process.kill()
            process.wait()

    def kill_slurmd(self, node: str) -> None:
        """End the daemon of a node, and nothing else there: what it had started lives on."""
        own = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()  # other clusters have nodes of that name
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[:4] != [b"slurmd", b"-D", b"-N", node.encode()]:
                    continue
                if own in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue

    def stop(self) -> None:
        """End all of it: the controller first, so that it starts nothing again."""
        for name in ["slurmctld", *self.nodes, "munged"]:
            process = self._processes.pop(name, None)
            if process is not None:
                process.send_signal(signal.SIGTERM if name == "munged" else signal.SIGKILL)
                process.wait()

    def clear(self) -> None:
        """Cancel all jobs, whatever they would rather do, and wait until all nodes are idle."""

        def cleared() -> bool:
            jobs = self.call("squeue", "--noheader", "--format=%i").split()
            if jobs:
                self.call("scancel", "--signal=KILL", "--full", *jobs)
                self.call("scancel", *jobs)
            return not jobs and self.idle() == set(self.nodes)

        self._until(cleared, "idle nodes", 60)

    def idle(self) -> set[str]:
        """The nodes that wait for work."""
        return set(
            self.call("sinfo", "--noheader", "--Node", "--partition=batch", "--states=idle", "--format=%N").split()
        )

    def call(self, *words: str) -> str:
        """A command's standard output; "" where it fails."""
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60)
        return done.stdout

    def _until(self, done: Callable[[], bool], what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-500:] for path in (self.folder / "log").iterdir())
                raise AssertionError(f"{what} did not come up\n{logs}")
            time.sleep(0.02)

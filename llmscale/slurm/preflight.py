"""What is looked at on every node before a run starts, and which node is a bad one.

Every node writes what it found of itself into one shared folder, which tells at once whether the file system is shared
and writable. `judge` then compares: what a node says is wrong with it, what differs from the other nodes, which node
said nothing. The all-reduce of all ranks comes after; a rank that does not come to it is named by its node.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from llmscale.distributed.launch import Launch, device_of, leave, start, tasks_of_nodes
from llmscale.errors import LlmscaleError, UsageError
from llmscale.slurm.task import node_name
from llmscale.versions import versions

MOST_SKEW_SECONDS = 5.0
MOST_USED_MIB = 1024
"""Memory of a GPU that something else may hold before the run begins."""
REDUCED_BYTES = 64 << 20
ABSENT = "absent_ranks.json"
MEMINFO = Path("/proc/meminfo")
_ECC = "ecc.errors.uncorrected.volatile.total"
_QUERY = ("index", "name", "driver_version", "memory.used", "clocks.sm", "clocks.max.sm", _ECC,
          "clocks_throttle_reasons.hw_slowdown")  # fmt: skip
_NOT_THERE = ("[N/A]", "[Not Supported]")
"""What nvidia-smi says of what a GPU does not have; in such brackets it also says that it cannot tell."""


@dataclass
class Report:
    """What a node found of itself. same: what must be equal on all nodes. skew: its clock less the file system's, in
    seconds. wrong: why it is a bad node.
    """

    node: str
    same: dict[str, str]
    skew: float = 0.0
    memory_gib: float = 0.0
    gpus: list[dict[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def look(folder: Path, gpus: int, check: str | None = None, exclusive: bool = False) -> Report:
    """Look at this node, and write the report into the folder that all nodes share.

    gpus: how many it must have; 0 looks at none. check: a program of the user's, which a bad node fails. exclusive: no
    other job is there, whose memory it would be.
    """
    report = Report(node_name(), dict(versions()))
    report.memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if exclusive and (free := _available_gib(MEMINFO)) is not None and free < report.memory_gib / 4:
        report.wrong.append(f"only {free:.0f} GiB of its {report.memory_gib:.0f} GiB of memory can be had")
    if gpus:
        _look_at_gpus(report, gpus, exclusive)
    if full := _full(folder):
        report.wrong.append(full)
    if check is not None:
        _check(report, check)
    path = folder / f"{report.node}.json"
    try:
        path.write_text("")
        report.skew = time.time() - path.stat().st_mtime
        work = path.with_suffix(".tmp")
        work.write_text(json.dumps(asdict(report), indent=1) + "\n")
        work.replace(path)
    except OSError as error:
        report.wrong.append(f"cannot write to {folder}: {error.strerror}")
    return report


def _available_gib(meminfo: Path) -> float | None:
    """Memory that a process could have, caches given up; None where the kernel does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    except OSError:
        return None
    return int(found[1]) / 2**20 if found else None


def _look_at_gpus(report: Report, wanted: int, exclusive: bool) -> None:
    if shutil.which("nvidia-smi") is None:
        report.wrong.append(f"has no nvidia-smi, and slurm.gpus_per_node is {wanted}")
        return
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError) as error:
        report.wrong.append(f"nvidia-smi fails: {error}")
        return
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    rows = [[cell.strip() for cell in line.split(",")] for line in said]
    shown = [dict(zip(_QUERY, row, strict=True)) for row in rows if len(row) == len(_QUERY)]
    report.gpus = shown if exclusive else _ours(shown)
    words = [line for line, row in zip(said, rows, strict=True) if len(row) != len(_QUERY)]
    if done.returncode or words:
        code = f" with exit code {done.returncode}" if done.returncode else ""
        report.wrong.append(f"nvidia-smi fails{code}: {'; '.join(words)[:300] or 'it says nothing'}")
    report.same |= {"driver": ",".join(sorted({gpu["driver_version"] for gpu in report.gpus}))}
    report.same |= {"GPU": ",".join(sorted({gpu["name"] for gpu in report.gpus}))}
    if len(report.gpus) < wanted:
        report.wrong.append(f"shows {len(report.gpus)} GPU(s), and slurm.gpus_per_node is {wanted}")
    for gpu in report.gpus:
        where = f"GPU {gpu['index']}"
        for key, what in (("memory.used", "memory"), (_ECC, "count of memory errors")):
            if gpu[key].startswith("[") and gpu[key] not in _NOT_THERE:
                report.wrong.append(f"{where}: its {what} is {gpu[key]}")
        if _number(gpu["memory.used"]) > MOST_USED_MIB:
            report.wrong.append(f"{where}: something holds {gpu['memory.used']} MiB of its memory")
        if _number(gpu[_ECC]) > 0:
            report.wrong.append(f"{where}: {gpu[_ECC]} uncorrected memory error(s)")
        if gpu["clocks_throttle_reasons.hw_slowdown"] == "Active":
            report.wrong.append(f"{where}: slowed down by its hardware ({gpu['clocks.sm']} MHz)")


def _ours(gpus: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the job, where the node shows it those of others as well."""
    given = [index for index in os.environ.get("SLURM_STEP_GPUS", "").split(",") if index]
    return [gpu for gpu in gpus if gpu["index"] in given] if given and len(gpus) > len(given) else gpus


def _number(text: str) -> float:
    """A figure of nvidia-smi; 0 where it has none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _full(folder: Path) -> str | None:
    free = shutil.disk_usage(folder).free if folder.is_dir() else None
    if free is None:
        return f"does not see {folder}: it is not on a file system that all nodes share"
    return f"{folder}: {free >> 20} MiB are free there" if free < 64 << 20 else None


def _check(report: Report, program: str) -> None:
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=240)
    except (OSError, subprocess.TimeoutExpired) as error:
        report.wrong.append(f"{program}: {error}")
        return
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        report.wrong.append(f"{program}: exit code {done.returncode}{f': {said[-1][:200]}' if said else ''}")


def judge(folder: Path, nodes: Sequence[str]) -> dict[str, list[str]]:
    """Bad node -> what is wrong with it, of the nodes that should have written into the folder."""
    reports, bad = {}, {}
    for node in nodes:
        try:
            reports[node] = Report(**json.loads((folder / f"{node}.json").read_text()))
        except (OSError, ValueError, TypeError):
            bad[node] = ["said nothing: nothing runs there, or it does not see the run directory"]
    for node, report in reports.items():
        if report.wrong:
            bad[node] = list(report.wrong)
    for key in sorted({key for report in reports.values() for key in report.same}):
        for node, reason in _odd_ones(key, {node: report.same.get(key, "none") for node, report in reports.items()}):
            bad.setdefault(node, []).append(reason)
    if reports:
        middle = statistics.median(report.skew for report in reports.values())
        for node, report in reports.items():
            if abs(report.skew - middle) > MOST_SKEW_SECONDS:
                bad.setdefault(node, []).append(f"its clock is {report.skew - middle:+.1f} s off the others'")
    for node, ranks in _absent(folder).items():
        bad.setdefault(node, []).append(f"rank(s) {ranks} did not come to the all-reduce")
    return bad


def _absent(folder: Path) -> dict[str, list[int]]:
    """Node -> ranks that did not come; nothing where nothing whole was written."""
    try:
        found = json.loads((folder / ABSENT).read_text())
        return {str(node): list(ranks) for node, ranks in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _odd_ones(key: str, values: Mapping[str, str]) -> list[tuple[str, str]]:
    """The nodes whose value is not that of most; where no value is, of the first node."""
    most = Counter(values.values()).most_common(2)
    usual = most[0][0] if len(most) == 1 or most[0][1] > most[1][1] else next(iter(values.values()))
    return [(node, f"{key} is {value}, {usual} elsewhere") for node, value in values.items() if value != usual]


def all_reduce(folder: Path, launch: Launch, timeout: timedelta = timedelta(seconds=120)) -> dict[str, Any] | None:
    """One all-reduce over all ranks of the step: its answer is checked and timed. Rank 0 gives the figures.

    bus_gib_per_second: bytes · 2 (n - 1) / n / seconds, what each link carries (NCCL's tests call it busbw).

    Raises:
        LlmscaleError: a rank did not come, which is written into the folder with its node; or the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    device = device_of(launch)
    meet(folder, launch, timeout)
    start(launch, device)
    try:
        size, rank = launch.world_size, launch.rank
        data = torch.empty(REDUCED_BYTES // 4, device=device)
        seconds = []
        for _ in range(3):
            data.fill_(float(rank + 1))
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(data)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        wrong = int((data != size * (size + 1) / 2).sum())
        if wrong:
            raise LlmscaleError(f"{node_name()}: {wrong} numbers of an all-reduce over {size} ranks are wrong")
        best = min(seconds)
        figures = {
            "ranks": size,
            "mib": REDUCED_BYTES >> 20,
            "seconds": best,
            "bus_gib_per_second": REDUCED_BYTES / 2**30 * 2 * (size - 1) / size / best,
        }
        return figures if rank == 0 else None
    finally:
        leave()


def meet(folder: Path, launch: Launch, timeout: timedelta) -> None:
    """Wait until every rank has come, before a process group waits for them without a word.

    Raises:
        LlmscaleError: some did not; rank 0 writes which, by node.
    """
    (folder / f"rank_{launch.rank}").write_text(node_name())
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        came = sum(1 for _ in folder.glob("rank_*"))
        if came >= launch.world_size:
            return
        time.sleep(0.1)
    missing = [rank for rank in range(launch.world_size) if not (folder / f"rank_{rank}").exists()]
    if launch.rank == 0:
        absent: dict[str, list[int]] = {}
        for rank in missing:
            absent.setdefault(node_of(rank, launch), []).append(rank)
        (folder / ABSENT).write_text(json.dumps(absent))
    raise LlmscaleError(f"rank(s) {missing} of {launch.world_size} did not come in {timeout.seconds} s")


def node_of(rank: int, launch: Launch) -> str:
    """The node of a rank: each node of the job, in their order, has the next ranks."""
    nodes = [name for name in os.environ.get("LLMSCALE_NODES", "").split(",") if name]
    tasks = tasks_of_nodes() or [max(launch.local_world_size, 1)] * len(nodes)
    before = 0
    for node, count in zip(nodes, tasks, strict=False):
        before += count
        if rank < before:
            return node
    return f"the node of rank {rank}"


def nodes_of(text: str) -> list[str]:
    """Names with commas between them."""
    names = [name for name in text.split(",") if name]
    if not names:
        raise UsageError("--judge: names no node")
    return names

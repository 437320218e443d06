"""How much memory this process may still take, of its device and as far as the machine and its job's limit allow; and
giving back what it no longer needs.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")


def give_back() -> None:
    """Collect what nothing refers to, and hand freed memory back to the system.

    glibc keeps freed blocks below 32 MiB: a whole model, where no tensor of it is larger.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; for the CPU also what the job's limit (its cgroup) leaves."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min([int(psutil.virtual_memory().available), *_left_in_cgroups(Path("/proc/self/cgroup"), CGROUPS)])


def _left_in_cgroups(own: Path, root: Path) -> Iterator[int]:
    """What the limits of this process's cgroup and of those around it leave. What the page cache holds is not counted:
    the kernel gives it up. own: the file that names it, of cgroup v2 (`0::/path`)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("0::/"):
            inner = root / line.removeprefix("0::/")
            for folder in (inner, *inner.parents):
                if not folder.is_relative_to(root):
                    return
                yield from _left(folder)


def _left(folder: Path) -> Iterator[int]:
    try:
        limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        if limit != "max":
            yield max(0, int(limit) - used + int(rows.get("file", 0)))
    except (OSError, ValueError):  # the root has no limit
        return

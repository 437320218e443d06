"""What memory is left: the machine's, and what a job's limit leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from llmscale.distributed.memory import _left_in_cgroups, available_bytes, give_back


def cgroup(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\nfile {cached}\n")


def test_the_limits_of_a_job_and_of_what_is_around_it_count_and_the_page_cache_does_not(tmp_path: Path) -> None:
    cgroup(tmp_path / "slurm" / "job_1", "8000", 5000, 1000)
    cgroup(tmp_path / "slurm" / "job_1" / "step_0", "max", 4000, 500)
    own = tmp_path / "own"
    own.write_text("0::/slurm/job_1/step_0\n")
    assert list(_left_in_cgroups(own, tmp_path)) == [4000]
    own.write_text("3:memory:/old\n")
    assert list(_left_in_cgroups(own, tmp_path)) == []
    assert list(_left_in_cgroups(tmp_path / "none", tmp_path)) == []


def test_no_more_is_available_than_the_machine_has() -> None:
    assert 0 < available_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_what_was_freed_goes_back_to_the_system() -> None:
    torch.zeros(30 << 18)  # 30 MiB: from now on glibc keeps what is smaller
    held = [torch.ones(1 << 18) for _ in range(200)]
    last = torch.ones(1 << 18)  # above them, so that the heap cannot just end lower
    del held
    before = psutil.Process().memory_info().rss
    give_back()
    assert before - psutil.Process().memory_info().rss > 150 << 20
    assert float(last[0]) == 1.0

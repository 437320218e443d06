"""The same run under every launcher: torchrun, DeepSpeed's own, srun's variables, and none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.test_matrix import run_config
from tests.ports import free_ports

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmscale"]
DEEPSPEED = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module", "llmscale"]


def write(folder: Path, corpus: Path) -> Path:
    config = run_config(Case(data=2, zero=2), corpus, folder / "run", "bf16")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("expected")
    in_processes(2, command, "pretrain", str(write(folder, corpus)))
    return losses(folder)


@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_launcher_starts_the_run(launcher: list[str], corpus: Path, expected: list[float], tmp_path: Path) -> None:
    path = write(tmp_path, corpus)
    program = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{program}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["DS_ACCELERATOR"] = "cpu"
    words = [str(free_ports()) if word == "PORT" else word for word in launcher]
    done = subprocess.run(
        [sys.executable, "-m", *words, "pretrain", str(path)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path) == expected


def _srun(rank: int) -> dict[str, str]:
    """What srun sets for a task of a step of two tasks on this node."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2",
    }  # fmt: skip


def _without_torchrun(path: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    command("pretrain", path)


def test_srun_starts_the_run_from_its_variables_alone(corpus: Path, expected: list[float], tmp_path: Path) -> None:
    outcomes = in_processes(2, _without_torchrun, str(write(tmp_path, corpus)), environment=_srun)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].output
    assert losses(tmp_path) == expected
    assert "started by srun" in outcomes[0].output

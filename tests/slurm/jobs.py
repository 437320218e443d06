"""Runs for the cluster, as a user of it has them: a folder, a config, and `llmscale slurm` typed in that folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llmscale.slurm.records import Attempt, Submission, attempts, find
from tests.distributed.conftest import VOCAB
from tests.slurm.cluster import Cluster

SECONDS = 150
"""The longest that anything is waited for."""


class Job:
    """A run in a folder of its own, and what became of it."""

    def __init__(self, cluster: Cluster, folder: Path, tokens: Path, slurm: dict[str, Any], **more: Any) -> None:
        self.cluster, self.folder = cluster, folder
        # As from within another run: its variables reach no process of a job.
        self.environment = {
            **os.environ, **cluster.environment, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder / "state"),
            "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "5", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1",
        }  # fmt: skip
        config = {
            "run": {"name": "tiny", "output_dir": "run", "seed": 7},
            "model": {
                "family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64,
                "vocab_size": VOCAB, "max_position_embeddings": 32, "init_std": 0.1,
            },
            "data": {"train": [{"path": str(tokens)}], "validation": [{"path": str(tokens)}], "sequence_length": 32},
            "training": {
                "steps": 60, "global_batch_size": 8, "precision": "fp32", "validation_interval": 10,
                "validation_batches": 2,
            },
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"interval": 20},
            "logging": {"tensorboard": False},
            "slurm": {
                "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "memory": "1G", "time": "00:10:00",
                "exclusive": False, "signal_seconds": 20, "preflight": "none", **slurm,
            },
        }  # fmt: skip
        for section, keys in more.items():
            config[section] = {**config.get(section, {}), **keys}
        (folder / "run.yaml").write_text(yaml.safe_dump(config))

    def with_stub(self, cases: str) -> None:
        """Put a program before llmscale in the job. cases: of bash, of its restarts and arguments ("0 slurm begin")."""
        stub = self.folder / "stub"
        stub.write_text(
            f'#!/bin/bash\ncd {self.folder}\ncase "${{SLURM_RESTART_COUNT:-0}} $*" in\n{cases}\nesac\n'
            f'exec {sys.executable} -m llmscale "$@"\n'
        )
        stub.chmod(0o755)
        path = self.folder / "run.yaml"
        config = yaml.safe_load(path.read_text())
        config["slurm"]["program"] = [str(stub)]
        path.write_text(yaml.safe_dump(config))

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def llmscale(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Type a command in the folder."""
        return subprocess.run(
            [sys.executable, "-m", "llmscale", *words],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def submit(self, *words: str) -> Submission:
        done = self.llmscale("slurm", "submit", "run.yaml", *words)
        assert done.returncode == 0, done.stderr
        return find(str(self.run))

    def number(self) -> str:
        return str(find(str(self.run)).jobs[0])

    def state(self, number: str | None = None) -> str:
        return self.cluster.call("squeue", "-h", "-t", "all", "-j", number or self.number(), "-o", "%T").strip()

    def minutes_used(self) -> int:
        """Whole minutes since the job's start."""
        used = self.cluster.call("squeue", "-h", "-j", self.number(), "-o", "%M").strip()
        return int(used.split(":")[-2])

    def attempts(self) -> list[Attempt]:
        return attempts(find(str(self.run)).folder)

    def step(self) -> int:
        """The newest step in the metrics."""
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def rows(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def until(self, done: Callable[[], Any], what: str) -> None:
        """Wait; the log is shown where it takes too long."""
        deadline = time.monotonic() + SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not in {SECONDS} s; {self.state()}\n{self.log()[-6000:]}")
            time.sleep(0.05)

    def until_over(self) -> str:
        """Wait until the submission has ended, and give why."""
        ended = find(str(self.run)).folder / "ended"
        self.until(ended.exists, "the end")
        self.until(lambda: self.state() not in ("RUNNING", "COMPLETING", "PENDING"), "the job's end")
        return ended.read_text().strip()

    def until_step(self, step: int) -> None:
        self.until(lambda: self.step() >= step, f"step {step}")

    def until_file(self, name: str) -> None:
        self.until((self.folder / name).exists, name)

    def node(self, number: str | None = None) -> str:
        """The nodes that a job runs on."""
        return self.cluster.call("squeue", "-h", "-j", number or self.number(), "-o", "%N").strip()

    def until_attempts(self, count: int) -> None:
        self.until(lambda: len(self.attempts()) >= count, f"{count} starts to end")

    def log(self) -> str:
        submission = find(str(self.run))
        paths = [submission.log_of(job) for job in submission.jobs]
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

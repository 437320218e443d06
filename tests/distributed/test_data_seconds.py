"""The wait for data that a run reports is that of the rank that waits longest, since all others wait for it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import yaml

from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.test_matrix import run_config


def with_a_clock_of_its_own(path: str) -> None:
    """Of rank r each look at it is r + 1 seconds after the one before, and so is each wait for a batch."""
    from llmscale.training import loop

    looks = itertools.count(step=int(os.environ["RANK"]) + 1)
    loop.time = SimpleNamespace(perf_counter=lambda: float(next(looks)))  # type: ignore[assignment]
    command("pretrain", path)


def test_the_slowest_rank_is_the_wait(corpus: Path, tmp_path: Path) -> None:
    config = run_config(Case(1, False, 1, 1, 2, zero=1), corpus, tmp_path / "run", "fp32")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    outcomes = in_processes(2, with_a_clock_of_its_own, str(tmp_path / "run.yaml"))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].output[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {(row["data_seconds"], row["step_seconds"]) for row in rows} == {(2.0, 2.0)}

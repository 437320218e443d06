"""Validation looks, and changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import Case
from tests.distributed.test_matrix import run_config, train


def rows_of(config: dict[str, Any], key: str) -> list[tuple[int, float]]:
    path = Path(config["run"]["output_dir"]) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


@pytest.mark.parametrize(
    "case",
    [Case(1, False, 1, 1, 2, zero=3), Case(2, True, 2, 1, 1, zero=2, family="gpt2"), Case(1, False, 2, 2, 1, zero=1)],
    ids=str,
)
def test_validation_changes_no_training_step(case: Case, corpus: Path, tmp_path: Path) -> None:
    plain = run_config(case, corpus, tmp_path / "plain", "fp32")
    validated = run_config(case, corpus, tmp_path / "validated", "fp32")
    for config in (plain, validated):
        config["model"]["dropout"] = 0.1
    validated["data"]["validation"] = [{"path": str(corpus)}]
    validated["training"] |= {"validation_interval": 2, "validation_batches": 2}
    train(plain, case.world_size, tmp_path)
    train(validated, case.world_size, tmp_path)
    for key in ("loss", "grad_norm"):
        assert rows_of(plain, key) == rows_of(validated, key)
    found = rows_of(validated, "validation_loss")
    assert [step for step, _ in found] == [2, 4, 5]
    # The same data, without dropout: near the training loss, and equal on no two steps.
    assert len({loss for _, loss in found}) == 3
    assert all(0.5 < loss < 5.5 for _, loss in found)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, False, 1, 1, 2),
        Case(2, True, 1, 1, 2),
        Case(2, True, 1, 1, 2, mask=True),
        # Several micro-batches are under way at a time: each is recomputed with its own documents.
        Case(1, False, 2, 1, 1, family="gpt2", mask=True),
    ],
    ids=str,
)
def test_recomputation_with_dropout_changes_no_step(
    case: Case, corpus: Path, short_documents: Path, tmp_path: Path
) -> None:
    """Recomputed dropout must draw what the first pass drew, be it from the ranks' own or their common generator."""
    found = []
    for recompute in ("none", "selective", "full"):
        data = short_documents if case.mask else corpus
        config = run_config(replace(case, recompute=recompute), data, tmp_path / recompute, "fp32")
        config["model"]["dropout"] = 0.1
        train(config, case.world_size, tmp_path)
        found.append(rows_of(config, "loss"))
    assert found[0] == found[1] == found[2]

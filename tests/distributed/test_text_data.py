"""A run on raw-text shards: what it reads does not depend on who reads it, before a stop and after."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmscale.data import tokenizer
from llmscale.data.describe import describe
from tests.distributed.layouts import Case
from tests.distributed.test_matrix import run_config, train
from tests.unit.data.servers import Proxy, proxy, s3, upload

__all__ = ["proxy", "s3"]
STEPS = 6


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text shards of this package's own tests, described in four logical streams."""
    folder = tmp_path_factory.mktemp("text")
    texts = [path.read_text() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number, document in enumerate(texts[shard::4]):
                info = tarfile.TarInfo(f"{number}.txt")
                info.size = len(document.encode())
                tar.addfile(info, io.BytesIO(document.encode()))
    tokenizer.write(tokenizer.train(texts, 300), folder / "tokenizer.json")
    describe([str(folder / "*.tar")], folder / "tokenizer.json", folder / "described", streams=4)
    return folder / "described"


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_a_run_on_text_stops_on_two_ranks_and_goes_on_on_others(mixed: bool, text: Path, tmp_path: Path) -> None:
    configs = []
    for name, case in (
        ("whole", Case(1, False, 1, 1, 2, zero=1)),
        ("alone", Case()),
        ("stages", Case(2, True, 2, 1, 1, zero=1)),
    ):
        config = run_config(case, text, tmp_path / name, "fp32")
        config["model"] |= {"vocab_size": 304, "num_query_groups": 4, "num_layers": 5}
        config["training"]["steps"] = STEPS
        config["checkpoint"] = {"interval": 3}
        config["data"]["train"] = [{"path": str(text), "format": "text"}]
        if mixed:
            config["data"]["train"].append({"path": str(text), "weight": 2})
        configs.append((config, case))
    train(configs[0][0], 2, tmp_path)
    whole = rows_of(tmp_path / "whole")
    assert len({row["loss"] for row in whole}) == STEPS
    for config, case in configs[1:]:
        output = Path(config["run"]["output_dir"])
        shutil.copytree(tmp_path / "whole", output)
        shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
        train(config, case.world_size, tmp_path)
        for one, two in zip(whole, rows_of(output), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_run_that_is_done_does_not_wait_for_what_a_store_does_not_give(
    text: Path, proxy: Proxy, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next window is read ahead, in threads that an exit of the interpreter would wait for."""
    monkeypatch.setattr("llmscale.data.describe.PIECE_BYTES", 4 << 10)
    (tmp_path / "tars").mkdir()
    for tar in text.parent.glob("*.tar"):
        shutil.copyfile(tar, tmp_path / "tars" / f"shard-{tar.name}")
    url = upload(s3[1], tmp_path / "tars", "stalls")
    described = tmp_path / "described"
    describe([f"{url}/*.tar"], text.parent / "tokenizer.json", described, streams=1)
    config = run_config(Case(), described, tmp_path / "run", "fp32")
    config["model"] |= {"vocab_size": 304}
    config["training"] |= {"steps": 2}
    config["checkpoint"] = {"interval": 0}
    config["data"] |= {"cache": str(tmp_path / "cache")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    proxy.requests.clear()
    proxy.plan.extend(["pass"] * 4)  # the first window
    proxy.forever = "stall"
    done = subprocess.run(
        [sys.executable, "-m", "llmscale", "pretrain", str(tmp_path / "run.yaml")],
        timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(rows_of(tmp_path / "run")) == 2
    assert sum(count for name, count in proxy.requests.items() if name.startswith("shard-")) > 4

"""Data that is broken for some ranks and not for others, and what is broken counted over all of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml

from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.test_matrix import run_config


def damaged(corpus: Path, folder: Path, shard: int) -> Path:
    """A copy of the corpus with a flipped bit in one shard."""
    shutil.copytree(corpus, folder)
    path = sorted(folder.glob("*.tar"))[shard]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    return folder


def on_its_node(folders: list[str], *arguments: str) -> None:
    """The command line where each rank has its own copy of the data."""
    os.chdir(folders[int(os.environ["RANK"])])
    command(*arguments)


def test_ranks_of_a_group_never_train_on_different_batches(corpus: Path, tmp_path: Path) -> None:
    """One copy of two is damaged: without a comparison, its rank would skip what the other one trains on."""
    nodes = [tmp_path / "sound", tmp_path / "faulty"]
    shutil.copytree(corpus, nodes[0] / "train")
    damaged(corpus, nodes[1] / "train", 1)
    for case in (Case(2, False, 1, 1, 1, zero=1), Case(1, False, 2, 1, 1, zero=1)):
        config = run_config(case, Path("train"), tmp_path / "run", "fp32")
        config["training"]["steps"] = 60
        config["data"] |= {"on_error": "skip", "max_skipped": 0.5}
        config["checkpoint"] = {"interval": 0}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        outcomes = in_processes(2, on_its_node, [str(node) for node in nodes], "pretrain", str(tmp_path / "run.yaml"))
        assert [outcome.exit_code for outcome in outcomes] == [1, 1]
        for outcome in outcomes:
            assert "read different batches: a sample is broken for some of them" in outcome.output
            assert "Traceback" not in outcome.output

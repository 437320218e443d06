"""Data that is broken for some ranks and not for others, and what is broken counted over all of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from llmscale.data.stream import Reading, Stream
from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.test_matrix import BATCH, SEQUENCE, run_config, train


def damaged(corpus: Path, folder: Path, shard: int) -> Path:
    """A copy of the corpus with a flipped bit in one shard."""
    shutil.copytree(corpus, folder)
    path = sorted(folder.glob("*.tar"))[shard]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    return folder


def figures(output: Path, name: str) -> list[Any]:
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


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


def test_counts_are_those_of_the_run_on_any_ranks_and_after_a_stop(corpus: Path, tmp_path: Path) -> None:
    folder = damaged(corpus, tmp_path / "train", 1)
    configs = []
    for name, case in (
        ("two", Case(1, False, 1, 1, 2, zero=1)),
        ("stages", Case(1, False, 2, 1, 1, zero=1)),
    ):
        config = run_config(case, folder, tmp_path / name, "fp32")
        config["model"] |= {"num_query_groups": 4}
        config["training"]["steps"] = 60
        config["optimizer"]["lr"] = 1e-4
        config["data"] |= {"on_error": "skip", "max_skipped": 0.5}
        config["checkpoint"] = {"interval": 40}
        configs.append(config)
    train(configs[0], 2, tmp_path)
    stream = Stream([(str(folder), 1.0)], SEQUENCE, 7, Reading(on_error="skip", max_skipped=0.5))
    stream.read(range(60 * BATCH))
    wanted = [stream.left_out((step + 1) * BATCH).replaced for step in range(60)]
    assert wanted[-1] > wanted[40] > 0
    assert figures(tmp_path / "two", "data_replaced_sequences") == wanted
    assert figures(tmp_path / "two", "data_skipped_samples")[-1] == 1
    shutil.copytree(tmp_path / "two", tmp_path / "stages")
    shutil.rmtree(tmp_path / "stages" / "checkpoints" / "step_00000060")
    train(configs[1], 2, tmp_path)
    assert figures(tmp_path / "stages", "data_replaced_sequences") == wanted
    assert figures(tmp_path / "stages", "data_skipped_samples")[40:] == [1] * 20
    assert len((tmp_path / "stages" / "skipped.jsonl").read_text().splitlines()) == 1

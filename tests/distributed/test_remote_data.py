"""A run whose data lies in an S3-compatible store, and one whose shard is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.test_matrix import run_config, train


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    """The environment that leads to a server on the loopback, which has a bucket `data`."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    patch = pytest.MonkeyPatch()
    for name, value in environment.items():
        patch.setenv(name, value)
    # Servers of one process share what they hold.
    fsspec.filesystem("s3", skip_instance_cache=True).makedirs("data", exist_ok=True)
    yield environment
    patch.undo()
    server.stop()


def losses(config: dict[str, Any]) -> list[float]:
    path = Path(config["run"]["output_dir"]) / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_a_run_reads_from_a_store_what_it_reads_from_a_folder(
    store: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    case = Case(1, False, 1, 1, 2, zero=1)
    here = run_config(case, corpus, tmp_path / "here", "fp32")
    train(here, 2, tmp_path)
    fsspec.filesystem("s3", skip_instance_cache=True).put(str(corpus), "data/train", recursive=True)
    there = run_config(case, corpus, tmp_path / "there", "fp32")
    there["data"] |= {"train": [{"path": "s3://data/train"}], "cache": str(tmp_path / "cache"), "cache_gib": 0.1}
    (tmp_path / "there.yaml").write_text(yaml.safe_dump(there))
    outcomes = in_processes(2, command, "pretrain", str(tmp_path / "there.yaml"), environment=lambda rank: store)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].output[-3000:]
    assert losses(there) == losses(here)
    row = json.loads((tmp_path / "there" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["data_bytes_fetched"] > 0
    there["data"]["train"] = [{"path": "s3://data/gone"}]
    (tmp_path / "there.yaml").write_text(yaml.safe_dump(there))
    (outcome,) = in_processes(1, command, "pretrain", str(tmp_path / "there.yaml"), environment=lambda rank: store)
    assert outcome.exit_code == 2
    assert "s3://data/gone" in outcome.output and "Traceback" not in outcome.output


def test_checkpoints_in_a_store_are_written_and_resumed_on_another_layout(
    store: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    one, two = Case(1, False, 1, 1, 2, zero=2, tied=True), Case(2, True, 1, 1, 1, zero=1, tied=True)
    here = run_config(one, corpus, tmp_path / "here", "fp32")
    here["model"]["num_query_groups"] = 4
    here["schedule"] = {"name": "constant"}
    train(here, 2, tmp_path)
    for steps, case in ((2, one), (5, two)):
        there = run_config(case, corpus, tmp_path / "there", "fp32")
        there["model"]["num_query_groups"] = 4
        there["training"]["steps"] = steps
        there["schedule"] = {"name": "constant"}
        there["checkpoint"] = {"interval": 2, "folder": "s3://data/saved"}
        (tmp_path / "there.yaml").write_text(yaml.safe_dump(there))
        outcomes = in_processes(2, command, "pretrain", str(tmp_path / "there.yaml"), environment=lambda rank: store)
        assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].output[-3000:]
    assert "resumed from s3://data/saved/step_00000002 at step 2" in " ".join(outcomes[0].output.split())
    assert not (tmp_path / "there" / "checkpoints").exists()
    assert losses(there) == pytest.approx(losses(here), rel=1e-5)


def test_a_broken_sample_stops_the_run_or_is_left_out_on_every_layout_alike(corpus: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(corpus, tmp_path / "train"))
    shard = sorted(folder.glob("*.tar"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    found = []
    for case in (Case(1, False, 1, 1, 2, zero=1), Case(1, False, 2, 1, 1, zero=1)):
        config = run_config(case, folder, tmp_path / f"run{len(found)}", "fp32")
        config["model"] |= {"num_query_groups": 4}
        config["training"]["steps"] = 60  # a quarter of the corpus: the broken sample is met
        config["optimizer"]["lr"] = 1e-4
        config["checkpoint"] = {"interval": 60}
        path = tmp_path / f"run{len(found)}.yaml"
        path.write_text(yaml.safe_dump(config))
        outcomes = in_processes(2, command, "pretrain", str(path))
        assert 1 in [outcome.exit_code for outcome in outcomes]
        assert any(shard.name in outcome.output and "sample 0000" in outcome.output for outcome in outcomes)
        config["data"] |= {"on_error": "skip", "max_skipped": 0.5}
        config["checkpoint"]["resume"] = "never"
        train(config, 2, tmp_path)
        found.append(losses(config))
        rows = (Path(config["run"]["output_dir"]) / "skipped.jsonl").read_text().splitlines()
        assert {json.loads(row)["shard"] for row in rows} == {shard.name} or all(shard.name in row for row in rows)
        last = json.loads((Path(config["run"]["output_dir"]) / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["data_skipped_samples"] == 1
        assert last["data_replaced_sequences"] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-4)

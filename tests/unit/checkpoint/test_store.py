"""Checkpoints in a store: a real S3-compatible server on the loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from click.testing import CliRunner

from llmscale.checkpoint.format import Checkpoint, Damaged
from llmscale.checkpoint.place import place_of
from llmscale.checkpoint.retention import abandon, candidates, checkpoints, prune
from llmscale.checkpoint.save import Saver
from llmscale.cli.checkpoint import command
from llmscale.errors import CheckpointError, UsageError
from tests.ports import free_ports
from tests.unit.checkpoint.saving import newest_whole
from tests.unit.data.servers import endpoint, s3

from .test_checkpoint import FACTS, RANDOM, assert_is, fragments, read_all

__all__ = ["s3"]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(s3: Any, request: pytest.FixtureRequest) -> Iterator[Path]:
    with endpoint(f"http://127.0.0.1:{s3[0]}"):
        yield place_of(f"s3://data/{request.node.name}/checkpoints")


def save(folder: Path, *steps: int) -> None:
    saver = Saver(folder, asynchronous=True)
    for step in steps:
        saver.save(step, fragments(step), RANDOM, FACTS)
    ended = saver.wait()
    assert ended is not None and ended.error is None, ended


def test_what_is_read_is_what_was_saved_and_the_commands_work(folder: Path) -> None:
    save(folder, 1, 2, 3)
    found = newest_whole(folder)
    assert found is not None and found.step == 3
    assert_is(found, 3)
    read_all(found)
    assert [one.step for one in candidates("auto", folder)] == [3, 2, 1]
    assert [one.step for one in candidates(f"{folder}/step_00000002", folder)] == [2]
    run = CliRunner()
    listed = json.loads(run.invoke(command, ["list", str(folder), "--json"]).stdout)
    assert [row["step"] for row in listed] == [1, 2, 3]
    assert json.loads(run.invoke(command, ["inspect", str(folder.parent), "--json"]).stdout)["step"] == 3
    assert run.invoke(command, ["verify", str(folder.parent)]).exit_code == 0
    assert [path.name for path in prune(folder, 1, folder / "step_00000003")] == ["step_00000001", "step_00000002"]
    assert [path.name for path in checkpoints(folder)] == ["step_00000003"]
    # The same step again takes its name.
    save(folder, 3)
    assert_is(Checkpoint(folder / "step_00000003"), 3)
    assert_is(Checkpoint(folder / "abandoned_step_00000003"), 3)
    save(folder, 4)
    (moved,) = abandon(folder, folder / "step_00000003")
    assert_is(Checkpoint(moved), 4)
    assert [one.step for one in candidates("auto", folder)] == [3]


def test_damage_is_found_and_a_step_without_its_manifest_is_not_whole(folder: Path, s3: Any) -> None:
    save(folder, 1, 2)
    path = folder / "step_00000002" / "rank_00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + b"x" + whole[-39:])
    with pytest.raises(Damaged, match=r"rank_00000\.safetensors: .* was altered"):
        read_all(Checkpoint(path.parent))
    result = CliRunner().invoke(command, ["verify", str(path.parent)])
    assert isinstance(result.exception, CheckpointError) and "rank_00000.safetensors" in str(result.exception)
    path.write_bytes(whole[:-40])
    found = newest_whole(folder)
    assert found is not None and found.step == 1
    (folder / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        list(candidates("auto", folder))


def test_a_store_that_refuses_fails_the_save_and_no_more(folder: Path, s3: Any) -> None:
    saver = Saver(place_of("s3://no-such-bucket/checkpoints"), asynchronous=True)
    saver.save(1, fragments(1), RANDOM, FACTS)
    ended = saver.wait()
    assert ended is not None and ended.error is not None
    assert "step_00000001" in ended.error and "on rank 0; older checkpoints are untouched" in ended.error
    save(folder, 1)


@pytest.mark.parametrize("credentials", [True, False], ids=["nobody-listens", "no-credentials"])
def test_a_store_that_is_out_of_reach_is_no_damage_and_no_empty_folder(
    credentials: bool, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with endpoint(f"http://127.0.0.1:{free_ports() if credentials else s3[0]}"):
        if not credentials:
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        folder = place_of(f"s3://data/none-{credentials}/checkpoints")
        for look in (
            lambda: list(candidates("auto", folder)),
            lambda: list(candidates(f"{folder}/step_00000001", place_of("none"))),
            lambda: Checkpoint(folder / "step_00000001"),
        ):
            with pytest.raises(CheckpointError, match="cannot be read now") as caught:
                look()
            assert not isinstance(caught.value, Damaged)
        result = CliRunner().invoke(command, ["list", str(folder)])
        assert isinstance(result.exception, CheckpointError), result.exception


def test_a_url_that_nothing_knows_is_refused() -> None:
    with pytest.raises(UsageError, match=r"strange://x: cannot be reached"):
        place_of("strange://x")
    result = CliRunner().invoke(command, ["list", "none/here"])
    assert isinstance(result.exception, UsageError)

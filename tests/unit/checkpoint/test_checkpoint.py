"""A checkpoint on the disk: any damage is found and named, and a save that fails or is killed leaves the older ones."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from llmscale.checkpoint.format import WEIGHT, Checkpoint, Damaged, Fragment
from llmscale.checkpoint.place import is_remote, place_of
from llmscale.checkpoint.retention import candidates, checkpoints, prune
from llmscale.checkpoint.save import Saved, Saver
from llmscale.cli.checkpoint import command
from llmscale.config.schema import Model
from llmscale.errors import CheckpointError, UsageError
from llmscale.models.cut import local_shape
from llmscale.models.family import families
from tests.unit.checkpoint.saving import newest_whole, save

MODEL = Model(
    family="llama", num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=90,
    max_position_embeddings=32,
)  # fmt: skip
FACTS: dict[str, Any] = {
    "tokens": 640, "data": None, "layout": {"tensor": 1}, "versions": {"torch": torch.__version__},
    "config": {"model": MODEL.model_dump(mode="json"), "training": {"precision": "fp32"}},
}  # fmt: skip
RANDOM = {"cpu": torch.get_rng_state()}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


def fragments(seed: int, pieces: int = 3) -> list[Fragment]:
    """All weights of the model with Adam's state, each cut into runs as ZeRO may cut them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for weight in families()[MODEL.family].parameters(MODEL, MODEL.vocab_size or 0):
        size = torch.Size(local_shape(weight, 1)).numel()
        states = {name: torch.randn(size, generator=generator) for name in (WEIGHT, "exp_avg", "exp_avg_sq")}
        bounds = [size * number // pieces for number in range(pieces + 1)]
        for low, high in itertools.pairwise(bounds):
            part = {name: tensor[low:high] for name, tensor in states.items()}
            found.append(Fragment(weight, 0, 1, low, part))
    return found


@pytest.fixture(scope="module")
def whole(group: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (1, 2):
        save(folder, step, fragments(step), RANDOM, FACTS)
    return folder.parent


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.weights:
        for state in checkpoint.states:
            checkpoint.whole(name, state)
    checkpoint.random_state("rank_00000.safetensors")


def assert_is(checkpoint: Checkpoint, seed: int) -> None:
    saved: dict[str, list[Fragment]] = {}
    for one in fragments(seed):
        saved.setdefault(one.weight.name, []).append(one)
    for name, parts in saved.items():
        for state in checkpoint.states:
            local = torch.cat([part.tensors[state] for part in parts]).view(local_shape(parts[0].weight, 1))
            assert torch.equal(checkpoint.whole(name, state), local[: parts[0].weight.shape[0]])


def test_what_is_read_is_what_was_saved(run: Path) -> None:
    assert_is(Checkpoint(run / "checkpoints" / "step_00000002"), 2)
    result = CliRunner().invoke(command, ["verify", str(run), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["whole"] is True
    assert not list((run / "checkpoints").glob(".*"))


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "index.json", "manifest.json"])
def test_any_flipped_bit_is_found_and_its_file_named(name: str, run: Path) -> None:
    path = run / "checkpoints" / "step_00000002" / name
    draw = random.Random(name)
    head = 8 + int.from_bytes(path.read_bytes()[:8], "little") if name.endswith("tensors") else 0
    for number in range(40):
        # Half of them in the header of a file of tensors, which is a small part of it.
        place = draw.randrange(head) if head and number % 2 else draw.randrange(path.stat().st_size)
        bit = draw.randrange(8)
        flip(path, place, bit)
        result = CliRunner().invoke(command, ["verify", str(path.parent)])
        assert isinstance(result.exception, CheckpointError), (place, bit)
        assert result.exception.exit_code == 1
        assert name in str(result.exception), (place, bit, str(result.exception))
        flip(path, place, bit)
    assert CliRunner().invoke(command, ["verify", str(path.parent)]).exit_code == 0


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "index.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 100)], ids=["gone", "cut"]
)
def test_what_is_missing_or_cut_short_is_named_and_the_older_one_taken(
    damage: Callable[[Path], None], name: str, run: Path
) -> None:
    path = run / "checkpoints" / "step_00000002" / name
    damage(path)
    result = CliRunner().invoke(command, ["verify", str(run)])
    assert isinstance(result.exception, CheckpointError) and name in str(result.exception)
    found = newest_whole(run / "checkpoints")
    assert found is not None and found.step == 1
    listed = json.loads(CliRunner().invoke(command, ["list", str(run), "--json"]).stdout)
    assert [name in row.get("broken", "") for row in listed] == [False, True]


def test_a_flipped_bit_is_found_when_it_is_read(run: Path) -> None:
    path = run / "checkpoints" / "step_00000002" / "rank_00000.safetensors"
    flip(path, path.stat().st_size // 2, 3)
    with pytest.raises(Damaged, match=r"rank_00000\.safetensors: .* was altered \(its checksum differs\)"):
        read_all(Checkpoint(path.parent))


def test_a_run_never_begins_anew_beside_broken_checkpoints(run: Path) -> None:
    folder = run / "checkpoints"
    for path in checkpoints(folder):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole; .* checkpoint\.resume to never"):
        list(candidates("auto", folder))
    assert list(candidates("never", folder)) == []
    assert list(candidates("auto", run / "none")) == []
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume: .*holds no whole checkpoint"):
        list(candidates(str(run / "none"), folder))


def test_damage_to_the_formats_number_is_damage(run: Path) -> None:
    path = run / "checkpoints" / "step_00000002" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 2', b'"format": 0', 1))
    found = newest_whole(run / "checkpoints")
    assert found is not None and found.step == 1
    path.write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="format 1, this llmscale reads 2") as caught:
        Checkpoint(path.parent)
    assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "index.json", "manifest.json"])
def test_what_cannot_be_read_for_now_does_not_pass_for_damage(name: str, run: Path) -> None:
    """The process may open no more files: whole checkpoints must not be passed over for that."""
    path = run / "checkpoints" / "step_00000002"
    opened = Checkpoint(path)
    if name != "index.json":
        opened.index  # noqa: B018
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be read now .Too many open files.*try again") as caught:
            read_all(Checkpoint(path) if name == "manifest.json" else opened)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not isinstance(caught.value, Damaged) and name in str(caught.value)
    read_all(opened)


def test_verify_looks_at_all_checkpoints_of_a_run_and_a_step_without_its_manifest_is_broken(run: Path) -> None:
    folder = run / "checkpoints"
    flip(folder / "step_00000001" / "index.json", 50, 1)
    found = json.loads(CliRunner().invoke(command, ["verify", str(run), "--json"]).stdout)
    assert [row["whole"] for row in found["checkpoints"]] == [False, True] and found["whole"] is False
    result = CliRunner().invoke(command, ["verify", str(run)])
    assert isinstance(result.exception, CheckpointError) and "step_00000002: whole" in result.stdout
    (folder / "step_00000001" / "manifest.json").unlink()
    result = CliRunner().invoke(command, ["verify", str(folder / "step_00000001")])
    assert isinstance(result.exception, CheckpointError) and result.exception.exit_code == 1
    assert "no manifest.json" in str(result.exception)


@pytest.mark.parametrize("url", ["file://", "memory://", ""])
def test_any_url_is_written_to_and_a_run_directory_knows_where_its_checkpoints_are(
    url: str, group: None, tmp_path: Path
) -> None:
    folder, run = f"{url}{tmp_path}/not/there/yet", tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"checkpoint:\n  folder: {folder}\n")
    assert is_remote(place_of(folder)) == (url == "memory://")  # a folder is renamed and synced, whatever it is called
    save(place_of(folder), 1, fragments(1), RANDOM, FACTS)
    assert [one.step for one in candidates(str(run), tmp_path / "none")] == [1]
    (row,) = json.loads(CliRunner().invoke(command, ["list", str(run), "--json"]).stdout)
    assert row["step"] == 1
    assert CliRunner().invoke(command, ["verify", str(run)]).exit_code == 0


def test_list_and_inspect_read_no_tensors(run: Path) -> None:
    os.truncate(run / "checkpoints" / "step_00000002" / "rank_00000.safetensors", 0)
    step = run / "checkpoints" / "step_00000001"
    size = (step / "rank_00000.safetensors").stat().st_size
    (step / "rank_00000.safetensors").write_bytes(bytes(size))
    result = CliRunner().invoke(command, ["inspect", str(step), "--json"])
    about = json.loads(result.stdout)
    assert about["step"] == 1 and about["tokens"] == 640 and about["layout"] == {"tensor": 1}
    assert about["weights"]["embedding.word_embeddings.weight"] == [90, 32]
    assert isinstance(CliRunner().invoke(command, ["inspect", str(run / "none")]).exception, UsageError)


def test_a_full_disk_leaves_the_older_ones_and_no_half(run: Path) -> None:
    """The kernel refuses files beyond a size, as a full disk refuses them: in the middle of a write."""
    folder = run / "checkpoints"
    saver = Saver(folder, asynchronous=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        assert saver.save(3, fragments(3), RANDOM, FACTS) is None
        ended = saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert ended is not None and ended.error is not None
    assert "step_00000003: the checkpoint cannot be written: File too large on rank 0" in ended.error
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000002"]
    # The next one succeeds.
    saver.save(4, fragments(4), RANDOM, FACTS)
    ended = saver.wait()
    assert ended is not None and ended.error is None
    assert_is(Checkpoint(folder / "step_00000004"), 4)


def test_keep_counts_whole_checkpoints_and_never_removes_the_one_just_saved(run: Path) -> None:
    folder = run / "checkpoints"
    os.truncate(folder / "step_00000002" / "rank_00000.safetensors", 100)
    saver = Saver(folder, asynchronous=True, committed=partial(prune, folder, 2))
    names = []
    for step in (5, 4, 6):
        saver.save(step, fragments(step), RANDOM, FACTS)
        saver.wait()
        names.append([path.name[-1] for path in checkpoints(folder)])
    assert names == [["1", "2", "5"], ["1", "2", "4", "5"], ["5", "6"]]


def test_what_cannot_be_removed_is_a_warning_and_a_link_loses_no_more_than_itself(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoints"
    (folder / "step_00000002").rename(run / "elsewhere")
    (folder / "step_00000002").symlink_to(run / "elsewhere")
    saver = Saver(folder, asynchronous=True, committed=partial(prune, folder, 1))
    saver.save(3, fragments(3), RANDOM, FACTS)
    ended = saver.wait()
    assert ended is not None and ended.error is None
    assert [path.name for path in folder.iterdir()] == ["step_00000003"]
    assert_is(Checkpoint(run / "elsewhere"), 2)
    (folder / ".step_00000003.removed").write_text("in the way")
    saver.save(4, fragments(4), RANDOM, FACTS)
    ended = saver.wait()
    assert ended is not None and ended.error is None
    assert "step_00000004 is saved; older checkpoints could not be removed" in caplog.text


def test_the_same_step_again_removes_no_whole_checkpoint(run: Path) -> None:
    folder = run / "checkpoints"
    for seed in (3, 4):
        save(folder, 2, fragments(seed), RANDOM, FACTS)
    for name, seed in {"step_00000002": 4, "abandoned_step_00000002": 2, "abandoned_step_00000002_2": 3}.items():
        assert_is(Checkpoint(folder / name), seed)


def test_what_killed_saves_left_is_swept_away(run: Path) -> None:
    folder = run / "checkpoints"
    for name in (".step_00000007.tmp", ".step_00000001.removed"):
        (folder / name).mkdir()
        (folder / name / "rank_00000.safetensors").write_bytes(bytes(9))
    Saver(folder, asynchronous=True)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000002"]


def test_training_goes_on_while_a_save_is_written(tmp_path: Path) -> None:
    """What is saved is the state at the call, whatever becomes of it meanwhile; one save at a time, in order."""
    saver = Saver(tmp_path, asynchronous=True)
    told: list[Saved | None] = []
    for step in range(1, 6):
        state = fragments(step)
        told.append(saver.save(step, state, RANDOM, FACTS))
        for one in state:
            for tensor in one.tensors.values():
                tensor.fill_(float("nan"))
    while (last := saver.poll()) is None:
        time.sleep(0.001)
    assert [one.step for one in [*told[1:], last] if one and one.error is None] == [1, 2, 3, 4, 5]
    assert saver.poll() is saver.wait() is None
    for step in range(1, 6):
        assert_is(Checkpoint(tmp_path / f"step_{step:08d}"), step)


def save_for_ever(folder: Path, asynchronous: bool, step: int, ready: Any) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    saver = Saver(folder, asynchronous)
    states = [fragments(number) for number in range(1, 5)]
    ready.set()
    while True:
        step += 1
        saver.save(step, states[step % 4], RANDOM, FACTS)


def test_kill_9_at_twenty_moments_of_saving_leaves_whole_checkpoints_alone(tmp_path: Path) -> None:
    step, draw = 0, random.Random(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for number in range(20):
        ready = context.Event()
        process = context.Process(target=save_for_ever, args=(tmp_path, number % 2 == 1, step, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(draw.uniform(0.0, 0.1))
        process.kill()
        process.join()
        there = checkpoints(tmp_path)
        newest = int(there[-1].name.removeprefix("step_")) if there else 0
        assert newest >= step
        if there:
            found = newest_whole(tmp_path)
            assert found is not None and found.step == newest  # what has its name is whole
            assert list(found.problems()) == []
            assert_is(found, 1 + newest % 4)
        step = newest
        for path in there[:-1]:
            shutil.rmtree(path)
    assert step > 5  # it did save in between

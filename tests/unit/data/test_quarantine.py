"""Broken data: the run stops and says where, or goes on without, in one way for all readers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmscale.data.cache import Cache
from llmscale.data.order import Order
from llmscale.data.shards import SplitWriter
from llmscale.data.split import Split
from llmscale.data.token_source import TokenSource
from llmscale.errors import DataError, UsageError

LENGTHS = [(number * 7) % 50 for number in range(60)]
SAMPLE, WINDOW, SEED = 64, 3, 5


def source(place: Path | str, length: int = 16, cache: Cache | None = None, **options: Any) -> TokenSource:
    return TokenSource(
        Split(place, cache), length, SEED, 8, **{"shuffle_window": WINDOW, "max_skipped": 1.0, **options}
    )


def read(one: TokenSource, ordinals: Sequence[int] | None = None, length: int = 16) -> np.ndarray:
    wanted = np.arange(one.sequences) if ordinals is None else np.array(ordinals)
    out = np.zeros((len(wanted), length + 1), dtype=one.dtype)
    one.read(wanted, np.arange(len(wanted)), out)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    writer = SplitWriter(folder, "uint16", 0, SAMPLE, 3)
    first = 1
    for length in LENGTHS:
        writer.add(np.arange(first, first + length, dtype=np.uint16), True, True)
        first += length
    writer.finish(b"{}", 2000)
    return folder


def place_of(folder: Path, sample: int) -> tuple[Path, int]:
    """The shard of a sample, and where its tokens begin."""
    shard = Split(folder).shards[sample // 3]
    return folder / shard.name, shard.offsets[sample % 3]


def flip(folder: Path, sample: int, at: int = 11) -> None:
    path, offset = place_of(folder, sample)
    data = bytearray(path.read_bytes())
    data[offset + at] ^= 1
    path.write_bytes(data)


def expected(folder: Path, broken: set[int], length: int) -> np.ndarray:
    """One epoch by the rule: what needs a broken sample gives way to the next sound sequence of its window."""
    split = Split(folder)
    good = source(folder, length)
    order = Order(good.sequences, max(1, SAMPLE // length), WINDOW, SEED)
    sequences = order.sequences(np.arange(order.size), 0).tolist()
    rows = read(good, length=length)

    def sound(sequence: int) -> bool:
        start = sequence * length
        return not broken & set(range(start // SAMPLE, (start + length) // SAMPLE + 1))

    found = []
    for place in range(order.size):
        first, end = order.window_of(place)
        turn = [first + (place - first + step) % (end - first) for step in range(end - first)]
        found.append(rows[next(other for other in turn if sound(sequences[other]))])
    assert split.card.samples > max(broken, default=0)
    return np.array(found)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_takes_the_place_of_broken_samples_does_not_depend_on_who_reads(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("broken") / "split"
    shutil.copytree(whole, folder)
    length = data.draw(st.sampled_from([5, 16, 32, 64, 100]))
    broken = set(data.draw(st.lists(st.integers(1, 20), max_size=3, unique=True)))
    try:
        wanted = expected(folder, broken, length)
    except StopIteration:  # a window without a sound sequence: another test
        return
    for sample in broken:
        flip(folder, sample)
    ranks = data.draw(st.sampled_from([1, 2, 3]))
    seen = np.zeros_like(wanted)
    for rank in range(ranks):
        one = source(folder, length, on_error="skip")
        ordinals = list(range(rank, len(wanted), ranks))
        while ordinals:
            count = data.draw(st.integers(1, 20))
            taken, ordinals = ordinals[:count], ordinals[count:]
            seen[taken] = read(one, taken, length)
    assert np.array_equal(seen, wanted)


def test_a_broken_sample_stops_the_run_with_shard_and_sample(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    flip(folder, 4)
    with pytest.raises(
        DataError,
        match=r"split/shard-00001\.tar: sample 000000004: its checksum differs .* since it was indexed; copy ",
    ):
        read(source(folder))
    assert read(source(folder, verify="never")).shape[1] == 17


@pytest.mark.parametrize("remote", [False, True])
def test_the_first_token_of_a_broken_sample_is_nobodys_label(remote: bool, whole: Path, tmp_path: Path) -> None:
    """It is an id like any other, and only the checksum of its sample tells."""
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    flip(folder, 3, at=0)
    place, cache = str(folder), None
    if remote:
        memory = fsspec.filesystem("memory")
        for path in folder.iterdir():
            memory.pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
        place, cache = f"memory://{tmp_path.name}", Cache(tmp_path / "cache", 1 << 20)
    before = 3 * SAMPLE // 16 - 1
    order = Order(source(whole).sequences, SAMPLE // 16, WINDOW, SEED)
    where = order.sequences(np.arange(order.size), 0).tolist().index(before)
    found = source(place, cache=cache, on_error="skip")
    assert np.array_equal(read(found, [where]), expected(whole, {3}, 16)[[where]])
    assert not np.array_equal(read(found, [where]), read(source(whole), [where]))
    found.close()


@pytest.mark.parametrize("target", ["shard-00001.tar", "/proc/self/mem"])  # ELOOP when opened, EIO when read
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_what_this_machine_cannot_read_stops_the_run_and_breaks_nothing(
    on_error: Any, target: str, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    one = source(folder, on_error=on_error, report=tmp_path / "report")
    (folder / "shard-00001.tar").unlink()
    (folder / "shard-00001.tar").symlink_to(target)
    wanted = r"shard-00001\.tar: cannot be read on this machine: .*; check its file system"
    if on_error == "stop" and target == "/proc/self/mem":  # its size is looked at first
        wanted = r"shard-00001\.tar: sample .* the shard has 0 bytes"
    with pytest.raises(DataError, match=wanted):
        read(one)
    assert one.counters()["skipped_samples"] == 0
    assert not (tmp_path / "report").exists()


def cut(folder: Path) -> None:
    path, offset = place_of(folder, 4)
    path.write_bytes(path.read_bytes()[: offset + 20])


def remove(folder: Path) -> None:
    place_of(folder, 4)[0].unlink()


def other_dtype(folder: Path) -> None:
    path, offset = place_of(folder, 4)
    data = path.read_bytes()
    header = data[offset - 128 : offset].replace(b"<u2", b"<i2")
    path.write_bytes(data[: offset - 128] + header + data[offset:])


def unreadable_documents(folder: Path) -> None:
    path, offset = place_of(folder, 4)
    data = bytearray(path.read_bytes())
    data[offset + 128 + 512 + 256] ^= 1  # the magic number of the documents' .npy
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut, "cut short: 10 of 64 tokens are there"),
        (remove, "the shard is missing"),
        (other_dtype, "its .npy header is not that of 64 tokens of uint16"),
        (unreadable_documents, "its documents are not where they should be, or are no array of uint32"),
    ],
)
def test_skipping_counts_and_reports_every_way_to_be_broken(
    harm: Callable[[Path], None], reason: str, whole: Path, tmp_path: Path
) -> None:
    folder, report = tmp_path / "split", tmp_path / "report.jsonl"
    shutil.copytree(whole, folder)
    harm(folder)
    with pytest.raises(DataError, match=r"shard-00001\.tar: .*; copy the folder again, or build it again"):
        read(source(folder))
    one = source(folder, on_error="skip", report=report)
    read(one)
    read(one)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    shard = str(folder / "shard-00001.tar")
    assert [line["sample"] for line in lines] == sorted({line["sample"] for line in lines})
    assert {(line["shard"], line["url"]) for line in lines} == {("shard-00001.tar", shard)}
    assert reason in next(line["reason"] for line in lines if line["sample"] == "000000004")
    assert one.counters()["skipped_samples"] == len(lines)
    assert one.counters()["replaced_sequences"] >= 2 * 4 * len(lines)
    broken = {int(line["sample"]) for line in lines}
    assert np.array_equal(read(one), expected(whole, broken, 16))


def test_more_broken_samples_than_allowed_stop_the_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    flip(folder, 4)
    read(source(folder, on_error="skip", max_skipped=0.0))
    flip(folder, 9)
    with pytest.raises(DataError, match=r"shard-00003\.tar: sample 000000009: .*; 2 samples are broken, .* at most 1 "):
        read(source(folder, on_error="skip", max_skipped=0.0))


def test_a_window_without_a_sound_sample_stops_the_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    for sample in range(Split(folder).card.samples):
        flip(folder, sample, at=1)
    with pytest.raises(DataError, match=r"split: no sample of a whole shuffle window is sound"):
        read(source(folder, on_error="skip"))


def test_skipping_without_checking_is_refused(whole: Path) -> None:
    with pytest.raises(UsageError, match=r"on_error: skip needs verify: first"):
        source(whole, on_error="skip", verify="never")


def test_a_report_that_cannot_be_written_is_no_silence(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    flip(folder, 4)
    (tmp_path / "none").touch()
    with pytest.raises(DataError, match=r"none/report: the report of what is broken cannot be written: "):
        read(source(folder, on_error="skip", report=tmp_path / "none/report"))


def test_a_shard_that_is_cut_while_it_is_open_is_an_error_and_no_crash(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    one = source(folder)
    read(one)
    for path in folder.glob("*.tar"):
        with path.open("r+b") as file:
            file.truncate(700)
    with pytest.raises(DataError, match=r"shard-0000\d\.tar: sample \d+(:| was) cut short"):
        read(one)


def test_ids_beyond_the_vocabulary_are_found_without_checksums_too(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    flip(folder, 4, at=1)  # 256 more or less
    flip(folder, 5, at=41)
    path, offset = place_of(folder, 4)
    data = bytearray(path.read_bytes())
    data[offset + 40 : offset + 42] = (2000).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00001\.tar: sample 000000004: holds the id 2000, .* has 2000; "):
        read(source(folder, verify="never"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../shard-00000.tar"}, r"index\.json: shards\.0: '\.\./shard-00000\.tar' is not a plain file name"),
        ({"name": "/etc/passwd"}, r"'/etc/passwd' is not a plain file name"),
        ({"name": "a;rm -rf b"}, r"'a;rm -rf b' is not a plain file name"),
        ({"name": "$(id).tar"}, r"is not a plain file name"),
        ({"name": ".."}, r"is not a plain file name"),
        ({"name": "shard-00001.tar"}, r"index\.json: lists a shard twice"),
        ({"bytes": 1 << 60}, r"shards\.0\.bytes: Input should be less than or equal to"),
        (
            {"bytes": 1 << 41},
            r"index\.json: shards\.0\.bytes: 2199023255552 are more than 3 samples of 64 tokens take; ",
        ),
        ({"bytes": -1}, r"shards\.0\.bytes: "),
        ({"offsets": [640, 640, 640]}, r"shards\.0: offsets beyond the shard, out of order, or without checksums"),
        ({"offsets": [-640, 640, 6400]}, r"shards\.0: offsets beyond the shard"),
        ({"offsets": [640, 10**9, 2 * 10**9]}, r"shards\.0: offsets beyond the shard"),
        ({"offsets": [10**30, 1, 2]}, r"shards\.0: offsets beyond the shard"),
        ({"offsets": []}, r"shards\.0: offsets beyond the shard"),
        ({"checksums": [1]}, r"shards\.0: offsets beyond the shard, .*without checksums"),
    ],
)
def test_an_index_that_leads_elsewhere_or_is_absurd_is_refused(
    change: dict[str, Any], message: str, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0].update(change)
    (folder / "index.json").write_text(json.dumps(index))
    card = json.loads((folder / "card.json").read_text())
    card["index_sha256"] = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match=message):
        Split(folder)


def test_a_broken_sample_behind_a_command_is_fetched_again_and_then_left_out(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(whole, folder)
    flip(folder, 4)
    url = f"pipe:cat {folder}/{{name}}"
    with pytest.raises(DataError, match=r"pipe:cat .*/shard-00001\.tar: sample 000000004: its checksum differs"):
        read(source(url, cache=Cache(tmp_path / "cache", 1 << 20)))
    one = source(url, cache=Cache(tmp_path / "cache", 1 << 20), on_error="skip")
    assert np.array_equal(read(one), expected(whole, {4}, 16))


def test_a_cache_that_cannot_be_opened_is_said_and_breaks_nothing(whole: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 20)
    one = source(f"pipe:cat {whole}/{{name}}", cache=cache, on_error="skip")
    read(one)
    for name in ("shard-00000.tar", "shard-00001.tar"):
        path = cache.path(one._split.key, name)
        path.unlink()
        path.symlink_to(name)
    with pytest.raises(DataError, match=r"cache: the cache cannot be opened: .*; check its file system"):
        read(one)
    assert one.counters()["skipped_samples"] == 0
    one.close()

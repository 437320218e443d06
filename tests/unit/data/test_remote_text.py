"""Raw-text shards in a store: a real S3-compatible server on the loopback, behind a proxy that misbehaves when told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from llmscale.cli.data import command
from llmscale.data.cache import Cache
from llmscale.data.describe import describe
from llmscale.data.store import Patience
from llmscale.data.stream import Reading, Stream
from llmscale.data.text_shards import TextSplit
from llmscale.data.text_source import TextSource
from llmscale.data.verify import verify
from llmscale.errors import DataError, UsageError

from .conftest import sentence
from .servers import Proxy, proxy, s3, upload
from .test_text_source import write_shard

__all__ = ["proxy", "s3"]
CALM = Patience(attempt_seconds=60.0, total_seconds=120.0, first_delay_seconds=0.02, longest_delay_seconds=0.1)
HASTY = Patience(attempt_seconds=0.3, total_seconds=1.0, first_delay_seconds=0.02, longest_delay_seconds=0.1)
ROWS = 300


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmscale.data.describe.PIECE_BYTES", 6000)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members = [(f"{number:03d}.txt", (sentence(number) * 2).encode()) for number in range(shard, 90, 3)]
        write_shard(folder / f"shard-{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def place(s3: Any, shards: Path) -> str:
    """The URL of the folder of the shards."""
    return upload(s3[1], shards, "text")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 20)


@pytest.fixture
def described(place: str, proxy: Proxy, tokenizer_json: Path, tmp_path: Path) -> Path:
    """A description, here, of the shards there."""
    describe([f"{place}/*.tar"], tokenizer_json, tmp_path / "described", streams=4)
    proxy.requests.clear()
    return tmp_path / "described"


@pytest.fixture
def local(shards: Path, tokenizer_json: Path, tmp_path: Path) -> np.ndarray:
    """The sequences that the shards in a folder give."""
    describe([str(shards)], tokenizer_json, tmp_path / "local", streams=4)
    stream = Stream([(str(tmp_path / "local"), 1.0)], 16, seed=5)
    rows = stream.read(range(ROWS))
    stream.close()
    return rows


def source(split: TextSplit, **options: Any) -> TextSource:
    return TextSource(split, 16, 5, **options)


def read(one: TextSource) -> np.ndarray:
    out = np.zeros((ROWS, 17), dtype=one.dtype)
    one.read(np.arange(ROWS), np.arange(ROWS), out)
    return out


def fetched_of(proxy: Proxy) -> int:
    return sum(count for name, count in proxy.requests.items() if name.endswith(".tar"))


def test_a_store_gives_the_sequences_of_the_folder_and_each_piece_once(
    described: Path, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    for _ in range(2):  # the second time from the cache
        one = source(TextSplit(described, lambda: cache, CALM))
        assert np.array_equal(read(one), local)
        one.close()
    assert fetched_of(proxy) == one._split.card.pieces > 6
    assert cache.counters.as_dict()["cache_misses"] == one._split.card.pieces
    assert cache.counters.as_dict()["cache_hits"] >= one._split.card.pieces


def test_the_description_may_lie_beside_the_shards(
    described: Path, shards: Path, tokenizer_json: Path, proxy: Proxy, s3: Any, local: np.ndarray, tmp_path: Path
) -> None:
    top = tmp_path / "top"
    (top / "shards").mkdir(parents=True)
    for path in shards.iterdir():
        (top / "shards" / path.name).write_bytes(path.read_bytes())
    describe([str(top / "shards")], tokenizer_json, top / "described", streams=4)
    upload(s3[1], top / "shards", "moved/shards")
    url = upload(s3[1], top / "described", "moved/described")
    reading = Reading(cache=tmp_path / "cache")
    stream = Stream([(url, 1.0)], 16, seed=5, reading=reading)
    assert stream.formats == ("text",)
    assert np.array_equal(stream.read(range(ROWS)), local)
    assert stream.counters()["bytes_fetched"] > 0
    stream.close()
    assert verify(url, cache=Cache(tmp_path / "cache")) == []
    result = CliRunner().invoke(command, ["inspect", url, "--json"], env={"TMPDIR": str(tmp_path)})
    assert result.exit_code == 0 and json.loads(result.output)[0]["documents"] == 90


@pytest.mark.parametrize("action", ["error", "stall", "truncate", "flip"])
def test_what_fails_now_and_then_is_asked_again_and_right(
    action: str, described: Path, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    one = source(TextSplit(described, lambda: cache, Patience(2.0, 120.0, 0.02, 0.1)))
    proxy.plan.extend([action, "pass", "pass", action])
    assert np.array_equal(read(one), local)
    assert one.counters()["retries"] >= 2
    one.close()


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("error", r"shard-\d\.tar: \d+ attempts in \d+ s failed, the last with: .*; check the URL"),
        ("stall", r"shard-\d\.tar: \d+ attempts in \d+ s failed, .*no answer within 0\.3 s"),
        ("deny", r"shard-\d\.tar: cannot be read: PermissionError: .*; check the URL, the credentials"),
    ],
)
def test_a_store_that_cannot_be_reached_ends_the_run_and_breaks_nothing(
    action: str, message: str, on_error: Any, described: Path, proxy: Proxy, cache: Cache
) -> None:
    patience = CALM if action == "deny" else HASTY
    one = source(TextSplit(described, lambda: cache, patience), on_error=on_error, max_skipped=1.0)
    proxy.forever = action
    with pytest.raises(DataError, match=message):
        read(one)
    assert one.counters()["skipped_samples"] == 0
    one.close()


def test_a_shard_that_is_gone_or_changed_is_named_or_left_out(
    described: Path, shards: Path, proxy: Proxy, s3: Any, tmp_path: Path, cache: Cache, tokenizer_json: Path
) -> None:
    url = upload(s3[1], shards, "broken")
    folder = tmp_path / "broken"
    describe([f"{url}/*.tar"], tokenizer_json, folder, streams=4)
    whole = (shards / "shard-1.tar").read_bytes()
    pieces = TextSplit(folder).shards[1].pieces
    assert verify(folder, cache=cache) == []
    for body, reason in ((None, "the shard is missing"), (whole[:-8] + b"x" * 8192, None), (whole[::-1], "differs")):
        if body is None:
            s3[1].delete_object(Bucket="data", Key="broken/shard-1.tar")
        else:
            s3[1].put_object(Bucket="data", Key="broken/shard-1.tar", Body=body)
        problems = verify(folder, cache=cache)
        if reason is None:  # what follows on the pieces is nobody's
            assert problems == []
            continue
        assert len(problems) == (1 if body is None else len(pieces))
        assert all(line.startswith(f"{url}/shard-1.tar: ") and reason in line for line in problems)
    report = tmp_path / "report.jsonl"
    one = source(TextSplit(folder, lambda: cache, CALM), on_error="skip", max_skipped=1.0, report=report)
    read(one)
    assert one.counters()["skipped_samples"] == len(pieces)
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert {row["url"] for row in rows} == {f"{url}/shard-1.tar"}
    assert all(row["piece"].startswith("at byte ") and "differs" in row["reason"] for row in rows)
    one.close()


def test_a_cache_too_small_for_the_windows_of_all_streams_is_refused(
    described: Path, proxy: Proxy, tmp_path: Path
) -> None:
    reading = Reading(cache=tmp_path / "cache", cache_bytes=20_000)
    with pytest.raises(UsageError, match=r"described: the cache's limit is 20000 bytes, and two shuffle windows take"):
        Stream([(str(described), 1.0)], 16, 5, reading)


def test_a_damaged_copy_in_the_cache_is_fetched_again(
    described: Path, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    one = source(TextSplit(described, lambda: cache, CALM))
    read(one)
    before = fetched_of(proxy)
    for path in _files(cache.folder / "files"):
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
    again = source(TextSplit(described, lambda: cache, CALM))
    assert np.array_equal(read(again), local)
    assert fetched_of(proxy) == 2 * before
    one.close()
    again.close()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())

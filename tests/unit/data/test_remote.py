"""Splits in a store: a real S3-compatible server on the loopback, behind a proxy that misbehaves when told."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from llmscale.data.cache import Cache
from llmscale.data.shards import SplitWriter
from llmscale.data.split import Split
from llmscale.data.store import Patience
from llmscale.data.stream import Reading, Stream
from llmscale.data.token_source import TokenSource
from llmscale.data.verify import verify
from llmscale.errors import DataError, UsageError
from tests.ports import free_ports

from .conftest import WriteSplit, tokenizer_of
from .servers import Proxy, proxy, s3, upload

__all__ = ["proxy", "s3"]
ROOT = Path(__file__).resolve().parents[3]
LENGTHS = [(number * 7) % 50 for number in range(60)]
LENGTH = 16
TOKENIZER = tokenizer_of(1 << 16)
CALM = Patience(attempt_seconds=60.0, total_seconds=120.0, first_delay_seconds=0.02, longest_delay_seconds=0.1)
HASTY = Patience(attempt_seconds=0.3, total_seconds=1.0, first_delay_seconds=0.02, longest_delay_seconds=0.1)


def source(split: Split, **options: Any) -> TokenSource:
    return TokenSource(split, LENGTH, 3, 8, **{"shuffle_window": 4, "connections": 4, **options})


def read(one: TokenSource, count: int | None = None) -> np.ndarray:
    count = one.sequences if count is None else count
    out = np.zeros((count, LENGTH + 1), dtype=one.dtype)
    one.read(np.arange(count), np.arange(count), out)
    return out


def fetched_of(proxy: Proxy) -> int:
    """Requests for parts of shards."""
    return sum(count for name, count in proxy.requests.items() if name.startswith("shard-"))


def needed_of(split: Split) -> int:
    """Requests that one epoch takes: samples that hold inputs, and the first labels of all shards but the first."""
    inputs = (split.card.tokens - 1) // LENGTH * LENGTH
    return -(-inputs // split.card.sample_tokens) + len(split.shards) - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of samples of 64 tokens, 3 in each shard."""
    folder = tmp_path_factory.mktemp("local")
    writer = SplitWriter(folder, "uint16", 0, 64, 3)
    first = 1
    for length in LENGTHS:
        writer.add(np.arange(first, first + length, dtype=np.uint16), True, True)
        first += length
    writer.finish(TOKENIZER, 1 << 16)
    return folder


@pytest.fixture(scope="module")
def local(folder: Path) -> np.ndarray:
    return read(source(Split(folder)))


@pytest.fixture(scope="module")
def place(s3: Any, folder: Path) -> str:
    """The URL of the same split in the store."""
    return upload(s3[1], folder, "whole")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 20)


def test_a_store_gives_the_sequences_and_the_order_of_the_folder(
    place: str, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    one = source(Split(place, cache, CALM))
    assert np.array_equal(read(one), local)
    assert np.array_equal(read(one), local)
    assert fetched_of(proxy) == needed_of(one._split)
    assert proxy.requests["index.json"] == proxy.requests["tokenizer.json"] == 1
    counters = one.counters()
    assert counters["cache_misses"] == counters["cache_hits"] == needed_of(one._split) - len(one._split.shards) + 1
    assert counters["retries"] == 0
    one.close()
    again = source(Split(place, cache, CALM))
    assert np.array_equal(read(again), local)
    assert proxy.requests["index.json"] == 1
    assert again.read_tokenizer() == TOKENIZER


@pytest.mark.parametrize("action", ["error", "stall", "truncate", "flip"])
def test_what_fails_now_and_then_is_asked_again_and_right(
    action: str, place: str, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    one = source(Split(place, cache, Patience(2.0, 120.0, 0.02, 0.1)))
    proxy.plan.extend([action, "pass", "pass", action, "pass", action])
    assert np.array_equal(read(one), local)
    assert one.counters()["retries"] >= 3
    one.close()


def test_answers_that_are_too_short_time_and_again_do_not_make_a_whole_shard_a_broken_one(
    place: str, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    one = source(Split(place, cache, CALM), on_error="skip", max_skipped=1.0)
    proxy.plan.extend(["shorten"] * 12)
    assert np.array_equal(read(one, 1), local[:1])
    assert one.counters()["retries"] == 12
    assert np.array_equal(read(one), local)
    assert one.counters()["skipped_samples"] == 0
    one.close()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("error", r"s3://data/.*/shard-\d+\.tar: \d+ attempts in \d+ s failed, the last with: .*; check the URL"),
        (
            "stall",
            r"shard-\d+\.tar: \d+ attempts in \d+ s failed, the last with: TimeoutError: no answer within 0\.3 s",
        ),
        ("truncate", r"shard-\d+\.tar: \d+ attempts in \d+ s failed, the last with: "),
        ("flip", r"shard-\d+\.tar: sample \d{9}: its checksum differs from index\.json"),
        ("deny", r"shard-\d+\.tar: cannot be read: PermissionError: .*; check the URL, the credentials"),
    ],
)
def test_what_always_fails_ends_in_bounded_time_with_what_and_why(
    action: str, message: str, place: str, proxy: Proxy, cache: Cache
) -> None:
    one = source(Split(place, cache, CALM))
    one._split.store._patience = HASTY
    proxy.forever = action
    started = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        read(one, 8)
    assert time.monotonic() - started < HASTY.total_seconds + HASTY.attempt_seconds + 5
    assert "\n" not in str(caught.value)
    one.close()


def test_a_card_that_cannot_be_had_is_said(place: str, proxy: Proxy, cache: Cache) -> None:
    with pytest.raises(UsageError, match=r"s3://data/none: not a dataset, it has no card\.json; name the URL"):
        Split("s3://data/none", cache, CALM)
    proxy.only, proxy.forever = "card.json", "stall"
    with pytest.raises(DataError, match=r"card\.json: \d+ attempts in \d+ s failed"):
        Split(place, cache, HASTY)


def test_look_ahead_fetches_before_and_nothing_twice(place: str, proxy: Proxy, local: np.ndarray, cache: Cache) -> None:
    one = source(Split(place, cache, CALM))
    one.look_ahead(np.arange(one.sequences))
    one.look_ahead(np.arange(one.sequences))
    assert np.array_equal(read(one), local)
    assert fetched_of(proxy) == needed_of(one._split)
    one.close()


def test_look_ahead_never_takes_more_than_half_of_the_cache(
    place: str, proxy: Proxy, tmp_path: Path, local: np.ndarray
) -> None:
    one = source(Split(place, Cache(tmp_path / "small", 12_000), CALM), shuffle_window=2, readers=2)
    fetcher = one._samples._fetcher
    assert fetcher._ahead == 3_000 // int(one._samples.sizes.max())
    one.look_ahead(np.arange(one.sequences))
    ahead = fetched_of(proxy)
    while len(fetcher._unread) < fetcher._ahead or any(future.running() for future in fetcher._futures.values()):
        time.sleep(0.001)
    assert fetched_of(proxy) <= ahead + 2 * fetcher._ahead  # each sample, and the label after the last of a shard
    assert sorted(read(one).tolist()) == sorted(local.tolist())
    one.close()


def test_a_shard_that_is_gone_or_changed_is_named(
    folder: Path, proxy: Proxy, s3: Any, cache: Cache, local: np.ndarray
) -> None:
    place, key = upload(s3[1], folder, "changed"), "changed/shard-00002.tar"
    whole = (folder / "shard-00002.tar").read_bytes()
    s3[1].put_object(Bucket="data", Key=key, Body=whole[:3000])
    with pytest.raises(DataError, match=r"shard-00002\.tar: sample \d+: the shard has 3000 bytes, index\.json says"):
        read(source(Split(place, cache, CALM)))
    s3[1].delete_object(Bucket="data", Key=key)
    with pytest.raises(
        DataError, match=r"s3://data/changed/shard-00002\.tar: sample 00000000\d: the shard is missing;"
    ):
        read(source(Split(place, cache, CALM)))
    s3[1].put_object(Bucket="data", Key=key, Body=whole)
    assert np.array_equal(read(source(Split(place, cache, CALM))), local)


def test_a_copy_in_the_cache_that_was_damaged_is_fetched_again(
    place: str, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    assert np.array_equal(read(source(Split(place, cache, CALM))), local)
    victim = cache.path(Split(place, cache, CALM).key, f"{5:09d}")
    data = bytearray(victim.read_bytes())
    data[300] ^= 1
    victim.write_bytes(data)
    before = proxy.requests["shard-00001.tar"]
    assert np.array_equal(read(source(Split(place, cache, CALM))), local)
    assert proxy.requests["shard-00001.tar"] in (before + 1, before + 2)  # the shard's last sample brings a label
    victim.write_bytes(b"")
    assert np.array_equal(read(source(Split(place, cache, CALM))), local)


READER = """
import sys
import numpy as np
from pathlib import Path
from llmscale.data.cache import Cache
from llmscale.data.split import Split
from llmscale.data.token_source import TokenSource
from llmscale.data.verify import verify

place, folder, limit, output = sys.argv[1:]
split = Split(place, Cache(Path(folder), int(limit)))
source = TokenSource(split, 16, 3, 8, shuffle_window=4, connections=4, readers=3)
seen = []
for first in range(0, 2 * source.sequences, 10):
    ordinals = (np.arange(10) + first) % source.sequences
    source.look_ahead((ordinals + 10) % source.sequences)
    out = np.zeros((10, 17), dtype=source.dtype)
    source.read(ordinals, np.arange(10), out)
    seen.append(out)
np.save(output, np.concatenate(seen))
"""


@pytest.mark.parametrize("limit", [20_000, 1 << 20])  # the samples have about 55,000 bytes
def test_processes_share_a_cache_that_is_smaller_than_the_data_or_not(
    limit: int, place: str, proxy: Proxy, local: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, place, str(folder), str(limit), str(tmp_path / f"{rank}.npy")],
            cwd=ROOT, stderr=subprocess.PIPE,
        )
        for rank in range(3)
    ]  # fmt: skip
    for rank, reader in enumerate(readers):
        said = reader.communicate()[1].decode()
        assert reader.returncode == 0, said[-2000:]
        seen = np.load(tmp_path / f"{rank}.npy")
        assert np.array_equal(seen, np.concatenate([local] * 3)[: len(seen)])
    assert sum(path.stat().st_size for path in (folder / "files").rglob("*") if path.is_file()) <= limit
    if limit == 1 << 20:
        split = Split(place, Cache(folder), CALM)
        assert fetched_of(proxy) <= needed_of(split) + 2 * (len(split.shards) - 1)  # labels are each process's own


def test_a_reader_that_is_killed_leaves_a_cache_that_works(
    place: str, proxy: Proxy, local: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    proxy.plan.extend(["pass"] * 5)
    proxy.forever = "stall"
    command = [sys.executable, "-c", READER, place, str(folder), str(1 << 20), str(tmp_path / "0.npy")]
    with subprocess.Popen(command, cwd=ROOT) as reader:
        while fetched_of(proxy) < 8 and reader.poll() is None:
            time.sleep(0.005)
        reader.kill()
    assert list(folder.glob("stripes/*.partial"))
    proxy.forever = ""
    cache = Cache(folder, 1 << 20)
    assert np.array_equal(read(source(Split(place, cache, CALM))), local)
    cache.limit = 1
    assert list(cache._in_flight()) == []
    assert not list(folder.glob("stripes/*.partial"))


def test_a_cache_too_small_for_two_windows_is_refused(place: str, proxy: Proxy, tmp_path: Path) -> None:
    reading = Reading(shuffle_window=8, cache=tmp_path / "cache", cache_bytes=4_000)
    with pytest.raises(UsageError, match=r"s3://data/whole: the cache's limit is 4000 bytes, and two shuffle windows"):
        Stream([(place, 1.0)], LENGTH, 3, reading)


def test_sources_that_share_a_cache_need_two_windows_each_and_look_ahead_over_half_of_it_together(
    write_split: WriteSplit, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    names = ("one", "two", "three")
    for name in names:
        for path in write_split(name, [4095] * 40, sample_tokens=4096).iterdir():
            memory.pipe_file(f"/shared/{name}/{path.name}", path.read_bytes())
    sources = [(f"memory://shared/{name}", 1.0) for name in names]

    def stream(count: int, limit: int) -> Stream:
        return Stream(sources[:count], 256, 1, Reading(shuffle_window=10, cache=tmp_path / "c", cache_bytes=limit))

    limit = 2 * 10 * 18_800  # two windows of one of them
    stream(1, limit).close()
    with pytest.raises(
        UsageError, match=rf"one, .*three: the cache's limit is {limit} bytes, and two shuffle windows of each take"
    ):
        stream(3, limit)
    all_three = stream(3, 3 * limit)
    ahead = [one._samples._fetcher._ahead for one in all_three._sources]  # type: ignore[attr-defined]
    assert ahead == [9, 9, 9]
    all_three.close()


@pytest.mark.parametrize("command", ["cat {folder}/{name}", "cat {folder}/{name} | cat"])
def test_a_command_gives_what_the_folder_has(command: str, folder: Path, cache: Cache, local: np.ndarray) -> None:
    one = source(Split("pipe:" + command.replace("{folder}", str(folder)), cache, CALM))
    one.look_ahead(np.arange(30))
    assert np.array_equal(read(one), local)
    assert one.counters()["bytes_fetched"] < 1.01 * sum(path.stat().st_size for path in folder.iterdir())
    one.close()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat /nowhere/{name}", r"pipe:cat /nowhere/card\.json: \d+ attempts in \d+ s failed, .*exit status 1: cat: "),
        ("sleep 60; echo {name}", r"card\.json: .* failed, the last with: TimeoutError: no byte within 0\.3 s"),
        (  # one byte after the other, faster than an attempt's patience
            "for i in $(seq 80); do printf x; sleep 0.05; done # {name}",
            r"card\.json: .* failed, the last with: TimeoutError: \d+ bytes within 0\.3 s",
        ),
        ("yes {name}", r"pipe:yes card\.json: gives more than \d+ bytes"),
        ("echo {name}", r"pipe:echo card\.json: the whole file: Invalid JSON"),
    ],
)
def test_a_command_that_fails_is_ended_and_quoted(
    command: str, message: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmscale.data.split._MOST_CARD_BYTES", 1 << 20)
    with pytest.raises(DataError, match=message):
        Split(f"pipe:{command}", cache, HASTY)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "nosuchcommand cp {name} -",
            r"pipe:nosuchcommand cp card\.json -: exit status 127: .*not found; correct the ",
        ),
        ("/ {name}", r"pipe:/ card\.json: exit status 126: .*; correct the command, or install it"),
    ],
)
def test_a_command_that_is_not_there_is_said_at_once(command: str, message: str, cache: Cache) -> None:
    with pytest.raises(UsageError, match=message):
        Split(f"pipe:{command}", cache, CALM)
    assert cache.counters.requests == 1


def test_a_store_that_keeps_failing_is_warned_of_while_it_is_waited_for(
    place: str, proxy: Proxy, local: np.ndarray, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith("llmscale")]

    one = source(Split(place, cache, CALM))
    proxy.plan.extend(["error", "error"])
    assert np.array_equal(read(one, 1), local[:1])
    assert said() == []
    proxy.plan.extend(["error"] * 20)
    assert np.array_equal(read(one), local)
    (message,) = said()  # one for all requests that fail together
    wanted = r"s3://data/.*shard-\d+\.tar: 3 attempts in \d+ s failed, the last with: .*; trying on, for 120 s"
    assert re.match(wanted, message)
    one.close()


def test_a_command_without_a_name_is_refused(cache: Cache) -> None:
    with pytest.raises(UsageError, match=r"does not say where the file's name goes; write \{name\} in its place"):
        Split("pipe:cat x", cache)


def test_a_scheme_without_its_package_says_what_to_install(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"foo://x: .*foo.*; give a folder, an fsspec URL or pipe:COMMAND"):
        Split("foo://x", cache)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(
        UsageError, match=r"reading s3:// needs a package .*; install it with `pip install 'llmscale\[s3\]'`"
    ):
        Split("s3://data/x", cache)


def test_an_http_server_without_byte_ranges_is_refused(
    folder: Path, cache: Cache, tmp_path: Path, local: np.ndarray
) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(
            DataError, match=r"ignores byte ranges .*; fetch whole shards .*'pipe:curl -sSf URL/\{name\}'"
        ):
            read(source(Split(url, cache, CALM)))
        server.shutdown()


def test_an_http_server_that_is_away_or_refuses_is_not_one_without_the_dataset(folder: Path, cache: Cache) -> None:
    with pytest.raises(DataError, match=r"card\.json: \d+ attempts in \d+ s failed, the last with: ClientConnector"):
        Split(f"http://127.0.0.1:{free_ports()}", cache, HASTY)

    class Refusing(SimpleHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403 if self.path.startswith("/closed") else 404)

        do_GET = do_HEAD

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(DataError, match=r"closed/card\.json: cannot be read: ClientResponseError: 403"):
            Split(f"{url}/closed", cache, CALM)
        with pytest.raises(UsageError, match=r"none: not a dataset, it has no card\.json"):
            Split(f"{url}/none", cache, CALM)
        server.shutdown()


def test_a_store_of_another_kind_gives_the_same(folder: Path, cache: Cache, local: np.ndarray) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/split/{path.name}", path.read_bytes())
    assert np.array_equal(read(source(Split("memory://split", cache, CALM))), local)
    assert np.array_equal(read(source(Split(f"file://{folder}"))), local)


def test_verify_reads_a_store_to_the_last_byte(folder: Path, s3: Any, proxy: Proxy, cache: Cache) -> None:
    place, key = upload(s3[1], folder, "verified"), "verified/shard-00001.tar"
    assert verify(place, cache=cache) == []
    data = bytearray((folder / "shard-00001.tar").read_bytes())
    data[Split(folder).shards[1].offsets[2] + 5] ^= 1
    s3[1].put_object(Bucket="data", Key=key, Body=bytes(data))
    problems = verify(place, cache=cache)
    assert len(problems) == 2
    assert problems[1].startswith(f"{place}/shard-00001.tar: sample 000000005: its checksum differs from index.json; ")
    s3[1].put_object(Bucket="data", Key=key, Body=b"")
    assert verify(place, cache=cache)[0].startswith(f"{place}/shard-00001.tar: has 0 bytes, index.json says ")
    s3[1].delete_object(Bucket="data", Key=key)
    assert verify(place, cache=cache) == [f"{place}/shard-00001.tar: is missing; copy it there again"]
    assert not [path for path in (cache.folder / "files").rglob("*") if path.is_file()]

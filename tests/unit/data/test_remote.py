"""Splits in a store: a real S3-compatible server on the loopback, behind a proxy that misbehaves when told."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from llmscale.data.cache import Cache
from llmscale.data.split import Split
from llmscale.data.store import Patience
from llmscale.data.token_source import TokenSource
from llmscale.errors import DataError, UsageError

from .conftest import WriteSplit
from .servers import Proxy, proxy_of, s3, upload

__all__ = ["s3"]
LENGTHS = [(number * 7) % 50 for number in range(80)]
QUICK = Patience(attempt_seconds=0.5, total_seconds=2.0, first_delay_seconds=0.02, longest_delay_seconds=0.1)
LENGTH = 16
REMOTE = {"shuffle_window": 4, "connections": 4}


def source(split: Split, **options: Any) -> TokenSource:
    return TokenSource(split, LENGTH, 3, 8, **{**REMOTE, **options})


def read(one: TokenSource, start: int = 0, count: int | None = None) -> np.ndarray:
    count = one.sequences if count is None else count
    out = np.zeros((count, LENGTH + 1), dtype=one.dtype)
    one.read(np.arange(start, start + count), np.arange(count), out)
    return out


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxy_of(s3[0]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server


@pytest.fixture
def place(s3: Any, proxy: Proxy, write_split: WriteSplit, tmp_path: Path) -> str:
    """The URL of a split that also lies in tmp_path/local."""
    return upload(s3[1], write_split("local", LENGTHS), tmp_path.name)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 20)


@pytest.fixture
def local(place: str, tmp_path: Path) -> np.ndarray:
    return read(source(Split(tmp_path / "local")))


def test_a_store_gives_the_sequences_and_the_order_of_the_folder(
    place: str, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    one = source(Split(place, cache, QUICK))
    assert np.array_equal(read(one), local)
    assert np.array_equal(read(one), local)
    samples = one._split.card.samples
    shards = {name: count for name, count in proxy.requests.items() if name.startswith("shard-")}
    labels = len(shards) - 1  # the first label of each shard but the first belongs to the sequence before it
    assert sum(shards.values()) == samples + labels
    assert proxy.requests["index.json"] == proxy.requests["tokenizer.json"] == 1
    counters = one.counters()
    assert counters["cache_misses"] == samples
    assert counters["cache_hits"] == samples
    assert counters["retries"] == 0
    one.close()
    again = source(Split(place, cache, QUICK))
    assert np.array_equal(read(again), local)
    assert proxy.requests["index.json"] == 1
    assert again.tokenizer.read_bytes() == b"{}"


@pytest.mark.parametrize("action", ["error", "stall", "truncate", "flip"])
def test_what_fails_now_and_then_is_asked_again_and_right(
    action: str, place: str, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    split = Split(place, cache, QUICK)
    proxy.plan.extend([action, "pass", "pass"] * 2 + [action] * 2)
    one = source(split)
    assert np.array_equal(read(one), local)
    assert one.counters()["retries"] == 4
    one.close()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("error", r"s3://data/.*/shard-\d+\.tar: \d+ attempts in \d+ s failed, the last with: .*; check the URL"),
        (
            "stall",
            r"shard-\d+\.tar: \d+ attempts in \d+ s failed, the last with: TimeoutError: no answer within 0\.5 s",
        ),
        ("truncate", r"shard-\d+\.tar: \d+ attempts in \d+ s failed, the last with: "),
        ("flip", r"shard-\d+\.tar: sample \d{9}: its checksum differs from index\.json"),
        ("deny", r"shard-\d+\.tar: cannot be read: PermissionError: .*; check the URL, the credentials"),
    ],
)
def test_what_always_fails_ends_in_bounded_time_with_what_and_why(
    action: str, message: str, place: str, proxy: Proxy, cache: Cache
) -> None:
    one = source(Split(place, cache, QUICK))
    proxy.forever = action
    started = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        read(one, 0, 8)
    assert time.monotonic() - started < QUICK.total_seconds + QUICK.attempt_seconds + 5
    assert "\n" not in str(caught.value)
    one.close()
    proxy.forever = ""
    proxy.plan.clear()


def test_a_card_that_cannot_be_had_is_said(place: str, proxy: Proxy, cache: Cache) -> None:
    with pytest.raises(DataError, match=r"s3://data/none: not a dataset, it has no card\.json; name the URL"):
        Split("s3://data/none", cache, QUICK)
    proxy.only, proxy.forever = "card.json", "stall"
    with pytest.raises(DataError, match=r"card\.json: \d+ attempts in \d+ s failed"):
        Split(place, cache, QUICK)


def test_look_ahead_fetches_before_and_nothing_twice(place: str, proxy: Proxy, local: np.ndarray, cache: Cache) -> None:
    one = source(Split(place, cache, QUICK))
    one.look_ahead(np.arange(one.sequences))
    one.look_ahead(np.arange(one.sequences))
    assert np.array_equal(read(one), local)
    counts = [count for name, count in proxy.requests.items() if name.startswith("shard-")]
    assert sum(counts) == one._split.card.samples + len(counts) - 1
    one.close()


def test_look_ahead_never_takes_more_than_half_of_the_cache(place: str, tmp_path: Path, local: np.ndarray) -> None:
    cache = Cache(tmp_path / "small", 30_000)
    one = source(Split(place, cache, QUICK), shuffle_window=2)
    one.look_ahead(np.arange(one.sequences))
    room = one._samples._fetcher._ahead
    while len(one._samples._fetcher._unread) < room:
        time.sleep(0.001)
    assert np.array_equal(read(one)[:0], local[:0])
    assert room * int(one._samples.sizes.max()) <= 15_000
    one.close()


def test_a_shard_that_is_gone_or_changed_is_named(
    place: str, s3: Any, cache: Cache, local: np.ndarray, tmp_path: Path
) -> None:
    key = f"{tmp_path.name}/shard-00002.tar"
    whole = (tmp_path / "local/shard-00002.tar").read_bytes()
    s3[1].put_object(Bucket="data", Key=key, Body=whole[:3000])
    with pytest.raises(DataError, match=r"shard-00002\.tar: sample \d+: the shard has 3000 bytes, index\.json says"):
        read(source(Split(place, cache, QUICK)))
    s3[1].delete_object(Bucket="data", Key=key)
    with pytest.raises(DataError, match=r"s3://data/.*/shard-00002\.tar: sample 00000000\d: the shard is missing; "):
        read(source(Split(place, cache, QUICK)))
    s3[1].put_object(Bucket="data", Key=key, Body=whole)
    assert np.array_equal(read(source(Split(place, cache, QUICK))), local)


def test_a_copy_in_the_cache_that_was_damaged_is_fetched_again(
    place: str, proxy: Proxy, local: np.ndarray, cache: Cache
) -> None:
    assert np.array_equal(read(source(Split(place, cache, QUICK))), local)
    victim = cache.path(Split(place, cache, QUICK).key, f"{5:09d}")
    data = bytearray(victim.read_bytes())
    data[300] ^= 1
    victim.write_bytes(data)
    before = proxy.requests["shard-00001.tar"]
    assert np.array_equal(read(source(Split(place, cache, QUICK))), local)
    assert proxy.requests["shard-00001.tar"] in (before + 1, before + 2)  # the shard's last sample brings a label
    victim.write_bytes(b"")
    assert np.array_equal(read(source(Split(place, cache, QUICK))), local)


READER = """
    import sys
    import numpy as np
    from pathlib import Path
    from llmscale.data.cache import Cache
    from llmscale.data.split import Split
    from llmscale.data.token_source import TokenSource

    place, folder, limit, output, start = sys.argv[1:]
    split = Split(place, Cache(Path(folder), int(limit)))
    source = TokenSource(split, 16, 3, 8, shuffle_window=4, connections=4, readers=3)
    seen = []
    for first in range(0, 3 * source.sequences, 10):
        rows = np.arange((first + int(start)) % source.sequences + np.arange(10).min(), 0) if False else np.arange(10)
        ordinals = (np.arange(10) + first) % source.sequences
        source.look_ahead((ordinals + 10) % source.sequences)
        out = np.zeros((10, 17), dtype=source.dtype)
        source.read(ordinals, rows, out)
        seen.append(out)
    np.save(output, np.concatenate(seen))
"""


def test_processes_share_a_cache_that_is_smaller_than_the_data(
    place: str, proxy: Proxy, local: np.ndarray, tmp_path: Path
) -> None:
    script = tmp_path / "reader.py"
    script.write_text(textwrap.dedent(READER))
    limit = 12_000  # of about 20 kB
    readers = [
        subprocess.Popen(
            [
                sys.executable,
                str(script),
                place,
                str(tmp_path / "cache"),
                str(limit),
                str(tmp_path / f"{rank}.npy"),
                "0",
            ],
            stderr=subprocess.PIPE,
        )
        for rank in range(3)
    ]
    most = 0
    while any(reader.poll() is None for reader in readers):
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache/files").rglob("*") if path.is_file()))
        time.sleep(0.005)
    for reader in readers:
        assert reader.returncode == 0, reader.stderr.read().decode()[-2000:]
    wanted = np.concatenate([local] * 4)
    for rank in range(3):
        seen = np.load(tmp_path / f"{rank}.npy")
        assert np.array_equal(seen, wanted[: len(seen)])
    assert 0 < most <= limit

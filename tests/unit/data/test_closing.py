"""Closing while a store does not answer: whoever waits gets an error at once, and nothing is left behind."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from llmscale.data import prefetch
from llmscale.data.describe import describe
from llmscale.data.loader import Loader
from llmscale.data.prefetch import Prefetch
from llmscale.data.stream import Reading, Stream
from llmscale.errors import DataError

from .conftest import WriteSplit, sentence
from .servers import Proxy, proxy, s3, upload
from .test_text_source import write_shard

__all__ = ["proxy", "s3"]
GUARD_SECONDS = 20
"""A tenth of the patience with a store: what takes longer waited for it."""


def ends(call: Callable[[], Any]) -> bool:
    """Whether a call comes back."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(GUARD_SECONDS)
    return not thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.001)


@pytest.fixture(params=["asyncio", "threads", "command", "text"])
def stalled(
    request: pytest.FixtureRequest, write_split: WriteSplit, tokenizer_json: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[str, Callable[[], object]]]:  # fmt: skip
    """(a source whose store gives no shard, whether one was asked for)."""
    if request.param == "command":
        folder, asked = write_split("there", [30] * 40), tmp_path / "asked"
        yield f"pipe:case {{name}} in *.tar) touch {asked}; sleep 60;; *) cat {folder}/{{name}};; esac", asked.exists
    elif request.param == "threads":
        for path in write_split("there", [30] * 40).iterdir():
            MemoryFileSystem().pipe_file(f"/stalled/{path.name}", path.read_bytes())
        wanted, go = threading.Event(), threading.Event()
        cat_file = MemoryFileSystem.cat_file

        def stalling(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
            if path.endswith(".tar"):
                wanted.set()
                go.wait(60)
            return cat_file(self, path, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", stalling)
        yield "memory://stalled", wanted.is_set
        go.set()
    else:
        proxy: Proxy = request.getfixturevalue("proxy")
        client = request.getfixturevalue("s3")[1]
        if request.param == "asyncio":
            place = upload(client, write_split("there", [30] * 40), "there")
        else:
            monkeypatch.setattr("llmscale.data.describe.PIECE_BYTES", 6000)
            (tmp_path / "tars").mkdir()
            members = [(f"{number}.txt", sentence(number).encode()) for number in range(60)]
            write_shard(tmp_path / "tars" / "shard-0.tar", members)
            describe([f"{upload(client, tmp_path / 'tars', 'tars')}/*.tar"], tokenizer_json, tmp_path / "text")
            place = str(tmp_path / "text")
            proxy.requests.clear()
        proxy.forever = "stall"
        yield place, lambda: any(name.startswith("shard-") for name in proxy.requests)


def test_closing_the_stream_ends_a_read_that_waits_for_a_store(
    stalled: tuple[str, Callable[[], object]], tmp_path: Path
) -> None:
    place, asked = stalled
    before = set(threading.enumerate())
    stream = Stream([(place, 1.0)], 16, 1, Reading(cache=tmp_path / "cache"))
    loader = Loader(stream, 8)
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            next(loader)
        except DataError as error:
            errors.append(error)

    wait_for(asked)
    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    assert ends(stream.close)
    consumer.join(GUARD_SECONDS)
    assert errors and "closed" in str(errors[0])
    assert ends(loader.close)
    left = {thread.name.rstrip("-_0123456789") for thread in set(threading.enumerate()) - before}
    assert not left & {"prefetch", "fetch", "read", "tokenise"}


def test_closing_the_stream_ends_a_read_that_waits_for_another_process(write_split: WriteSplit, tmp_path: Path) -> None:
    place = f"pipe:cat {write_split('there', [30] * 40)}/{{name}}"
    stream = Stream([(place, 1.0)], 16, 1, Reading(cache=tmp_path / "cache"))
    with (tmp_path / "cache" / "usage").open("a+b") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)
        loader = Loader(stream, 8)
        wait_for(lambda: list((tmp_path / "cache").glob("stripes/*.partial")))
        assert ends(stream.close)
        with pytest.raises(DataError, match="closed"):
            next(loader)
        assert ends(loader.close)


def test_a_loader_that_is_closed_alone_leaves_what_does_not_come_to_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CLOSE_SECONDS", 0.01)
    go = threading.Event()

    def produce() -> Iterator[int]:
        go.wait(60)
        yield 1

    items = Prefetch(produce(), 1)
    assert ends(items.close)
    assert list(items) == []
    go.set()
    items._thread.join(GUARD_SECONDS)
    assert not items._thread.is_alive()


def test_a_closed_stream_says_so(write_split: WriteSplit, tmp_path: Path) -> None:
    place = f"pipe:cat {write_split('there', [30] * 40)}/{{name}}"
    stream = Stream([(place, 1.0)], 16, 1, Reading(cache=tmp_path / "cache"))
    stream.close()
    stream.close()
    with pytest.raises(DataError, match="closed"):
        stream.read([0])

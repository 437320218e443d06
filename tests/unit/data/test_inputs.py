"""Which files an input names: on this machine, and in a real S3-compatible store."""

from __future__ import annotations

import gzip
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import parquet

from llmscale.data.documents import Reader, pieces
from llmscale.data.inputs import InputFile, find
from llmscale.errors import DataError, UsageError


def names(files: list[InputFile], root: str) -> list[str]:
    return [file.name.removeprefix(root).lstrip("/") for file in files]


def test_folders_are_read_in_order_of_path_and_each_file_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden/x.txt", "__pycache__/y.txt", "b/.z.txt", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    root = str(tmp_path)
    found = find([str(tmp_path / "b/2.txt"), root, str(tmp_path / "*.md")])
    assert names(found, root) == ["b/2.txt", "a.txt", "b/1.txt", "c.md"]
    assert [file.size for file in found] == [7, 5, 7, 4]
    assert names(find([root], [".md"]), root) == ["c.md"]
    assert names(find([str(tmp_path / "[ab]**/*.txt")]), root) == ["b/1.txt", "b/2.txt"]
    assert names(find([str(tmp_path / "*.txt")]), root) == ["a.txt"]


def test_links_that_are_not_followed_are_told(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for path in ("in/a.txt", "in/deep/b.txt", "other/c.txt"):
        (tmp_path / path).write_text(path)
    (tmp_path / "in/deep/folder").symlink_to(tmp_path / "other")
    (tmp_path / "in/broken.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "in/.hidden").symlink_to(tmp_path / "nothing")
    (tmp_path / "in/d.txt").symlink_to(tmp_path / "other/c.txt")
    links: list[str] = []
    assert len(find([str(tmp_path / "in")], (), links)) == 3
    assert links == [str(tmp_path / "in/broken.txt"), str(tmp_path / "in/deep/folder")]


def test_a_version_changes_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (before,) = find([str(tmp_path)])
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    (after,) = find([str(tmp_path)])
    assert before.version != after.version


def test_input_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--input .*nothing.*: matches no file"):
        find([str(tmp_path / "nothing*")])
    with pytest.raises(UsageError, match=r"holds no file; give"):
        find([str(tmp_path)])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"holds no file with suffix \.py"):
        find([str(tmp_path)], [".py"])


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an S3-compatible server on the loopback."""
    patch = pytest.MonkeyPatch()
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):  # fmt: skip
        patch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("texts")
    for name, data in (
        ("web/b/2.txt", b"two"), ("web/b/1.txt", b"one"), ("web/a.jsonl", b'{"text": "line"}\n'), ("web/.x.txt", b""),
        ("web/__pycache__/y.txt", b""), ("other.txt", b"other"),
    ):  # fmt: skip
        system.pipe_file(f"texts/{name}", data)
    yield "s3://texts"
    patch.undo()
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_store_is_listed_like_a_folder(bucket: str) -> None:
    assert names(find([f"{bucket}/web"]), bucket) == ["web/a.jsonl", "web/b/1.txt", "web/b/2.txt"]
    assert names(find([f"{bucket}/web/"], [".txt"]), bucket) == ["web/b/1.txt", "web/b/2.txt"]
    assert names(find([f"{bucket}/web/b/*.txt", f"{bucket}/web/b/2.txt"]), bucket) == ["web/b/1.txt", "web/b/2.txt"]
    (file,) = find([f"{bucket}/other.txt"])
    assert (file.size, file.path) == (5, None)
    assert file.version


def test_documents_are_read_from_a_store(bucket: str) -> None:
    reader = Reader(find([f"{bucket}/web"]))
    assert [piece.text for part in reader for piece in pieces(part, "text")] == ["line", "one", "two"]
    assert reader.bytes_read == reader.total_bytes == 17 + 3 + 3


def test_what_a_store_does_not_have_is_named(bucket: str, tmp_path: Path) -> None:
    for name in ("gone.txt", "gone/*.txt"):
        with pytest.raises(UsageError, match=rf"--input {bucket}/gone.*: matches no file"):
            find([f"{bucket}/{name}"])
    with pytest.raises((DataError, UsageError), match=r"--input nosuch://x/y: |nosuch://x/y: cannot be read"):
        find(["nosuch://x/y"])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b c.txt").write_text("b")
    found = find([f"file://{tmp_path}/b%20c.txt", f"file://{tmp_path}/*.txt", str(tmp_path)])
    assert names(found, str(tmp_path)) == ["b c.txt", "a.txt"]


def test_a_store_that_does_not_let_us_in_is_told_in_a_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(
        DataError, match=r"^s3://texts/web: cannot be read: Unable to locate credentials; check the URL"
    ):
        find([f"{bucket}/web"])
    fsspec.get_filesystem_class("s3").clear_instance_cache()


ROWS = b"".join(b'{"text": "row %d"}\n' % number for number in range(20_000))


class Handler(BaseHTTPRequestHandler):
    """Serves ROWS, in the way that the first part of the path says."""

    protocol_version = "HTTP/1.1"
    cut: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(ROWS)

    def answer(self, data: bytes) -> None:
        kind = self.path.split("/")[1]
        if kind.isdigit():
            self.send_response(int(kind))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked and kind != "no_ranges" else 0
        self.send_response(206 if asked and kind != "no_ranges" else 200)
        if kind == "no_size":
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(ROWS) - begin))
        self.end_headers()
        if data and kind in ("break", "no_ranges") and len(self.cut) < 3:
            self.cut.append(self.path)
            self.wfile.write(data[begin : begin + 100_000])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(data[begin:])


@pytest.fixture
def server() -> Iterator[str]:
    Handler.cut.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["whole", "break", "no_ranges", "no_size"])
def test_reading_over_http_goes_on_where_it_broke(server: str, kind: str) -> None:
    (file,) = find([f"{server}/{kind}/rows.jsonl?key=a.b"])
    reader = Reader([file])
    assert b"".join(part.data for part in reader) == ROWS
    assert len(Handler.cut) == (3 if kind in ("break", "no_ranges") else 0)
    assert reader.bytes_read == (len(ROWS) if kind != "no_size" else 0)


@pytest.mark.parametrize("kind", ["whole", "no_size"])
def test_the_end_of_a_file_over_http_may_be_read_again_and_again(
    server: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with find([f"{server}/{kind}/rows.jsonl"])[0].open() as file:
        assert file.read() == ROWS
        assert [file.read(10) for _ in range(20)] == [b""] * 20
    assert not caplog.records


def test_what_an_http_server_says_is_told(server: str) -> None:
    with pytest.raises(UsageError, match=r"--input .*/404/rows\.jsonl: matches no file"):
        find([f"{server}/404/rows.jsonl"])
    for status in (403, 500):
        with pytest.raises(DataError, match=rf"/{status}/rows\.jsonl: cannot be read: .*{status}"):
            find([f"{server}/{status}/rows.jsonl"])
    with pytest.raises(DataError, match=r"cannot be read: .*Cannot connect"):
        find(["http://127.0.0.1:9/rows.jsonl"])


def test_every_format_is_read_from_a_store(bucket: str, tmp_path: Path) -> None:
    system = fsspec.filesystem("s3")
    row = b'{"text": "one"}\n'
    parquet.write_table(pyarrow.table({"text": ["one"] * 3}), tmp_path / "a.parquet")
    files = {
        "a.jsonl.gz": gzip.compress(row * 3),
        "a.jsonl.zst": pyarrow.compress(row * 3, "zstd", asbytes=True),
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
    }
    for name, data in files.items():
        system.pipe_file(f"texts/formats/{name}", data)
        reader = Reader(find([f"{bucket}/formats/{name}"]))
        assert [piece.text for part in reader for piece in pieces(part, "text")] == ["one"] * 3
        assert reader.bytes_read == reader.total_bytes == len(data)


def test_memory_is_a_store_too() -> None:
    fsspec.filesystem("memory").pipe_file("/a.txt", b"a")
    fsspec.filesystem("memory").pipe_file("/deep/b.txt", b"b")
    for name in ("memory://a.txt", "memory://deep", "memory://deep/*.txt"):
        assert len(list(Reader(find([name])))) == 1

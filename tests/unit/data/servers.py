"""A real S3-compatible server on the loopback, and a proxy before it that fails, stalls and truncates when told."""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ACTIONS = ("pass", "error", "stall", "truncate", "shorten", "flip", "deny")


class Proxy(socketserver.ThreadingTCPServer):
    """Hands each request on, with `Connection: close`, unless the next of `plan` says otherwise.

    plan: one action a request for a file whose name holds `only`; used up, all pass. Each is one of ACTIONS.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.plan: deque[str] = deque()
        self.only = "shard-"
        self.forever = ""
        self.requests: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []
        self.change = threading.Lock()
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def action(self, path: str, span: str) -> str:
        with self.change:
            self.requests[path.rpartition("/")[2]] += 1
            self.ranges.append((path, span))
            if self.only not in path:
                return "pass"
            return self.plan.popleft() if self.plan else self.forever or "pass"


class _Handler(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        with suppress(OSError):
            self._handle()

    def _handle(self) -> None:
        lines = []
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            lines.append(line)
        if not lines:
            return
        method, path = lines[0].decode().split()[:2]
        headers = {key.lower(): value for key, value in (line.decode().split(": ", 1) for line in lines[1:])}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        action = self.server.action(path, headers.get("range", "").strip()) if method == "GET" else "pass"
        if action == "stall":
            self.server.ended.wait(60)
            return
        if action in ("error", "deny"):
            status = b"500 Internal Server Error" if action == "error" else b"403 Forbidden"
            self.wfile.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
            return
        kept = [line for line in lines[1:] if not line.lower().startswith(b"connection:")]
        with socket.create_connection(("127.0.0.1", self.server.target)) as target:
            target.sendall(lines[0] + b"".join(kept) + b"Connection: close\r\n\r\n" + body)
            with target.makefile("rb") as answer:
                whole = answer.read()
        head, _, content = whole.partition(b"\r\n\r\n")
        if action == "truncate":
            content = content[: len(content) // 2]
        if action == "shorten":  # and lies about it
            content = content[: len(content) // 2]
            head = re.sub(rb"(?i)(content-length: )\d+", rb"\g<1>%d" % len(content), head)
        if action == "flip" and len(content) < 250:  # a first label: no checksum is its own
            content = b""
        elif action == "flip":
            content = content[:200] + bytes([content[200] ^ 1]) + content[201:]
        self.wfile.write(head + b"\r\n\r\n" + content)


@contextmanager
def proxy_of(port: int) -> Iterator[Proxy]:
    with Proxy(port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """(port, boto client) of a moto server."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", aws_access_key_id="id", aws_secret_access_key="secret",
        region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket="data")
    yield port, client
    server.stop()


@contextmanager
def endpoint(url: str) -> Iterator[None]:
    """Have fsspec go to a server. It keeps its instances, and they know the endpoint of their time."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(s3: Any) -> Iterator[Proxy]:
    """Between fsspec and the server."""
    with proxy_of(s3[0]) as server, endpoint(server.url):
        yield server


def upload(client: Any, folder: Path, prefix: str) -> str:
    """Put the files of a folder into the bucket; gives its URL."""
    for path in folder.iterdir():
        client.put_object(Bucket="data", Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    return f"s3://data/{prefix}"

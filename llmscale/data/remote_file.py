"""A file of a store as a Python file, read once from front to back in little memory.

Where a connection breaks or stalls, reading goes on at the same byte, with the patience of `store.py`. Stores are asked
for ranges. An HTTP server is asked for the whole file, and after a break for the rest of it: many know no ranges and
some no size. A .parquet file is read from its end, so there the server has to know ranges.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

from llmscale.data.store import Counters, Doubtful, Patience, UrlStore, split_url

_BUFFER = 4 << 20


def open_remote(url: str, size: int, seekable: bool) -> BinaryIO:
    """The file at a URL. size: 0 where the server does not tell.

    Raises, here and while it is read:
        UsageError: a package is missing. DataError: the store fails for longer than `Patience` has.
    """
    streamed = url.startswith(("http://", "https://")) and not seekable
    raw = _Stream(url, size) if streamed else _Ranges(url, size)
    return cast(BinaryIO, io.BufferedReader(raw, _BUFFER))


class _Remote(io.RawIOBase):
    def __init__(self, url: str, size: int, patience: Patience | None = None) -> None:
        folder, self._name = split_url(url)
        self._patience = patience or Patience()
        self._store = UrlStore(folder, self._patience, Counters())
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._some(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _some(self, most: int) -> bytes:
        """The bytes at the position: at most so many, none at the end."""
        raise NotImplementedError


class _Ranges(_Remote):
    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def _some(self, most: int) -> bytes:
        end = min(self._position + most, self._size)
        return self._store.read(self._name, self._position, end) if end > self._position else b""


class _Stream(_Remote):
    _response: Any = None
    _ended = False

    def _some(self, most: int) -> bytes:
        if self._ended:  # aiohttp warns of reading on, with a stack, and readers of tars and .gz do
            return b""

        def call() -> bytes:
            try:
                if self._response is None:
                    self._response = self._open()
                data: bytes = self._response.read(most)
            except Exception:
                self._drop()
                raise
            if not data and self._position < self._size:
                self._drop()
                raise Doubtful(f"ends at byte {self._position} of {self._size}")
            return data

        data = self._store.attempt(self._name, call)
        self._ended = not data
        return data

    def close(self) -> None:
        self._drop()
        super().close()

    def _open(self) -> Any:
        """The response from the position on."""
        import aiohttp

        system, root = self._store.filesystem()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={self._position}-"} if self._position else {})
        seconds = self._patience.attempt_seconds
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        path = f"{root.rstrip('/')}/{self._name}"
        # Any size but none: fsspec would ask for it, with these headers.
        response = system.open(path, block_size=0, size=1, headers=headers, timeout=timeout)
        left = self._position if response.r.status == 200 else 0  # 206: from the byte that was asked for
        while left and (data := response.read(min(left, _BUFFER))):
            left -= len(data)
        return response

    def _drop(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

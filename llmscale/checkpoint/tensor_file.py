"""safetensors files, written and read one tensor at a time, so that memory holds one of them; with checksums.

Read with pread into memory of its own, and not mapped as the library does: what was mapped, looked at for its checksum
and written out again came to 0.25 GiB/s here, what was read and written by blocks to 0.75.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmscale.checkpoint.place import is_remote, read_range

TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64",
}  # fmt: skip

DTYPES = {name: dtype for dtype, name in TYPES.items()}
_BLOCK = 1 << 20
"""Bytes of one write. Of a whole tensor at once the kernel took between as long and five times as long."""
_RANGE = 8 << 20
"""Bytes of one request to a store."""
_MOST_HEADER_BYTES = 100 << 20
"""The library's own limit."""


@dataclass(frozen=True)
class Header:
    """What a tensor in a file is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Written:
    """A file. head_crc32: of all before the tensors. crc32: of each tensor's bytes, by name."""

    bytes: int
    head_crc32: int
    crc32: dict[str, int]


def write(
    path: Path,
    headers: Sequence[Header],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    checksums: bool = True,
    check: Callable[[str, torch.Tensor], object] = lambda name, tensor: None,
    sync: Callable[[Path], object] | None = None,
) -> Written:
    """Write the tensors that the headers speak of, in their order; the next are made while one is written.

    Of tensors in the making, waiting or being written there are at most twice the bytes of the largest one.

    check: called with each name and tensor before it is written, to raise where it must not be; not in the thread that
    makes the tensors. sync: what brings the file to the disk, `synced` when None; `synced_behind` lets the next
    file begin.

    The format: 8 bytes of header length, little-endian; a JSON header of names, types, shapes and offsets; the bytes.
    """
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for header in headers:
        offsets = [end, end + header.bytes]
        described[header.name] = {"dtype": TYPES[header.dtype], "shape": list(header.shape), "data_offsets": offsets}
        end += header.bytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    crc32 = {}
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(head)
        for header, tensor in _ahead(headers, tensors, pool):
            if tensor.dtype != header.dtype or tuple(tensor.shape) != header.shape:
                raise ValueError(f"{header.name}: {tensor.dtype} {list(tensor.shape)} given, {header} said")
            check(header.name, tensor)
            raw = raw_bytes(tensor)
            if checksums:
                crc32[header.name] = zlib.crc32(raw)
            for start in range(0, len(raw), _BLOCK):
                file.write(raw[start : start + _BLOCK])
            del tensor, raw  # before there is a next one
    (sync or synced)(path)
    return Written(len(head) + end, zlib.crc32(head), crc32)


def synced(path: Path) -> None:
    """Return when a file is on the disk."""
    if is_remote(path):
        return
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def synced_behind() -> Iterator[Callable[[Path], object]]:
    """Gives a `sync` for `write` that works in a thread beside it; at the end all those files are on the disk."""
    with ThreadPoolExecutor(1) as pool:
        coming: list[Future[None]] = []
        yield lambda path: coming.append(pool.submit(synced, path))
        for one in coming:
            one.result()


def _ahead(
    headers: Sequence[Header], tensors: Iterable[torch.Tensor], pool: ThreadPoolExecutor
) -> Iterator[tuple[Header, torch.Tensor]]:
    """Each header with its tensor. The pool's one thread makes them, as far ahead as memory allows: a large one after
    small ones would otherwise be waited for."""
    found, most = iter(tensors), 2 * max((header.bytes for header in headers), default=0)
    coming: deque[Future[torch.Tensor | None]] = deque()
    held = begun = 0
    for header in headers:
        while begun < len(headers) and held + headers[begun].bytes <= most:
            coming.append(pool.submit(next, found, None))
            held += headers[begun].bytes
            begun += 1
        tensor = coming.popleft().result()
        if tensor is None:
            raise ValueError(f"{header.name}: no tensor given")
        yield header, tensor
        del tensor
        held -= header.bytes
    if next(found, None) is not None:
        raise ValueError("more tensors given than headers")


def _entry(found: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = found["data_offsets"]
    return str(found["dtype"]), tuple(map(int, found["shape"])), int(begin), int(end)


class Reader:
    """A safetensors file, open for reading. Nothing in it is run."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be read, and ValueError where it is no such file, or not all of it."""
        self._path, self._file = path, -1
        if not is_remote(path):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = path.stat().st_size if self._file < 0 else os.fstat(self._file).st_size
        length = int.from_bytes(self._range(0, min(8, size)), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        self.head = self._range(0, 8 + length)
        """All before the tensors."""
        try:
            found = json.loads(self.head[8:])
            found.pop("__metadata__", None)
            self._about = {name: _entry(one) for name, one in found.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a header of safetensors ({type(error).__name__}: {error})") from None
        for name, (kind, shape, begin, end) in self._about.items():
            wrong = kind in DTYPES and end - begin != DTYPES[kind].itemsize * math.prod(shape)
            if wrong or not 0 <= begin <= end <= size - len(self.head) or any(side < 0 for side in shape):
                raise ValueError(f"{name}: {kind} {list(shape)} does not stand at {begin} to {end}")

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def _range(self, start: int, end: int) -> bytes:
        return os.pread(self._file, end - start, start) if self._file >= 0 else read_range(self._path, start, end)

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return list(self._about)

    def about(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(type as safetensors calls it, shape) of a tensor."""
        kind, shape, *_ = self._about[name]
        return kind, shape

    def read(self, name: str) -> torch.Tensor:
        """A tensor. Raises ValueError where it is not there, or of a type that is not known here; OSError."""
        if name not in self._about:
            raise ValueError("is not in the file")
        kind, shape, begin, end = self._about[name]
        if kind not in DTYPES:
            raise ValueError(f"is of type {kind}")
        tensor = torch.empty(shape, dtype=DTYPES[kind])
        raw, place, done = raw_bytes(tensor), len(self.head) + begin, 0
        while done < end - begin:
            if self._file >= 0:
                count = os.preadv(self._file, [raw[done:]], place + done)
            else:
                data = read_range(self._path, place + done, place + min(done + _RANGE, end - begin))
                raw[done : done + len(data)] = data
                count = len(data)
            if count == 0:
                raise ValueError("is cut short")
            done += count
        return tensor


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    raw: memoryview = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
    return raw

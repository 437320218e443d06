"""Writing a safetensors file one tensor at a time, so that memory holds one of them, with checksums."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a tensor in a file is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Written:
    """A file. head_crc32: of all before the tensors. crc32: of each tensor's bytes, by name."""

    bytes: int
    head_crc32: int
    crc32: dict[str, int]


def write(
    path: Path, headers: Sequence[Header], tensors: Iterable[torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write the tensors that the headers speak of, in their order; they are asked for one by one.

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
    checksums = {}
    with path.open("wb") as file:
        file.write(head)
        for header, tensor in zip(headers, tensors, strict=True):
            if tensor.dtype != header.dtype or tuple(tensor.shape) != header.shape:
                raise ValueError(f"{header.name}: {tensor.dtype} {list(tensor.shape)} given, {header} said")
            raw = raw_bytes(tensor)
            checksums[header.name] = zlib.crc32(raw)
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(head) + end, zlib.crc32(head), checksums)


def read_head(path: Path) -> bytes:
    """All before the tensors; fewer bytes where the file is shorter."""
    with path.open("rb") as file:
        length = file.read(8)
        most = path.stat().st_size
        return length + file.read(min(most, struct.unpack("<Q", length)[0]) if len(length) == 8 else 0)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    raw: memoryview = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
    return raw

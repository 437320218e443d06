"""Writing a safetensors file one tensor at a time, so that memory holds one of them and not the file."""

from __future__ import annotations

import json
import os
import struct
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


def write(
    path: Path, headers: Sequence[Header], tensors: Iterable[torch.Tensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Write the tensors that the headers speak of, in their order; they are asked for one by one. Gives the bytes.

    The format: 8 bytes of header length, little-endian; a JSON header of names, types, shapes and offsets; the bytes.
    """
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for header in headers:
        offsets = [end, end + header.bytes]
        head[header.name] = {"dtype": TYPES[header.dtype], "shape": list(header.shape), "data_offsets": offsets}
        end += header.bytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for header, tensor in zip(headers, tensors, strict=True):
            if tensor.dtype != header.dtype or tuple(tensor.shape) != header.shape:
                raise ValueError(f"{header.name}: {tensor.dtype} {list(tensor.shape)} given, {header} said")
            raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end

"""Files that are there whole or not at all, also after a kill or a loss of power; and a tar that is one of them.

A file is written under another name, brought onto the disk, and renamed. The tar of arrays can be left and gone on with
at any member: it is cut to the length that was noted, and its checksum is computed again from what is there.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llmscale.errors import DataError


class ArrayTar:
    """A tar file of .npy members: ustar, no times, no owners, so that the same content is the same bytes."""

    def __init__(self, path: Path, kept: int = 0) -> None:
        """kept: bytes of a file that was begun and is gone on with; what stands after them is cut off."""
        self.path = path
        self.bytes = kept
        self._sha256 = hashlib.sha256()
        self._file = reopen(path, kept)
        self._file.seek(0)
        while block := self._file.read(1 << 20):
            self._sha256.update(block)

    def member(self, name: str, array: npt.NDArray[Any]) -> int:
        """Write a member; gives the offset of the array's first byte."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        info = tarfile.TarInfo(name)
        info.size = len(header.getvalue()) + array.nbytes
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + header.getvalue())
        offset = self.bytes
        self._write(array.tobytes())
        self._write(bytes(-info.size % tarfile.BLOCKSIZE))
        return offset

    def sync(self) -> None:
        """Bring all members onto the disk."""
        sync(self._file)

    def finish(self) -> str:
        """Give the file its name; returns its SHA-256."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        sync(self._file)
        self.close()
        partial(self.path).rename(self.path)
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Leave the file as it is."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)


def reopen(path: Path, kept: int) -> BufferedRandom:
    """PATH.partial, to write on at its end, cut to its first `kept` bytes. It may have got its name meanwhile.

    Raises:
        DataError: there are fewer bytes.
    """
    if kept and path.exists():
        path.rename(partial(path))
    try:
        file = partial(path).open("r+b" if kept else "w+b")
    except FileNotFoundError:
        raise DataError(f"{partial(path)}: is missing") from None
    if (found := file.seek(0, os.SEEK_END)) < kept:
        file.close()
        raise DataError(f"{partial(path)}: {found} bytes are left of the {kept} that were written")
    file.truncate(kept)
    file.seek(kept)
    return file


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before; a failure leaves nothing of it."""
    try:
        with temporary(path).open("wb") as file:
            file.write(data)
            sync(file)
        temporary(path).replace(path)
    except OSError:
        with suppress(OSError):
            temporary(path).unlink()
        raise


def partial(path: Path) -> Path:
    """The name of a file of a dataset while it is written, piece by piece."""
    return path.with_name(f"{path.name}.partial")


def temporary(path: Path) -> Path:
    """The name of a file while it is written at once: one that no user has given to a file of theirs."""
    return path.with_name(f".{path.name}.llmscale-partial")


def sync(file: BinaryIO | BufferedRandom) -> None:
    """Bring what was written onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring names and renames in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

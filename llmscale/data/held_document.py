"""A document whose end has not come yet: only then is it known whether it is a copy of another one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from llmscale.data.dedup import Minima
from llmscale.data.encode import digest
from llmscale.data.shards import Tokens

_HELD_BYTES = 64 << 20
"""Of tokens, in memory; more wait on disk."""


class HeldDocument:
    """Its tokens, piece after piece; on disk, where it is long."""

    def __init__(self, split: str, folder: Path, dtype: str) -> None:
        self.split = split
        self.minima: Minima | None = None
        self._dtype = np.dtype(dtype)
        self._folder = folder
        self._pieces: list[Tokens] = []
        self._lengths: list[int] = []
        self._digests: list[bytes] = []
        self._file: IO[bytes] | None = None

    @property
    def digest(self) -> bytes:
        """Of the whole text: that of its only piece, or of the pieces' digests."""
        return self._digests[0] if len(self._digests) == 1 else digest(b"".join(self._digests))

    def add(self, tokens: Tokens, piece_digest: bytes, minima: Minima | None) -> None:
        self._digests.append(piece_digest)
        if minima is not None:
            self.minima = minima if self.minima is None else np.minimum(self.minima, minima)
        self._pieces.append(tokens)
        self._lengths.append(len(tokens))
        if sum(piece.nbytes for piece in self._pieces) > _HELD_BYTES:
            self._file = self._file or tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            for piece in self._pieces:
                self._file.write(piece.tobytes())
            self._pieces = []

    def pieces(self) -> Iterator[tuple[Tokens, bool, bool]]:
        """The tokens, piece after piece, each with whether it is the first and the last."""
        spilled = len(self._lengths) - len(self._pieces)
        if self._file:
            self._file.seek(0)
        for number, length in enumerate(self._lengths):
            if number < spilled and self._file:
                tokens: Tokens = np.frombuffer(self._file.read(length * self._dtype.itemsize), dtype=self._dtype)
            else:
                tokens = self._pieces[number - spilled]
            yield tokens, number == 0, number == len(self._lengths) - 1

    def close(self) -> None:
        if self._file:
            self._file.close()

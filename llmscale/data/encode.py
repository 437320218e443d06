"""From files to tokens by any number of processes, in an order that does not depend on how many there are.

The main process reads parts of documents (`documents.py`), packs them into jobs of about 256 KiB, and hands each job to
the next free worker; results are taken in the order of the jobs. A window of jobs is in flight, of 16 MiB a worker or
of one job, and that bounds memory. A document that stands whole in a line, a row or a sample is one job: a .jsonl with
lines of 92 MB took 756 MB in the main process and 865 MB in a worker (ru_maxrss, --workers 2).

With each job goes the position after it, from which reading can go on in another process: a file, and how many of its
parts are done. Going on there proves that the files before are the same by their names, sizes and times, and that file
by a checksum of the parts; what comes after may have changed, so that a bad line can be mended.

Per second of CPU it makes 0.94 (one worker, or two) of what tokenizers alone makes of the same texts in memory, and
1.3 times what Megatron-LM's preprocessing makes (`python -m benchmarks.data_build --rounds 3 --mib 24`).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmscale.data import dedup, documents
from llmscale.data.documents import Part, Reader, Seen
from llmscale.data.inputs import InputFile
from llmscale.data.shards import Tokens
from llmscale.data.tokenizer import Tokenizer
from llmscale.distributed.launch import one_thread_for_tokenizers
from llmscale.errors import DataError, UsageError

_JOB_BYTES = 1 << 18
"""About 0.1 s of work: at the end no worker waits for long, and the way to a worker takes under 1 ms."""
_JOBS_A_WORKER = 4
_BYTES_A_WORKER = 16 << 20
"""Of jobs that wait or are at work, where they are large: of a line of 88 MB there is one, and the next is read."""


class Position(BaseModel):
    """How far the input is read."""

    model_config = ConfigDict(frozen=True)

    file: int = 0
    """Files that are done."""
    parts: int = 0
    """Of the next file."""
    name: str = ""
    """Of that file, where any are done."""
    parts_crc32: int = 0
    files_sha256: str = ""
    """Of the names, sizes and times of the files that are done, one after another."""
    bytes_before: int = 0
    """Of the files that are done."""
    bytes_read: int = 0
    seen: Seen = Seen()


@dataclass(frozen=True)
class Job:
    """Parts, and the position after them."""

    parts: tuple[Part, ...]
    position: Position

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(len(part.data) for part in self.parts)


@dataclass(frozen=True)
class Encoded:
    """The tokens of some pieces, one after another. fingerprint: of the document, None where it has begun before."""

    tokens: Tokens
    lengths: list[int]
    fingerprints: list[int | None]
    last: list[bool]
    empty: int
    replaced: int
    digests: list[bytes]
    """Of each piece; none where duplicates stay."""
    minima: list[dedup.Minima]
    """Of each piece; none where near duplicates stay."""
    skipped: list[str]
    """What is wrong with each record that was passed over."""


@dataclass(frozen=True)
class Encoder:
    """What a worker does to a job."""

    tokenizer: Tokenizer
    text_key: str
    exact: bool = False
    near: bool = False
    skip: bool = False
    """Whether bad records are passed over."""

    def __call__(self, parts: tuple[Part, ...]) -> Encoded:
        tokens: list[Tokens] = []
        fingerprints: list[int | None] = []
        lasts: list[bool] = []
        digests: list[bytes] = []
        minima: list[dedup.Minima] = []
        empty = replaced = 0
        skipped: list[str] = []
        for piece in self._pieces(parts, skipped):
            if piece.first and piece.last and not piece.text.strip():
                empty += 1
                continue
            replaced += piece.replaced
            tokens.append(self.tokenizer.encode(piece.text, continues=not piece.first))
            fingerprints.append(_fingerprint(piece) if piece.first else None)
            lasts.append(piece.last)
            if self.exact:
                digests.append(digest(_stripped(piece)))
            if self.near:
                minima.append(dedup.minima(piece.text))
        joined = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.uint16)
        lengths = [len(ids) for ids in tokens]
        return Encoded(joined, lengths, fingerprints, lasts, empty, replaced, digests, minima, skipped)

    def _pieces(self, parts: tuple[Part, ...], skipped: list[str]) -> Iterator[documents.Piece]:
        """The pieces of all parts; what is wrong with bad records, where they are passed over, goes to `skipped`."""
        for part in parts:
            try:
                yield from documents.pieces(part, self.text_key)
            except documents.BadRecord as error:
                if not self.skip:
                    raise
                skipped.append(str(error))


def jobs(files: Sequence[InputFile], text_key: str, start: Position) -> Iterator[Job]:
    """The parts of all files from a position on, in packs of about _JOB_BYTES.

    Raises:
        UsageError: what stands before the position has changed since.
    """
    _check_files(files, start)
    pack: list[Part] = []
    size = 0
    sha256, bytes_before, seen = start.files_sha256, start.bytes_before, start.seen
    for number in range(start.file, len(files)):
        reader = Reader(files[number : number + 1], text_key, seen)
        skipped = start.parts if number == start.file else 0
        parts = crc32 = 0
        for part in reader:
            parts += 1
            crc32 = zlib.crc32(part.data, crc32)
            if parts <= skipped:
                if parts == skipped and crc32 != start.parts_crc32:
                    raise _changed(files[number])
                continue
            pack.append(part)
            size += len(part.data)
            if size >= _JOB_BYTES:
                yield Job(
                    tuple(pack),
                    Position(
                        file=number, parts=parts, name=files[number].shown, parts_crc32=crc32, files_sha256=sha256,
                        bytes_before=bytes_before, bytes_read=bytes_before + reader.bytes_read, seen=seen,
                    ),
                )  # fmt: skip
                pack, size = [], 0
        if parts < skipped:
            raise _changed(files[number])
        sha256 = _stamp(sha256, files[number])
        bytes_before += reader.total_bytes
        seen = reader.seen
    yield Job(
        tuple(pack),
        Position(
            file=len(files), files_sha256=sha256, bytes_before=bytes_before, bytes_read=bytes_before,
            seen=seen,
        ),
    )  # fmt: skip


def in_order(encoder: Encoder, packs: Iterator[Job], workers: int) -> Generator[tuple[Encoded, Position], None, None]:
    """The results of all jobs, in the order of the jobs, each with the position after it."""
    if workers == 1:
        for job in packs:
            yield encoder(job.parts), job.position
        return
    # Spawned, not forked: the tokenizer's and the progress display's threads would not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[tuple[Future[Encoded], Position, int]] = deque()
    in_flight = 0
    try:
        started = pool.submit(os.getpid)
        for job in packs:
            size = job.bytes
            while pending and (len(pending) > _JOBS_A_WORKER * workers or in_flight + size > _BYTES_A_WORKER * workers):
                future, position, done = pending.popleft()
                in_flight -= done
                yield future.result(), position
            pending.append((pool.submit(_encode, job.parts), job.position, size))
            in_flight += size
            del job  # while the next is read
        while pending:
            future, position, _ = pending.popleft()
            yield future.result(), position
    except OSError as error:
        raise DataError(f"no worker can be started: {error.strerror}; use fewer --workers") from None
    except BrokenProcessPool:
        if started.exception():
            raise DataError(
                "no worker could be started (what they said stands above); use --workers 1, "
                'or in a script call build under `if __name__ == "__main__":`'
            ) from None
        raise DataError("a worker was killed, most often for want of memory; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Encoder
"""Of this process, where it is a worker."""


def _start_worker(encoder: Encoder) -> None:
    """Ctrl-C is for the main process, which ends the workers; the tokenizer comes once, not with each job.

    A main process that was killed ends nobody: a worker would wait for ever at a queue that its siblings hold open.
    """
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    one_thread_for_tokenizers()
    _worker = encoder


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _encode(parts: tuple[Part, ...]) -> Encoded:
    return _worker(parts)


def _stripped(piece: documents.Piece) -> bytes:
    """A piece without the white space at its document's beginning and end: texts that differ there alone are copies."""
    text = piece.text.lstrip() if piece.first else piece.text
    return (text.rstrip() if piece.last else text).encode()


def _fingerprint(piece: documents.Piece) -> int:
    """64 bits of a document by its first piece: of all its text, or of so much as every first piece of a longer has.

    Wherever white space at the beginning lets the first piece of a long document end, its copies get the same.
    """
    text = _stripped(piece)
    return int.from_bytes(digest(text if piece.last else text[: documents.PIECE_BYTES // 4], 8), "big")


def digest(data: bytes, size: int = dedup.DIGEST_BYTES) -> bytes:
    """BLAKE2b of some bytes."""
    return hashlib.blake2b(data, digest_size=size).digest()


def _check_files(files: Sequence[InputFile], start: Position) -> None:
    sha256 = ""
    for file in files[: start.file]:
        sha256 = _stamp(sha256, file)
    if len(files) < start.file or sha256 != start.files_sha256:
        raise _changed(None)
    there = files[start.file].shown if start.file < len(files) else "nothing"
    if start.name not in ("", there):
        raise UsageError(
            f"--input: {there} stands where the unfinished build was reading {start.name}; a file has come or gone "
            "before it: make --input what it was, or drop that build with --restart"
        )


def _stamp(before: str, file: InputFile) -> str:
    """A checksum of a file's name, size and version, and of the files before it."""
    return hashlib.sha256(
        f"{before}\0{file.name}\0{file.size}\0{file.version}".encode(errors="surrogateescape")
    ).hexdigest()


def _changed(file: InputFile | None) -> UsageError:
    what = file.shown if file else "--input: a file"
    moved = "" if file else ", or one has come or gone before it"
    return UsageError(
        f"{what} has changed that the unfinished build had read{moved}; put it back, or drop that build with --restart"
    )

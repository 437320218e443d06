"""Text in, token shards out: read in order, tokenised by any number of processes, written in order.

The main process reads parts of documents (`documents.py`), packs them into jobs of about a MiB, and hands each job to
the next free worker; results are taken in the order of the jobs, so the shards are the same bytes for any number of
workers. A window of jobs is in flight, and that bounds memory. A document goes to the validation split when the hash
of its text (of its first MiB, where it is longer) falls below the fraction: copies of a document always land on the
same side.

Everything is written into OUTPUT.partial, which takes the place of OUTPUT by a rename once it is whole and on disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llmscale.data import documents
from llmscale.data.documents import Part, Reader
from llmscale.data.shards import SAMPLE_TOKENS, Card, SplitWriter, Tokens
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError, UsageError

TRAIN, VALIDATION = "train", "validation"
_JOB_BYTES = 1 << 20
_MIN_SAMPLE_TOKENS = 1024


@dataclass
class Progress:
    """How far a build is. Bytes are those of the input files, as they lie on disk."""

    total_bytes: int
    bytes_read: int = 0
    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Summary:
    """What a build did."""

    output: Path
    splits: dict[str, Card]
    files: int
    binary_files: int
    """Left out: they hold NUL bytes."""
    empty_documents: int
    """Left out: nothing but white space."""
    replaced_characters: int
    """Bytes that are not UTF-8, now U+FFFD."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of some pieces, one after another. fingerprint: of the document, None where it has begun before."""

    tokens: Tokens
    lengths: list[int]
    fingerprints: list[int | None]
    last: list[bool]
    empty: int
    replaced: int


def build(
    inputs: Sequence[str],
    tokenizer: Path,
    output: Path,
    *,
    workers: int = 1,
    validation_fraction: float = 0.01,
    shard_bytes: int = 256 << 20,
    suffixes: Sequence[str] = (),
    text_key: str = "text",
    end_of_document: str | None = None,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Write OUTPUT/train and, where validation_fraction is above 0, OUTPUT/validation.

    The same inputs, tokenizer and options give the same bytes. report: called now and then with how far it is.
    """
    reader = Reader(documents.find(inputs, suffixes))
    loaded = Tokenizer(tokenizer, end_of_document)
    _check_output(output, inputs, reader.paths, overwrite)
    itemsize = np.dtype(loaded.dtype).itemsize
    sample_tokens = min(SAMPLE_TOKENS, max(_MIN_SAMPLE_TOKENS, shard_bytes // itemsize))
    shard_samples = max(1, shard_bytes // (sample_tokens * itemsize))
    writers = {}
    try:
        with _staged(output) as folder:
            for split in (TRAIN, VALIDATION) if validation_fraction > 0 else (TRAIN,):
                (folder / split).mkdir()
                writers[split] = SplitWriter(
                    folder / split, loaded.dtype, loaded.end_of_document, sample_tokens, shard_samples
                )
            with closing(_in_order(partial(_encode, loaded, text_key), _jobs(reader), workers)) as results:
                empty, replaced = _write(writers, results, validation_fraction, reader, report)
            if not writers[TRAIN].documents:
                raise DataError(_no_documents(sum(writer.documents for writer in writers.values()), empty, reader))
            cards = {name: writer.finish(loaded.content, loaded.vocab_size) for name, writer in writers.items()}
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}; name another --output") from None
    finally:
        for writer in writers.values():
            writer.abandon()
    return Summary(output, cards, len(reader.paths), reader.binary_files, empty, replaced)


def _write(
    writers: dict[str, SplitWriter],
    results: Iterable[Encoded],
    validation_fraction: float,
    reader: Reader,
    report: Callable[[Progress], None],
) -> tuple[int, int]:
    """Write all results; gives how many documents were empty, and how many characters were replaced."""
    split = TRAIN
    empty = replaced = 0
    for result in results:
        split = _add(writers, split, result, validation_fraction)
        empty, replaced = empty + result.empty, replaced + result.replaced
        documents_done = sum(writer.documents for writer in writers.values())
        tokens_done = sum(writer.tokens for writer in writers.values())
        report(Progress(reader.total_bytes, reader.bytes_read, documents_done, tokens_done))
    return empty, replaced


def _add(writers: dict[str, SplitWriter], split: str, result: Encoded, validation_fraction: float) -> str:
    """Hand each piece to its split; gives the split of the last one, which the next piece may continue."""
    start = 0
    for length, fingerprint, last in zip(result.lengths, result.fingerprints, result.last, strict=True):
        if fingerprint is not None:
            split = VALIDATION if fingerprint < validation_fraction * 2**64 else TRAIN
        writers[split].add(result.tokens[start : start + length], fingerprint is not None, last)
        start += length
    return split


def _jobs(reader: Reader) -> Iterator[tuple[Part, ...]]:
    """Parts in packs of about _JOB_BYTES."""
    pack: list[Part] = []
    size = 0
    for part in reader:
        pack.append(part)
        size += len(part.data)
        if size >= _JOB_BYTES:
            yield tuple(pack)
            pack, size = [], 0
    if pack:
        yield tuple(pack)


def _encode(tokenizer: Tokenizer, text_key: str, parts: tuple[Part, ...]) -> Encoded:
    """The tokens of a job; runs in the workers."""
    tokens: list[Tokens] = []
    fingerprints: list[int | None] = []
    lasts: list[bool] = []
    empty = replaced = 0
    for part in parts:
        for piece in documents.pieces(part, text_key):
            if piece.first and piece.last and not piece.text.strip():
                empty += 1
                continue
            replaced += piece.replaced
            tokens.append(tokenizer.encode(piece.text))
            fingerprints.append(_fingerprint(piece.data) if piece.first else None)
            lasts.append(piece.last)
    joined = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.uint16)
    return Encoded(joined, [len(ids) for ids in tokens], fingerprints, lasts, empty, replaced)


def _fingerprint(data: bytes) -> int:
    """64 bits of a hash of a document."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _in_order(
    encode: Callable[[tuple[Part, ...]], Encoded], jobs: Iterator[tuple[Part, ...]], workers: int
) -> Generator[Encoded, None, None]:
    """The results of all jobs, in the order of the jobs."""
    if workers == 1:
        yield from map(encode, jobs)
        return
    # Spawned, not forked: the tokenizer's and the progress display's threads would not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=_LEAVE_INTERRUPTS)
    pending: deque[Future[Encoded]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(encode, job))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker was killed, most often for want of memory; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_LEAVE_INTERRUPTS = (signal.SIGINT, signal.SIG_IGN)
"""Ctrl-C is for the main process, which ends the workers."""


def _check_output(output: Path, inputs: Sequence[str], files: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that would destroy something, or be read as input the next time."""
    target = output.resolve()
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: is a file; name a folder")
    inside = next((file for file in files if target in file.resolve().parents), None)
    if inside:
        raise UsageError(f"--input {inside}: lies inside --output {output}; name another --output")
    around = next((name for name in inputs if os.path.isdir(name) and Path(name).resolve() in target.parents), None)
    if around:
        raise UsageError(f"--output {output}: lies inside --input {around}, which is read; name a folder outside it")
    there = sorted(entry.name for entry in output.iterdir()) if output.exists() else []
    if there and not overwrite:
        raise UsageError(f"--output {output}: is not empty; name another folder, or replace it with --overwrite")
    if foreign := [name for name in there if not (output / name / "card.json").is_file()]:
        raise UsageError(f"--output {output}: holds {foreign[0]!r}, which no build wrote; name another folder")


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `output` at the end. Nothing stays behind on an error."""
    target = output.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = target.with_name(f"{target.name}.partial")
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output {output}: another build is writing it; wait for it or name another") from None
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        try:
            yield partial_folder
            if target.exists():
                old = target.with_name(f"{target.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
                partial_folder.rename(target)
                shutil.rmtree(old)
            else:
                partial_folder.rename(target)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
            os.unlink(lock.name)


def _no_documents(validation: int, empty: int, reader: Reader) -> str:
    if validation:
        return f"all {validation} document(s) fell into the validation split; use a smaller --validation-fraction"
    return (
        f"no document to train on in --input: {empty} empty, {reader.binary_files} binary file(s); give files with text"
    )

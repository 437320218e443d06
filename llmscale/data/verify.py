"""Check a dataset to the last byte: every checksum, every offset, every id, and the documents' boundaries."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np

from llmscale.data.cache import Cache
from llmscale.data.quarantine import Broken, message
from llmscale.data.shards import REBUILD, Shard, checksum, sample_key
from llmscale.data.split import Split, parse_sample, splits
from llmscale.data.store import is_remote
from llmscale.data.text_shards import TextSplit, is_text
from llmscale.errors import DataError


def verify(
    place: Path | str, report: Callable[[int, int], None] = lambda done, total: None, cache: Cache | None = None
) -> list[str]:
    """All that is wrong in a split or in all splits of a dataset, one line each; empty when it is whole.

    place: a folder, or the URL of a split (`store.py`), whose shards go through the cache one after another.
    report: called with (bytes checked, bytes in all) after each shard.
    """
    if is_text(place):
        return _text(TextSplit(place, (lambda: cache) if cache else Cache), report)
    problems: list[str] = []
    opened = []
    for one in splits(Path(place)) if not is_remote(place) else [place]:
        try:
            opened.append(Split(one, cache))
        except DataError as error:
            problems.append(str(error))
    total = sum(split.card.bytes for split in opened)
    done = 0
    for split in opened:
        problems += _totals(split)
        sample = 0
        for shard in split.shards:
            problems += _shard(split, shard, sample)
            sample += len(shard.offsets)
            done += shard.bytes
            report(done, total)
    return problems


def _text(split: TextSplit, report: Callable[[int, int], None]) -> list[str]:
    """All pieces of text shards that are not what was described."""
    problems, done = [], 0
    for number, (_, piece) in enumerate(split.pieces):
        split.forget(number)
        try:
            split.documents(number)
        except Broken as broken:
            problems.append(message(split, broken))
        except DataError as error:
            problems.append(str(error))
        split.forget(number)
        done += piece.bytes
        report(done, split.card.bytes)
    return list(dict.fromkeys(problems))


def _totals(split: Split) -> Iterator[str]:
    card = split.card
    for name in ("tokens", "documents", "bytes"):
        found = sum(getattr(shard, name) for shard in split.shards)
        if found != getattr(card, name):
            yield f"{split.folder / 'index.json'}: {found} {name}, card.json says {getattr(card, name)}; {REBUILD}"
    if not split.tokenizer.is_file():
        yield f"{split.tokenizer}: is missing; {REBUILD}"
    elif hashlib.sha256(split.tokenizer.read_bytes()).hexdigest() != card.tokenizer_sha256:
        yield f"{split.tokenizer}: not the tokenizer that made the shards (its checksum differs); {REBUILD}"
    for path in sorted(split.folder.glob("*.tar")):
        if path.name not in {shard.name for shard in split.shards}:
            yield f"{path}: not in index.json; remove it"


def _shard(split: Split, shard: Shard, first: int) -> Iterator[str]:
    """Problems of a shard; first: the number of its first sample."""
    path = split.where(shard.name)
    _forget(split, shard)
    try:
        with split.open_shard(shard) as file:
            yield from _file(split, shard, first, path, file)
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror}; {REBUILD}"
    except DataError as error:
        yield str(error)
    _forget(split, shard)


def _forget(split: Split, shard: Shard) -> None:
    """What is checked is what the store has, not a copy in the cache."""
    if split.store and split.cache:
        split.cache.discard(split.key, shard.name)


def _file(split: Split, shard: Shard, first: int, path: str, file: BufferedReader) -> Iterator[str]:
    """Problems of a shard that can be read."""
    size = os.fstat(file.fileno()).st_size
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if size != shard.bytes:
        yield f"{path}: has {size} bytes, index.json says {shard.bytes}; {REBUILD}"
    elif sha256 != shard.sha256:
        yield f"{path}: its checksum differs from index.json; {REBUILD}"
    yield from _members(path, file, shard, first)
    for number in range(len(shard.offsets)):
        problem = _sample(split, shard, number, first + number, file)
        if problem:
            yield f"{path}: sample {sample_key(first + number)}: {problem}; {REBUILD}"


def _members(path: str, file: BufferedReader, shard: Shard, first: int) -> Iterator[str]:
    """Whether the tar lists the samples that the index lists, each at its place."""
    wanted = []
    for number in range(first, first + len(shard.offsets)):
        wanted += [f"{sample_key(number)}.tokens.npy", f"{sample_key(number)}.documents.npy"]
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, EOFError, OSError) as error:
        yield f"{path}: not a whole tar file ({error}); {REBUILD}"
        return
    if [member.name for member in members if member.isreg()] != wanted:
        yield f"{path}: its members are not the {len(shard.offsets)} samples that index.json lists; {REBUILD}"
        return
    for number, member in enumerate(members[::2]):
        if not member.offset_data < shard.offsets[number] < member.offset_data + member.size:
            yield f"{path}: sample {sample_key(first + number)}: index.json has a wrong offset; {REBUILD}"


def _sample(split: Split, shard: Shard, number: int, sample: int, file: BufferedReader) -> str:
    """What is wrong with a sample's content, if anything."""
    start, end = split.region(shard, number)
    file.seek(start)
    try:
        tokens, starts = parse_sample(file.read(end - start), np.dtype(split.card.dtype), split.sample_length(sample))
    except ValueError as error:
        return str(error)
    if checksum(tokens, starts) != shard.checksums[number]:
        return "its checksum differs from index.json"
    card = split.card
    if (largest := int(tokens.max())) >= card.vocab_size:
        return f"the id {largest} is beyond the vocabulary of {card.vocab_size}"
    places = starts.astype(np.int64)
    inside = places[places > 0]
    if np.any(np.diff(places) <= 0) or np.any(places >= len(tokens)):
        return "document boundaries out of order"
    if np.any(tokens[inside - 1] != card.end_of_document):
        return "a document begins where none has ended"
    if sample == card.samples - 1 and tokens[-1] != card.end_of_document:
        return "the last document has no end"
    return ""

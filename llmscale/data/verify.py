"""Check a dataset to the last byte: every checksum, every offset, every id, the documents' boundaries, and the card.

What a card says of the tokenizer and of the documents is computed anew from the tokenizer.json and the samples.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmscale.data.cache import Cache
from llmscale.data.inputs import local_path
from llmscale.data.quarantine import Broken, message
from llmscale.data.shards import REBUILD, Shard, checksum, sample_key
from llmscale.data.split import Split, parse_sample, splits, without_card
from llmscale.data.store import is_remote
from llmscale.data.text_shards import TextSplit, is_text
from llmscale.data.tokenizer import parsed, special_tokens, vocabulary_size
from llmscale.errors import DataError, UsageError

_PART = re.compile(r"part-(\d+)")


def verify(
    place: Path | str, report: Callable[[int, int], None] = lambda done, total: None, cache: Cache | None = None
) -> list[str]:
    """All that is wrong in a split or in all splits of a dataset, one line each; empty when it is whole.

    place: a folder, a pattern that names some, or the URL of a split (`store.py`), whose shards go through the cache
    one after another. report: called with (bytes checked, bytes in all) after each shard.
    """
    place = local_path(str(place))
    if is_text(place):
        return _text(TextSplit(place, (lambda: cache) if cache else Cache), report)
    problems: list[str] = []
    places: Sequence[Path | str] = [place]
    if not is_remote(place):
        problems += [f"{folder}: has shards, and no card.json; {REBUILD}" for folder in without_card(place)]
        problems += _parts(Path(place))
        try:
            places = splits(place)
        except UsageError:
            if not problems:
                raise
            places = []
    opened = []
    for one in places:
        try:
            opened.append(Split(one, cache))
        except DataError as error:
            problems.append(str(error))
    total = sum(split.card.bytes for split in opened)
    done = 0
    for split in opened:
        problems += _totals(split)
        problems += _tokenizer(split)
        lengths = _Lengths()
        sample = 0
        for shard in split.shards:
            problems += _shard(split, shard, sample, lengths)
            sample += len(shard.offsets)
            done += shard.bytes
            report(done, total)
        problems += lengths.problems(split)
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


def _parts(folder: Path) -> Iterator[str]:
    """What is missing of a dataset that was built in parts, as far as the names of the others tell."""
    unfinished = sorted(folder.glob("part-*.partial"))
    yield from (f"{path}: a build that has not ended; give its command again" for path in unfinished)
    numbers = {int(match[1]) for path in folder.glob("part-*") if (match := _PART.fullmatch(path.name))}
    started = {int(match[1]) for path in unfinished if (match := _PART.fullmatch(path.stem))}
    for number in sorted(set(range(max(numbers, default=0))) - numbers - started):
        yield f"{folder / f'part-{number:05d}'}: is missing, and later parts are there; build it, or copy it again"


def _totals(split: Split) -> Iterator[str]:
    card = split.card
    found = {name: sum(getattr(shard, name) for shard in split.shards) for name in ("tokens", "documents", "bytes")}
    for name, count in (*found.items(), ("shards", len(split.shards))):
        if count != getattr(card, name):
            yield f"{split.folder / 'index.json'}: {count} {name}, card.json says {getattr(card, name)}; {REBUILD}"
    for path in sorted(split.folder.glob("*.tar")):
        if path.name not in {shard.name for shard in split.shards}:
            yield f"{path}: not in index.json; remove it"


def _tokenizer(split: Split) -> Iterator[str]:
    """Whether the card says of the tokenizer what is true."""
    try:
        tokenizer = parsed(split.read_tokenizer(), str(split.tokenizer))
    except DataError as error:
        yield str(error)
        return
    card, where = split.card, split.where("card.json")
    if (size := vocabulary_size(tokenizer)) != card.vocab_size:
        yield f"{where}: vocab_size is {card.vocab_size}, that of tokenizer.json is {size}; {REBUILD}"
    if card.end_of_document not in special_tokens(tokenizer).values():
        yield f"{where}: end_of_document {card.end_of_document} is no special token of tokenizer.json; {REBUILD}"


class _Lengths:
    """The lengths of the documents as the samples give them, one sample after another."""

    def __init__(self) -> None:
        self.broken = False
        """Whether a sample could not be read: then nothing is known of the lengths."""
        self._bins = np.zeros(64, dtype=np.int64)
        self._open = 0
        """Tokens of the document that may go on."""
        self._shortest = self._longest = 0

    def add(self, tokens: int, places: npt.NDArray[np.int64]) -> None:
        """A sample of so many tokens, and where in it documents begin."""
        if not len(places):
            self._open += tokens
            return
        self._note(np.concatenate([[self._open + places[0]], np.diff(places)]))
        self._open = tokens - int(places[-1])

    def problems(self, split: Split) -> Iterator[str]:
        """What the card says otherwise, after the last sample."""
        if self.broken:
            return
        self._note(np.array([self._open]))
        card = split.card
        for name, found in (
            ("documents", int(self._bins.sum())),
            ("shortest_document", self._shortest),
            ("longest_document", self._longest),
            ("document_lengths", self._bins[: self._longest.bit_length()].tolist()),
        ):
            if found != getattr(card, name):
                yield (
                    f"{split.where('card.json')}: {name} is {getattr(card, name)}, the shards give {found}; {REBUILD}"
                )

    def _note(self, lengths: npt.NDArray[np.int64]) -> None:
        lengths = lengths[lengths > 0]
        if len(lengths):
            self._bins += np.bincount(np.frexp(lengths)[1] - 1, minlength=len(self._bins))
            self._shortest = min(self._shortest or 1 << 62, int(lengths.min()))
            self._longest = max(self._longest, int(lengths.max()))


def _shard(split: Split, shard: Shard, first: int, lengths: _Lengths) -> Iterator[str]:
    """Problems of a shard; first: the number of its first sample."""
    path = split.where(shard.name)
    _forget(split, shard)
    try:
        with split.open_shard(shard) as file:
            yield from _file(split, shard, first, path, file, lengths)
    except OSError as error:
        lengths.broken = True
        yield f"{path}: cannot be read: {error.strerror}; {REBUILD}"
    except DataError as error:
        lengths.broken = True
        yield str(error)
    _forget(split, shard)


def _forget(split: Split, shard: Shard) -> None:
    """What is checked is what the store has, not a copy in the cache."""
    if split.store and split.cache:
        split.cache.discard(split.key, shard.name)


def _file(split: Split, shard: Shard, first: int, path: str, file: BufferedReader, lengths: _Lengths) -> Iterator[str]:
    """Problems of a shard that can be read."""
    size = os.fstat(file.fileno()).st_size
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if size != shard.bytes:
        yield f"{path}: has {size} bytes, index.json says {shard.bytes}; {REBUILD}"
    elif sha256 != shard.sha256:
        yield f"{path}: its checksum differs from index.json; {REBUILD}"
    yield from _members(path, file, shard, first)
    for number in range(len(shard.offsets)):
        problem = _sample(split, shard, number, first + number, file, lengths)
        if problem:
            lengths.broken = True
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


def _sample(split: Split, shard: Shard, number: int, sample: int, file: BufferedReader, lengths: _Lengths) -> str:
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
    lengths.add(len(tokens), places)
    return ""

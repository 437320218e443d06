"""Text in, token shards out: read in order, tokenised by any number of processes, written in order.

The shards are the same bytes for any number of workers (`encode.py`), and whether or not the build was killed on the
way: it works in OUTPUT.partial, notes at every finished shard all that it takes to go on (`journal.py`), and goes on
when it is started again with the same options. A document goes to the validation split when the hash of its text
(without white space around it; of the first 256 KiB, where it is longer than a MiB) falls below the fraction: copies
of a document always land on the same side.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmscale.data import journal
from llmscale.data.dedup import PERMUTATIONS, SHINGLE_WORDS, Deduplicator
from llmscale.data.destination import Destination, destination
from llmscale.data.documents import BadRecord, Seen
from llmscale.data.encode import Encoded, Encoder, Position, in_order, jobs
from llmscale.data.held_document import HeldDocument
from llmscale.data.inputs import find
from llmscale.data.journal import DATASET, Journal
from llmscale.data.shards import SAMPLE_TOKENS, Card, Deduplication, SplitWriter, shard_name
from llmscale.data.skipped import Skipped
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError, UsageError, shown

TRAIN, VALIDATION = "train", "validation"
_MIN_SAMPLE_TOKENS = 1024
_KEPT = "what was built is kept: the same command goes on"


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

    output: str
    splits: dict[str, Card]
    files: int
    seen: Seen
    """Binary files and links, which are left out, and files whose kind had to be guessed."""
    empty_documents: int
    """Left out: nothing but white space."""
    replaced_characters: int
    """Bytes that are not UTF-8, now U+FFFD."""
    exact_duplicates: int
    """Left out: copies of an earlier document."""
    near_duplicates: int
    skipped_records: int
    """Passed over: they are no documents. OUTPUT/skipped.jsonl names them."""
    resumed_documents: int
    """Were there already, from a build that had not ended."""

    @property
    def binary_files(self) -> int:
        """Left out: they hold NUL bytes."""
        return self.seen.binary_files


def build(
    inputs: Sequence[str],
    tokenizer: Path,
    output: str | Path,
    *,
    workers: int = 1,
    validation_fraction: float = 0.01,
    shard_bytes: int = 256 << 20,
    suffixes: Sequence[str] = (),
    text_key: str = "text",
    end_of_document: str | None = None,
    pattern: str | None = None,
    dedup: str = "none",
    near_threshold: float = 0.8,
    overwrite: bool = False,
    restart: bool = False,
    staging: Path | None = None,
    part: tuple[int, int] | None = None,
    max_skipped: int | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Write OUTPUT/train and, where validation_fraction is above 0, OUTPUT/validation.

    The same inputs, tokenizer and options give the same bytes. tokenizer, end_of_document, pattern: as `Tokenizer` has
    them. output: a folder or an fsspec URL. dedup: none, exact or near. restart: begin anew where an unfinished build
    could be gone on with. part: (number from 0, how many), to build only that share of the files, into
    OUTPUT/part-<number>. max_skipped: how many records that are no documents may be passed over; when None the first
    stops the build. report: called now and then with how far it is.

    Raises:
        UsageError: there are fewer files than parts; output or an unfinished build there is not for this one.
        DataError: the input is at fault, or nothing can be written. KeyboardInterrupt: with what is kept.
    """
    links: list[str] = []
    files = find(inputs, suffixes, links)
    if part is not None:
        number, count = part
        if len(files) < count:
            raise UsageError(
                f"--part {number}/{count}: the input has {len(files)} file(s); use at most that many parts"
            )
        files = files[number::count]
        output = f"{str(output).rstrip('/')}/part-{number:05d}"
    total_bytes = sum(file.size for file in files)
    loaded = Tokenizer(tokenizer, end_of_document, pattern)
    encoder = Encoder(loaded, text_key, exact=dedup != "none", near=dedup == "near", skip=max_skipped is not None)
    options = {
        "--tokenizer": loaded.sha256,
        "--end-of-document": str(loaded.end_of_document),
        "--text-key": text_key,
        "--validation-fraction": str(validation_fraction),
        "--shard-size": str(shard_bytes),
        "--dedup": f"{dedup} {near_threshold}" if encoder.near else dedup,
        **({"--part": f"{part[0]}/{part[1]}"} if part else {}),
    }
    options = {name: shown(value) for name, value in options.items()}
    place = destination(output, staging)
    state: Journal | None = None
    try:
        with closing(place), journal.held(place.staging, str(output)):
            state = None if restart else journal.load(place.staging, options)
            place.check(inputs, files, overwrite, begun=state is not None)
            if state is None:
                journal.drop(place.staging)
                state = journal.begin(place.staging, options)
                place.clear()
            run = _Build(
                place, state, loaded, shard_bytes,
                (TRAIN, VALIDATION) if validation_fraction > 0 else (TRAIN,), validation_fraction,
                near_threshold if encoder.near else None, encoder.exact, max_skipped,
            )  # fmt: skip
            try:
                resumed = run.documents
                packs = jobs(files, text_key, run.position)
                with closing(in_order(encoder, packs, workers)) as results:
                    run.write(results, lambda: report(run.progress(total_bytes)))
                cards = run.finish()
            finally:
                run.abandon()
            place.publish(place.staging / DATASET)
            journal.drop(place.staging)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_KEPT if state and state.documents else "no shard was finished yet") from None
    except OSError as error:  # those of the input and of workers have become a DataError where they arose
        option, where = ("--output", output) if place.local else ("--staging", place.staging)
        raise DataError(_unwritten(shown(where), option, error, state)) from None
    return Summary(
        str(output), cards, len(files), run.position.seen.and_links(links), run.state.empty, run.state.replaced,
        run.state.exact_removed, run.state.near_removed, run.state.skipped, resumed,
    )  # fmt: skip


def _unwritten(where: str, option: str, error: OSError, state: Journal | None) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = f"{where}: cannot be written: {error.strerror or error}"
    if state and state.documents:
        return f"{what}; {'free some space' if full else 'mend that'}: {_KEPT}"
    return f"{what}; {'free some space, or ' if full else ''}name another {option}"


class _Build:
    """The main process's part: what was encoded goes to the splits, in order, and the journal is kept."""

    def __init__(
        self, place: Destination, state: Journal, tokenizer: Tokenizer, shard_bytes: int, splits: Sequence[str],
        validation_fraction: float, threshold: float | None, dedup: bool, max_skipped: int | None,
    ) -> None:  # fmt: skip
        self.state = state
        self.position = state.position
        self._place = place
        self._folder = place.staging
        self._tokenizer = tokenizer
        self._fraction = validation_fraction
        self._threshold = threshold
        self._split = state.split or TRAIN
        self._held: HeldDocument | None = None
        self._shipped = dict.fromkeys(splits, 0)
        itemsize = np.dtype(tokenizer.dtype).itemsize
        sample_tokens = min(SAMPLE_TOKENS, max(_MIN_SAMPLE_TOKENS, shard_bytes // itemsize))
        shard_samples = max(1, shard_bytes // (sample_tokens * itemsize))
        self._dedup = Deduplicator(self._folder / journal.KEPT, threshold, state.kept) if dedup else None
        self._writers: dict[str, SplitWriter] = {}
        self._skipped: Skipped | None = None
        try:
            (self._folder / DATASET).mkdir(exist_ok=True)
            if max_skipped is not None or state.skipped:
                self._skipped = Skipped(
                    self._folder / DATASET, max_skipped or 0, state.skipped, state.skipped_bytes
                )  # fmt: skip
            for split in splits:
                (self._folder / DATASET / split).mkdir(parents=True, exist_ok=True)
                self._writers[split] = SplitWriter(
                    self._folder / DATASET / split, tokenizer.dtype, tokenizer.end_of_document, sample_tokens,
                    shard_samples, state.writers.get(split),
                )  # fmt: skip
        except DataError as error:
            self.abandon()
            raise DataError(f"{error}; the unfinished build is damaged, drop it with --restart") from None
        self._ship()

    @property
    def documents(self) -> int:
        """Documents written."""
        return sum(writer.documents for writer in self._writers.values())

    def progress(self, total_bytes: int) -> Progress:
        """How far it is."""
        tokens = sum(writer.tokens for writer in self._writers.values())
        return Progress(total_bytes, self.position.bytes_read, self.documents, tokens)

    def write(self, results: Iterator[tuple[Encoded, Position]], report: Callable[[], None]) -> None:
        """Write all results. What stands is kept when the input is at fault."""
        report()
        shards = self._shards()
        while True:
            try:
                result, position = next(results)
                if self._skipped:
                    self._skipped.check(result.skipped)
            except StopIteration:
                return
            except DataError as error:
                said = (
                    f"{error}; or pass such records over with --on-error skip"
                    if isinstance(error, BadRecord)
                    else str(error)
                )
                if self.documents and self._save():
                    raise DataError(f"{said}; {_KEPT}") from None
                raise DataError(said) from None
            self._add(result)
            self.position = position
            if self._shards() != shards and self._save():
                shards = self._shards()
            report()

    def finish(self) -> dict[str, Card]:
        """Finish all splits."""
        if not self._writers[TRAIN].documents:
            self.abandon()
            journal.drop(self._folder)
            raise DataError(self._no_documents())
        about = None
        if self._dedup:
            about = Deduplication(
                method="near" if self._dedup.near else "exact",
                exact_removed=self.state.exact_removed,
                near_removed=self.state.near_removed,
            )
            if self._dedup.near:
                about = about.model_copy(
                    update={
                        "threshold": self._threshold, "shingle_words": SHINGLE_WORDS, "permutations": PERMUTATIONS,
                        "bands": self._dedup.bands,
                    }
                )  # fmt: skip
        content, size = self._tokenizer.content, self._tokenizer.vocab_size
        if self._skipped:
            self._skipped.finish()
        return {name: writer.finish(content, size, about, self.state.skipped) for name, writer in self._writers.items()}

    def abandon(self) -> None:
        """Let go of the open files."""
        for writer in self._writers.values():
            writer.abandon()
        if self._held:
            self._held.close()
        if self._skipped:
            self._skipped.close()

    def _add(self, result: Encoded) -> None:
        """Hand each piece to its split."""
        self.state.empty += result.empty
        self.state.replaced += result.replaced
        if self._skipped:
            self._skipped.add(result.skipped)
            self.state.skipped = self._skipped.count
        start = 0
        whole: list[HeldDocument] = []
        for number, length in enumerate(result.lengths):
            tokens = result.tokens[start : start + length]
            start += length
            fingerprint, last = result.fingerprints[number], result.last[number]
            if fingerprint is not None:
                self._split = VALIDATION if fingerprint < self._fraction * 2**64 else TRAIN
            if self._dedup is None:
                self._writers[self._split].add(tokens, fingerprint is not None, last)
                continue
            self._held = self._held or HeldDocument(self._split, self._folder, self._tokenizer.dtype)
            self._held.add(tokens, result.digests[number], result.minima[number] if result.minima else None)
            if last:
                whole.append(self._held)
                self._held = None
        if self._dedup and whole:
            self._add_unless_copies(self._dedup, whole)

    def _add_unless_copies(self, dedup: Deduplicator, whole: Sequence[HeldDocument]) -> None:
        minima = [document.minima for document in whole if document.minima is not None]
        verdicts = dedup.check([document.digest for document in whole], np.stack(minima) if minima else None)
        for document, verdict in zip(whole, verdicts, strict=True):
            if not verdict:
                for tokens, first, last in document.pieces():
                    self._writers[document.split].add(tokens, first, last)
            document.close()
        self.state.exact_removed += verdicts.count("exact")
        self.state.near_removed += verdicts.count("near")

    def _shards(self) -> int:
        return sum(writer.shards for writer in self._writers.values())

    def _save(self) -> bool:
        """Write the journal, but while a document is held back; then hand on the shards that it knows."""
        if self._held:
            return False
        if self._dedup:
            self._dedup.sync()
            self.state.kept = self._dedup.kept
        if self._skipped:
            self.state.skipped_bytes = self._skipped.save()
        self.state.position, self.state.split = self.position, self._split
        self.state.writers = {name: writer.save() for name, writer in self._writers.items()}
        self.state.save(self._folder)
        self._ship()
        return True

    def _ship(self) -> None:
        for split, writer in self._writers.items():
            for number in range(self._shipped[split], writer.shards):
                path = self._folder / DATASET / split / shard_name(number)
                if path.exists():
                    self._place.add(split, path)
            self._shipped[split] = writer.shards

    def _no_documents(self) -> str:
        if written := self.documents:
            return f"all {written} document(s) fell into the validation split; use a smaller --validation-fraction"
        return (
            f"no document to train on in --input: {self.state.empty} empty, {self.position.seen.binary_files} binary "
            "file(s); give files with text"
        )

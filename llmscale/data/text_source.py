"""Sequences out of raw-text shards, tokenised while they stream: a source of the stream (`stream.py`).

How many tokens a text has is not known before it is tokenised, so there is no arithmetic from an ordinal to a place.
Instead the text is read in N logical streams side by side, N being fixed when the shards are described: ordinal i of
the source is the (i // N)-th sequence of stream i % N. A stream is one long row of tokens:

    epoch e: all pieces of the source, permuted by (seed, e); stream s takes places s, s + N, s + 2N … of that order
    window:  WINDOW pieces that follow on each other in a stream; their documents, permuted, each with its end
    row:     window after window, epoch after epoch, cut into sequences of L + 1 tokens that overlap by one

So an epoch of the source holds each document once, and every token is a label once; nothing is left over at the end of
an epoch, the row goes on. What ranks and workers do changes none of it. Where sequence k of a stream begins is known
by three numbers (k, window, token in it): `state` gives them for each stream, whatever the size of the data, and a
source that was told them goes on without reading what came before.

A window is tokenised in chunks of CHUNK bytes, ahead of the reader, by threads: the tokenizer lets go of the
interpreter lock. About two windows of text a stream are in memory. Long documents are tokenised in the pieces, and so
to the tokens, of `llmscale data build`. Threads of their own read the text, so that no tokenising waits for a store.

Ranks share the work without talking to each other where each reads streams of its own: with this source alone in the
mixture, and a number of streams that the data-parallel size divides. Else each rank tokenises all of the text that the
job trains on, for the sequences that it reads of every stream; the sequences are the same. (Dealing out the positions
of a batch by stream would spare that, and make which rank reads what depend on the sources.)
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmscale.data import documents
from llmscale.data.fetcher import CLOSED
from llmscale.data.order import mix, permute
from llmscale.data.quarantine import Broken, OnError, Quarantine
from llmscale.data.shards import Tokens
from llmscale.data.source import Integers
from llmscale.data.text_shards import DESCRIBE, TextSplit
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError

WINDOW = 4
"""Pieces: documents are shuffled over 2 MiB of text from 4 places of the source."""
CHUNK = 64 << 10
"""Bytes that are tokenised as one: a second of work holds many, so that no reader waits long for its own."""
CONNECTIONS = 16
"""Windows that are read at the same time."""


@dataclass(frozen=True)
class Loaded:
    """A window's documents in chunks, the first of which is being tokenised."""

    chunks: list[list[bytes]]
    first: Future[Tokens]


class TextSource:
    """A description of text shards, cut into sequences. May be read by one thread and asked for its state by others."""

    def __init__(
        self,
        split: TextSplit,
        sequence_length: int,
        seed: int,
        *,
        workers: int = 2,
        on_error: OnError = "stop",
        max_skipped: float = 0.001,
        report: Path | None = None,
    ) -> None:
        """workers: threads that tokenise. on_error: stop at a broken piece, or leave it out, for every rank alike;
        max_skipped: the share of the pieces that may be left out, one always may; report: where they are written
        down, a JSON object a line.
        """
        card = split.card
        self.tokenizer_sha256 = card.tokenizer_sha256
        self.vocab_size = card.vocab_size
        self.end_of_document = card.end_of_document
        self.dtype = np.dtype(card.dtype)
        self.fingerprint = _fingerprint(split)
        self.remote = split.remote
        self.cache_bytes = _two_windows(split) if split.remote else 0
        self.folder, self.sequence_length = split.folder, sequence_length
        self._split, self._seed = split, seed
        self._tokenizer = _tokenizer(split)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
        self._readers = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="read")
        self._tracks = [_Track(self, number) for number in range(card.streams)]
        self.quarantine = Quarantine(split, on_error, max_skipped, report)
        self._closed = False

    def read_tokenizer(self) -> bytes:
        """The text of the tokenizer.json beside the description."""
        return self._tokenizer.content

    def read(self, ordinals: Integers, rows: Integers, out: Tokens) -> None:
        """Copy the sequences at these ordinals into rows of out."""
        steps, streams = np.divmod(ordinals, len(self._tracks))
        try:
            # All streams' windows are under way before the first is waited for.
            self.look_ahead(ordinals)
            for index in np.lexsort((steps, streams)).tolist():
                self._tracks[streams[index]].read(int(steps[index]), out[rows[index]])
        except (CancelledError, RuntimeError):
            if self._closed:
                raise DataError(CLOSED) from None
            raise

    def look_ahead(self, ordinals: Integers) -> None:
        """Begin to tokenise what these sequences need; returns at once."""
        steps, streams = np.divmod(ordinals, len(self._tracks))
        for stream in np.unique(streams).tolist():
            self._tracks[stream].look_ahead(int(steps[streams == stream].min()))

    def state(self, ordinal: int) -> dict[str, Any]:
        """For each stream where its first sequence at or after this ordinal begins: [sequence, window, token].

        A stream that this process has not read so far has an earlier place that it knows: `merge` takes the latest.
        """
        return {"streams": [self._tracks[stream].place(step) for stream, step in self._next_of(ordinal)]}

    def _next_of(self, ordinal: int) -> list[tuple[int, int]]:
        """(stream, its first sequence at or after an ordinal) of all streams."""
        count = len(self._tracks)
        return [(stream, max(0, -((stream - ordinal) // count))) for stream in range(count)]

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Of what the ranks know of the same ordinal, the latest places."""
        return {"streams": [max(places) for places in zip(*(state["streams"] for state in states), strict=True)]}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Begin at the places that `state` gave: what lies before them needs no reading, and can be read still."""
        for track, place in zip(self._tracks, state.get("streams", [[0, 0, 0]] * len(self._tracks)), strict=True):
            track.begin(*place)

    def epochs(self, ordinal: int) -> float | None:
        """Passes over the source, in windows that were read, over the streams that this process reads."""
        found = [(stream, self._tracks[stream].found(step)) for stream, step in self._next_of(ordinal)]
        passes = [place[0] / self.windows(stream) for stream, place in found if place]
        return sum(passes) / len(passes) if passes else None

    def counters(self) -> dict[str, float]:
        """What was left out, and what fetching took."""
        fetching = self._split.cache.counters.as_dict() if self._split.cache else {}
        return {**fetching, "skipped_samples": len(self.quarantine)}

    def close(self) -> None:
        """End the threads; a read that waits for a store ends with a DataError."""
        self._closed = True
        self._split.close()
        self._readers.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def windows(self, stream: int) -> int:
        """Windows of a stream in one epoch."""
        pieces = len(range(stream, self._split.card.pieces, len(self._tracks)))
        return -(-pieces // WINDOW)

    def load(self, stream: int, window: int) -> Future[Loaded]:
        """Have a stream's window read."""
        if self._closed:
            raise DataError(CLOSED)
        return self._readers.submit(self._load, stream, window)

    def encode(self, chunk: list[bytes]) -> Future[Tokens]:
        """Have a chunk tokenised."""
        return self._pool.submit(self._encode, chunk)

    def _load(self, stream: int, window: int) -> Loaded:
        """window: counted over all epochs."""
        epoch, number = divmod(window, self.windows(stream))
        first = stream + number * WINDOW * len(self._tracks)
        total = self._split.card.pieces
        places = np.arange(first, total, len(self._tracks), dtype=np.int64)[:WINDOW]
        found: list[bytes] = []
        for piece in permute(places, total, self._seed, epoch).tolist():
            found += self._documents(piece)
        chunks: list[list[bytes]] = []
        size = CHUNK
        for index in permute(np.arange(len(found)), len(found), mix(self._seed) ^ stream, window) if found else ():
            if size >= CHUNK:
                chunks.append([])
                size = 0
            chunks[-1].append(found[index])
            size += len(found[index])
        return Loaded(chunks, self.encode(chunks[0] if chunks else []))

    def _encode(self, chunk: list[bytes]) -> Tokens:
        parts: list[Tokens] = []
        end = np.array([self.end_of_document], dtype=self.dtype)
        for data in chunk:
            parts += [self._tokenizer.encode(text, continues) for text, continues in documents.texts(data)]
            parts.append(end)
        return np.concatenate(parts) if parts else end[:0]

    def _documents(self, piece: int) -> list[bytes]:
        """Those of a piece that are not blank; none of one that is broken and left out."""
        try:
            found = self._split.documents(piece)
        except Broken as broken:
            self.quarantine.add(broken)
            return []
        return [data for data in found if len(data) > documents.PIECE_BYTES or _text(data).strip()]


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


class _Window:
    """A window of a stream, tokenised chunk by chunk as far as it was asked for."""

    def __init__(self, source: TextSource, stream: int, number: int) -> None:
        self._source = source
        self._loading = source.load(stream, number)
        self._coming: dict[int, Future[Tokens]] = {}
        self._chunks: list[Tokens] = []
        self._ends: list[int] = []

    @property
    def known(self) -> int:
        """Tokens so far."""
        return self._ends[-1] if self._ends else 0

    def more(self) -> bool:
        """Take the next chunk, and have those after it begun; False when there is none."""
        loaded = self._loading.result()
        number = len(self._chunks)
        if number == len(loaded.chunks):
            return False
        for ahead in range(number + 1, min(number + 3, len(loaded.chunks))):
            if ahead not in self._coming:
                self._coming[ahead] = self._source.encode(loaded.chunks[ahead])
        tokens = (self._coming.pop(number) if number else loaded.first).result()
        self._ends.append(self.known + len(tokens))
        self._chunks.append(tokens)
        return True

    def near_end(self) -> bool:
        """Whether the last chunks are under way."""
        return len(self._chunks) + 2 >= len(self._loading.result().chunks)

    def copy(self, start: int, out: Tokens) -> int:
        """Copy what is there from token `start` on; gives how many that are."""
        done, chunk = 0, bisect.bisect_right(self._ends, start)
        while done < len(out) and chunk < len(self._chunks):
            offset = start + done - (self._ends[chunk] - len(self._chunks[chunk]))
            part = self._chunks[chunk][offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done, chunk = done + len(part), chunk + 1
        return done


class _Track:
    """One logical stream: how many tokens its windows have, as far as it was read, and the windows in use."""

    def __init__(self, source: TextSource, stream: int) -> None:
        self._source, self._stream = source, stream
        self._lock = threading.RLock()
        self._windows: dict[int, _Window] = {}
        self.begin(0, 0, 0)

    def begin(self, step: int, window: int, token: int) -> None:
        """Count from here: sequence `step` begins at this token of this window."""
        with self._lock:
            self._step, self._first, self._token = step, window, token
            self._ends: list[int] = []
            """Of the windows that were read to their end: tokens from the first one's beginning on."""
            self._empty = 0

    def place(self, step: int) -> list[int]:
        """[step, window, token] where a sequence begins; where that is not known, of one before it that is."""
        with self._lock:
            if step < self._step:
                return [0, 0, 0]
            return [step, *found] if (found := self.found(step)) else [self._step, self._first, self._token]

    def found(self, step: int) -> tuple[int, int] | None:
        """(window, token) where a sequence begins, as far as that was read; waits for no reader."""
        if (place := self._place(step)) < 0:
            return None
        index = bisect.bisect_right(self._ends, place)
        offset = place - (self._ends[index - 1] if index else 0)
        window = self._windows.get(self._first + index)
        begun = step == self._step or offset == 0
        if index < len(self._ends) or begun or (window is not None and offset <= window.known):
            return self._first + index, offset
        return None

    def look_ahead(self, step: int) -> None:
        """Have the window read that holds a sequence, or where that is not known, the one that is needed next."""
        with self._lock:
            if step < self._step:
                self.begin(0, 0, 0)
            self._window(self._first + bisect.bisect_right(self._ends, self._place(step)))

    def read(self, step: int, out: Tokens) -> None:
        """Copy a sequence."""
        with self._lock:
            if step < self._step:
                self.begin(0, 0, 0)
            place, done = self._place(step), 0
            while done < len(out):
                index = self._find(place + done)
                start = place + done - (self._ends[index - 1] if index else 0)
                window = self._window(self._first + index)
                self._drop_before(self._first + index)
                while window.known <= start and window.more():
                    pass
                done += window.copy(start, out[done:])

    def _place(self, step: int) -> int:
        """Where a sequence begins, counted in tokens from the beginning of the first window."""
        return self._token + (step - self._step) * self._source.sequence_length

    def _find(self, place: int) -> int:
        """Which window after the first one holds a token; reads on until it is known."""
        while not self._ends or self._ends[-1] <= place:
            number = self._first + len(self._ends)
            window, before = self._window(number), self._ends[-1] if self._ends else 0
            while window.known <= place - before and window.more():
                pass
            if self._source.remote or window.near_end():
                self._window(number + 1)
            if window.known > place - before:
                return len(self._ends)
            self._ends.append(before + window.known)
            self._empty = 0 if window.known else self._empty + 1
            if self._empty > self._source.windows(self._stream):
                raise DataError(f"{self._source.folder}: logical stream {self._stream} holds no text")
            self._drop_before(number)
        return bisect.bisect_right(self._ends, place)

    def _drop_before(self, number: int) -> None:
        """Keep no window that was read; what goes back reads it again."""
        for old in [kept for kept in self._windows if kept < number]:
            del self._windows[old]

    def _window(self, number: int) -> _Window:
        if number not in self._windows:
            self._windows[number] = _Window(self._source, self._stream, number)
        return self._windows[number]


def _two_windows(split: TextSplit) -> int:
    """Bytes of the cache: of each stream the window that is read and the next, for the ranks of the node to share."""
    total = sum(piece.bytes for _, piece in split.pieces)
    return min(2 * WINDOW * split.card.streams * -(-total // split.card.pieces), total)


def _fingerprint(split: TextSplit) -> str:
    """Of all that decides which tokens come in which order. Where the shards lie does not: they may move."""
    card = split.card
    found = hashlib.sha256(
        f"{card.tokenizer_sha256} {card.end_of_document} {card.streams} {card.text_key!r}\n".encode()
    )
    for _, piece in split.pieces:
        found.update(b"%d %d\n" % (piece.bytes, piece.checksum))
    return found.hexdigest()


def _tokenizer(split: TextSplit) -> Tokenizer:
    tokenizer = Tokenizer(split.tokenizer, split.card.end_of_document_token)
    if tokenizer.sha256 != split.card.tokenizer_sha256:
        raise DataError(f"{split.tokenizer}: not the tokenizer that card.json was written for; {DESCRIBE}")
    return tokenizer

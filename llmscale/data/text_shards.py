"""Raw-text webdataset shards, described (`describe.py`) so that they are tokenised as they stream (`text_source.py`).

    DIR/card.json        what it is: tokenizer fingerprint, vocabulary, number of logical streams, totals
    DIR/index.json       the shards, and the pieces that each is read in: byte offsets, documents, checksums
    DIR/tokenizer.json   the tokenizer to use

The shards stay where they are, here or wherever fsspec can read, and as they are: tars whose samples hold a text (.txt,
or .json with a text key). A piece is a run of whole samples of about half a MiB: the least that is read, checked and
shuffled as one. A tar is read once to find them; the index has about 70 bytes for each. Pieces of a store go through
the cache of the node (`cache.py`). The description may lie in a store as well.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, cast

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmscale.data.cache import Cache
from llmscale.data.inputs import local_path
from llmscale.data.pipe_store import open_store
from llmscale.data.quarantine import NOT_THERE, Broken, unreadable
from llmscale.data.records import Record, read_record
from llmscale.data.store import Counters, Damaged, Missing, Patience, UrlStore, is_remote, split_url
from llmscale.data.tars import END_OF_TAR, samples
from llmscale.errors import DataError

DESCRIBE = "copy the file again, or describe the shards again with `llmscale data describe`"
TEXT_FORMAT: Literal["llmscale-text"] = "llmscale-text"
_MOST_CARD_BYTES = 1 << 28
_MOST_INDEX_BYTES = 1 << 32


class TextCard(Record):
    """What a description is: card.json."""

    format: Literal["llmscale-text"]
    version: Literal[1]
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1)
    end_of_document: int
    end_of_document_token: str
    dtype: Literal["uint16", "uint32"]
    text_key: str
    streams: int = Field(ge=1)
    shards: int
    pieces: int = Field(ge=1)
    documents: int
    bytes: int
    index_sha256: str


class Piece(Record):
    """A run of whole samples in a shard."""

    offset: int = Field(ge=0)
    bytes: int = Field(ge=1)
    documents: int
    checksum: int
    """CRC-32 of its bytes."""


class TextShard(Record):
    """A tar file. path: a URL, or a path, relative to the description where it is given so."""

    path: str
    bytes: int = Field(le=1 << 42)
    pieces: list[Piece]

    @model_validator(mode="after")
    def _sane(self) -> TextShard:
        begins = [*(piece.offset for piece in self.pieces), self.bytes]
        ends = [0, *(piece.offset + piece.bytes for piece in self.pieces)]
        if any(begin < end for begin, end in zip(begins, ends, strict=True)):
            raise PydanticCustomError("pieces", "pieces beyond the shard, or out of order")
        return self


class TextIndex(Record):
    """Where everything stands: index.json."""

    shards: list[TextShard]


def is_text(place: str | Path) -> bool:
    """Whether what lies in a folder or at a URL says that it describes text."""
    try:
        if is_remote(place):
            store = open_store(str(place), Patience(), Counters())
            card = json.loads(store.read_all("card.json", _MOST_CARD_BYTES))
        else:
            card = json.loads(Path(local_path(str(place)), "card.json").read_bytes())
    except (OSError, ValueError, Missing):
        return False
    return isinstance(card, dict) and card.get("format") == TEXT_FORMAT


class TextSplit:
    """A description, read back. The shards are not touched."""

    unit: ClassVar[str] = "piece"
    fix: ClassVar[str] = DESCRIBE

    def __init__(
        self, place: str | Path, open_cache: Callable[[], Cache] = Cache, patience: Patience | None = None
    ) -> None:
        """place: a folder or an fsspec URL. open_cache: gives what keeps that which lies in stores; called at need."""
        self.place = local_path(str(place))
        self._open_cache = open_cache
        self.cache: Cache | None = None
        self._patience = patience or Patience()
        self._stores: dict[str, UrlStore] = {}
        self._opening = threading.Lock()
        self._closed = False
        self.folder = self._copy() if is_remote(self.place) else Path(self.place)
        self.card = read_record(TextCard, self.folder / "card.json", DESCRIBE)
        self.shards = tuple(read_record(TextIndex, self.folder / "index.json", DESCRIBE, self.card.index_sha256).shards)
        self.pieces = tuple((shard, piece) for shard in self.shards for piece in shard.pieces)
        if len(self.pieces) != self.card.pieces:
            raise DataError(f"{place}: {len(self.pieces)} pieces, card.json says {self.card.pieces}; {DESCRIBE}")
        self.remote = any(is_remote(self.where(shard.path)) for shard in self.shards)
        if self.remote and self.cache is None:
            self.cache = open_cache()

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json to use; of a description in a store, a copy of it."""
        return self.folder / "tokenizer.json"

    @property
    def units(self) -> int:
        """Pieces."""
        return self.card.pieces

    def unit_name(self, number: int) -> str:
        """Where a piece stands in its shard."""
        piece = self.pieces[number][1]
        return f"at byte {piece.offset} ({piece.bytes} bytes)"

    def where(self, name: str) -> str:
        """A shard's path or URL."""
        if is_remote(name):
            return name
        if is_remote(self.place):
            scheme, mark, path = self.place.partition("://")
            return scheme + mark + os.path.normpath(f"{path}/{name}")
        return os.path.normpath(self.folder.resolve() / name)

    def documents(self, number: int) -> list[bytes]:
        """The documents of a piece, in the order of the tar: UTF-8, as good as it was.

        Raises:
            Broken: the shard is missing, has changed, or is damaged. DataError: it cannot be read here, or its store
            not be reached.
        """
        shard, piece = self.pieces[number]
        where = self.where(shard.path)
        data = self._fetched(number, where) if is_remote(where) else self._read(number, Path(where))
        if problem := _problem(data, piece):
            raise Broken(number, shard.path, problem)
        try:
            return [one.data for one in samples(where, io.BytesIO(data + END_OF_TAR), self.card.text_key)]
        except DataError as error:  # it was so when it was described: another version of this program may refuse more
            raise Broken(number, shard.path, str(error)) from None

    def forget(self, number: int) -> None:
        """Take a piece out of the cache, so that it is fetched again."""
        if self.cache:
            self.cache.discard(*self._cached(number))

    def close(self) -> None:
        """Give up what is being waited for, and make no further attempts to reach a store."""
        with self._opening:
            self._closed = True
            for store in self._stores.values():
                store.close()

    def _read(self, number: int, path: Path) -> bytes:
        shard, piece = self.pieces[number]
        try:
            with path.open("rb") as file:
                if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
                    reason = f"the shard has {size} bytes, had {shard.bytes} when it was described"
                    raise Broken(number, shard.path, reason, whole=True)
                file.seek(piece.offset)
                return file.read(piece.bytes)
        except NOT_THERE:
            raise Broken(number, shard.path, "the shard is missing", whole=True) from None
        except OSError as error:
            raise unreadable(str(path), error) from None

    def _fetched(self, number: int, url: str) -> bytes:
        """A piece of a store, through the cache; a copy there that was damaged is fetched again."""
        shard, piece = self.pieces[number]
        cache, (key, name) = cast(Cache, self.cache), self._cached(number)
        folder, file_name = split_url(url)
        fetched = False

        def fetch(file: BinaryIO) -> None:
            nonlocal fetched
            fetched = True
            begin, end = piece.offset, piece.offset + piece.bytes
            file.write(self._store(folder).read(file_name, begin, end, lambda data: _problem(data, piece)))

        try:
            data = _content(cache.get(key, name, piece.bytes, fetch))
            if _problem(data, piece) and not fetched:
                cache.discard(key, name)
                data = _content(cache.get(key, name, piece.bytes, fetch))
        except Missing:
            raise Broken(number, shard.path, "the shard is missing", whole=True) from None
        except Damaged as error:
            raise Broken(number, shard.path, error.reason) from None
        except OSError as error:
            raise unreadable(f"{cache.path(key, name)}, a piece of {url}", error) from None
        cache.counters.add(cache_hits=not fetched, cache_misses=fetched)
        return data

    def _cached(self, number: int) -> tuple[str, str]:
        """(key, name) of a piece in the cache."""
        return self.card.index_sha256[:32], f"{number:09d}"

    def _store(self, folder: str) -> UrlStore:
        with self._opening:
            if folder not in self._stores:
                self._stores[folder] = UrlStore(folder, self._patience, cast(Cache, self.cache).counters)
                if self._closed:
                    self._stores[folder].close()
            return self._stores[folder]

    def _copy(self) -> Path:
        """Where the cache keeps the description itself."""
        self.cache = cache = self._open_cache()
        store = open_store(self.place, self._patience, cache.counters)
        data = store.read_all("card.json", _MOST_CARD_BYTES)
        try:
            card = TextCard.model_validate_json(data)
        except ValueError:
            raise DataError(f"{store.where('card.json')}: describes no text; {DESCRIBE}") from None
        key = hashlib.sha256(data).hexdigest()
        for name, sha256, most in (
            ("tokenizer.json", card.tokenizer_sha256, _MOST_CARD_BYTES),
            ("index.json", card.index_sha256, _MOST_INDEX_BYTES),
        ):
            path = cache.keep(key[:32], name, sha256, partial(store.read_all, name, most))
            if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise DataError(f"{store.where(name)}: not the one that card.json was written for; {DESCRIBE}")
        return cache.keep(key[:32], "card.json", key, lambda: data).parent


def _content(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _problem(data: bytes, piece: Piece) -> str:
    """What is wrong with the bytes of a piece, if anything."""
    return "" if zlib.crc32(data) == piece.checksum else "is not what was described (its checksum differs)"

"""A folder of a node that keeps what was fetched, shared by all ranks and runs of it, with a limit on its size.

    FOLDER/usage                 bytes that are kept or promised; its lock is held while room is made
    FOLDER/stripes/017.lock      whoever fetches a file holds the lock that the file's name falls on
    FOLDER/stripes/017.partial   what it is writing
    FOLDER/files/KEY/NAME        whole files: a reader sees all of one or none
    FOLDER/splits/KEY/NAME       the index and the tokenizer of a split: small, and never evicted

Locks are flock's: the kernel lets go of them when a process dies, however it dies. One process fetches a file and the
others wait for it; room is made before a file is written, oldest use first, by the one that holds `usage`; a file
that is removed while it is read stays readable until it is closed. What a killed process left is a stale `.partial`,
found by its lock being free, and a promise in `usage`, which is counted anew whenever room is made.

The folder has to be on a disk of the node: flock and room are per node. Keys are checksums of content, so that a
dataset that was built again never meets its old files.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llmscale.data.store import Counters
from llmscale.errors import DataError, UsageError

STRIPES = 1024
DEFAULT_LIMIT = 16 << 30
_FULL_AFTER_EVICTION = 0.9
_LONGEST_POLL_SECONDS = 0.05
_USAGE_DIGITS = 20


def default_folder() -> Path:
    """In the node's folder for temporary files, which TMPDIR names."""
    return Path(tempfile.gettempdir()) / f"llmscale-cache-{os.getuid()}"


class Cache:
    """Files by key and name, at most `limit` bytes of them."""

    def __init__(self, folder: Path | None = None, limit: int = DEFAULT_LIMIT, wait_seconds: float = 600.0) -> None:
        """limit: in bytes. wait_seconds: how long another process may take to fetch one file."""
        self.folder = folder or default_folder()
        self._files = str(self.folder / "files")
        self.limit = limit
        self.counters = Counters()
        self._wait_seconds = wait_seconds
        self._closed = threading.Event()
        try:
            for part in ("files", "splits", "stripes"):
                (self.folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        except OSError as error:
            raise UsageError(
                f"{self.folder}: the cache cannot be made there: {error.strerror}; name another folder for it"
            ) from None
        if owner != os.getuid():
            raise UsageError(f"{self.folder}: the cache belongs to another user; name another folder for it")

    def close(self) -> None:
        """Wait for no other process any longer: whoever does gets a DataError."""
        self._closed.set()

    def has(self, key: str, name: str) -> bool:
        """Whether a file is here now."""
        return os.path.exists(f"{self._files}/{key}/{name}")

    def path(self, key: str, name: str) -> Path:
        """Where a file is, or would be."""
        return self.folder / "files" / key / name

    def open(self, key: str, name: str) -> int | None:
        """A descriptor of a file that is here, else None. Marks the file as used."""
        try:
            descriptor = os.open(f"{self._files}/{key}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(_unusable(self.folder, error)) from None
        with suppress(OSError):
            os.utime(descriptor)
        return descriptor

    def get(self, key: str, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> int:
        """A descriptor of a file, fetched if it is not here; stays good if the file is evicted meanwhile.

        fetch: writes the file; called by one process at a time. What it raises leaves nothing behind.
        """
        path = self.path(key, name)
        with self._stripe(f"{key}/{name}") as stripe:
            if (descriptor := self.open(key, name)) is not None:
                return descriptor
            partial = stripe.with_suffix(".partial")
            try:
                with partial.open("w+b") as file:
                    self._make_room(file, size)
                    fetch(file)
                    file.flush()
                    if os.fstat(file.fileno()).st_size != size:
                        file.truncate(size)
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
                    os.rename(partial, path)
                    return descriptor
            except BaseException as error:
                with suppress(FileNotFoundError):
                    partial.unlink()
                if isinstance(error, OSError):
                    raise DataError(_unwritable(self.folder, error)) from None
                raise

    def keep(self, key: str, name: str, sha256: str, fetch: Callable[[], bytes]) -> Path:
        """A small file that is never evicted, fetched unless one with this checksum is here."""
        path = self.folder / "splits" / key / name
        with self._stripe(f"{key}/{name}") as stripe:
            with suppress(FileNotFoundError), path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    return path
            data = fetch()
            partial = stripe.with_suffix(".partial")
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                partial.write_bytes(data)
                os.rename(partial, path)
            except OSError as error:
                raise DataError(_unwritable(self.folder, error)) from None
        return path

    def discard(self, key: str, name: str) -> None:
        """Remove a file that turned out to be damaged."""
        with suppress(FileNotFoundError):
            self.path(key, name).unlink()

    @contextmanager
    def _stripe(self, name: str) -> Iterator[Path]:
        """Hold the lock that a name falls on; gives its path."""
        path = self.folder / "stripes" / f"{zlib.crc32(name.encode()) % STRIPES:04d}.lock"
        try:
            lock = path.open("a+b")
        except OSError as error:
            raise DataError(_unusable(self.folder, error)) from None
        with lock:
            self._wait_for(lock.fileno(), f"{self.folder}: another process has been fetching {name}")
            yield path

    def _wait_for(self, lock: int, doing: str) -> None:
        """Take a lock, or raise after so many seconds."""
        started = time.monotonic()
        pause = 0.001
        while not self._closed.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() - started > self._wait_seconds:
                    raise DataError(
                        f"{doing} for more than {self._wait_seconds:g} s; see what that process waits for"
                    ) from None
            self._closed.wait(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        raise DataError(f"{doing}: not waited for any longer, since the stream was closed")

    def _make_room(self, file: BinaryIO, size: int) -> None:
        """Promise `size` bytes to a file that is about to be written, and evict what that takes."""
        usage = os.open(self.folder / "usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait_for(usage, f"{self.folder}: another process has been making room in the cache")
            used = os.pread(usage, _USAGE_DIGITS, 0)
            total = int(used) if used.isdigit() else None
            if total is None or total + size > self.limit:
                total = self._evict(size)
            # Has its size from now on, so that whoever counts the files counts it.
            os.truncate(file.fileno(), size)
            # In place: a file that is cut and written anew goes to the disk at once, and is waited for (ext4).
            os.pwrite(usage, b"%0*d" % (_USAGE_DIGITS, total + size), 0)
        finally:
            os.close(usage)

    def _evict(self, size: int) -> int:
        """Remove the files that were used longest ago until there is room; gives the bytes that are left."""
        total = sum(self._in_flight())
        files = []
        for entry in _files(self.folder / "files"):
            with suppress(FileNotFoundError):
                found = entry.stat()
                files.append((found.st_mtime_ns, found.st_size, entry.path))
                total += found.st_size
        if total + size > self.limit:
            target = max(0, int(_FULL_AFTER_EVICTION * self.limit) - size)
            for _, length, path in sorted(files):
                if total <= target:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                    self.counters.add(evictions=1)
                total -= length
        return total

    def _in_flight(self) -> Iterator[int]:
        """Bytes promised to files that are being written; removes those that a killed process left."""
        for path in (self.folder / "stripes").glob("*.partial"):
            with path.with_suffix(".lock").open("a+b") as lock, suppress(FileNotFoundError):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield path.stat().st_size
                else:
                    path.unlink()


def _unusable(folder: Path, error: OSError) -> str:
    return (
        f"{folder}: the cache cannot be opened: {error.strerror or error}; check its file system and this process's "
        "limit on open files, and start again"
    )


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"{folder}: the cache cannot be written: {error.strerror or error}; free space, lower the cache's limit or "
        "name another folder for it"
    )


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                yield entry

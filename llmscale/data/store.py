"""Files of a split that lie elsewhere: any fsspec URL, or a command that writes a file to its standard output.

    s3://bucket/train   gs://bucket/train   https://host/train   hf://datasets/name/train   memory://train
    pipe:aws s3 cp s3://bucket/train/{name} -       {name} stands for card.json, index.json, shard-00000.tar …

Credentials and endpoints are those of fsspec and of the service's own tools: AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, FSSPEC_S3_ANON=true, ~/.config/fsspec/*.json. None of them is ever logged.

Whatever a store does, a call ends: an attempt that has not answered after `attempt_seconds` is given up, and attempts
end after `total_seconds`, with a delay between them that doubles and is drawn at random, so that a thousand ranks do
not come back together. A file that is not there, or not for us, fails at once; one that is too short by what the store
itself says, or whose bytes are wrong, after `DOUBTS` attempts: a damaged file stays damaged. Too few bytes of a file
that the store calls long enough are the connection's fault, and asked for again as long as there is patience.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import re
import shlex
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, BinaryIO, TypeVar

from llmscale.errors import DataError, UsageError

logger = logging.getLogger(__name__)
T = TypeVar("T")
DOUBTS = 3
_ATTEMPTS_IN_SILENCE = 3
_WARNING_SECONDS = 60.0
"""Between two warnings of one store: many requests fail together."""
_PART = 8 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_S3 = ("s3", "s3a")
PACKAGES = {
    **dict.fromkeys(_S3, "llmscale[s3]"), "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
    "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub",
}  # fmt: skip
"""What pip installs to reach a protocol."""
_WORTH_ANOTHER_ATTEMPT = {408, 425, 429}


class Missing(DataError):
    """The store says that a file is not there."""


class Damaged(DataError):
    """A file is there, and its bytes are not those that were asked for. reason: without the file's name."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Doubtful(Exception):
    """Bytes that may have been lost on the way."""


@dataclass(frozen=True)
class Patience:
    """How long a store is waited for."""

    attempt_seconds: float = 30.0
    """For one answer of a few MiB; of a command: for its first byte, and for each 2 MiB of its output."""
    total_seconds: float = 300.0
    first_delay_seconds: float = 0.2
    longest_delay_seconds: float = 20.0


@dataclass
class Counters:
    """What fetching took, for the metrics."""

    requests: int = 0
    retries: int = 0
    bytes_fetched: int = 0
    cache_hits: int = 0
    """Samples that a read found in the cache."""
    cache_misses: int = 0
    waits: int = 0
    """Reads that had to wait for samples."""
    wait_seconds: float = 0.0
    evictions: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: float) -> None:
        """Add to some of them; any thread may."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, float]:
        """All of them by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if not one.name.startswith("_")}


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether this names a store; a folder is anything else."""
    text = os.fspath(place)
    return text.startswith("pipe:") or ("://" in text and not text.startswith(("file://", "local://")))


def split_url(url: str) -> tuple[str, str]:
    """(folder, name) of a file's URL; a query belongs to the name."""
    path, mark, query = url.partition("?")
    folder, _, name = path.rpartition("/")
    return folder if not folder.endswith(":/") else f"{folder}/", name + mark + query  # memory://name


def plain_name(name: str) -> bool:
    """Whether a name is that of a file, with nothing in it that leads elsewhere or that a shell would read."""
    return _PLAIN_NAME.fullmatch(name) is not None


class Store(ABC):
    """Files by name. May be used by several threads at once, and after a fork."""

    def __init__(self, url: str, patience: Patience, counters: Counters) -> None:
        self.url = url
        self._patience = patience
        self._counters = counters
        self._closed = threading.Event()
        self._warned = -_WARNING_SECONDS

    def where(self, name: str) -> str:
        """What to call a file in a message."""
        return f"{self.url.rstrip('/')}/{name}"

    def close(self) -> None:
        """Give up what is being waited for, and make no further attempts: whoever reads gets a DataError."""
        self._closed.set()

    @abstractmethod
    def read_all(self, name: str, most: int) -> bytes:
        """A whole file of at most so many bytes."""

    def attempt(self, name: str, call: Callable[[], T]) -> T:
        """The first success, within the patience that there is.

        Raises:
            Missing, Damaged: by what the store has. DataError: it did not answer, or refused.
        """
        started = time.monotonic()
        delay = self._patience.first_delay_seconds
        doubts = attempts = 0
        while not self._closed.is_set():
            attempts += 1
            self._counters.add(requests=1)
            try:
                return call()
            except (DataError, UsageError):
                raise
            except Doubtful as error:
                doubts += 1
                reason = str(error)
                if doubts == DOUBTS:
                    raise Damaged(f"{self.where(name)}: {reason}, in {doubts} attempts", reason) from None
            except FileNotFoundError:
                raise Missing(f"{self.where(name)}: is missing; copy it there again") from None
            except Exception as error:
                reason = _reason(error)
                if _final(error):
                    raise DataError(f"{self.where(name)}: cannot be read: {reason}; {_REACH}") from None
            spent = time.monotonic() - started
            if spent + delay >= self._patience.total_seconds:
                raise DataError(
                    f"{self.where(name)}: {attempts} attempts in {spent:.0f} s failed, the last with: {reason}; "
                    f"{_REACH}"
                )
            self._counters.add(retries=1)
            now = time.monotonic()
            if attempts >= _ATTEMPTS_IN_SILENCE and now - self._warned >= _WARNING_SECONDS:
                self._warned = now
                logger.warning(
                    "%s: %d attempts in %.0f s failed, the last with: %s; trying on, for %g s in all",
                    self.where(name), attempts, spent, reason, self._patience.total_seconds,
                )  # fmt: skip
            self._closed.wait(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, self._patience.longest_delay_seconds)
        raise DataError(f"{self.where(name)}: given up, since its reader was closed")


_REACH = "check the URL, the credentials and the network, and start again"


def _reason(error: Exception) -> str:
    """One line that tells an exception."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _beyond_the_end(error: Exception) -> bool:
    """Whether a store says that it has no byte of a range: 416, which s3fs makes an OSError of EINVAL."""
    refused = isinstance(error, OSError) and error.errno == errno.EINVAL and "range" in str(error)
    return refused or getattr(error, "status", None) == 416


def failure_behind(error: FileNotFoundError) -> BaseException | None:
    """What went wrong, where fsspec took an HTTP server's failure for a missing file; None where one is missing."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    out_of_reach = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return cause if (out_of_reach if status is None else status not in (404, 410)) else None


def _final(error: Exception) -> bool:
    """Whether another attempt cannot help."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _WORTH_ANOTHER_ATTEMPT
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    kinds = (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError)
    return isinstance(error, kinds) or type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}


class UrlStore(Store):
    """A folder that fsspec reads."""

    def __init__(self, url: str, patience: Patience, counters: Counters) -> None:
        super().__init__(url, patience, counters)
        self._opened: tuple[int, Any, str] | None = None
        self._opening = threading.Lock()
        self._answers: set[Future[Any]] = set()
        self.filesystem()

    def close(self) -> None:
        """Give up what is being waited for, and make no further attempts: whoever reads gets a DataError."""
        super().close()
        for answer in tuple(self._answers):
            answer.cancel()

    def read(self, name: str, start: int, end: int, check: Callable[[bytes], str] = lambda data: "") -> bytes:
        """The bytes from start to end. check: says what is wrong with them, or nothing.

        Raises:
            Missing, Damaged: by what the store has. DataError: it did not answer, or refused.
        """

        def call() -> bytes:
            try:
                data: bytes = self._call("cat_file", name, start=start, end=end)
            except Exception as error:
                if _beyond_the_end(error):
                    raise Doubtful(f"ends before byte {start}") from None
                raise
            if len(data) > end - start:
                raise DataError(
                    f"{self.where(name)}: the server ignores byte ranges and sent {len(data)} bytes for {end - start}; "
                    "fetch whole shards with a command, such as 'pipe:curl -sSf URL/{name}'"
                )
            self._counters.add(bytes_fetched=len(data))
            if len(data) < end - start:
                came = f"{len(data)} of the {end - start} bytes from byte {start} came"
                size = self._call("info", name)["size"]
                raise Doubtful(came) if size is not None and size < end else ConnectionError(came)
            if problem := check(data):
                raise Doubtful(problem)
            return data

        return self.attempt(name, call)

    def size(self, name: str) -> int | None:
        """Bytes of a file, where the store tells."""
        found = self.attempt(name, lambda: self._call("info", name))["size"]
        return None if found is None else int(found)

    def read_all(self, name: str, most: int) -> bytes:
        """A whole file of at most so many bytes, in parts that each have their own time."""
        size = self.size(name)
        if size is None:
            data: bytes = self.attempt(name, lambda: self._call("cat_file", name))
            size = len(data)
            self._counters.add(bytes_fetched=size)
        else:
            data = b""
        if size > most:
            raise DataError(f"{self.where(name)}: {size} bytes, more than such a file ever has; check the URL")
        return data or b"".join(self.read(name, start, min(start + _PART, size)) for start in range(0, size, _PART))

    def copy(self, name: str, file: BinaryIO, size: int) -> None:
        """Write a file of this size into `file`."""
        found = self.size(name)
        if found not in (None, size):
            reason = f"has {found} bytes, index.json says {size}"
            raise Damaged(f"{self.where(name)}: {reason}", reason)
        for start in range(0, size, _PART):
            file.write(self.read(name, start, min(start + _PART, size)))

    def _call(self, method: str, name: str, **options: Any) -> Any:
        """A method of the filesystem, for at most the seconds of an attempt."""
        filesystem, root = self.filesystem()
        path = f"{root.rstrip('/')}/{name}"
        seconds = self._patience.attempt_seconds
        answer: Future[Any]
        if filesystem.async_impl:
            # Cancels the request, which fsspec's own timeout would leave behind.
            call = asyncio.wait_for(getattr(filesystem, f"_{method}")(path, **options), seconds)
            answer, seconds = asyncio.run_coroutine_threadsafe(call, filesystem.loop), seconds + 5
        else:
            answer = _in_thread(lambda: getattr(filesystem, method)(path, **options))
        self._answers.add(answer)
        try:
            if self._closed.is_set():  # `close` may not have seen the answer
                answer.cancel()
            return answer.result(seconds)
        except FileNotFoundError as error:
            raise failure_behind(error) or error from None
        except TimeoutError:
            raise TimeoutError(f"no answer within {self._patience.attempt_seconds:g} s") from None
        finally:
            self._answers.discard(answer)

    def filesystem(self) -> tuple[Any, str]:
        """The filesystem and the path in it: one a process, since connections do not survive a fork."""
        with self._opening:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), *_filesystem(self.url))
            return self._opened[1:]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in _S3:
        # Attempts are counted and spaced here; the client's own would multiply them.
        configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **configured}
    try:
        filesystem, root = url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        fix = f"install it with `pip install {shlex.quote(package)}`" if package else f"({error})"
        raise UsageError(f"{url}: reading {protocol}:// needs a package that is not here; {fix}") from None
    except ValueError as error:
        raise UsageError(f"{url}: {error}; give a folder, an fsspec URL or pipe:COMMAND") from None
    if protocol in _S3:
        filesystem.retries = 1
    return filesystem, root


def _in_thread(call: Callable[[], T]) -> Future[T]:
    """What a call gives, some time; one that is not waited for stays behind in a thread that ends with the process."""
    answer: Future[T] = Future()

    def run() -> None:
        with suppress(InvalidStateError):  # cancelled
            try:
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    return answer

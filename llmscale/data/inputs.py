"""What a user names as input: files, folders, globs and URLs, each file once and in an order that does not change.

Inside a folder or glob files come sorted by path; hidden files and folders and __pycache__ are left out there, and
links to folders are not followed. A URL is any that fsspec knows (s3://, gs://, https://, hf://, file://): a file, a
glob, or a folder where the store can list.
Credentials and endpoints are those of fsspec and of the service's own tools (AWS_PROFILE, AWS_ENDPOINT_URL, HF_TOKEN).
"""

from __future__ import annotations

import glob
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from llmscale.data.remote_file import open_remote
from llmscale.data.store import PACKAGES, failure_behind
from llmscale.errors import DataError, UsageError, shown

_GLOB = "*?["
_HTTP = ("http://", "https://")
_LOCAL = ("file://", "local://")


@dataclass(frozen=True)
class InputFile:
    """A file to read. version: changes when the file does, as far as it can be told without reading it."""

    name: str
    size: int
    version: str

    @property
    def path(self) -> Path | None:
        """Where it lies on this machine; None for a URL."""
        return None if is_url(self.name) else Path(self.name)

    @property
    def shown(self) -> str:
        """Its name for messages."""
        return shown(self.name)

    @property
    def file_name(self) -> str:
        """Its name without the query of a URL: the ending says the format."""
        return self.name.partition("?")[0] if self.name.startswith(_HTTP) else self.name

    def open(self) -> BinaryIO:
        """The file, to be read from its beginning.

        Raises:
            DataError: it cannot be read.
        """
        try:
            if self.path:
                return self.path.open("rb")
        except OSError as error:
            raise unreadable(self.name, error) from None
        return open_remote(self.name, self.size, seekable=self.file_name.lower().endswith(".parquet"))


def is_url(name: str) -> bool:
    """Whether this names something for fsspec that is not on this machine."""
    return "://" in name and not name.startswith(_LOCAL)


def find(inputs: Sequence[str], suffixes: Sequence[str] = (), links: list[str] | None = None) -> list[InputFile]:
    """The files that the inputs name. suffixes: keep only these from folders.

    links: gets the names of links inside folders that are not followed: to other folders, and to nothing.

    Raises:
        UsageError: an input names no file. DataError: a store or a folder cannot be listed.
    """
    found: dict[str, InputFile] = {}
    for name in inputs:
        files = _remote(name, suffixes) if is_url(name) else _local(local_path(name), suffixes, links)
        for key, file in files:
            found.setdefault(key, file)
    return list(found.values())


def unreadable(name: str, error: Exception) -> DataError:
    """The message for an input that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return DataError(f"{shown(name)}: cannot be read: {reason}; mend the file or leave it out of --input")


def local_path(name: str) -> str:
    """What a user named, as a path where it is a URL of something on this machine."""
    return unquote(name.partition("://")[2]) if name.startswith(_LOCAL) else name


def _local(name: str, suffixes: Sequence[str], links: list[str] | None) -> Iterator[tuple[str, InputFile]]:
    matches = [name] if os.path.exists(name) else sorted(filter(os.path.exists, glob.glob(name, recursive=True)))
    paths = [path for match in matches for path in _walk(Path(match), suffixes, links)]
    if not paths:
        raise _nothing(name, suffixes, bool(matches))
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise unreadable(str(path), error) from None
        yield str(path.resolve()), InputFile(str(path), status.st_size, str(status.st_mtime_ns))


def _walk(path: Path, suffixes: Sequence[str], links: list[str] | None) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = []
    for folder, folders, names in os.walk(path, onerror=_refuse):
        folders[:] = [name for name in folders if not _hidden(name)]
        kept = (name for name in names if _wanted(name, suffixes))
        files = [Path(folder, name) for name in kept]
        found += [file for file in files if file.is_file()]
        if links is not None:
            left = [*(Path(folder, name) for name in folders), *(file for file in files if not file.exists())]
            links += sorted(str(link) for link in left if link.is_symlink())
    return sorted(found)


def _remote(name: str, suffixes: Sequence[str]) -> Iterator[tuple[str, InputFile]]:
    system, path = _system(name)
    try:
        if any(character in path for character in _GLOB) and not _exists(system, path):
            matches = sorted(system.glob(path))
        else:
            matches = [path] if _exists(system, path) else []
        paths = [file for match in matches for file in _listed(system, match, suffixes)]
        if not paths:
            raise _nothing(name, suffixes, bool(matches))
        for path in paths:
            about = system.info(path)
            version = next((str(about[key]) for key in ("ETag", "etag", "mtime", "LastModified") if about.get(key)), "")
            url = system.unstrip_protocol(path)
            yield url, InputFile(url, int(about.get("size") or 0), version)
    except UsageError:
        raise
    except Exception as error:  # each store has its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{shown(name)}: cannot be read: {reason}; check the URL, the credentials and the network"
        ) from None


def _exists(system: Any, path: str) -> bool:
    """Whether there is such a file or folder; a store that refuses says so, in place of "no"."""
    try:
        system.info(path)
    except FileNotFoundError as error:
        if (cause := failure_behind(error)) is not None:
            raise ValueError(f"{type(cause).__name__}: {cause}") from None
        return False
    return True


def _listed(system: Any, path: str, suffixes: Sequence[str]) -> list[str]:
    if system.info(path)["type"] != "directory":  # isdir would fetch a whole file over HTTP, to look for links
        return [path]
    root = path.rstrip("/")
    found = []
    for file in system.find(root):
        *folders, name = posixpath.relpath(file, root).split("/")
        if _wanted(name, suffixes) and not any(map(_hidden, folders)):
            found.append(file)
    return sorted(found)


def _system(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError:
        package = PACKAGES.get(scheme, scheme)
        raise UsageError(
            f"--input {url}: {scheme}:// needs a package that is missing; pip install '{package}'"
        ) from None
    except ValueError as error:
        raise UsageError(f"--input {url}: {error}") from None
    return system, path


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _wanted(name: str, suffixes: Sequence[str]) -> bool:
    return not name.startswith(".") and (not suffixes or name.endswith(tuple(suffixes)))


def _nothing(name: str, suffixes: Sequence[str], matched: bool) -> UsageError:
    ending = f" with suffix {', '.join(suffixes)}" if suffixes and matched else ""
    what = f"holds no file{ending}" if matched else "matches no file"
    return UsageError(f"--input {shown(name)}: {what}; give existing files, folders, URLs or quoted globs")


def _refuse(error: OSError) -> None:
    raise unreadable(str(error.filename), error)

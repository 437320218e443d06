"""Where a dataset goes: a folder, or an object store that fsspec writes (s3://, gs://).

A folder is built as FOLDER.partial beside it and takes its place by a rename. What was there is removed only where
every file of it has a name that builds give, here as in a store; else nothing is. For a store, each shard is built in a
local folder, uploaded by one thread while the next is written, and removed here once the store has all its bytes; two
wait at most. The cards come last, the one of train/ at the very end: without a card no reader takes a split for one.
Uploads are tried again with growing delays, and a build that is started again uploads what it had not.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from llmscale.data.inputs import InputFile, is_url, local_path
from llmscale.data.skipped import REPORT
from llmscale.errors import DataError, UsageError, shown

SPLITS = ("validation", "train")
"""In the order in which they appear."""
_FILES = ("tokenizer.json", "index.json")
_OURS = re.compile(r"(card|index|tokenizer)\.json|shard-\d+\.tar")
"""Names of the files in a split."""
_ATTEMPTS = 6
_WAITING = 2


class Destination(Protocol):
    """A place for a dataset."""

    staging: Path
    """The folder to work in, which may be left and found again."""
    local: ClassVar[bool]
    """Whether what is written lies on this machine."""

    def check(self, inputs: Sequence[str], files: Sequence[InputFile], overwrite: bool, begun: bool) -> None:
        """Refuse what would destroy something. begun: this very build was writing it before."""

    def clear(self) -> None:
        """Make room, at the beginning of a build, where that cannot be done at its end."""

    def add(self, split: str, shard: Path) -> None:
        """A shard is whole, and the journal knows it."""

    def publish(self, dataset: Path) -> None:
        """Let readers see the finished dataset."""

    def close(self) -> None:
        """Let go, whether the build is finished or not."""


def destination(output: str | Path, staging: Path | None = None) -> Destination:
    """The destination that a path or URL names. staging: folder for the work of a build that goes to a store."""
    text = os.fspath(output)
    if not is_url(text):
        if staging:
            raise UsageError(f"--staging {staging}: is for an --output that is a URL; leave it away")
        return _Folder(Path(local_path(text)))
    return _Store(text, staging)


class _Folder:
    local: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._target = path.resolve()
        if os.path.ismount(self._target):
            raise UsageError(f"--output {shown(path)}: is a mount point, which cannot be renamed; name a folder in it")
        self.staging = self._target.with_name(f"{self._target.name}.partial")
        self._old = self._target.with_name(f".{self._target.name}.llmscale-old")

    def check(self, inputs: Sequence[str], files: Sequence[InputFile], overwrite: bool, begun: bool) -> None:
        output, target = self._path, self._target
        if output.exists() and not output.is_dir():
            raise UsageError(f"--output {shown(output)}: is a file; name a folder")
        inside = next((file for file in files if file.path and target in file.path.resolve().parents), None)
        if inside:
            raise UsageError(f"--input {inside.shown}: lies inside --output {output}; name another --output")
        around = next((name for name in inputs if os.path.isdir(name) and Path(name).resolve() in target.parents), None)
        if around:
            raise UsageError(f"--output {shown(output)}: lies inside --input {shown(around)}; name a folder outside it")
        there = sorted(entry.name for entry in output.iterdir()) if output.exists() else []
        if there and not overwrite:
            raise UsageError(
                f"--output {shown(output)}: is not empty; name another folder, or replace it with --overwrite"
            )
        self._refuse_foreign(target)
        self._refuse_foreign(self._old)

    def clear(self) -> None:
        pass

    def add(self, split: str, shard: Path) -> None:
        pass

    def publish(self, dataset: Path) -> None:
        if self._target.exists():
            self._refuse_foreign(self._target)  # it may have come there meanwhile
            self._remove_old()
            self._target.rename(self._old)
        dataset.rename(self._target)
        self._remove_old()

    def close(self) -> None:
        pass

    def _remove_old(self) -> None:
        """Remove the dataset that was replaced, by this build or by one that was killed then."""
        if self._old.exists():
            self._refuse_foreign(self._old)
            shutil.rmtree(self._old)

    def _refuse_foreign(self, folder: Path) -> None:
        for split in sorted(folder.iterdir()) if folder.exists() else ():
            if split.name == REPORT:
                continue
            foreign = None if (split / "card.json").is_file() and not split.is_symlink() else split
            foreign = foreign or next(
                (file for file in sorted(split.iterdir()) if not _OURS.fullmatch(file.name)), None
            )
            if foreign:
                name = str(foreign.relative_to(folder))
                raise UsageError(f"--output {shown(folder)}: holds {name!r}, which no build wrote; name another folder")


class _Store:
    local: ClassVar[bool] = False

    def __init__(self, url: str, staging: Path | None) -> None:
        self._url = url.rstrip("/")
        self._files, self._root = _filesystem(self._url)
        name = f"llmscale-{hashlib.sha256(self._url.encode()).hexdigest()[:16]}.partial"
        self.staging = (staging or Path(tempfile.gettempdir())).resolve() / name
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._pending: deque[Future[None]] = deque()

    def check(self, inputs: Sequence[str], files: Sequence[InputFile], overwrite: bool, begun: bool) -> None:
        there = sorted(path.rstrip("/").rpartition("/")[2] for path in self._attempt(self._url, self._list))
        foreign = [name for name in there if name not in (*SPLITS, REPORT)] or [
            name
            for split in SPLITS
            for name in self._attempt(self._url, partial(self._names, split))
            if not _OURS.fullmatch(name.split("/", 1)[1])
        ]
        if foreign:
            raise UsageError(f"--output {self._url}: holds {foreign[0]!r}, which no build wrote; name another")
        if there and not overwrite and not begun:
            raise UsageError(
                f"--output {self._url}: is not empty; name another, or replace it with --overwrite, "
                "or name the --staging folder in which its unfinished build was"
            )

    def clear(self) -> None:
        self._attempt(self._url, self._remove)

    def add(self, split: str, shard: Path) -> None:
        while len(self._pending) >= _WAITING:
            self._pending.popleft().result()
        self._pending.append(self._uploads.submit(self._move, split, shard))

    def publish(self, dataset: Path) -> None:
        # Nothing is removed here: after a kill the build goes on from its journal, which knows less than is here.
        while self._pending:
            self._pending.popleft().result()
        for split in SPLITS:
            for path in sorted((dataset / split).glob("shard-*.tar")):
                self._upload(split, path)
        if (dataset / REPORT).is_file():
            self._upload("", dataset / REPORT)
        for names in (_FILES, ("card.json",)):
            for split in SPLITS:
                for name in names:
                    if (dataset / split / name).is_file():
                        self._upload(split, dataset / split / name)

    def close(self) -> None:
        self._uploads.shutdown(cancel_futures=True)

    def _move(self, split: str, local: Path) -> None:
        """Put a file into the store, and remove it here."""
        self._upload(split, local)
        local.unlink()

    def _upload(self, split: str, local: Path) -> None:
        name = f"{split}/{local.name}".lstrip("/")
        path = f"{self._root}/{name}"
        size = local.stat().st_size

        def put() -> None:
            self._files.put_file(str(local), path)
            self._files.invalidate_cache()
            if (there := self._files.info(path)["size"]) != size:
                raise OSError(f"{there} of {size} bytes are there")

        self._attempt(f"{self._url}/{name}", put)

    def _list(self) -> list[str]:
        self._files.invalidate_cache()
        try:
            return [str(path) for path in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []

    def _names(self, split: str) -> list[str]:
        """The files of a split, each as SPLIT/NAME."""
        found = (str(path).removeprefix(self._root).lstrip("/") for path in self._files.find(f"{self._root}/{split}"))
        return sorted(name for name in found if name.rstrip("/") != split)

    def _remove(self) -> None:
        """Remove the files of both splits; what `check` saw is all that there is. The cards first."""
        self._files.invalidate_cache()
        names = [name for split in reversed(SPLITS) for name in self._names(split)]
        cards = [name for name in names if name.endswith("/card.json")]
        others = [name for name in names if name not in cards]
        others += [REPORT] * bool(self._files.exists(f"{self._root}/{REPORT}"))
        for some in (cards, others):
            if some:
                self._files.rm([f"{self._root}/{name}" for name in some])
        self._files.invalidate_cache()

    def _attempt(self, where: str, call: Any) -> Any:
        delay = 0.5
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return call()
            except Exception as error:  # each store has its own
                final = isinstance(error, PermissionError | FileNotFoundError) or "Credentials" in type(error).__name__
                if final or attempt == _ATTEMPTS:
                    reason = " ".join(str(error).split())[:300] or type(error).__name__
                    raise DataError(
                        f"{where}: cannot be written: {reason}; check the URL, the credentials and the network"
                    ) from None
            time.sleep(delay)
            delay *= 2


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"--output {url}: needs a package that is not here: {error}") from None
    except ValueError as error:
        raise UsageError(f"--output {url}: {error}; give a folder or an fsspec URL") from None
    return filesystem, str(root).rstrip("/")

"""Where a conversion writes: a hidden folder beside its output, which takes the output's place when it is whole.

What is replaced is removed last of all, and only where a conversion wrote it; what is read is never replaced. A kill
leaves the hidden folder `.NAME.partial`, which the next conversion to NAME removes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmscale.checkpoint.place import is_remote
from llmscale.checkpoint.save import step_name
from llmscale.errors import ConversionError, UsageError

FACTS = "llmscale.json"
"""In every export."""
MODEL = "model.yaml"
"""In every import."""


class Destination:
    """An output in the making. work: the folder to write to. failed: set where what was written is not to be used."""

    def __init__(self, output: Path, folders: Sequence[Path], files: Sequence[Path], overwrite: bool) -> None:
        """folders, files: what is read.

        Raises:
            UsageError: there is something that must not be replaced.
        """
        self._output = output
        self._place = output.resolve()
        self._beside = self._place.with_name(f"{self._place.name}.failed")
        self.work = self._place.with_name(f".{self._place.name}.partial")
        self.failed = False
        there = self._place.exists()
        if there and not overwrite and not _is_empty(self._place):
            raise UsageError(f"{output}: is there already; name another folder, or replace it with --overwrite")
        for source in (*folders, *files):
            if is_remote(source):
                continue
            read = source.resolve()
            if (
                self._place == read
                or self._place in read.parents
                or (source in folders and read in self._place.parents)
            ):
                where = "is" if self._place == read else "holds" if self._place in read.parents else "lies in"
                raise UsageError(f"{output}: {where} {source}, which is read; name another folder")
        self._replaces = there and not _is_empty(self._place)
        for place in (self._place, self._beside) if self._replaces else ():
            if place.exists() and not _is_empty(place) and not _was_converted(place):
                raise UsageError(
                    f"{place}: was not written by `llmscale convert`, or more is in it now, so --overwrite leaves it; "
                    "name another folder, or remove it yourself"
                )

    @property
    def final(self) -> Path:
        """Where it will stand: what failed is left beside what it was to replace."""
        return self._beside if self.failed and self._replaces else self._output

    def settle(self) -> None:
        """Put what was written in its place."""
        final = self.final.resolve()
        if not final.exists():
            self.work.rename(final)
            return
        old = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        try:
            self.work.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def error(self, error: OSError) -> ConversionError:
        """What went wrong, in words: with a file that was read, or with the output."""
        reason = error.strerror or str(error)
        if error.filename and not Path(str(error.filename)).is_relative_to(self.work):
            return ConversionError(f"{error.filename}: cannot be read or written: {reason}")
        return ConversionError(f"{self._output}: cannot be written: {reason}; name another folder")


@contextmanager
def destination(
    output: Path, *, folders: Sequence[Path] = (), files: Sequence[Path] = (), overwrite: bool = False
) -> Iterator[Destination]:
    """Gives what to write to; at the end it stands where it should, or after an error there is nothing of it.

    Raises:
        UsageError: the output is not empty and must not be replaced. ConversionError: it cannot be written.
    """
    found = Destination(output, folders, files, overwrite)
    shutil.rmtree(found.work, ignore_errors=True)
    try:
        found.work.mkdir(parents=True)
        yield found
        found.settle()
    except OSError as error:
        raise found.error(error) from error
    finally:
        shutil.rmtree(found.work, ignore_errors=True)


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def _was_converted(place: Path) -> bool:
    """Whether it is an export or an import, in which nobody has trained since."""
    if not place.is_dir() or (place / "config.yaml").exists():
        return False
    steps = [path.name for path in (place / "checkpoints").glob("*")]
    return (place / MODEL).is_file() if steps == [step_name(0)] else not steps and (place / FACTS).is_file()

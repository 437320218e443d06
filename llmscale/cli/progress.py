"""How far a long command is: a bar on standard error; where that is no terminal, a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from llmscale.data.build import Progress
    from llmscale.data.documents import Seen

_LINE_SECONDS = 10.0


@contextmanager
def display(verb: str) -> Iterator[Callable[[Progress], None]]:
    """Gives the function to call with every progress; rates count from the first, which a build that goes on has."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(verb)
        return
    columns = (
        TextColumn(f"{verb} {{task.percentage:.0f}}%"),
        BarColumn(10),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    rates = _Rates()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(verb, total=None, figures="")
        yield lambda progress: bar.update(
            task, total=progress.total_bytes, completed=progress.bytes_read, figures=rates.figures(progress)
        )


class _Rates:
    """Rates since the first progress."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first: Progress | None = None

    def figures(self, progress: Progress) -> str:
        """Documents and tokens, in all and a second."""
        first = self._since(progress)
        seconds = max(time.monotonic() - self._start, 1e-9)
        counts = (
            ("documents", progress.documents, progress.documents - first.documents),
            ("tokens", progress.tokens, progress.tokens - first.tokens),
        )
        return " · ".join(f"{_short(now)} {name} ({_short(new / seconds)}/s)" for name, now, new in counts if now)

    def seconds_left(self, progress: Progress) -> float:
        """At the rate of the bytes until now."""
        done = progress.bytes_read - self._since(progress).bytes_read
        seconds = time.monotonic() - self._start
        return seconds * (progress.total_bytes - progress.bytes_read) / done if done else 0.0

    def _since(self, progress: Progress) -> Progress:
        self._first = self._first or replace(progress)
        return self._first


class _Lines:
    """A line every _LINE_SECONDS."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._shown = time.monotonic()
        self._rates = _Rates()

    def __call__(self, progress: Progress) -> None:
        figures, left = self._rates.figures(progress), self._rates.seconds_left(progress)
        if time.monotonic() - self._shown < _LINE_SECONDS:
            return
        self._shown = time.monotonic()
        share = progress.bytes_read / max(progress.total_bytes, 1)
        click.echo(f"{self._verb}: {share:.0%} · {figures} · {left:,.0f} s left", err=True)


def _short(count: float) -> str:
    """A number for a narrow display: 1.8M."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.1f}T"


def in_units(count: int) -> str:
    """A number of bytes for people: 1.5 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def seen_lines(seen: Seen, replaced: int) -> Iterator[str]:
    """What was read in another way than the user may expect, or left out."""
    for count, names, what in (
        (seen.binary_files, seen.binary_names, "binary file(s) left out, which hold NUL bytes"),
        (seen.links, seen.link_names, "link(s) not followed, which lead to a folder or to nothing"),
    ):
        if count:
            yield f"  {count:,} {what}: {', '.join(names)}{', …' if count > len(names) else ''}"
    if seen.json_of_lines:
        yield f"  {seen.json_of_lines:,} .json file(s) read as .jsonl: their first line is an object with the text"
    if seen.json_as_text:
        yield f"  {seen.json_as_text:,} .json file(s) read as text, each one document: no object with --text-key a line"
    if replaced:
        yield f"  {replaced:,} character(s) that are not UTF-8 replaced by U+FFFD"

"""`llmscale data build`: reads the options, calls `llmscale.data.build`, and prints what was built."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmscale.cli import data_options as options
from llmscale.cli.progress import display, in_units, seen_lines
from llmscale.errors import UsageError, shown

if TYPE_CHECKING:
    from llmscale.data.build import Summary


@click.command("build")
@options.inputs
@options.more
@options.suffixes
@options.text_key
@options.tokenizer
@options.pattern
@click.option(
    "--output", required=True, metavar="FOLDER|URL", help="What to make, s3://… too; holds train/ and validation/."
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes that tokenise; one a CPU when not given.")
@click.option(
    "--validation-fraction", type=click.FloatRange(0, 1, max_open=True), default=0.01, show_default=True,
    help="Share of the documents, by their hash, that goes to validation/; 0 for none.",
)  # fmt: skip
@click.option(
    "--shard-size", type=options.Size(), default="256M", show_default=True, help="Bytes of tokens in a shard."
)
@click.option(
    "--end-of-document", metavar="TOKEN", help="Token that ends a document; <|endoftext|> or </s> when not given."
)
@click.option(
    "--dedup",
    type=click.Choice(["none", "exact", "near"]),
    default="none",
    show_default=True,
    help="Leave out documents that equal an earlier one, or nearly do.",
)
@click.option(
    "--near-threshold",
    type=click.FloatRange(0, 1, min_open=True),
    help="With --dedup near: from which similarity of their runs of five words (Jaccard, estimated); 0.8 by default.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What a record that is no document does; skip names it in OUTPUT/skipped.jsonl.",
)
@click.option(
    "--max-skipped", type=click.IntRange(min=0), help="With --on-error skip: at most so many records; 1000 by default."
)
@click.option("--overwrite", is_flag=True, help="Replace the dataset that --output holds.")
@click.option("--restart", is_flag=True, help="Drop an unfinished build instead of going on with it.")
@click.option(
    "--staging",
    type=options.LocalPath(),
    metavar="FOLDER",
    help="Where to work when --output is a URL; the system's folder for temporary files when not given.",
)
@options.part
@options.as_json
def build(
    inputs: Sequence[str],
    more: Sequence[str],
    suffixes: Sequence[str],
    text_key: str,
    tokenizer: Path,
    pattern: str | None,
    output: str,
    workers: int | None,
    validation_fraction: float,
    shard_size: int,
    end_of_document: str | None,
    dedup: str,
    near_threshold: float | None,
    on_error: str,
    max_skipped: int | None,
    overwrite: bool,
    restart: bool,
    staging: Path | None,
    part: tuple[int, int] | None,
    as_json: bool,
) -> None:
    """Turn text into token shards that `llmscale pretrain` streams.

    Reads .jsonl (a line is a document), .parquet (a row), webdataset .tar (a sample) and text files of any other kind
    (a file), .gz and .zst of them too, here or wherever fsspec can read. The result is the same, byte for byte, for
    any number of workers. Empty documents and binary files are left out, bytes that are not UTF-8 are replaced; all are
    counted. A build that was killed goes on where it was, at the last finished shard, when the same command is given
    again.

    \b
    Example:
      llmscale data build --input corpus/ --suffix .txt --tokenizer tok.json --output data/corpus --dedup near
    """
    from llmscale.data.build import build as run

    for option, given, asked in (
        ("--near-threshold", near_threshold, "--dedup near"), ("--max-skipped", max_skipped, "--on-error skip"),
    ):  # fmt: skip
        if given is not None and asked not in (f"--dedup {dedup}", f"--on-error {on_error}"):
            raise UsageError(f"{option} {given}: does nothing without {asked}; give that too, or leave it away")
    with _ended_by_sigterm(), display("tokenising") as report:
        summary = run(
            (*inputs, *more),
            tokenizer,
            output,
            workers=workers or _cpus(),
            validation_fraction=validation_fraction,
            shard_bytes=shard_size,
            suffixes=suffixes,
            text_key=text_key,
            end_of_document=end_of_document,
            pattern=pattern,
            dedup=dedup,
            near_threshold=0.8 if near_threshold is None else near_threshold,
            max_skipped=(1000 if max_skipped is None else max_skipped) if on_error == "skip" else None,
            overwrite=overwrite,
            restart=restart,
            staging=staging,
            part=part,
            report=report,
        )
    click.echo(json.dumps(_summary(summary)) if as_json else "\n".join(_summary_lines(summary)))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what runs here as Ctrl-C does: in order."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cpus() -> int:
    """The CPUs that this process may use, where the system can say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _summary(summary: Summary) -> dict[str, Any]:
    result = asdict(summary)
    result |= result.pop("seen").model_dump()
    result["splits"] = {name: card.model_dump() for name, card in summary.splits.items()}
    return result


def _summary_lines(summary: Summary) -> Iterator[str]:
    yield f"{shown(summary.output)}: {summary.files:,} file(s) read"
    for name, card in summary.splits.items():
        size = f"{card.shards:,} shard(s), {in_units(card.bytes)}"
        yield f"  {name}: {card.documents:,} documents, {card.tokens:,} tokens, {size}"
    if "validation" in summary.splits and not summary.splits["validation"].documents:
        yield "  no document fell into validation: raise --validation-fraction to have some"
    if summary.resumed_documents:
        yield f"  {summary.resumed_documents:,} document(s) were there from the build that was gone on with"
    if summary.exact_duplicates or summary.near_duplicates:
        yield f"  {summary.exact_duplicates:,} exact and {summary.near_duplicates:,} near duplicate(s) left out"
    if summary.skipped_records:
        yield f"  {summary.skipped_records:,} record(s) passed over that are no documents: skipped.jsonl names them"
    yield from seen_lines(summary.seen, summary.replaced_characters)
    if summary.empty_documents:
        yield f"  {summary.empty_documents:,} empty document(s) left out"

"""`llmscale data`: tokenizer, inspect, verify, describe. Thin: read the options, call `llmscale.data`, print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmscale.cli import data_options as options
from llmscale.cli.data_build import build
from llmscale.cli.progress import display, in_units, seen_lines
from llmscale.errors import DataError, UsageError

if TYPE_CHECKING:
    from llmscale.data.build import Progress
    from llmscale.data.text_shards import TextCard, TextSplit


@click.group()
def command() -> None:
    """Train a tokenizer, build token shards, look into them, check them."""


command.add_command(build)


@command.command("tokenizer")
@options.inputs
@options.more
@options.suffixes
@options.text_key
@click.option(
    "--vocab-size", type=click.IntRange(1, 1 << 24), required=True, help="Number of token ids, special ones included."
)
@click.option("--special-token", "special_tokens", multiple=True, help="A further special token; repeatable.")
@click.option("--output", type=options.LocalPath(), required=True, help="tokenizer.json to write.")
@click.option("--overwrite", is_flag=True, help="Replace the file that --output names.")
@options.as_json
def train_tokenizer(
    inputs: Sequence[str],
    more: Sequence[str],
    suffixes: Sequence[str],
    text_key: str,
    vocab_size: int,
    special_tokens: Sequence[str],
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train a byte-level BPE tokenizer on text.

    The end-of-document token <|endoftext|> is always in it, as id 0. The same input gives the same tokenizer.

    \b
    Example:
      llmscale data tokenizer --input corpus/ --suffix .txt --vocab-size 32768 --output tok.json
    """
    from llmscale.data import documents, tokenizer
    from llmscale.data.build import Progress
    from llmscale.data.inputs import find

    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file such as {output / 'tokenizer.json'}")
    if output.exists() and not overwrite:
        raise UsageError(f"--output {output}: is there; name another file, or replace it with --overwrite")
    tokenizer.check_special(special_tokens)
    tokenizer.check_writable(output)
    links: list[str] = []
    files = find((*inputs, *more), suffixes, links)
    reader = documents.Reader(files, text_key, documents.Seen().and_links(links))
    progress = Progress(reader.total_bytes)
    replaced = 0

    def texts(report: Callable[[Progress], None]) -> Iterator[str]:
        nonlocal replaced
        for part in reader:
            for piece in documents.pieces(part, text_key):
                replaced += piece.replaced
                progress.bytes_read = reader.bytes_read
                progress.documents += piece.last
                report(progress)
                yield piece.text

    specials = (tokenizer.END_OF_DOCUMENT, *special_tokens)
    with display("training") as report:
        text = tokenizer.train(texts(report), vocab_size, specials)
    tokenizer.write(text, output)
    result = {
        "output": str(output),
        "vocab_size": vocab_size,
        "special_tokens": list(dict.fromkeys(specials)),
        "documents": progress.documents,
        "bytes": reader.total_bytes,
        "replaced_characters": replaced,
        **reader.seen.model_dump(),
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        size = in_units(reader.total_bytes)
        click.echo(f"{output}: {vocab_size:,} tokens, from {progress.documents:,} documents of {size}")
        for line in seen_lines(reader.seen, replaced):
            click.echo(line)


@command.command("inspect")
@click.argument("place", metavar="FOLDER|PATTERN|URL")
@click.option(
    "--documents", type=click.IntRange(min=0), default=3, show_default=True, help="Documents to show as text."
)
@click.option("--plot", type=options.LocalPath(), metavar="FILE.png", help="Draw the document lengths.")
@options.as_json
def inspect(place: str, documents: int, plot: Path | None, as_json: bool) -> None:
    """Show totals, document lengths and some documents of a dataset.

    \b
    Example:
      llmscale data inspect data/corpus --plot lengths.png
    """
    from llmscale.data.inspect import describe, histogram, plot_histogram
    from llmscale.data.text_shards import TextSplit, is_text

    if is_text(place):
        if plot:
            raise UsageError(f"--plot {plot}: {place} describes text, whose tokens nobody has counted; leave it away")
        described = TextSplit(place)
        if as_json:
            click.echo(json.dumps([{"folder": place, **described.card.model_dump()}]))
            return
        click.echo(_described(place, described.card))
        for number, document in enumerate(_first(described, documents), 1):
            click.echo(f"  document {number}, from its beginning:")
            click.echo("\n".join(f"    | {line}" for line in document[:400].splitlines()))
        return
    found = describe(place, documents)
    if plot:
        plot_histogram(found, plot)
    if as_json:
        rows = [{"folder": one.place, **one.card.model_dump(), "examples": one.documents} for one in found]
        click.echo(json.dumps(rows))
        return
    for one in found:
        card = one.card
        mean = card.tokens / card.documents if card.documents else 0
        click.echo(one.place)
        click.echo(
            f"  {card.documents:,} documents, {card.tokens:,} tokens ({card.dtype}, vocabulary {card.vocab_size:,})"
        )
        click.echo(
            f"  {card.shards:,} shard(s), {card.samples:,} sample(s) of {card.sample_tokens:,}, {in_units(card.bytes)}"
        )
        click.echo(f"  tokenizer {card.tokenizer_sha256[:16]}, end of document {card.end_of_document}")
        click.echo(
            f"  tokens a document: {card.shortest_document:,} to {card.longest_document:,}, {mean:,.1f} on average"
        )
        for line in histogram(card):
            click.echo(f"    {line}")
        for number, text in enumerate(one.documents, 1):
            click.echo(f"  document {number} of {len(one.documents)}, from its beginning:")
            click.echo("\n".join(f"    | {line}" for line in text.splitlines()))


@command.command("verify")
@click.argument("place", metavar="FOLDER|PATTERN|URL")
@options.as_json
@click.pass_context
def verify(context: click.Context, place: str, as_json: bool) -> None:
    """Check every checksum, offset and token id of a dataset, or the text that a description speaks of; exit code 1 if
    something is broken.

    \b
    Example:
      llmscale data verify data/corpus
    """
    from llmscale.data.build import Progress
    from llmscale.data.verify import verify as run

    checked = 0
    with display("checking") as report:

        def show(done: int, total: int) -> None:
            nonlocal checked
            checked = total
            report(Progress(total, done))

        problems = run(place, show)
    if as_json:
        click.echo(json.dumps({"folder": place, "whole": not problems, "bytes": checked, "problems": problems}))
        context.exit(1 if problems else 0)
    if problems:
        raise DataError("\n".join(problems))
    click.echo(f"{place}: whole, {in_units(checked)} checked")


@command.command("describe")
@options.inputs
@options.more
@options.text_key
@options.tokenizer
@options.pattern
@click.option("--output", type=options.LocalPath(), required=True, help="Folder of the description.")
@click.option(
    "--streams", type=click.IntRange(min=1), default=64, show_default=True,
    help="Logical streams; data-parallel ranks share the tokenising where their number divides it.",
)  # fmt: skip
@click.option(
    "--end-of-document", metavar="TOKEN", help="Token that ends a document; <|endoftext|> or </s> when not given."
)
@options.as_json
def describe(
    inputs: Sequence[str],
    more: Sequence[str],
    text_key: str,
    tokenizer: Path,
    pattern: str | None,
    output: Path,
    streams: int,
    end_of_document: str | None,
    as_json: bool,
) -> None:
    """Describe raw-text webdataset shards, so that they can be tokenised while they stream.

    The shards (.tar with .txt or .json samples) stay as and where they are; the description is what data.train[].path
    names.

    \b
    Example:
      llmscale data describe --input 'shards/*.tar' --tokenizer tok.json --output data/web
    """
    from llmscale.data.build import Progress
    from llmscale.data.describe import describe as run

    with display("reading") as report:
        card = run(
            (*inputs, *more),
            tokenizer,
            output,
            streams=streams,
            text_key=text_key,
            end_of_document=end_of_document,
            pattern=pattern,
            report=lambda done, total, documents: report(Progress(total, done, documents)),
        )
    if as_json:
        click.echo(json.dumps({"output": str(output), **card.model_dump()}))
        return
    click.echo(_described(str(output), card))
    if card.streams < streams:
        click.echo(f"  {streams} streams were asked for, and the text has {card.pieces} piece(s): one a stream")


def _first(described: TextSplit, documents: int) -> list[str]:
    """The first documents of a description's first piece."""
    from llmscale.data.quarantine import Broken, message

    try:
        return [data.decode("utf-8", errors="replace") for data in described.documents(0)[:documents]]
    except Broken as broken:
        raise DataError(message(described, broken)) from None


def _described(place: str, card: TextCard) -> str:
    return (
        f"{place}: text, {card.documents:,} documents in {card.shards:,} shard(s), {in_units(card.bytes)}, "
        f"read in {card.streams} logical stream(s)"
    )

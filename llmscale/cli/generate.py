"""`llmscale generate`: text from a checkpoint or an export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from llmscale.cli.numbers import Finite
from llmscale.errors import UsageError


@click.command(epilog="Example: llmscale generate runs/demo --prompt 'def main(' --max-tokens 200")
@click.argument("model")
@click.option("--prompt", default="", help="Text to go on from; empty begins a new document.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A prompt a line; an empty one begins a document.",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts at a time.")
@click.option("--max-tokens", type=click.IntRange(1), default=100, show_default=True, help="Tokens to generate.")
@click.option("--temperature", type=Finite(0), default=0.8, show_default=True, help="0 takes the likeliest.")
@click.option("--top-k", type=click.IntRange(0), default=50, show_default=True, help="Of the k likeliest; 0 of all.")
@click.option("--top-p", type=Finite(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus.")
@click.option(
    "--seed",
    type=click.IntRange(-(2**63), 2**64 - 1),
    default=0,
    show_default=True,
    help="The same seed gives the same text.",
)
@click.option("--stop", multiple=True, help=r"Text that ends it; \n, \t, \\ as in C; repeatable.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json; the model's own when not given.")
@click.option("--end-of-document", metavar="TOKEN", help="Ends a text, besides what the model says.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a prompt, one a line.")
def command(
    model: str,
    prompt: str,
    prompts: Path | None,
    batch_size: int,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    tokenizer: Path | None,
    end_of_document: str | None,
    as_json: bool,
) -> None:
    """Generate text from MODEL: a step's folder, a run directory for its newest, or a folder in Hugging Face's format.

    On a terminal the text of a single prompt appears as it is generated.
    """
    from llmscale.distributed.launch import quiet_imports

    texts = [prompt] if prompts is None else _lines(prompts, prompt)
    quiet_imports()
    from llmscale.inference.generate import Sampling, open_text_model

    stops = tuple(_unescaped(text) for text in stop if text)
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed, stops)
    names = [f"--prompts {prompts}: line {number}" for number in range(1, len(texts) + 1)] if prompts else ["--prompt"]
    with open_text_model(model, tokenizer, end_of_document) as (place, opened):
        if len(texts) == 1 and not as_json:
            click.echo(texts[0], nl=False)
            opened.generate(texts, sampling, lambda piece: click.echo(piece, nl=False), names=names)
            click.echo()
            return
        found = opened.generate(texts, sampling, batch_size=batch_size, names=names)
        for given, text in zip(texts, found, strict=True):
            row = {"checkpoint": str(place), "prompt": given, "text": text}
            click.echo(json.dumps(row) if as_json else f"{given}{text}\n")


def _lines(path: Path, prompt: str) -> list[str]:
    if prompt:
        raise UsageError("--prompt and --prompts: give one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: cannot be read ({error}); give a text file with a prompt a line") from None
    if not text:
        raise UsageError(f"--prompts {path}: is empty; give a prompt a line")
    return text.removesuffix("\n").split("\n")


def _unescaped(text: str) -> str:
    """With \\n, \\r, \\t and \\\\ as the characters that they stand for: shells hand them on as they were typed."""
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t"}.get(match[1], match[1]), text)

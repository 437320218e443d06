"""`llmscale generate`: text from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llmscale.errors import UsageError


@click.command(epilog="Example: llmscale generate runs/demo --prompt 'def main(' --max-tokens 200")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="Text to go on from; empty begins a new document.")
@click.option("--max-tokens", type=click.IntRange(1), default=100, show_default=True, help="Tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0 takes the likeliest.")
@click.option("--top-k", type=click.IntRange(0), default=50, show_default=True, help="Of the k likeliest; 0 of all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json; the run's own when not given.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    checkpoint: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Generate text from CHECKPOINT: a step's folder, or a run directory for its newest."""
    from llmscale.checkpoint.retention import find
    from llmscale.data.tokenizer import Tokenizer
    from llmscale.distributed.launch import quiet_imports

    quiet_imports()
    from llmscale.inference.model import open_model
    from llmscale.inference.sample import Sampling, sample

    found = find(str(checkpoint), checkpoint / "checkpoints")
    if found is None:
        raise UsageError(f"{checkpoint}: no checkpoint")
    path = tokenizer or found.path.parent.parent / "tokenizer.json"
    if not path.exists():
        raise UsageError(f"{path}: no tokenizer there; name one with --tokenizer")
    words = Tokenizer(path)
    model = found.model
    vocab_size = model.vocab_size or words.vocab_size
    if words.vocab_size > vocab_size:
        raise UsageError(
            f"{path}: {words.vocab_size} tokens, and the model has {vocab_size}; name the right --tokenizer"
        )
    ids = [int(i) for i in words.encode(prompt)] or [words.end_of_document]
    settings = Sampling(max_tokens, temperature, top_k, top_p, seed)
    with open_model(found.model, found.whole, found.precision) as (stage, device):
        context = model.max_position_embeddings
        tokens = list(sample(stage, ids, settings, context, vocab_size, words.end_of_document, device))
    text = words.decode(tokens)
    if as_json:
        click.echo(json.dumps({"checkpoint": str(found.path), "prompt": prompt, "text": text, "tokens": len(tokens)}))
    else:
        click.echo(prompt + text)

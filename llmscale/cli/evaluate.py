"""`llmscale evaluate`: how good a model is."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmscale.cli.progress import display
from llmscale.errors import UsageError

if TYPE_CHECKING:
    from llmscale.data.build import Progress


@click.group(epilog="Example: llmscale evaluate perplexity runs/demo --data data/validation")
def command() -> None:
    """Evaluate a checkpoint or an export."""


def _show(report: Callable[[Progress], None], done: int, total: int) -> None:
    from llmscale.data.build import Progress

    report(Progress(total, done))


@command.command(epilog="Example: llmscale evaluate perplexity runs/demo --data data/validation --stride 512")
@click.argument("model")
@click.option("--data", "places", multiple=True, required=True, metavar="FOLDER|URL", help="A split; repeatable.")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens of a window; the model's longest sequence if not given."
)
@click.option("--stride", type=click.IntRange(1), help="Tokens from window to window; half the context if not given.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Windows of one forward pass.")
@click.option("--max-tokens", type=click.IntRange(2), help="Read so many tokens of each split; all if not given.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json; the model's own when not given.")
@click.option("--end-of-document", metavar="TOKEN", help="What ends a document, besides what the model tells.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def perplexity(
    model: str,
    places: tuple[str, ...],
    context: int | None,
    stride: int | None,
    batch_size: int,
    max_tokens: int | None,
    tokenizer: Path | None,
    end_of_document: str | None,
    as_json: bool,
) -> None:
    """Perplexity of MODEL (a step's folder, a run directory, or a folder in Hugging Face's format) on token shards.

    Every token counts once, whatever window it is in: each window predicts what the one before has not.
    """
    from llmscale.data.split import Split
    from llmscale.distributed.launch import quiet_imports

    splits = [Split(place) for place in places]
    quiet_imports()
    from llmscale.evaluation.perplexity import score, together
    from llmscale.inference.generate import open_text_model

    with open_text_model(model, tokenizer, end_of_document) as (place, opened):
        for split in splits:
            if split.card.tokenizer_sha256 != opened.fingerprint:
                raise UsageError(f"--data {split.place}: was tokenised with another tokenizer than the model's")
            if opened.ends and split.card.end_of_document not in opened.ends:
                raise UsageError(
                    f"--data {split.place}: documents end with the id {split.card.end_of_document}, the model's with "
                    f"{', '.join(map(str, opened.ends))}; build it with that, or name its own in --end-of-document"
                )
        window = context or opened.context
        if window > opened.context:
            raise UsageError(f"--context {window}: the model takes {opened.context}")
        step = stride or max(1, window // 2)
        if step > window:
            raise UsageError(f"--stride {step}: leaves out tokens between windows of {window}; use at most {window}")
        scores = []
        for split in splits:
            with display("evaluating") as report:
                scores.append(
                    score(
                        opened.model, split, window, step, batch_size, max_tokens,
                        partial(_show, report),
                    )
                )  # fmt: skip
    total = together(scores)
    rows = [*scores, total] if len(scores) > 1 else scores
    if as_json:
        sources = [{"source": s.source, "tokens": s.tokens, "loss": s.loss, "perplexity": s.perplexity} for s in scores]
        about = {"model": str(place), "context": window, "stride": step, "sources": sources}
        click.echo(json.dumps({**about, "tokens": total.tokens, "loss": total.loss, "perplexity": total.perplexity}))
        return
    click.echo(f"{place}, windows of {window} tokens, a stride of {step}")
    for row in rows:
        click.echo(f"  {row.source}: perplexity {row.perplexity:,.3f}, loss {row.loss:.5f} over {row.tokens:,} tokens")


@command.command(
    epilog="Example: llmscale evaluate harness runs/demo --tasks my_task --include tasks --num-fewshot 0",
)
@click.argument("model")
@click.option("--tasks", required=True, metavar="NAME[,NAME]", help="Tasks, groups or tags of lm-eval or of --include.")
@click.option(
    "--include",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of task files of your own; they win over lm-eval's.",
)
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each question; the task's own by default.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Take so many documents of each task; all if not given.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json of a checkpoint; the run's own if not given."
)
@click.option(
    "--end-of-document", metavar="TOKEN", help="What ends a checkpoint's documents; what it tells if not given."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write all of lm-eval's results here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def harness(
    model: str,
    tasks: str,
    include: Path | None,
    num_fewshot: int | None,
    batch_size: int,
    limit: int | None,
    tokenizer: Path | None,
    end_of_document: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Tasks of lm-evaluation-harness on MODEL (a step's folder, a run directory, or a folder in Hugging Face's format).

    Needs the extra: pip install 'llmscale[harness]'. A task's documents may be files of your own: in its file say
    `dataset_path: json` and name them in `dataset_kwargs`.
    """
    from llmscale.distributed.launch import quiet_imports
    from llmscale.evaluation import harness as evaluation

    evaluation.require()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks: names no task")
    quiet_imports()
    from llmscale.inference.model_folder import in_hugging_face_format

    with in_hugging_face_format(model, tokenizer, end_of_document) as (place, folder):
        if (tokenizer or end_of_document) and folder == place:
            option = f"--tokenizer {tokenizer}" if tokenizer else f"--end-of-document {end_of_document}"
            raise UsageError(f"{option}: {place} is in Hugging Face's format, and the harness takes its own")
        found = evaluation.harness(
            folder, names, include=include, num_fewshot=num_fewshot, batch_size=batch_size, limit=limit
        )
    about = {"model": str(place), "results": found["results"], "n-shot": found["n-shot"], "versions": found["versions"]}
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**found, "model": str(place)}, indent=2, default=str) + "\n")
    if as_json:
        click.echo(json.dumps(about, default=str))
        return
    click.echo(f"{place}")
    for task, values in found["results"].items():
        for metric, value in values.items():
            name = metric.removesuffix(",none")
            if isinstance(value, int | float) and "_stderr" not in metric and name not in ("alias", "sample_len"):
                error = values.get(metric.replace(",", "_stderr,"))
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                click.echo(f"  {task}: {name} {value:.4f}{spread} ({found['n-shot'].get(task, 0)}-shot)")

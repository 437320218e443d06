"""`llmscale convert`: to Hugging Face's format, with a proof, and from it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import click

from llmscale.cli.numbers import Finite
from llmscale.cli.progress import display
from llmscale.errors import ConversionError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@click.group(epilog="Example: llmscale convert to-hf runs/demo exported")
def command() -> None:
    """Convert checkpoints to and from Hugging Face's format."""


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(value).strip().upper())
        if match is None or not (found := int(float(match[1]) * _UNITS[match[2] or ""])):
            self.fail(f"{value!r} is no size such as 5GB or 512MiB", param, ctx)
        return found


@command.command("to-hf", epilog="Example: llmscale convert to-hf runs/demo exported --dtype bf16")
@click.argument("checkpoint")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Of the tensors; when not given what the run computed in, or what an imported model came in.",
)
@click.option(
    "--max-shard-size", type=_Size(), default="5GB", show_default=True,
    help="Most bytes of one file; a weight's tensors (q, k and v; gate and up) stay together.",
)  # fmt: skip
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json; the run's own when not given.")
@click.option(
    "--end-of-document", metavar="TOKEN", help="What ends a document; what the checkpoint tells if not given."
)
@click.option("--verify/--no-verify", default=True, help="Compare transformers' logits with llmscale's own.")
@click.option(
    "--tolerance", type=Finite(0, min_open=True), default=1e-4, show_default=True,
    help="Largest difference of two logits that passes.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion in OUTPUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def to_hf(
    checkpoint: str,
    output: Path,
    dtype: str | None,
    max_shard_size: int,
    tokenizer: Path | None,
    end_of_document: str | None,
    verify: bool,
    tolerance: float,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT, a step's folder or a run directory for its newest, so that transformers loads it.

    The export is then loaded by transformers, and its logits are compared with those of the checkpoint. That takes
    4 bytes a parameter, or longer where there is less memory; where they differ by more than the tolerance the export
    is marked failed, and the exit code 1.
    """
    from llmscale.checkpoint.retention import open_checkpoint
    from llmscale.data.build import Progress
    from llmscale.distributed.launch import huge_pages, quiet_imports

    quiet_imports()
    huge_pages()
    from llmscale.convert.to_hf import to_hf as run

    found = open_checkpoint(checkpoint)
    with display("converting") as report:
        export = run(
            found,
            output,
            dtype=dtype,  # type: ignore[arg-type]
            max_shard_bytes=max_shard_size,
            tokenizer=tokenizer,
            end_of_document=end_of_document,
            verify=verify,
            tolerance=tolerance,
            overwrite=overwrite,
            report=lambda done, total: report(Progress(total, done)),
        )
    proof = export.parity
    if as_json:
        content = {
            **asdict(export),
            "output": str(export.output),
            "checkpoint": str(found.path),
            "failed": export.failed,
        }
        click.echo(json.dumps(content))
    else:
        size = f"{export.parameters:,} parameters in {export.dtype}, {export.shards} file(s)"
        click.echo(f"{export.output}: {export.architecture}, {size}")
        if proof is None:
            click.echo("  not verified")
        elif proof.equal:
            click.echo(f"  verified: logits differ by at most {proof.difference:.1e}, of {proof.largest:.3g}")
    if proof is not None and not proof.equal:
        raise ConversionError(
            f"{export.output}: FAILED: its logits differ by {proof.difference:.1e} from the checkpoint's, and the "
            f"tolerance is {proof.tolerance:.0e}; its embeddings {'are' if proof.same_embeddings else 'are not'} the "
            "same; do not use it, and report this"
        )


@command.command("from-hf", epilog="Example: llmscale convert from-hf downloaded/llama imported")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion in OUTPUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def from_hf(folder: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Import the model in FOLDER, which save_pretrained or a download wrote, so that runs on any layout start from it.

    OUTPUT gets a checkpoint with the weights, the tokenizer, and model.yaml, which a run's config names as its preset.
    """
    from llmscale.data.build import Progress
    from llmscale.distributed.launch import huge_pages, quiet_imports

    quiet_imports()
    huge_pages()
    from llmscale.convert.from_hf import from_hf as run

    with display("converting") as report:
        found = run(folder, output, overwrite=overwrite, report=lambda done, total: report(Progress(total, done)))
    if as_json:
        content = {**asdict(found), "output": str(found.output), "checkpoint": str(found.checkpoint)}
        click.echo(json.dumps(content))
        return
    click.echo(f"{output}: {found.family}, {found.parameters:,} parameters")
    if not found.tokenizer:
        click.echo("  no file of a tokenizer came with it: to generate from it or export it, name one with --tokenizer")
    click.echo("  to go on from it, say in the run's config:")
    click.echo(f"    model: {{preset: {output / 'model.yaml'}}}")
    click.echo(f"    checkpoint: {{start_from: {output}}}")

"""`llmscale checkpoint`: what checkpoints a run has, and what is in one. Reads no tensors but in `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llmscale.errors import CheckpointError, UsageError


@click.group(epilog="Example: llmscale checkpoint list runs/demo")
def command() -> None:
    """List, inspect and verify checkpoints."""


def _folder(run: str) -> Path:
    from llmscale.checkpoint.place import place_of

    path = place_of(run)
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


@command.command("list", epilog="Example: llmscale checkpoint list runs/demo --json")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_command(run: str, as_json: bool) -> None:
    """List the checkpoints of RUN, a run directory, oldest first."""
    from llmscale.checkpoint.format import Checkpoint
    from llmscale.checkpoint.retention import checkpoints

    folder = _folder(run)
    if not folder.is_dir():
        raise UsageError(f"{run}: no such folder; name a run directory, or where its checkpoints lie")
    rows: list[dict[str, Any]] = []
    for path in checkpoints(folder):
        try:
            found = Checkpoint(path)
            size = sum(about["bytes"] for about in found.manifest["files"].values())
            rows.append({"path": str(path), "step": found.step, "tokens": found.manifest["tokens"], "bytes": size})
        except CheckpointError as error:
            rows.append({"path": str(path), "broken": str(error)})
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        whole = (
            f"step {row['step']:>8}  {row['tokens']:>15,} tokens  {row['bytes'] / 2**20:>10.1f} MiB"
            if "step" in row
            else ""
        )
        click.echo(f"{row['path']}  {whole or 'BROKEN: ' + row['broken']}")
    if not rows:
        click.echo(f"no checkpoints in {folder}", err=True)


@command.command(epilog="Example: llmscale checkpoint inspect runs/demo/checkpoints/step_00000100")
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(checkpoint: str, as_json: bool) -> None:
    """Show what CHECKPOINT is: step, tokens, layout, versions, and its weights by global name."""
    from llmscale.checkpoint.retention import open_checkpoint

    found = open_checkpoint(checkpoint)
    about = {key: found.manifest[key] for key in ("step", "tokens", "layout", "versions", "states")}
    weights = {name: list(weight.shape) for name, weight in found.weights.items()}
    parameters = sum(weight.numel for weight in found.weights.values())
    if as_json:
        click.echo(json.dumps({"path": str(found.path), **about, "parameters": parameters, "weights": weights}))
        return
    click.echo(found.path)
    click.echo(f"parameters: {parameters:,}")
    for key, value in about.items():
        click.echo(f"{key}: {value}")
    for name, shape in weights.items():
        click.echo(f"  {name} {shape}")


@command.command(epilog="Example: llmscale checkpoint verify runs/demo/checkpoints/step_00000100")
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify(context: click.Context, checkpoint: str, as_json: bool) -> None:
    """Compare every byte of CHECKPOINT with its checksums; its numbers must be finite. Exit code 1 if it is broken."""
    from llmscale.checkpoint.format import Checkpoint, Damaged
    from llmscale.checkpoint.place import place_of
    from llmscale.checkpoint.retention import checkpoints

    named = place_of(checkpoint)
    path = named if (named / "manifest.json").exists() else None
    if path is None:
        found = checkpoints(_folder(checkpoint))
        if not found:
            raise UsageError(f"{checkpoint}: no checkpoint there; name a step_* folder or a run directory")
        path = found[-1]
    try:
        opened = Checkpoint(path)
        problems = list(opened.problems())
    except Damaged as error:
        problems = [str(error)]
    if as_json:
        click.echo(json.dumps({"path": str(path), "whole": not problems, "problems": problems}))
        context.exit(1 if problems else 0)
    if problems:
        raise CheckpointError("\n".join(problems))
    click.echo(f"{path}: whole, {len(opened.weights)} weights, states {', '.join(opened.states)}")

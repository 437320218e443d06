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


def _checkpoints(name: str) -> list[Path]:
    """What a name stands for. Raises UsageError where there is nothing of that name."""
    from llmscale.checkpoint.place import place_of
    from llmscale.checkpoint.retention import named

    found = named(name)
    if not found and not place_of(name).is_dir():
        raise UsageError(f"{name}: no such folder; name a run directory, or where its checkpoints lie")
    return found


@command.command("list", epilog="Example: llmscale checkpoint list runs/demo --json")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_command(run: str, as_json: bool) -> None:
    """List the checkpoints of RUN, a run directory, oldest first."""
    from llmscale.checkpoint.format import Checkpoint

    rows: list[dict[str, Any]] = []
    for path in _checkpoints(run):
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
        click.echo(f"no checkpoints in {run}", err=True)


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


@command.command(epilog="Example: llmscale checkpoint verify runs/demo")
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify(context: click.Context, checkpoint: str, as_json: bool) -> None:
    """Compare every byte of CHECKPOINT, or of all checkpoints of a run directory, with its checksums.

    Its numbers must be finite. Exit code 1 if any is broken.
    """
    from llmscale.checkpoint.format import Checkpoint, Damaged

    paths = _checkpoints(checkpoint)
    if not paths:
        raise UsageError(f"{checkpoint}: no checkpoint there; name a step_* folder or a run directory")
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            opened = Checkpoint(path)
            problems = list(opened.problems())
        except Damaged as error:
            problems = [str(error)]
        rows.append({"path": str(path), "whole": not problems, "problems": problems})
        if not problems and not as_json:
            click.echo(f"{path}: whole, {len(opened.weights)} weights, states {', '.join(opened.states)}")
    found = [problem for row in rows for problem in row["problems"]]
    if as_json:
        click.echo(json.dumps({"path": checkpoint, "whole": not found, "problems": found, "checkpoints": rows}))
        context.exit(1 if found else 0)
    if found:
        raise CheckpointError("\n".join(found))

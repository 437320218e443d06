"""`llmscale`: finds the command, runs it, and turns what the package raises into one line and an exit code.

    0    done
    1    a failure while running (LlmscaleError)
    2    the user asked for something that cannot be (UsageError, or click's own)
    130  interrupted from the keyboard

A command's module is imported when it is asked for, and imports what is heavy when it runs: `llmscale --help` takes
0.12 s where importing torch, DeepSpeed and Megatron-core takes 6. Anything else that is raised is a defect of llmscale:
it keeps its traceback.
"""

from __future__ import annotations

import difflib
import sys
from importlib import import_module, metadata
from typing import Any

import click

from llmscale.errors import LlmscaleError

COMMANDS = {
    name: f"llmscale.cli.{name}"
    for name in ("pretrain", "generate", "evaluate", "data", "checkpoint", "convert", "slurm", "doctor")
}
"""Command -> the module whose `command` it is, in the order of the help."""
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are imported by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = import_module(COMMANDS[cmd_name]).command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {name!r}; {fix}", ctx)
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"llmscale {metadata.version('llmscale')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: llmscale pretrain run.yaml training.steps=1000",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version and exit."
)
@click.option(
    "--local_rank", "--local-rank", type=int, hidden=True, expose_value=False, help="DeepSpeed's launcher gives it."
)
def group() -> None:
    """Pretrain large language models: Megatron-core layers under DeepSpeed ZeRO, from webdataset shards."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code. arguments: those of the process when None."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        # Not standalone: click would print its errors its own way and call an interrupt exit code 1.
        code: Any = group.main(arguments, prog_name="llmscale", standalone_mode=False)
    except LlmscaleError as error:
        if not error.quiet:
            for line in str(error).splitlines() or [type(error).__name__]:
                click.echo(f"error: {line}", err=True)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "llmscale"
        click.echo(f"error: {error.format_message().rstrip('.')} (see {command} --help)", err=True)
        return error.exit_code
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        return error.exit_code
    except click.Abort as abort:
        # click says Abort for an interrupt and for an EOFError alike; the latter is an error that must be seen.
        if isinstance(abort.__cause__, EOFError):
            raise abort.__cause__ from None
        if isinstance(abort.__cause__, KeyboardInterrupt) and str(abort.__cause__):
            click.echo(f"interrupted; {abort.__cause__}", err=True)
        return INTERRUPTED
    return code if isinstance(code, int) else 0

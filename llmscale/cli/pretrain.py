"""`llmscale pretrain`: one process of a run; torchrun, srun or DeepSpeed's launcher start one a device."""

from __future__ import annotations

from pathlib import Path

import click

from llmscale.distributed import stop
from llmscale.errors import LlmscaleError, ReplacedError
from llmscale.slurm.outcome import Outcome, tell


@click.command(
    epilog="Example: torchrun --nproc-per-node 8 -m llmscale pretrain run.yaml training.steps=1000 parallel.tensor=2"
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def command(config: Path, overrides: tuple[str, ...]) -> int:
    """Pretrain the model that the YAML file CONFIG describes.

    KEY=VALUE overrides a key of the file. Started without a launcher it runs in one process; a run that was stopped
    goes on from its newest whole checkpoint when it is started again. SIGUSR1 or SIGTERM makes it save after the step
    under way, and end with exit code 85.
    """
    stop.listen()
    from llmscale.config.load import load
    from llmscale.distributed.launch import Launch, quiet_imports
    from llmscale.distributed.rules import problems

    try:
        launch = Launch.from_environment()
    except LlmscaleError as error:
        tell(Outcome("failed", str(error), retry=False))
        raise
    try:
        loaded = load(config, overrides, launch.world_size, problems)
        launch.export()
        quiet_imports()
        from llmscale.training.run import prepare, pretrain

        ended = pretrain(prepare(loaded, config, launch.world_size, launch.local_world_size), launch)
    except LlmscaleError as error:
        if isinstance(error, ReplacedError):
            tell(Outcome("replaced", str(error)))
        elif not error.consequence:
            tell(Outcome("failed", str(error), retry=error.exit_code != 2))
        # Every rank finds the same: one of them says it.
        error.quiet = error.everywhere and launch.rank > 0
        raise
    except Exception as error:
        tell(Outcome("failed", f"{type(error).__name__}: {error}"))
        raise
    if ended.stopped:
        if (name := stop.received()) is not None:  # a rank that was not asked leaves it to the one that was
            tell(Outcome("stopped", name, ended.step))
        return stop.STOPPED
    tell(Outcome("done", "", ended.step))
    return 0

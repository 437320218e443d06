"""`llmscale pretrain`: one process of a run; torchrun, srun or DeepSpeed's launcher start one a device."""

from __future__ import annotations

from pathlib import Path

import click

from llmscale.errors import LlmscaleError


@click.command(
    epilog="Example: torchrun --nproc-per-node 8 -m llmscale pretrain run.yaml training.steps=1000 parallel.tensor=2"
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def command(config: Path, overrides: tuple[str, ...]) -> None:
    """Pretrain the model that the YAML file CONFIG describes.

    KEY=VALUE overrides a key of the file. Started without a launcher it runs in one process; a run that was stopped
    goes on from its newest whole checkpoint when it is started again.
    """
    from llmscale.config.load import load
    from llmscale.distributed.launch import Launch, quiet_imports
    from llmscale.distributed.layout import problems

    launch = Launch.from_environment()
    try:
        loaded = load(config, overrides, launch.world_size, problems)
        launch.export()
        quiet_imports()
        from llmscale.training.run import prepare, pretrain

        pretrain(prepare(loaded, config, launch.world_size, launch.local_world_size), launch)
    except LlmscaleError as error:
        # Every rank finds the same: one of them says it.
        error.quiet = error.everywhere and launch.rank > 0
        raise

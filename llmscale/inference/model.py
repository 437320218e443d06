"""A checkpoint of any layout as one model in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmscale.checkpoint.format import Checkpoint
from llmscale.config.schema import Parallel
from llmscale.distributed import cpu
from llmscale.distributed.groups import form_groups
from llmscale.distributed.launch import Launch, device_of, start, stop
from llmscale.distributed.layout import Layout
from llmscale.models.family import families
from llmscale.models.init import copy_part
from llmscale.models.stage import Stage, build_stages


@contextmanager
def open_model(checkpoint: Checkpoint) -> Iterator[tuple[Stage, torch.device]]:
    """The whole model on this process's device, ready to run forward, in the precision that it was trained in."""
    launch = Launch(0, 1, 0, 1, "127.0.0.1", 0, "single")
    device = device_of(launch)
    start(launch, device)
    try:
        cpu.redirect()
        config = checkpoint.config.model_copy(update={"parallel": Parallel()})
        with form_groups(Layout.of(config, 1, 1), config.run.seed) as groups:
            family = families()[config.model.family]
            (stage,) = build_stages(config.model, family, config.training, groups, config.run.seed)
            with torch.no_grad():
                for weight, parameter in stage.weights():
                    copy_part(parameter, checkpoint.whole(weight.name), weight, 0, 1)
            yield stage.eval(), device
    finally:
        stop()

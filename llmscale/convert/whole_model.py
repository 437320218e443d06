"""A whole model in one process, from whatever holds its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from llmscale.config.schema import Data, DataSource, Model, RunConfig, Training
from llmscale.distributed import cpu
from llmscale.distributed.groups import form_groups
from llmscale.distributed.launch import alone
from llmscale.distributed.layout import Layout
from llmscale.models.family import families
from llmscale.models.init import copy_part
from llmscale.models.stage import Stage, build_stages


@contextmanager
def open_model(
    model: Model, whole: Callable[[str], torch.Tensor], precision: Literal["bf16", "fp32"]
) -> Iterator[tuple[Stage, torch.device]]:
    """The model on this process's device, ready to run forward. whole: gives a weight by name, in its global shape."""
    with alone() as device:
        cpu.redirect()
        config = RunConfig(
            model=model,
            data=Data(train=(DataSource(path="none"),), sequence_length=model.max_position_embeddings),
            training=Training(steps=0, global_batch_size=1, precision=precision),
        )
        with form_groups(Layout.of(config, 1, 1), config.run.seed) as groups:
            (stage,) = build_stages(model, families()[model.family], config.training, groups, config.run.seed)
            with torch.no_grad():
                for weight, parameter in stage.weights():
                    copy_part(parameter, whole(weight.name), weight, 0, 1)
            yield stage.eval(), device

"""A whole model in one process, from whatever holds its weights; where memory is short, one layer at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from llmscale.config.schema import Data, DataSource, Model, RunConfig, Training
from llmscale.distributed import cpu
from llmscale.distributed.groups import form_groups
from llmscale.distributed.launch import alone
from llmscale.distributed.layout import Layout
from llmscale.distributed.memory import available_bytes
from llmscale.models.family import Weight, families
from llmscale.models.init import copy_part
from llmscale.models.stage import Stage, build_stages

ReadWeight = Callable[[str], torch.Tensor]
"""Gives a weight by name, in its global shape."""


@contextmanager
def open_model(
    model: Model, whole: ReadWeight, precision: Literal["bf16", "fp32"], most_bytes: int | None = None
) -> Iterator[tuple[Stage, torch.device]]:
    """The model on this process's device, ready to run forward.

    most_bytes: what it may take. A larger model has the weights of one layer at a time, each read when that layer is
    about to compute, beside its embedding and output layer. None: what the device has left, less an eighth.
    """
    with alone() as device:
        cpu.redirect()
        config = RunConfig(
            model=model,
            data=Data(train=(DataSource(path="none"),), sequence_length=model.max_position_embeddings),
            training=Training(steps=0, global_batch_size=1, precision=precision),
        )
        with form_groups(Layout.of(config, 1, 1), config.run.seed) as groups:
            (stage,) = build_stages(model, families()[model.family], config.training, groups, None)
            held = sum(parameter.nbytes for parameter in stage.parameters())
            if most_bytes is None:
                # Nothing of the CPU's was written to, and so is not held yet.
                most_bytes = available_bytes(device) * 7 // 8 + (held if device.type == "cuda" else 0)
            by_layer = held > most_bytes
            if by_layer:
                _one_layer_at_a_time(stage, whole)
            with torch.no_grad():
                for weight, parameter in stage.weights():
                    if weight.layer is None or not by_layer:
                        copy_part(parameter, whole(weight.name), weight, 0, 1)
            yield stage.eval(), device


def _one_layer_at_a_time(stage: Stage, whole: ReadWeight) -> None:
    """Take the layers' weights away, and have each brought back for the time that its layer computes."""
    found: dict[int, list[tuple[Weight, torch.nn.Parameter, torch.Size]]] = defaultdict(list)
    for weight, parameter in stage.weights():
        if weight.layer is not None:
            found[weight.layer].append((weight, parameter, parameter.shape))
            parameter.data = parameter.new_empty(0)
    for number, layer in enumerate(stage.decoder.layers):

        def bring(module: torch.nn.Module, *_: Any, parts: Any = found[number]) -> None:
            for weight, parameter, shape in parts:
                parameter.data = parameter.new_empty(shape)
                copy_part(parameter, whole(weight.name), weight, 0, 1)

        def take(module: torch.nn.Module, *_: Any, parts: Any = found[number]) -> None:
            for _, parameter, _ in parts:
                parameter.data = parameter.new_empty(0)

        layer.register_forward_pre_hook(bring)
        layer.register_forward_hook(take)

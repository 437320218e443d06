"""The process groups of a layout: Megatron-core's, as values that are passed, and as the mpu that DeepSpeed reads.

The only file that touches Megatron-core's global `parallel_state`. Its schedules and some layers still look groups up
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from llmscale.distributed.layout import Layout, Position


@dataclass(frozen=True)
class Groups:
    """The groups this rank is in, and where it stands in them.

    partition: the ranks over which DeepSpeed partitions; the data-parallel group, or under ZeRO-0 this rank alone.
    embedding: first and last stage, which both hold a tied embedding; None on the stages between.
    """

    layout: Layout
    position: Position
    collection: ProcessGroupCollection
    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    model: dist.ProcessGroup
    embedding: dist.ProcessGroup | None
    partition: dist.ProcessGroup

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this rank's pipeline."""
        return dist.get_global_rank(self.pipeline, self.layout.pipeline - 1)


@contextmanager
def form_groups(layout: Layout, seed: int) -> Iterator[Groups]:
    """Form all process groups of a layout, and seed Megatron's random-number tracker for dropout.

    The seed of dropout outside tensor-parallel regions differs per pipeline stage and data-parallel rank; inside them
    per tensor-parallel rank as well.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
    )
    position = layout.position(dist.get_rank())
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * position.pipeline + 10_000 * position.data)
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    alone = layout.zero_stage == 0 and layout.data > 1
    first_or_last = position.pipeline in (0, layout.pipeline - 1)
    try:
        yield Groups(
            layout=layout,
            position=position,
            collection=ProcessGroupCollection.use_mpu_process_groups(),
            world=cast(dist.ProcessGroup, dist.group.WORLD),
            tensor=parallel_state.get_tensor_model_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            data=data,
            model=parallel_state.get_model_parallel_group(),
            embedding=parallel_state.get_embedding_group() if first_or_last else None,
            partition=dist.new_group([dist.get_rank()], use_local_synchronization=True) if alone else data,
        )
    finally:
        parallel_state.destroy_model_parallel()
        tensor_parallel.random.get_cuda_rng_tracker().reset()


class Mpu:
    """The groups as DeepSpeed asks for them.

    The model-parallel group is tensor × pipeline, and a rank's place in it is unique: DeepSpeed takes it for one
    replica.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._groups.model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups.model)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.model

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._groups.partition)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups.partition)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.partition

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.position.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.layout.tensor

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tensor

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._groups.position.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.layout.pipeline

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.pipeline

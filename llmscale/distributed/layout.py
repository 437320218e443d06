"""Sizes of a parallel layout, and where each rank stands in it. No torch. What can be combined: `rules.py`."""

from __future__ import annotations

from dataclasses import dataclass

from llmscale.config.derive import stage_layers
from llmscale.config.schema import RunConfig, Training


@dataclass(frozen=True)
class Position:
    """Where a rank stands: its rank in each of its groups."""

    tensor: int
    pipeline: int
    data: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions. Ranks count tensor first, then data, then pipeline (Megatron's order)."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    sequence_parallel: bool
    layers: tuple[int, ...]
    """Layers of each virtual stage, in the order of the model."""
    zero_stage: int

    @classmethod
    def of(cls, config: RunConfig, world_size: int, zero_stage: int) -> Layout:
        """The layout of a config that `problems` found nothing wrong with."""
        parallel = config.parallel
        return cls(
            world_size=world_size,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            sequence_parallel=parallel.sequence_parallel,
            layers=parallel.stage_layers
            or stage_layers(config.model.num_layers, parallel.pipeline * parallel.virtual_pipeline),
            zero_stage=zero_stage,
        )

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tensor * self.pipeline)

    def position(self, rank: int) -> Position:
        """Where a rank stands."""
        return Position(
            tensor=rank % self.tensor,
            data=rank // self.tensor % self.data,
            pipeline=rank // (self.tensor * self.data),
        )

    def chunk_layers(self, pipeline_rank: int) -> tuple[range, ...]:
        """The layers (from 0) of each model chunk of a pipeline rank; chunk c is virtual stage c × pipeline + rank."""
        starts = [sum(self.layers[:stage]) for stage in range(len(self.layers))]
        stages = range(pipeline_rank, len(self.layers), self.pipeline)
        return tuple(range(starts[stage], starts[stage] + self.layers[stage]) for stage in stages)

    def micro_batches(self, training: Training) -> int:
        """Micro-batches of one step on each data-parallel rank."""
        return training.global_batch_size // (training.micro_batch_size * self.data)

    def __str__(self) -> str:
        parts = [f"tensor {self.tensor}" + (" with sequence parallelism" if self.sequence_parallel else "")]
        interleaved = f" × {self.virtual_pipeline} virtual" if self.virtual_pipeline > 1 else ""
        parts += [f"pipeline {self.pipeline}{interleaved}", f"data {self.data}"]
        return " · ".join(parts)

"""THE table of layouts: what the matrix runs against the reference.

Columns: tensor, sequence_parallel, pipeline, virtual_pipeline, data, ZeRO stage, family, tied embeddings.
At most 4 processes each. 5 layers do not divide evenly into the stages: the uneven case is the usual one here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    zero: int = 1
    family: str = "llama"
    tied: bool = False
    offload: bool = False
    recompute: str = "none"
    mask: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = [self.family + ("-tied" if self.tied else "")]
        parts += [f"tp{self.tensor}{'sp' if self.sequence_parallel else ''}", f"pp{self.pipeline}"]
        parts += [f"vpp{self.virtual_pipeline}"] if self.virtual_pipeline > 1 else []
        parts += [f"dp{self.data}", f"zero{self.zero}{'-offload' if self.offload else ''}"]
        parts += [self.recompute] if self.recompute != "none" else []
        parts += ["mask"] if self.mask else []
        return "-".join(parts)


# tensor, sequence_parallel, pipeline, virtual_pipeline, data
SHAPES = [
    (1, False, 1, 1, 1),
    (1, False, 1, 1, 2),
    (2, False, 1, 1, 1),
    (2, True, 1, 1, 2),
    (4, True, 1, 1, 1),
    (1, False, 2, 1, 2),
    (1, False, 2, 2, 1),
    (1, False, 2, 2, 2),
    (1, False, 4, 1, 1),
    (2, True, 2, 1, 1),
    (2, False, 2, 2, 1),
]
FP32 = [
    Case(*shape, zero=zero, family=family, tied=tied)
    for index, shape in enumerate(SHAPES)
    for zero in (0, 1, 2, 3)
    # Families and tying alternate over the shapes and stages, so that each shape and each stage sees both.
    for family, tied in [(("llama", False), ("gpt2", True), ("gpt2", False), ("llama", True))[(index + zero) % 4]]
] + [
    Case(2, True, 2, 2, 1, zero=1, family="gpt2", tied=True),
    Case(1, False, 4, 2, 1, zero=3, family="llama", tied=False),
    Case(2, True, 2, 1, 1, zero=2, family="gpt2", tied=True, recompute="full"),
    Case(2, False, 1, 1, 2, zero=3, family="llama", recompute="selective"),
    Case(1, False, 2, 1, 2, zero=1, family="gpt2", tied=True, offload=True),
    Case(2, True, 1, 1, 2, zero=2, family="llama", offload=True),
    Case(1, False, 2, 2, 2, zero=3, family="llama", offload=True),
    # Attention inside documents, of which a sequence holds several; micro-batches of two sequences.
    Case(2, True, 2, 1, 1, zero=1, family="gpt2", tied=True, mask=True),
    Case(2, True, 1, 1, 2, zero=2, family="llama", recompute="selective", mask=True),
    Case(2, False, 1, 1, 1, zero=3, family="gpt2", recompute="full", mask=True),
    Case(1, False, 2, 1, 2, zero=3, family="llama", recompute="full", mask=True),
    Case(1, False, 2, 2, 1, zero=2, family="gpt2", recompute="full", mask=True),
    Case(2, False, 2, 2, 1, zero=1, family="llama", tied=True, mask=True),
]
BF16 = [
    Case(1, False, 1, 1, 2, zero=0, family="gpt2", tied=True),
    Case(1, False, 1, 1, 1, zero=1),
    Case(1, False, 2, 1, 2, zero=1),
    Case(1, False, 2, 2, 1, zero=2),
    Case(1, False, 2, 1, 2, zero=2, family="gpt2"),
    Case(1, False, 1, 1, 2, zero=3),
    Case(1, False, 2, 2, 2, zero=3, family="gpt2"),
    Case(2, True, 1, 1, 2, zero=1),
    Case(2, False, 2, 1, 1, zero=2),
    Case(2, True, 2, 1, 1, zero=3, family="gpt2", tied=True),
    Case(2, True, 2, 1, 1, zero=2, mask=True),
]

"""Where documents lie follows from the tokens: what comes after an end-of-document id begins one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmscale.models.packing import Packing

END = 0
CPU = torch.device("cpu")


def test_positions_start_again_after_each_end_of_document() -> None:
    tokens = torch.tensor([[5, 6, END, 7, END, END, 8, 9], [1, 2, 3, 4, 5, 6, 7, END]])
    packing = Packing.of(tokens, END, CPU)
    assert packing.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert packing.lengths == (3, 2, 1, 2, 8)
    assert packing.boundaries.tolist() == [0, 3, 5, 6, 8, 16]
    assert packing.boundaries.dtype == torch.int32


def test_what_the_previous_sequence_left_open_begins_anew() -> None:
    """A document that a sequence cuts is two: the second part cannot see the first."""
    packing = Packing.of(torch.tensor([[1, 2, 3, 4], [5, END, 6, 7]]), END, CPU)
    assert packing.lengths == (4, 2, 2)
    assert packing.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4))
def test_documents_tile_the_micro_batch(rows: list[list[int]]) -> None:
    packing = Packing.of(torch.tensor(rows), END, CPU)
    assert sum(packing.lengths) == 6 * len(rows)
    assert packing.positions.flatten().tolist() == [place for length in packing.lengths for place in range(length)]
    assert packing.boundaries.diff().tolist() == list(packing.lengths)
    flat = [token for row in rows for token in row]
    for begin in packing.boundaries[1:-1].tolist():
        assert begin % 6 == 0 or flat[begin - 1] == END

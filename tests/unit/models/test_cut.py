"""Tensor parallelism cuts a weight into pieces that tile it: each element on one rank, or on all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.models.cut import local_shape, pieces
from llmscale.models.family import Cut, Weight

CUTS: list[Cut] = ["replicated", "rows", "gated_rows", "columns", "vocab"]


@st.composite
def cut_weights(draw: st.DrawFn) -> tuple[Weight, int]:
    """A weight and the size of the group that it is cut for."""
    cut, size = draw(st.sampled_from(CUTS)), draw(st.integers(1, 8))
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    if cut == "vocab":
        rows = draw(st.integers(2, 1500))
    elif cut in ("rows", "gated_rows"):
        rows *= size * (2 if cut == "gated_rows" else 1)
    elif cut == "columns":
        columns *= size
    one_dimension = cut in ("replicated", "rows", "gated_rows") and draw(st.booleans())
    return Weight("weight", (rows,) if one_dimension else (rows, columns), cut, "normal"), size


def cut_out(whole: np.ndarray, weight: Weight, rank: int, size: int) -> np.ndarray:
    """A rank's own tensor; -1 where it holds padding."""
    local = np.full(local_shape(weight, size), -1)
    for piece in pieces(weight, rank, size):
        before = (slice(None),) * piece.dim
        held = slice(piece.local_start, piece.local_start + piece.length)
        local[(*before, held)] = whole[(*before, slice(piece.whole_start, piece.whole_start + piece.length))]
    return local


@given(cut_weights())
def test_the_pieces_of_all_ranks_tile_the_whole(case: tuple[Weight, int]) -> None:
    weight, size = case
    whole = np.arange(weight.numel).reshape(weight.shape)
    held = [cut_out(whole, weight, rank, size) for rank in range(size)]
    if weight.cut == "replicated":
        assert all((local == whole).all() for local in held)
        return
    numbers = np.concatenate([local.ravel() for local in held])
    assert sorted(numbers[numbers >= 0]) == list(range(weight.numel))
    assert weight.cut == "vocab" or (numbers >= 0).all()


@given(cut_weights())
def test_ranks_side_by_side_are_the_whole_in_order(case: tuple[Weight, int]) -> None:
    weight, size = case
    if weight.cut in ("replicated", "gated_rows"):
        return
    whole = np.arange(weight.numel).reshape(weight.shape)
    joined = np.concatenate(
        [cut_out(whole, weight, rank, size) for rank in range(size)], 1 if weight.cut == "columns" else 0
    )
    assert (joined[: len(whole)] == whole).all()
    assert (joined[len(whole) :] == -1).all()


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_holds_its_part_of_the_gate_and_of_the_up_projection(rank: int) -> None:
    weight = Weight("fc1", (8, 3), "gated_rows", "normal")
    whole = np.arange(24).reshape(8, 3)
    gate, up = whole[:4], whole[4:]
    expected = np.concatenate([gate[2 * rank : 2 * rank + 2], up[2 * rank : 2 * rank + 2]])
    assert (cut_out(whole, weight, rank, 2) == expected).all()


def test_a_rank_of_padding_alone_holds_no_piece() -> None:
    weight = Weight("embedding", (100, 4), "vocab", "normal")
    assert [sum(piece.length for piece in pieces(weight, rank, 4)) for rank in range(4)] == [32, 32, 32, 4]
    assert pieces(Weight("embedding", (30, 4), "vocab", "normal"), 3, 4) == ()

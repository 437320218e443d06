"""Batches of one rank: all ranks together read each position once, whatever their number; stop, and go on."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.loader import Loader
from llmscale.data.stream import Stream
from llmscale.errors import DataError

from .conftest import WriteSplit

Sources = list[tuple[str, float]]


@pytest.fixture
def sources(write_split: WriteSplit) -> Sources:
    return [(str(write_split("a", [30] * 40)), 3.0), (str(write_split("b", [7] * 50, first=10_000)), 1.0)]


def rows(loader: Loader[np.ndarray], count: int) -> list[list[int]]:
    with loader:
        return [row for _ in range(count) for row in next(loader).tolist()]


def keep(array: np.ndarray) -> np.ndarray:
    return array


def test_tokens_and_labels_are_tensors_one_apart(sources: Sources) -> None:
    stream = Stream(sources, 16, seed=1)
    with Loader(stream, 4) as batches:
        tokens, labels = next(batches)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.shape == labels.shape == (4, 16)
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    assert np.array_equal(tokens.numpy(), Stream(sources, 16, seed=1).read(range(4))[:, :-1])


def test_sources_are_told_of_every_sequence_before_it_is_read_and_once(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmscale.data.loader.LOOK_AHEAD", 20)
    stream = Stream(sources, 16, seed=1)
    told: list[int] = []
    read = stream.read

    def checked(positions: np.ndarray) -> np.ndarray:
        assert set(positions) <= set(told)
        assert len(told) - told.index(positions[0]) <= 30
        return read(positions)

    monkeypatch.setattr(stream, "look_ahead", lambda positions: told.extend(positions))
    monkeypatch.setattr(stream, "read", checked)
    rows(Loader(stream, 4, rank=1, world_size=2, position=8, batches=37, collate=keep), 37)
    assert told == list(range(9, 9 + 37 * 4, 2))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_sequence_once_over_any_ranks_stops_and_batch_sizes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Stopped at any step, going on with other ranks and another batch size: nothing is repeated or skipped."""
    from llmscale.data.shards import SplitWriter

    folder = tmp_path_factory.mktemp("split")
    writer = SplitWriter(folder, "uint16", 0, 64, 3)
    writer.add(np.arange(1, 2001, dtype=np.uint16), True, True)
    writer.finish(b"{}", 3000)
    sources = [(str(folder), 1.0)]
    epoch = 2000 // 16
    seen: list[list[int]] = []
    state = None
    while len(seen) < epoch:
        ranks = data.draw(st.sampled_from([1, 2, 3, 4]), label="ranks")
        batch_size = ranks * data.draw(st.integers(1, 5), label="sequences of a rank")
        steps = data.draw(st.integers(1, 6), label="steps")
        states = []
        parts = []
        for rank in range(ranks):
            stream = Stream(sources, 16, seed=5)
            if state is not None:
                assert stream.resume(state) == []
            loader = Loader(
                stream, batch_size, rank=rank, world_size=ranks, position=len(seen), collate=keep,
                prefetch=data.draw(st.integers(1, 3), label="prefetch"),
            )  # fmt: skip
            parts.append(rows(loader, steps))
            states.append(loader.state())
        assert all(one == states[0] for one in states)
        state = states[0]
        seen += [row for part in parts for row in part]
        assert state["position"] == len(seen)
    # The last batch may reach into the second epoch; a batch is a set, so compare the whole of what was read.
    wanted = Stream(sources, 16, seed=5).read(range(len(seen))).tolist()
    assert sorted(seen) == sorted(wanted)


def test_a_number_of_batches_ends_and_so_does_the_thread(sources: Sources) -> None:
    before = threading.active_count()
    with Loader(Stream(sources, 16, seed=1), 4, batches=3, collate=keep) as loader:
        assert len(list(loader)) == 3
        assert loader.position == 12
    assert threading.active_count() == before


def test_a_batch_that_does_not_divide_is_refused(sources: Sources) -> None:
    with pytest.raises(ValueError, match="5 does not divide over 2 ranks"):
        Loader(Stream(sources, 16, seed=1), 5, world_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5, "world_size": 4}, "rank 5 of 4: ranks count from 0 to 3"),
        ({"rank": -1, "world_size": 4}, "rank -1 of 4"),
        ({"world_size": 0}, "rank 0 of 0"),
        ({"position": -8}, "position -8: give the number"),
    ],
)
def test_a_rank_or_a_position_that_there_is_none_of_is_refused(
    options: dict[str, int], message: str, sources: Sources
) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(Stream(sources, 16, seed=1), 4, **options)
    with pytest.raises(ValueError, match="batch_size 0"):
        Loader(Stream(sources, 16, seed=1), 0)


def test_a_loader_of_a_resumed_stream_goes_on_where_the_state_was_taken(sources: Sources) -> None:
    with Loader(Stream(sources, 16, seed=1), 4, collate=keep) as loader:
        for _ in range(3):
            next(loader)
        state = loader.state()
        wanted = next(loader)
    stream = Stream(sources, 16, seed=1)
    stream.resume(state)
    with Loader(stream, 4, collate=keep) as again:
        assert np.array_equal(next(again), wanted)
        assert again.position == 16


def test_a_broken_shard_reaches_the_reader(sources: Sources) -> None:
    shard = Path(sources[0][0]) / "shard-00000.tar"
    stream = Stream(sources, 16, seed=1)
    shard.unlink()
    with Loader(stream, 8) as batches, pytest.raises(DataError, match=r"shard-00000\.tar"):
        for _ in range(100):
            next(batches)

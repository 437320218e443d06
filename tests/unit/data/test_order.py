from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.order import permute

seeds = st.integers(0, 2**63 - 1)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 5000), seed=seeds, epoch=st.integers(0, 2**40))
def test_every_sequence_of_an_epoch_comes_exactly_once(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 2**62), seed=seeds, epoch=st.integers(0, 2**40), data=st.data())
def test_any_size_maps_into_itself_without_collisions(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    found = permute(np.array(indices), size, seed, epoch)
    assert found.min() >= 0
    assert found.max() < size
    assert len(set(found.tolist())) == len(indices)


@given(size=st.integers(1, 10**6), seed=seeds, data=st.data())
@settings(max_examples=50, deadline=None)
def test_an_index_does_not_depend_on_what_is_asked_beside_it(size: int, seed: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(indices, size, seed, 3)
    alone = [permute(indices[i : i + 1], size, seed, 3)[0] for i in range(len(indices))]
    assert together.tolist() == alone


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    size = 10_000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    for one, other in itertools.combinations([np.arange(size), *orders], 2):
        assert np.sum(one == other) < 12  # 1 is expected of unrelated orders
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_all_orders_of_four_sequences_are_equally_frequent() -> None:
    counts = Counter(tuple(permute(np.arange(4), 4, 7, epoch).tolist()) for epoch in range(12_000))
    expected = 12_000 / 24
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(4)))
    assert chi_square < 49.7  # 1 in 1,000 for 23 degrees of freedom


def test_the_order_is_the_one_that_checkpoints_rely_on() -> None:
    """A saved position means something only while this never changes."""
    assert permute(np.arange(10), 10, 1234, 0).tolist() == [9, 0, 3, 4, 1, 8, 7, 5, 6, 2]
    assert permute(np.arange(3), 244_140_625, 1234, 2).tolist() == [130079605, 16142711, 118405913]

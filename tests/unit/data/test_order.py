from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.order import Order, permute

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


orders = st.builds(Order, st.integers(1, 3000), st.integers(1, 100), st.integers(1, 60), seeds)


@settings(max_examples=300, deadline=None)
@given(order=orders, epoch=st.integers(0, 2**40))
def test_an_epoch_of_blocks_and_windows_holds_every_sequence_once(order: Order, epoch: int) -> None:
    found = order.sequences(np.arange(order.size), epoch)
    assert np.array_equal(np.sort(found), np.arange(order.size))


@settings(max_examples=200, deadline=None)
@given(order=orders, epoch=st.integers(0, 2**40), data=st.data())
def test_a_window_reads_its_blocks_and_no_others(order: Order, epoch: int, data: st.DataObject) -> None:
    first, end = order.window_of(data.draw(st.integers(0, order.size - 1)))
    found = order.sequences(np.arange(first, end), epoch)
    whole = found[found < order.size // order.block * order.block]
    blocks = np.unique(whole // order.block)
    assert len(blocks) <= order.window
    assert len(whole) == len(blocks) * order.block
    assert end - first <= order.window * order.block + order.block - 1
    if len(whole) < len(found):  # what fills no block
        assert end == order.size


@settings(max_examples=40, deadline=None)
@given(
    order=st.builds(Order, st.integers(1, 2**50), st.integers(1, 10**6), st.integers(1, 10**6), seeds), data=st.data()
)
def test_a_place_does_not_depend_on_what_is_asked_beside_it_in_large_orders(order: Order, data: st.DataObject) -> None:
    near = data.draw(st.integers(0, order.size - 1))
    places = data.draw(
        st.lists(
            st.integers(0, order.size - 1) | st.integers(near, min(order.size - 1, near + 5000)),
            min_size=1,
            max_size=20,
        )
    )
    together = order.sequences(np.array(places), 3)
    assert together.min() >= 0
    assert together.max() < order.size
    assert together.tolist() == [int(order.sequences(np.array([place]), 3)[0]) for place in places]
    assert len(set(together.tolist())) == len(set(places))


def test_windows_epochs_and_seeds_give_unrelated_orders() -> None:
    def inside(seed: int, epoch: int, window: int) -> np.ndarray:
        """How a window reads the sequences of its blocks: their ranks."""
        found = Order(100_000, 50, 20, seed).sequences(np.arange(window * 1000, (window + 1) * 1000), epoch)
        return np.argsort(np.argsort(found))

    ranks = [inside(1, 0, 0), inside(1, 0, 1), inside(1, 1, 0), inside(2, 0, 0), np.arange(1000)]
    for one, other in itertools.combinations(ranks, 2):
        assert np.sum(one == other) < 12  # 1 is expected of unrelated orders
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.12


def test_sequences_of_a_window_are_shuffled_completely() -> None:
    """All orders of two blocks of two sequences, and what fills no block, come equally often."""
    counts = Counter(tuple(Order(5, 2, 2, 7).sequences(np.arange(5), epoch).tolist()) for epoch in range(6_000))
    expected = 6_000 / 120
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(5)))
    assert chi_square < 172  # 1 in 1,000 for 119 degrees of freedom


def test_the_order_of_blocks_is_the_one_that_checkpoints_rely_on() -> None:
    assert Order(23, 3, 2, 1234).sequences(np.arange(23), 0).tolist() == [
        0,
        5,
        1,
        2,
        4,
        3,
        9,
        13,
        11,
        10,
        12,
        14,
        6,
        7,
        18,
        19,
        20,
        8,
        17,
        22,
        15,
        16,
        21,
    ]
    assert Order(244_140_625, 64, 4096, 1234).sequences(np.arange(3), 2).tolist() == [220944554, 132380378, 139302710]

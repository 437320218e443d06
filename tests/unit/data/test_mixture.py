from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.mixture import Mixture

weights = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(weights=weights, start=st.integers(0, 2**50))
def test_each_source_counts_its_own_sequences_without_gaps(weights: list[float], start: int) -> None:
    mixture = Mixture(weights)
    sources, ordinals = mixture.locate(np.arange(start, start + 500))
    before, after = mixture.counts(start), mixture.counts(start + 500)
    assert sum(before) == start
    for source in range(len(weights)):
        assert ordinals[sources == source].tolist() == list(range(before[source], after[source]))


@settings(max_examples=100, deadline=None)
@given(weights=weights, start=st.integers(0, 10**12))
def test_realised_weights_are_within_a_tenth_of_a_percent_over_10_000_sequences(
    weights: list[float], start: int
) -> None:
    sources, _ = Mixture(weights).locate(np.arange(start, start + 10_000))
    realised = np.bincount(sources, minlength=len(weights)) / 10_000
    assert np.abs(realised - np.array(weights) / sum(weights)).max() <= 0.001


@settings(max_examples=50, deadline=None)
@given(weights=st.one_of(weights, st.lists(st.floats(1e-6, 1e6), min_size=60, max_size=300)))
def test_every_stretch_from_the_start_holds_the_mix(weights: list[float]) -> None:
    sources, _ = Mixture(weights).locate(np.arange(2000))
    counts = np.cumsum(np.eye(len(weights))[sources], axis=0)
    wanted = np.outer(np.arange(1, 2001), np.array(weights) / sum(weights))
    assert np.abs(counts - wanted).max() <= math.ceil(math.log2(len(weights))) / 2 + 1e-4


@settings(max_examples=50, deadline=None)
@given(weights=weights, positions=st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_a_position_does_not_depend_on_what_is_asked_beside_it(weights: list[float], positions: list[int]) -> None:
    mixture = Mixture(weights)
    together = np.stack(mixture.locate(np.array(positions)), axis=1).tolist()
    assert together == [[int(part[0]) for part in mixture.locate(np.array([position]))] for position in positions]


def test_only_the_ratios_of_weights_matter() -> None:
    positions = np.arange(3000)
    one, other = Mixture([3, 1, 4]).locate(positions), Mixture([0.375, 0.125, 0.5]).locate(positions)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_tiny_weight_still_gets_its_turn() -> None:
    assert Mixture([1.0, 1e-12]).counts(2**40)[1] > 0

"""Order as a pure function: bijections, exact proportions, every sample once an epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigatrain.data.mixture import Mixture, permute, permute_many, round_keys, slot_counts
from gigatrain.errors import DataError


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 500), key=st.integers(0, 2**63))
def test_permutation_is_a_bijection_and_both_versions_agree(length: int, key: int) -> None:
    keys = round_keys(key)
    images = [permute(index, length, keys) for index in range(length)]
    assert sorted(images) == list(range(length))
    assert permute_many(np.arange(length), length, keys).tolist() == images


@given(length=st.integers(1, 2**48), index=st.integers(0, 2**48), key=st.integers(0, 2**63))
def test_versions_agree_on_long_ranges(length: int, index: int, key: int) -> None:
    index %= length
    image = permute(index, length, round_keys(key))
    assert 0 <= image < length
    assert permute_many(np.array([index]), length, round_keys(key)).tolist() == [image]


def test_permutation_is_well_mixed() -> None:
    """Images of 0..999 in 1,000 look uniform, neighbours do not stay neighbours, and another key gives another order."""
    first, second = (permute_many(np.arange(1000), 1000, round_keys(seed)) for seed in (1, 2))
    assert (first == second).mean() < 0.01
    assert (np.abs(np.diff(first)) == 1).mean() < 0.01
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.1  # sigma of a random permutation is 0.032
    # Where index 0 of 10 goes over 5,000 keys: chi squared with 9 degrees of freedom is below 33.7 in 9,999 of 10,000 cases.
    hits = np.bincount([permute(0, 10, round_keys("chi", key)) for key in range(5000)], minlength=10)
    assert ((hits - 500) ** 2 / 500).sum() < 33.7


def test_outside_the_range_is_an_error() -> None:
    with pytest.raises(IndexError):
        permute(5, 5, round_keys(0))
    with pytest.raises(IndexError):
        permute_many(np.array([-1]), 5, round_keys(0))


def test_order_is_pinned() -> None:
    """A change of these numbers silently changes what every running experiment reads next."""
    assert [permute(index, 10, round_keys("pin")) for index in range(10)] == [8, 2, 9, 7, 3, 4, 6, 5, 0, 1]
    assert Mixture([5, 7], [1.0, 2.0], 3).at(1_000_000) == (1, 95238, 2)


def test_slots_hold_the_weights_exactly() -> None:
    assert slot_counts([1.0, 1.0]) == [1, 1]
    assert slot_counts([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert slot_counts([3.0]) == [1]
    counts = slot_counts([0.123456789, 0.876543211])
    assert sum(counts) == 65_536
    assert abs(counts[0] / 65_536 - 0.123456789) < 1 / 65_536
    with pytest.raises(DataError, match=r"source 1 has weight 1e-09.*least is 1 / 65,536"):
        slot_counts([1.0, 1e-9])


@pytest.mark.parametrize("weights", [[1.0, 1e-300], [1e300, 1e-300], [1.0, 5e-324], [1.0] * 66_000])
def test_a_source_without_a_slot_is_refused(weights: list[float]) -> None:
    """Also of more sources than slots, in a second: no share sums all the weights again."""
    with pytest.raises(
        DataError, match=r"source \d+ has weight .*, a share of .*, and the least is 1 / 65,536; raise it, or drop the source"
    ):
        slot_counts(weights)


def test_extreme_weights_that_have_slots() -> None:
    assert slot_counts([1e-300, 3e-300]) == [1, 3]
    assert slot_counts([1.7e308] * 3) == [1, 1, 1]
    for weight in (float("inf"), float("nan"), 0.0):
        with pytest.raises(DataError, match=r"source 1 has weight .*, and a weight is a positive, finite number"):
            slot_counts([1.0, weight])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_each_sample_once_an_epoch_of_its_source(sizes: list[int], seed: int, data: st.DataObject) -> None:
    weights = [float(data.draw(st.integers(1, 5))) for _ in sizes]
    mixture = Mixture(sizes, weights, seed)
    drawn: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for position in range(300):
        source, epoch, sample = mixture.at(position)
        drawn[source].append((epoch, sample))
    for size, mine in zip(sizes, drawn, strict=True):
        for start in range(0, len(mine), size):
            turn = mine[start : start + size]
            assert {epoch for epoch, _ in turn} == {start // size}
            assert len({sample for _, sample in turn}) == len(turn)
        assert all(0 <= sample < size for _, sample in mine)


@given(start=st.integers(0, 10_000), length=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_many_is_at(start: int, length: int) -> None:
    mixture = Mixture([11, 300, 5], [1.0, 5.0, 2.0], 7)
    assert mixture.many(range(start, start + length)) == [mixture.at(position) for position in range(start, start + length)]


def test_proportions_are_exact_in_every_cycle() -> None:
    mixture = Mixture([10, 10, 10], [0.7, 0.2, 0.1], 0)
    assert mixture.cycle == 70
    for cycle in range(3):
        counts = Counter(mixture.at(cycle * 70 + slot)[0] for slot in range(70))
        assert counts == {0: 49, 1: 14, 2: 7}


def test_epochs_and_seeds_differ_in_order() -> None:
    mixture = Mixture([200], [1.0], 0)
    first, second = ([mixture.at(200 * epoch + index)[2] for index in range(200)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(200))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    assert [Mixture([200], [1.0], 1).at(index)[2] for index in range(200)] != first


def test_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="source 1 has 0 samples"):
        Mixture([3, 0], [1.0, 1.0], 0)

"""How often to save: the two formulas against their source, the exact law beside them, and the bounds."""

import math

import pytest

from gigatrain.planning.estimate.failures import KINDS, Failures
from gigatrain.planning.estimate.saving import Measured, chosen, daly_s, young_s


def failing(every_s, ranks=1):
    return Failures("a test", 1 / every_s / ranks, math.inf, KINDS, planned_per_day=0.0)


def test_the_formulas_are_the_published_ones():
    assert young_s(5.0, 1000.0) == pytest.approx(100.0)
    # Daly 2006, eq. 37, at C = 5, M = 1000: 100 (1 + 0.05 / 3 + 0.0025 / 9) - 5
    assert daly_s(5.0, 1000.0) == pytest.approx(100 * (1 + 0.05 / 3 + 0.0025 / 9) - 5)
    assert daly_s(3000.0, 1000.0) == 1000.0  # a save that takes twice the mean time between failures


def searched(cost_s, mtbf_s):
    """The minimum of Daly's exact cost, M exp(R / M) (exp((T + C) / M) - 1) / T, by looking everywhere."""
    return min(
        (math.expm1((work + cost_s) / mtbf_s) / work, work) for work in (10 * 1.01**i for i in range(800) if 1.01**i < 0.5 * mtbf_s)
    )[1]


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(2.0, 3600.0), (30.0, 7200.0), (60.0, 1800.0)])
def test_one_tier_is_dalys_optimum_by_brute_force(cost_s, mtbf_s):
    found = chosen(8, 8, 1.0, Measured(0.0, 1.0, far_stalled_s=cost_s), most_share=0.9, days=30, failures=failing(mtbf_s, 8))
    best = searched(cost_s, mtbf_s)
    assert found.far == pytest.approx(best, rel=0.15)  # of a flat optimum; hazards that nest do the rest
    assert found.daly_s == pytest.approx(best, rel=0.03)
    assert found.mtbf_s == pytest.approx(mtbf_s)


def test_bounds_are_named():
    rare = chosen(1, 1, 2.0, Measured(0.0, 1.0, far_stalled_s=1.0), most_share=0.1, days=30, failures=failing(1e9))
    assert (rare.far, rare.bound) == (1800, "at least one an hour")
    often = chosen(8, 8, 1.0, Measured(0.0, 1.0, far_stalled_s=60.0), most_share=0.1, days=30, failures=failing(600.0, 8))
    assert (often.far, often.bound) == (540, "saving takes 10 % at most")


def test_a_near_tier_makes_far_saves_rare_and_what_is_given_is_kept():
    both = Measured(0.0, 1.0, near=True, far_stalled_s=30.0, near_stalled_s=0.05, near_beside_s=1.0)
    alone = Measured(0.0, 1.0, far_stalled_s=30.0)
    failures = failing(1800.0, 8192)
    near, far = (chosen(8192, 8, 5.0, one, most_share=0.5, days=30, failures=failures) for one in (both, alone))
    assert near.near is not None
    assert near.near < far.far < near.far
    given = Measured(0.0, 1.0, near=True, far_interval_s=500.0, near_interval_s=50.0, far_stalled_s=30.0, near_stalled_s=0.05)
    found = chosen(8192, 8, 5.0, given, most_share=0.01, days=30, failures=failures)
    assert (found.far, found.near) == (100, 10)

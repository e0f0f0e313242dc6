"""The rate is a function of the step: values at the ends and in between, by hand."""

import math

import pytest

from gigatrain.config import Schedule
from gigatrain.optim.schedule import rate


def test_warm_up_is_linear_and_the_first_update_moves():
    schedule = Schedule(kind="constant", warmup=4)
    assert [rate(schedule, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_update_is_at_the_floor(kind):
    schedule = Schedule(kind=kind, warmup=3, floor=0.125, decay=0.25)
    assert rate(schedule, 99, 100) == pytest.approx(0.125)
    assert rate(schedule, 3, 100) == 1.0


def test_cosine_is_half_way_in_the_middle():
    schedule = Schedule(kind="cosine", warmup=0, floor=0.0)
    assert rate(schedule, 50, 101) == pytest.approx(0.5)
    assert rate(schedule, 25, 101) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_holds_then_falls_linearly():
    schedule = Schedule(kind="wsd", warmup=0, floor=0.0, decay=0.5)
    assert [rate(schedule, step, 10) for step in range(10)] == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_a_run_of_one_step_has_a_rate():
    for kind in ("cosine", "linear", "wsd", "constant"):
        assert 0 < rate(Schedule(kind=kind), 0, 1) <= 1

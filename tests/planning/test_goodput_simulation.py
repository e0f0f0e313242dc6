"""A run told fault by fault: small ones by hand, drawn ones against the closed form."""

import math

import pytest
from programs import program

from gigatrain.errors import PlanError
from gigatrain.planning.estimate.goodput import expected
from gigatrain.planning.estimate.goodput_simulation import Fault, Saves, poisson, replay, simulate

ONE = Saves(far_s=100, far_stall_s=10)  # marks at 0, 110, 220, ...
TWO = Saves(far_s=100, far_stall_s=5, near_s=20, near_stall_s=1)  # near marks every 21, far ones every 110


@pytest.fixture(scope="module")
def bench():
    return program("benchmarks/goodput.py")


def seconds(faults, saves=ONE, wall_s=500.0, **more):
    """What 500 seconds went to, whole."""
    found = replay(faults, wall_s, saves, **more)
    assert found.share + sum(found.lost.values()) == pytest.approx(1)
    return {"useful": round(found.useful_s, 6)} | {name: round(value * wall_s, 6) for name, value in found.lost.items()}


def test_without_a_fault_only_saves_cost():
    assert seconds([]) == {"useful": 460, "checkpoint": 40}


def test_a_fault_goes_back_to_the_last_save():
    # at 250 it has come to 220 + 30; it goes on at 270 from 220, and ends at 450 = 4 x 110 + 10
    assert seconds([Fault(250, 5, 15)]) == {"useful": 410, "redone": 30, "detection": 5, "restart": 15, "checkpoint": 40}


def test_a_fault_in_a_stall_loses_what_is_being_saved():
    assert seconds([Fault(105, 0, 0)], wall_s=205.0) == {"useful": 100, "redone": 105}


@pytest.mark.parametrize(("at_s", "redone"), [(250, 140), (265, 45)])
def test_a_save_beside_training_counts_once_it_is_written(at_s, redone):
    late = Saves(far_s=100, far_stall_s=10, far_lag_s=40)
    assert seconds([Fault(at_s, 5, 15)], late)["redone"] == redone


@pytest.mark.parametrize(("lands", "redone"), [(0, 0), (1, 9), (2, 30)])
def test_where_a_fault_lands(lands, redone):
    assert seconds([Fault(250, 5, 15, lands)], TWO).get("redone", 0) == redone


def test_a_copy_that_is_still_under_way_to_its_peer_is_none():
    late = Saves(far_s=100, far_stall_s=5, near_s=20, near_stall_s=1, near_lag_s=12)
    assert seconds([Fault(250, 5, 15, 1)], late)["redone"] == 30  # the copy of 241 has not arrived, that of 220 has


def test_a_fault_while_it_restarts():
    found = seconds([Fault(250, 5, 15), Fault(260, 5, 15)])
    assert (found["detection"], found["restart"], found["redone"]) == (10, 20, 30)


def test_a_corruption_is_found_later_and_takes_back_what_was_saved_since():
    found = seconds([Fault(150, 0, 20, lag_s=200)])
    assert (found["corruption"], found["restart"], found["useful"]) == (240, 20, 220)
    # a crash before the next save loads what was good, and the corruption with it
    found = seconds([Fault(150, 0, 20, lag_s=200), Fault(180, 0, 10)])
    assert (found.get("corruption"), found["redone"]) == (None, 70)


def test_a_run_without_a_spare_waits_for_a_repair():
    faults = [Fault(250, 5, 15, nodes=1), Fault(300, 5, 15, nodes=1)]  # the second: nothing runs
    found = seconds(faults, spares=0, repair=lambda: 100.0)
    assert (found["wait"], found["restart"], found["detection"]) == (95, 15, 5)
    assert "wait" not in seconds(faults, spares=2, repair=lambda: 100.0)
    assert "wait" not in seconds(faults)


def test_a_run_that_shrinks_goes_on_with_fewer_replicas():
    found = replay([Fault(250, 5, 15, nodes=1)], 500, ONE, spares=0, repair=lambda: 100.0, replicas=4, nodes_per_replica=2, shrink=True)
    assert found.lost["reduced"] == pytest.approx(found.useful_s / 500 * (350 - 270) / 4 / 480)


def test_a_replica_that_is_lost_does_not_stop_the_others():
    lost = [Fault(250, 0, 20, lands=0, rebuild_s=60, replica=1), Fault(300, 0, 20, lands=0, rebuild_s=60, replica=1)]  # it is out already
    found = replay(lost, 500, ONE, replicas=4)
    assert found.stops == 1
    assert found.useful_s == 440  # 480 s, without 40 s of saves
    assert found.lost["reduced"] == pytest.approx(440 / 500 * 60 / 4 / 480)


def test_refuses_what_cannot_be_told():
    with pytest.raises(PlanError, match="sort them"):
        replay([Fault(20, 1, 1), Fault(10, 1, 1)], 100, ONE)
    with pytest.raises(PlanError, match="give both above 0"):
        replay([], 0, ONE)


def test_a_measured_fault_run_is_what_the_formula_says_of_its_durations():
    detect, restart = (0.8, 1.2, 1.6), (5.0, 6.5, 8.0)
    wall, mtbf, saves = 60_000.0, 30.0, Saves(far_s=10, far_stall_s=0.4)
    shares = [replay(poisson(mtbf, wall, detect, restart, seed), wall, saves).share for seed in range(4)]
    whole = sum(math.exp(-(d + r) / mtbf) for d in detect for r in restart) / 9
    assert sum(shares) / 4 == pytest.approx(10 * whole / (mtbf * math.expm1(10.4 / mtbf)), abs=0.005)


def test_the_closed_form_and_the_count_agree(bench):
    off = {}
    for name, case in bench.grid().items():
        found = expected(case)
        counted = simulate(case, found, seed=2, stops=4000 if found.share > 0.75 else 16_000)  # where more is lost, more is left to chance
        assert counted.share + sum(counted.lost.values()) == pytest.approx(1)
        off[name] = 100 * (found.share - counted.share)
    assert {name: value for name, value in off.items() if abs(value) > 0.5} == {}
    assert simulate(case, found, seed=2, stops=500) == simulate(case, found, seed=2, stops=500)

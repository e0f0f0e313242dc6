"""A budget is kept, a ramp is kept, a schedule is followed and what it cost is said: on a plant with lag, noise, saves and failures, by seed."""

import csv
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plant import Plant

from gigatrain.config import Power
from gigatrain.planning.watts import Watts
from gigatrain.power.control import Governor, expected, stagger
from gigatrain.power.line import LOW
from gigatrain.power.pace import Orders, Pace
from gigatrain.power.reading import Seen
from gigatrain.power.schedule import Schedule
from gigatrain.site import Figure

TRACES = sorted((Path(__file__).parent / "traces").glob("*.csv"))
BEGAN_S = 1_790_000_000.0


def figure(value):
    return Figure(value=value, basis="declared", source="a test")


KNOWN = Watts(
    facility_watts=figure(11_000.0),
    accelerators=800,
    per_node=8,
    device_watts=figure(700.0),
    pue=figure(1.1),
    price_eur_mwh=figure(50.0),
    carbon_g_kwh=figure(300.0),
)


def never(*_):
    raise AssertionError("nothing was to be done")


def schedule(*rows):
    return Schedule(tuple((BEGAN_S + at, megawatts, price, None) for at, megawatts, price in rows), False, "s.csv")


def top(plant, after=180.0, before=float("inf")):
    return max(watts for second, watts in plant.means(after) if second < before - 10)


def steepest(plant, after=0.0):
    """The greatest change of a 10-s mean within a minute."""
    means = dict(plant.means())
    return max(abs(means[at + 60] - means[at]) for at in means if at + 60 in means and at >= after)


@pytest.mark.parametrize(
    ("given", "budget", "least"),
    [
        ({}, 700e3, 0.88),
        ({"busy_s": 0.05, "every": 1}, 700e3, 0.92),  # windows far shorter than what there is to learn from
        ({"busy_s": 2.0, "every": 5}, 700e3, 0.8),  # whole steps in ten seconds
        ({"busy_s": 4.0, "every": 5}, 700e3, 0.8),
        ({}, 500e3, 0.6),  # a sixth above rest
        ({}, 1200e3, 0.98),  # ample
        ({}, 980e3, 0.9),  # just under full power
        ({"noise": 0.0}, 997e3, 0.9),
        ({"noise": 0.05, "seed": 3}, 700e3, 0.75),
        ({"save_every": 200}, 700e3, 0.8),  # saves are 9 % of the time
        ({"fails_at": (300.0, 700.0)}, 700e3, 0.75),  # standing still 10 %
        ({"drift": 0.1}, 700e3, 0.8),
    ],
)
def test_ten_seconds_stay_under_a_budget_and_little_is_left_unused(given, budget, least):
    plant = Plant(**given)
    governor = plant.run(Power(megawatts=budget / 1e6), Watts(), 1500)
    assert top(plant) <= budget
    late = [watts for _, watts in plant.means(300.0)]
    used = (sum(late) / len(late) - plant.rest) / (min(budget, plant.full) - plant.rest)  # of the steps that the budget has room for
    assert least <= used <= 1.02
    assert governor.cost()["over_budget_s"] <= 60


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rest=st.floats(0.15, 0.75),
    room=st.floats(0.25, 1.1),
    busy_s=st.floats(0.04, 2.0),
    window_s=st.floats(1.0, 40.0),
    noise=st.floats(0.0, 0.02),
    lag_s=st.floats(0.1, 2.0),
    seed=st.integers(0, 99),
)
def test_any_machine_settles_under_its_budget_and_stays_there(rest, room, busy_s, window_s, noise, lag_s, seed):
    plant = Plant(rest=rest * 1e6, full=1e6, busy_s=busy_s, every=max(1, round(window_s / busy_s)), noise=noise, lag_s=lag_s, seed=seed)
    budget = (rest + room * (1 - rest)) * 1e6
    last = 40 * max(10.0, plant.every * busy_s)
    plant.run(Power(megawatts=budget / 1e6), Watts(), last)
    assert top(plant, last / 4) <= 1.02 * budget  # the least that it dares to learn by
    late = [orders.share for at, orders in plant.orders if at > last / 2]
    down = [max(0.0, before - after) for before, after in pairwise(late)]
    assert sum(down) <= 0.35  # up as it learns, but it neither oscillates nor drifts


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_a_recorded_run_stays_under_a_budget(path):
    with path.open(encoding="utf-8") as file:
        rows = [[float(cell) for cell in row] for row in csv.reader(line for line in file if line[0].isdecimal())]
    seconds = [next(watts for time_s, watts in reversed(rows) if time_s <= second) for second in range(int(rows[-1][0]))]
    mean = sum(seconds) / len(seconds)
    plant = Plant(noise=0.0, series=tuple(watts / mean for watts in seconds))
    plant.run(Power(megawatts=0.75), Watts(), 1500)
    above = [
        watts for _, watts in plant.means(300) if watts > 750e3
    ]  # of 1,200 s: when it dares a step to learn, and a validation's dip ends
    assert len(above) <= 30
    assert max(above, default=0.0) <= 1.03 * 750e3


def test_a_step_longer_than_ten_seconds_of_budget_is_kept_over_its_period_and_that_is_said():
    plant = Plant(busy_s=15.0, every=4)
    plant.run(Power(megawatts=0.7), Watts(), 2400)
    means = [watts for _, watts in plant.means(600, span=300)]
    assert max(means) <= 700e3
    assert "not over 10 s: one step is busy for 15 s" in plant.orders[-1][1].why


def test_a_budget_below_what_is_drawn_at_rest_ends_the_run_or_waits_for_the_schedule():
    plant = Plant()
    plant.run(Power(megawatts=0.3), Watts(), 3600)
    orders = plant.orders[-1][1]
    assert (orders.leave, plant.now < 600) == (True, True)
    assert "at rest it draws 40" in orders.why
    assert "300.0 kW, which cannot be kept; raise power.megawatts, or take fewer nodes" in orders.why
    plant = Plant()
    plant.run(Power(megawatts=0.3, schedule="s.csv"), Watts(), 3600, schedule=schedule((0, None, 50.0), (90_000, None, 20.0)))
    assert plant.orders[-1][1].leave, "a schedule of prices does not change it"
    plant = Plant()
    plant.run(Power(schedule="s.csv"), Watts(), 1500, schedule=schedule((0, 1.2, None), (300, 0.3, None), (1200, 1.2, None)))
    paused = [orders for _, orders in plant.orders if orders.pause_until_s is not None]
    assert [orders.pause_until_s for orders in paused] == [BEGAN_S + 1200]
    assert "paused until" in paused[0].why
    assert dict(plant.means())[1400] > 900e3


def test_what_cannot_be_measured_is_not_claimed_to_be_kept():
    plant = Plant()
    plant.run(Power(megawatts=0.7), Watts(), 1200, knows=False)
    orders = plant.orders[-1][1]
    assert (orders.leave, plant.now < 600) == (True, True)
    assert "which cannot be kept: what the run draws is unknown at every boundary; give the site's file" in orders.why
    assert max(orders.share for _, orders in plant.orders) <= 0.15, "and full speed is not what it runs at until then"
    by_figures = Plant()
    by_figures.run(Power(megawatts=0.9), KNOWN, 600, knows=False)
    assert "and slowed by the site's figures; 6" in by_figures.orders[-1][1].why
    assert by_figures.means()[-1][1] == pytest.approx(0.9 * plant.full / 1.1, rel=0.1), "which are a tenth too high here"
    assert [kind for kind, _ in by_figures.orders[-1][1].notices] == ["figures"]


def test_where_the_facility_is_unknown_a_budget_is_held_against_the_widest_boundary_and_that_is_said():
    plant = Plant(boundary="device")
    plant.run(Power(megawatts=0.7), Watts(), 900)
    orders = plant.orders[-1][1]
    assert top(plant) <= 700e3
    assert "power.megawatts is held against the devices only: what the facility draws beyond is unknown" in orders.why
    assert len({orders.notices for at, orders in plant.orders if at > 60}) == 1, "said once: its words stay"


def test_a_meter_that_falls_silent_changes_no_order_and_one_that_sees_less_is_not_believed():
    plant = Plant()
    governor = plant.run(Power(megawatts=0.7), Watts(), 900)
    share, silent = governor.share, []
    for boundary, watts in (("facility", None), ("device", 2e5)):
        for _ in range(10):
            seen = Seen(BEGAN_S + 900, watts, step_s=0.5, busy_share=1.0, window_s=20.0, steps=20, boundary=boundary)
            silent.append(governor.decide(seen))
    assert {orders.share for orders in silent} == {share}
    assert {orders.notices for orders in silent} == {
        (("silent", "nothing is measured of the facility any more: what was ordered before goes on until it is"),)
    }
    resumed = Governor(Power(megawatts=0.7), Watts(), began_s=BEGAN_S)
    resumed.load(governor.state())
    assert resumed.decide(Seen(BEGAN_S, None)).share < 1.0
    wider = Governor(Power(megawatts=0.7), Watts(), began_s=BEGAN_S)
    wider.decide(Seen(BEGAN_S, None))
    for boundary, watts in (("device", 3e5), ("node", 5e5)):
        orders = wider.decide(Seen(BEGAN_S + 20, watts, step_s=0.5, busy_share=0.15, window_s=20.0, steps=6, boundary=boundary))
    assert "held against the nodes only" in orders.why


def test_a_window_that_is_not_learnt_from_is_no_window_without_a_meter():
    governor = Governor(Power(megawatts=0.7), Watts(), began_s=BEGAN_S)
    governor.decide(Seen(BEGAN_S, None))
    compiled = Seen(BEGAN_S + 90, 5e5, step_s=4.0, window_s=90.0, steps=20, mixed=True)
    orders = governor.decide(compiled)
    assert (orders.share, orders.notices) == (0.15, ())


def test_a_ramp_that_nothing_is_known_for_is_not_kept_and_not_at_five_per_cent_for_ever():
    for power, watts in ((Power(ramp_megawatts_min=0.1), Watts()), (Power(), Watts(ramp_watts_min=figure(1e5)))):
        plant = Plant()
        plant.run(power, watts, 600, knows=False)
        orders = plant.orders[-1][1]
        assert (orders.share, orders.slope, orders.notices[0][0]) == (1.0, None, "ramp")
        assert "the ramp is not kept: what the run draws is unknown" in orders.why
        plant = Plant()
        plant.run(power, KNOWN.model_copy(update={"ramp_watts_min": figure(1e5)}), 600, knows=False)
        assert plant.orders[-1][1].slope is not None, "by the site's figures"
        assert steepest(plant) <= 1.02 * 0.1e6


def test_a_sites_own_limit_is_kept_by_runs_that_could_reach_half_of_it():
    site = KNOWN.model_copy(update={"cap_watts": figure(0.7e6), "site": "made"})
    plant = Plant()
    plant.run(Power(), site, 900)
    assert top(plant) <= 700e3
    assert "power.cap_watts of made allows 700.0 kW" in plant.orders[-1][1].why
    assert not Governor(Power(), site.model_copy(update={"cap_watts": figure(200e6)}), began_s=0.0).acts
    assert Governor(Power(), Watts(cap_watts=figure(1e6)), began_s=0.0).acts, "a run whose draw is unknown"
    assert (
        Governor(Power(megawatts=0.9), site, began_s=BEGAN_S)
        .decide(Seen(BEGAN_S, None))
        .why.startswith("power.cap_watts of made allows 700")
    )
    blind = Plant()
    blind.run(Power(), Watts(cap_watts=figure(1e6)), 300, knows=False)
    assert (blind.orders[-1][1].share, blind.orders[-1][1].leave) == (1.0, False), "what the recipe did not ask for ends no run"
    assert blind.orders[-1][1].notices[0][0] == "unknown"


def test_no_megawatts_pause_at_once_or_end_the_run_if_it_is_for_ever():
    rows = schedule((-10, 0.0, 50.0), (300, 0.0, 60.0), (600, 1.2, None))
    governor = Governor(Power(schedule="s.csv"), Watts(), began_s=BEGAN_S, schedule=rows)
    orders = governor.decide(Seen(BEGAN_S, None))
    assert orders.pause_until_s == BEGAN_S + 600, "not until the next row, which allows nothing either"
    assert orders.notices == (("paused", "paused until 2026-09-21 14:23 UTC: the schedule allows 0 W"),)
    for never in (schedule((-10, 1.0, None), (0, 0.0, None)), Schedule(((0.0, 0.0, 1.0, None), (3600.0, 0.0, 2.0, None)), True, "s.csv")):
        orders = Governor(Power(schedule="s.csv"), Watts(), began_s=BEGAN_S, schedule=never).decide(Seen(BEGAN_S, None))
        assert orders.leave
        assert orders.why == "the schedule allows 0 W; give s.csv a row that allows more, or leave power.schedule out"


@pytest.mark.parametrize("every", [20, 120])
@pytest.mark.parametrize("megawatts", [0.0, 0.3])  # none, and less than it draws at rest
def test_a_pause_begins_at_its_time_and_not_at_the_next_report(every, megawatts):
    plant = Plant(every=every)
    rows = schedule((-10, 0.8, None), (905, megawatts, None), (1800, 0.8, None))
    governor = plant.run(Power(schedule="s.csv"), KNOWN, 2700, schedule=rows)
    means = dict(plant.means())
    assert (means[890] > 700e3, means[907]) == (True, pytest.approx(plant.rest, rel=0.02))
    assert top(plant) <= 800e3
    assert means[2600] > 700e3
    assert 890 <= governor.cost()["paused_s"] <= 905


def test_a_run_that_begins_in_a_dear_hour_is_slow_until_it_is_known_what_a_pause_is_worth():
    rows = schedule((-10, None, 200.0), (3600, None, 20.0))
    power = {"schedule": "s.csv", "follow": "price", "slow_above": 100.0}
    first = Governor(Power(**power), Watts(), began_s=BEGAN_S, schedule=rows).decide(Seen(BEGAN_S, None))
    assert (first.pause_until_s, first.share) == (None, 0.15)
    plant = Plant()
    plant.run(Power(**power, slow_to=0.5), Watts(), 1800, schedule=rows)
    late = [watts for _, watts in plant.means(600)]
    assert sum(late) / len(late) == pytest.approx(0.5 * plant.full, rel=0.05)
    none = Governor(Power(**power, slow_to=0.0), Watts(), began_s=BEGAN_S, schedule=rows).decide(Seen(BEGAN_S, None))
    assert none.pause_until_s == BEGAN_S + 3600


@pytest.mark.parametrize("knows", [True, False])
def test_what_was_above_a_budget_is_counted_in_closed_ten_seconds(knows):
    governor = Governor(Power(megawatts=1.0), Watts(), began_s=0.0)
    governor.decide(Seen(0.0, None))
    for minute in range(10):
        bins = tuple((60.0 * minute + 10 * n, 1.5e6 if n < 5 else 0.9e6) for n in range(6)) if knows else ()
        governor.decide(Seen(60.0 * minute + 60, 1.4e6, step_s=1.0, window_s=60.0, steps=60, tokens=60, bins=bins))
    cost = governor.cost()
    assert (cost["over_budget_s"], cost["over_budget_watts"]) == ((500.0, 0.5e6) if knows else (0.0, 0.0))


@pytest.mark.parametrize("watts", [Watts(), KNOWN])
def test_power_rises_and_falls_along_the_ramp_at_start_saves_and_end(watts):
    plant, most = Plant(save_every=1000), 0.3e6
    plant.run(Power(ramp_megawatts_min=most / 1e6), watts, 9e9, total_steps=2500)
    assert steepest(plant) <= 1.02 * most
    assert top(plant) > 0.99 * plant.full  # full speed between the saves
    assert plant.means()[-1][1] < 500e3  # down before the end
    freely = Plant(save_every=1000)
    freely.run(Power(), watts, 9e9, total_steps=2500)
    assert steepest(freely) > 1.5 * most
    assert freely.now < plant.now


def test_a_run_that_is_told_to_leave_comes_down_for_as_long_as_it_may():
    plant = Plant()
    governor = plant.run(Power(ramp_megawatts_min=0.3), Watts(), 600)
    orders, steps = governor.leaving(3600.0)
    assert orders.brake_after == 0
    assert orders.slope is not None
    whole_s = (1 - orders.low) / orders.slope
    assert steps == pytest.approx(whole_s * (1 + orders.low) / 2 / 0.5, rel=0.05)
    begins = []
    pace = Pace(clock=lambda: plant.now, sleep=lambda s: plant._pass(s, False), wall=lambda: BEGAN_S + plant.now)
    pace.follow(replace(orders, slope=None, brake_after=None))  # at full speed
    pace.follow(orders)
    for _ in range(steps):
        pace.wait(lambda: False, lambda: None)
        begins.append(plant.now)
        plant._pass(0.5, True)
    assert begins[-1] - begins[0] == pytest.approx(whole_s, rel=0.1)
    assert governor.leaving(30.0)[1] < steps / 2
    assert governor.leaving(0.0)[1] == 0
    assert Plant().run(Power(megawatts=2.0), Watts(), 60).leaving(3600.0)[1] == 0, "without a ramp it leaves at once"


def test_a_budget_that_falls_is_met_before_its_hour_and_along_the_ramp():
    rows = schedule((0, 1.2, None), (900, 0.7, None), (1800, 1.2, None))
    for power, most in ((Power(schedule="s.csv"), None), (Power(schedule="s.csv", ramp_megawatts_min=0.1), 0.1e6)):
        plant = Plant()
        plant.run(power, KNOWN, 2700, schedule=rows)
        assert max(watts for second, watts in plant.means() if 900 <= second < 1785) <= 700e3
        assert most is None or steepest(plant) <= 1.03 * most
        assert dict(plant.means())[2600] > 900e3
    assert dict(plant.means())[600] > 0.95e6  # not earlier than need be


def test_what_is_drawn_when_more_is_allowed_again_is_not_held_against_the_limit_before():
    plant = Plant()
    power = Power(schedule="s.csv", follow="price", slow_above=100.0, slow_to=0.0)
    governor = plant.run(power, KNOWN, 2700, schedule=schedule((0, 1.2, 50.0), (900, 0.7, 200.0), (1800, 1.2, 20.0)))
    assert (governor.cost()["over_budget_s"], governor.extra) == (0.0, 0.0)


def test_dear_hours_are_slow_ones_and_what_that_saved_is_counted():
    rows = schedule((0, None, 50.0), (900, None, 200.0), (1800, None, 20.0))
    plant = Plant()
    governor = plant.run(Power(schedule="s.csv", follow="price", slow_above=100.0, slow_to=0.7), KNOWN, 2700, schedule=rows)
    slow = [watts for second, watts in plant.means() if 1000 <= second < 1780]
    assert sum(slow) / len(slow) == pytest.approx(0.7 * plant.full, rel=0.05)
    cost = governor.cost()
    eur = cost["eur"]
    assert eur["not_drawn"] == pytest.approx(900 * 0.3 * 200 / 3600, rel=0.1)  # seconds x MW x EUR/MWh
    assert cost["tokens_not_trained"] == pytest.approx(2000 * cost["waited_s"], rel=0.05)
    assert eur["saved"] == pytest.approx(eur["not_drawn"] - eur["to_catch_up"])
    assert eur["saved"] > 0
    assert cost["kg_co2e"]["saved"] < 0  # at the same carbon all day, catching up costs more than was spared: at rest it draws too
    assert any("200 EUR/MWh are above 100" in orders.why for _, orders in plant.orders)


@pytest.mark.parametrize("ramp", [None, 0.2])
def test_a_run_that_pauses_in_dear_hours_goes_on_after_them(ramp):
    rows = schedule((0, None, 50.0), (900, None, 200.0), (1800, None, 20.0))
    plant = Plant()
    power = Power(schedule="s.csv", follow="price", slow_above=100.0, slow_to=0.0, ramp_megawatts_min=ramp)
    governor = plant.run(power, KNOWN, 2700, schedule=rows)
    means = dict(plant.means())
    assert means[1500] == pytest.approx(plant.rest, rel=0.02)
    assert means[2600] > 950e3
    assert ramp is not None or means[1820] > 950e3, "at once, not after a window"
    assert governor.cost()["paused_s"] > 500
    assert ramp is None or steepest(plant) <= 1.02 * ramp * 1e6


def test_limits_come_first_where_they_may_be_set_and_are_enough():
    plant = Plant(min_cap=0.3)
    plant.run(Power(megawatts=0.7, caps=True), KNOWN, 900)
    orders = plant.orders[-1][1]
    assert (orders.share, orders.period_s) == (1.0, None)
    assert orders.cap_share is not None
    assert 0.4 < orders.cap_share < 0.6
    assert top(plant) <= 700e3
    assert f"accelerators at {100 * orders.cap_share:.0f} % of their limit" in orders.why
    little = Plant(min_cap=0.8)
    little.run(Power(megawatts=0.7, caps=True), KNOWN, 900)
    assert {orders.cap_share for _, orders in little.orders} == {None}
    assert top(little) <= 700e3
    forbidden = Plant(min_cap=0.3)
    forbidden.run(Power(megawatts=0.7), KNOWN, 900)
    assert {orders.cap_share for _, orders in forbidden.orders} == {None}


@pytest.mark.parametrize("every", [20, 120])
@pytest.mark.parametrize("refused", [False, True])
def test_a_budget_that_falls_is_met_under_limits_of_accelerators_too(every, refused):
    rows = schedule((-10, 1.0, None), (1800, 0.7, None), (3600, 1.0, None))
    plant = Plant(min_cap=0.3, every=every, deaf=refused)
    governor = plant.run(Power(megawatts=0.85, caps=True, schedule="s.csv"), KNOWN, 4500, schedule=rows)
    assert top(plant, before=1800) <= 850e3
    assert max(watts for second, watts in plant.means() if 1800 <= second < 3590) <= 700e3
    assert governor.cost()["over_budget_s"] == 0
    assert any(orders.cap_share is not None for at, orders in plant.orders if 2000 < at < 3000)
    if not refused:
        assert {orders.share for at, orders in plant.orders if 3000 < at < 3590} == {1.0}, "limits alone, once they were seen to be enough"


@pytest.mark.parametrize("every", [20, 60, 120])
def test_limits_of_accelerators_move_along_the_ramp(every):
    rows = schedule((-10, 1.0, None), (1800, 0.7, None), (3000, None, None))
    plant, most = Plant(min_cap=0.3, noise=0.0, jitter=0.0, every=every), 0.05e6
    plant.run(Power(megawatts=0.9, caps=True, ramp_megawatts_min=most / 1e6, schedule="s.csv"), KNOWN, 6000, schedule=rows)
    capped = [orders.cap_share for _, orders in plant.orders if orders.cap_share is not None]
    assert (len(capped) > 5, min(capped) < 0.7) == (True, True)
    assert steepest(plant, 600) <= 1.02 * most  # at the start, where ten seconds hold two steps, less fine: that is a pace's, not a limit's
    assert max(watts for second, watts in plant.means() if 1800 <= second < 2990) <= 700e3


def test_every_rank_decides_alike_and_a_resume_goes_on_with_what_was_learnt():
    plant = Plant()
    first = plant.run(Power(megawatts=0.7), Watts(), 600)
    again = Plant()
    again.run(Power(megawatts=0.7), Watts(), 600)
    assert again.orders == plant.orders
    resumed = Governor(Power(megawatts=0.7), Watts(), began_s=BEGAN_S)
    resumed.load(first.state())
    orders = resumed.decide(Seen(BEGAN_S + 600, None, None, None))
    assert orders.share == pytest.approx(first.share, rel=0.1)
    assert resumed.cost() == first.cost()


def test_without_a_budget_a_ramp_or_a_schedule_nothing_is_decided_and_nothing_waited():
    governor = Governor(Power(), Watts(), began_s=0.0)
    pace = Pace(clock=never, sleep=never, wall=never)
    pace.follow(governor.decide(Seen(0.0, 5e5, None, 1.0, window_s=20.0, steps=20)))
    assert (governor.acts, pace.wait(never, never)) == (False, 0.0)


def test_the_expected_draw_is_the_sites_own_total_else_the_sum_of_its_parts_else_unknown():
    assert expected(KNOWN) == 1.1e6
    parts = Watts(
        accelerators=16, per_node=8, node_watts=figure(7000.0), fabric_watts=figure(100.0), storage_share=figure(0.03), pue=figure(1.2)
    )
    assert expected(parts) == pytest.approx((14_000 + 1600) * 1.03 * 1.2)
    assert expected(parts.model_copy(update={"pue": Figure(basis="unknown")})) is None


# Pace


def test_a_pace_really_waits_and_shows_that_it_is_alive():
    beats, pace = [], Pace()
    pace.follow(Orders(period_s=0.5, share=0.1, busy_s=0.05))
    begins = []
    for _ in range(4):
        pace.wait(lambda: False, lambda: beats.append(time.monotonic()))
        begins.append(pace._begun_s)  # a clock read here may come late, and the next begin would then seem early
        time.sleep(0.02)
    assert all(later - before >= 0.499 for before, later in pairwise(begins))
    assert len(beats) >= 3 * 3
    assert pace.take_waited_s() >= 1.3
    assert pace.take_waited_s() == 0.0


def test_a_wait_ends_when_the_run_is_to_stop():
    pace, stop = Pace(), threading.Event()
    pace.follow(Orders(period_s=3600.0, share=0.001, busy_s=3.6))
    pace.wait(stop.is_set, lambda: None)
    threading.Timer(0.1, stop.set).start()
    before = time.monotonic()
    pace.wait(stop.is_set, lambda: None)
    assert time.monotonic() - before < 60


def test_a_pause_is_left_by_a_meeting_and_ranks_meet_equally_often_whatever_their_clocks_say():
    orders = Orders(pause_until_s=BEGAN_S + 100.0, pause_from_s=BEGAN_S, share=1.0)
    for skew in (-20.0, 0.0, 20.0):
        now, met = [BEGAN_S + skew], []

        def sleep(seconds, now=now):
            now[0] += seconds

        pace = Pace(clock=lambda now=now: now[0], wall=lambda now=now: now[0], sleep=sleep)
        pace.follow(orders)
        pace.wait(lambda: True, lambda: None, lambda met=met: bool(met.append(1)))
        assert (len(met), now[0]) == (3, pytest.approx(BEGAN_S + 100.0)), "stop of one rank alone does not leave"
        now[0] = BEGAN_S
        pace.follow(orders)
        pace.wait(lambda: True, lambda: None, lambda: True)
        assert now[0] == pytest.approx(BEGAN_S + 30.0, abs=0.3)


def test_a_run_alone_leaves_a_pause_at_once():
    pace = Pace()
    pace.follow(Orders(pause_until_s=time.time() + 3600, pause_from_s=time.time()))
    assert pace.wait(lambda: True, lambda: None) < 60


def test_before_the_length_of_a_step_is_known_each_rank_measures_its_own():
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(clock=lambda: now[0], sleep=sleep, wall=lambda: now[0])
    pace.follow(Orders(share=0.25))
    for took in (30.0, 1.0, 1.0, 1.0):  # the first is compiled
        pace.wait(lambda: False, lambda: None)
        now[0] += took
    assert now[0] <= 33 + 60.5 + 3 * 3.1
    assert pace.take_waited_s() == pytest.approx(now[0] - 33.0)


def test_the_device_is_asked_only_where_there_is_something_to_wait_for():
    asked, now = [], [0.0]
    pace = Pace(lambda: asked.append(now[0]), clock=lambda: now[0], wall=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    orders = Orders(share=1.0, busy_s=1.0, slope=0.1, low=0.5, brake_after=30)
    pace.follow(orders)
    for _ in range(20):  # five seconds of ramp
        pace.wait(lambda: False, lambda: None)
        now[0] += 1.0
    assert 3 <= len(asked) <= 8
    pace.follow(replace(orders, brake_after=2))
    for _ in range(6):
        pace.wait(lambda: False, lambda: None)
        now[0] += 1.0
    assert len(asked) >= 7


def test_a_ramp_comes_down_before_a_save_and_begins_low_after_it():
    now = [0.0]
    pace = Pace(clock=lambda: now[0], wall=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    begins = []

    def steps(count):
        for _ in range(count):
            pace.wait(lambda: False, lambda: None)
            begins.append(now[0])
            now[0] += 1.0
        return [round(later - before, 1) for before, later in pairwise(begins[-count:])]

    orders = Orders(share=1.0, busy_s=1.0, slope=0.05, low=0.25, brake_after=20)
    pace.follow(orders)
    assert steps(15)[-2:] == [1.0, 1.0]
    pace.follow(replace(orders, brake_after=5))
    assert steps(20)[-1] == pytest.approx(4.0)
    pace.restart()  # in the middle of a window: it does not brake again
    assert steps(16)[-1] == 1.0
    pace.follow(replace(orders, brake_after=14))
    pace.restart()  # a save right after the decision: the brake is for the next one
    found = steps(30)
    assert (max(found[:2]) > 2.5, min(found[10:13]) < 1.5, found[-1]) == (True, True, pytest.approx(4.0))


def test_saves_of_many_runs_are_spread_evenly():
    every, runs = 50, 5000
    offsets = [stagger(f"pretrain-7b-{number}", every) for number in range(runs)]
    counts = [offsets.count(one) for one in range(every)]
    expectation = runs / every
    assert sum((count - expectation) ** 2 / expectation for count in counts) < 85.4  # chi-square of 49 degrees, one in a thousand
    assert stagger("a", every) == stagger("a", every)
    assert (stagger("a", 1), LOW) == (0, 0.05)

"""The meter of a node: exact sums, gaps, what is added to what, and what a killed process leaves; on meters whose truth is known."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import Clock, Replay, Steady, Waves, metered, pass_by, summed

from gigatrain.config import Power
from gigatrain.planning.watts import Watts
from gigatrain.power import meter as meter_module
from gigatrain.power.meter import opened
from gigatrain.power.reading import FIELDS

COUNTED = [name for name in FIELDS if name not in ("nodes", "devices")]  # the others are of a take, not of its time


def truth_mj(sources, since, until):
    return 1000 * sum(one.joules(until) - one.joules(since) for one in sources)


# -- sums


@settings(max_examples=50, deadline=None)
@given(
    waits=st.lists(st.tuples(st.floats(0.001, 4.0), st.booleans()), min_size=1, max_size=40),
    resets=st.lists(st.floats(1000, 1060), max_size=3),
    lost=st.lists(st.tuples(st.floats(1000, 1060), st.floats(0, 12)), max_size=3),
    wrap=st.sampled_from([None, 200_000, 262_143_328]),
    share=st.sampled_from([None, 0.3]),
    wall=st.floats(1.7e9, 1.8e9),
)
def test_takes_add_up_to_the_whole_whenever_they_are_asked_for(waits, resets, lost, wrap, share, wall):
    """Two meters see the same looks; one is asked all the time, the other once: not a millijoule, millisecond or bin differs."""
    clock = Clock(wall=wall)
    meters = []
    for _ in range(2):
        gpus = [
            Waves(clock, "GPU-a", reset_s=resets, lost=[(since, since + long) for since, long in lost], reasons=0x4),
            Waves(clock, "GPU-b", watts=300, power=False, reset_s=resets[:1]),
            Waves(clock, "GPU-c", counter=False),
        ]
        sockets = [Waves(clock, "n", "package-0", scope="cpu", watts=200, wrap_mj=wrap, update_s=0.001)]
        board = Waves(clock, "n", scope="node", watts=2500, counter=False, update_s=1.0, lost=[(1020, 1031)])
        meters.append(metered(clock, gpus, sockets, board, rest=500.0, plate=700.0, unmetered=1, share=share))
    often, once = meters
    takes = []
    for wait, asked in waits:
        for meter in meters:
            meter.look(every=True)
        takes += [often.take()] if asked else []
        clock.now += wait
    for meter in meters:
        meter.look(every=True)
    takes.append(often.take())
    whole, parts = once.take(), summed(takes)
    assert {name: getattr(parts, name) for name in COUNTED} == {name: getattr(whole, name) for name in COUNTED}
    assert parts.bins == whole.bins
    assert [number for number, *_ in whole.bins] == sorted({number for number, *_ in whole.bins})
    assert all(getattr(one, name) >= 0 for one in takes for name in FIELDS)
    assert whole.device_ms + whole.device_unknown_ms == pytest.approx(4 * whole.ms, abs=5)
    assert whole.node_measured_mj + whole.node_estimated_mj + whole.node_nameplate_mj >= sum(mj for *_, mj in whole.bins)


@settings(max_examples=60, deadline=None)
@given(
    late=st.lists(st.floats(0, 1.4), min_size=3, max_size=3),
    slow=st.lists(st.floats(0, 0.03), min_size=3, max_size=3),
    waits=st.lists(st.tuples(st.floats(0.001, 3.0), st.booleans()), min_size=3, max_size=25),
    lost=st.lists(st.tuples(st.floats(1000, 1030), st.floats(0, 9)), max_size=2),
    share=st.sampled_from([None, 0.3]),
)
def test_no_field_is_ever_negative_whenever_meters_began_and_however_old_their_news_are(late, slow, waits, lost, share):
    """One asked of a thread of its own (Polled) gives what it heard earlier, of a moment that is its own; a look takes time."""
    clock = Clock()
    gpu = Steady(clock, "GPU-a", lost=[(since, since + long) for since, long in lost])
    socket = Steady(clock, "n", "package-0", scope="cpu", watts=150, update_s=0.001)
    board = Steady(clock, "n", scope="node", watts=1700, counter=False, update_s=1.0)
    for source, before, takes in zip((gpu, socket, board), late, slow, strict=True):
        source.read = older(clock, source, before, takes)  # type: ignore[method-assign]
    meter = metered(clock, [gpu], [socket], board, rest=1000.0, share=share)
    taken = []
    for wait, asked in waits:
        meter.look(every=True)
        taken += [meter.take()] if asked else []
        clock.now += wait
    meter.look(every=True, last=True)
    taken.append(meter.take())
    assert all(getattr(one, name) >= 0 for one in taken for name in FIELDS)
    whole = summed(taken)
    assert whole.device_ms + whole.device_unknown_ms == pytest.approx(whole.ms, abs=2)
    assert whole.device_measured_mj <= 500 * (whole.ms + 100 + 2)  # the counter's news are of every 0.1 s
    assert share is not None or whole.node_measured_mj + whole.node_estimated_mj <= 1700 * (whole.ms + 100 + 2)


def older(clock, source, before, takes):
    read = source.read

    def look():
        clock.now += takes
        now = clock.now
        clock.now = now - before
        try:
            return read()
        finally:
            clock.now = now

    return look


@pytest.mark.parametrize(
    ("told", "how"),
    [
        ({}, {}),
        ({}, {"jitter": 0.9, "miss": 0.5}),
        ({"reset_s": (1017.77, 1090.2)}, {"jitter": 0.9, "miss": 0.2}),
        ({"lost": [(1030, 1034.5)]}, {"jitter": 0.5}),
        ({"wrap_mj": 2_621_440, "update_s": 0.001}, {"jitter": 0.5, "miss": 0.1}),
        ({"counter": False}, {"jitter": 0.5, "miss": 0.1}),
        ({"power": False}, {"jitter": 0.9, "miss": 0.5}),
        ({"update_s": 0.02}, {"every_s": 1.0, "jitter": 0.7}),
    ],
)
def test_joules_are_within_half_a_per_cent_of_the_truth(told, how):
    clock = Clock()
    gpus = [Waves(clock, f"GPU-{number}", watts=350 + 50 * number, **told) for number in range(4)]
    meter = metered(clock, gpus, every_s=how.get("every_s", 0.1))
    began = clock.now
    pass_by(meter, clock, 120, **how)
    taken = meter.take()
    assert taken.device_measured_mj + taken.device_estimated_mj == pytest.approx(truth_mj(gpus, began, clock.now), rel=5e-3)
    assert taken.integral_mj == pytest.approx(taken.counter_mj, rel=5e-3)
    assert taken.device_unknown_ms == 0
    assert (taken.device_estimated_mj > 0) == ("reset_s" in told)
    assert taken.gaps == (8 if "reset_s" in told else 4 if "lost" in told else 0)


def test_a_recorded_trace_is_metered_by_counter_and_by_watts():
    clock = Clock()
    trace = [(0, 6000), (10, 6900), (11, 2300), (15, 2300), (16, 7100), (60, 7000), (61, 0), (90, 0)]
    node = Replay(clock, trace, "n", scope="node", counter=False, update_s=1.0)
    gpus = [Replay(clock, [(at, watts * 0.8) for at, watts in trace], "GPU-a")]
    meter = metered(clock, gpus, [], node, every_s=0.1)
    pass_by(meter, clock, 60, jitter=0.3)
    taken = meter.take()
    exact_j = (6000 + 6900) * 5 + (6900 + 2300) / 2 + 2300 * 4 + (2300 + 7100) / 2 + (7100 + 7000) * 22
    assert taken.node_measured_mj == pytest.approx(1000 * exact_j, rel=5e-3)
    assert taken.device_measured_mj == pytest.approx(800 * exact_j, rel=5e-3)


# -- counters that misbehave


def test_a_reset_without_watts_is_unknown_and_with_them_an_estimate():
    clock = Clock()
    blind = metered(clock, [Steady(clock, "GPU-a", power=False, reset_s=[1010.05])])
    seen = metered(clock, [Steady(clock, "GPU-a", reset_s=[1010.05])])
    for meter in (blind, seen):
        clock.now = 1000.0
        pass_by(meter, clock, 20)
    unknown, known = blind.take(), seen.take()
    assert (unknown.gaps, unknown.gap_ms, unknown.device_unknown_ms, unknown.device_estimated_mj) == (1, 100, 100, 0)
    assert (known.gaps, known.gap_ms, known.device_unknown_ms, known.device_estimated_mj) == (1, 100, 0, 50_000)
    assert known.device_measured_mj + known.device_estimated_mj == 500 * 20_000


def test_a_counter_that_may_have_gone_round_twice_is_not_believed():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "package-0", wrap_mj=262_144_000, update_s=0.001, power=False)])
    pass_by(meter, clock, 10)
    clock.now += 200  # once at most: 100 of 262 kJ
    pass_by(meter, clock, 10)
    assert meter.take().gaps == 0
    clock.now += 600  # 300 kJ
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.gaps, taken.device_unknown_ms) == (1, 600_000)


def test_a_counter_that_stands_still_beside_watts_is_no_measurement_of_nothing():
    clock = Clock()
    source = Steady(clock, "GPU-a", watts=300)
    source.joules = lambda at_s: 5_000.0  # type: ignore[method-assign]
    meter = metered(clock, [source])
    pass_by(meter, clock, 60)
    taken = meter.take()
    assert taken.device_measured_mj == 0
    assert taken.device_estimated_mj == pytest.approx(300 * 60_000, rel=0.002)
    assert taken.gaps == 1


@pytest.mark.parametrize("caught_up", [True, False])
def test_a_counter_that_moves_again_tells_nothing_twice(caught_up):
    """It stood for 20 s, and then says all that it missed, or goes on from where it stood: those seconds are told by watts, once."""
    clock = Clock()
    source = Steady(clock, "GPU-a", watts=300)
    stands = (1010.0, 1030.0)
    source.joules = lambda at_s: (
        300
        * (  # type: ignore[method-assign]
            min(at_s, stands[0]) if at_s < stands[1] else at_s if caught_up else at_s - stands[1] + stands[0]
        )
    )
    meter = metered(clock, [source])
    pass_by(meter, clock, 60)
    taken = meter.take()
    assert taken.device_measured_mj + taken.device_estimated_mj == pytest.approx(300 * 60_000, rel=0.002)
    assert taken.device_estimated_mj == pytest.approx(300 * 20_000, rel=0.01)
    assert taken.gaps == 1


def test_a_driver_that_fails_for_days_fills_no_rows():
    clock = Clock()
    gpus = [Steady(clock, f"GPU-{number}") for number in range(40)]
    meter = metered(clock, gpus)
    for round in range(200):
        for number in range(40):
            meter._note(f"GPU-{number} no longer answers: error {round} {'x' * 500}", f"GPU-{number} no longer answers")
    assert len(meter.meters["notes"]) < 6000
    assert "GPU-3 no longer answers: error 199" in meter.meters["notes"]
    assert "(200 times)" in meter.meters["notes"]
    assert meter.meters["notes"].endswith(f"; and {24 * 200} more")


def test_one_that_comes_and_goes_is_one_note():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "GPU-a", lost=[(at, at + 9) for at in range(1010, 1400, 20)])])
    pass_by(meter, clock, 400, every_s=0.5)
    assert meter.meters["notes"] == "GPU-a no longer answers: GPU-a is lost (20 times)"


def test_time_for_which_a_meter_gives_no_reasons_is_not_time_at_full_clocks():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "GPU-a", reasons=0x4), Steady(clock, "GPU-b", reasons=None)])
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.device_ms, taken.power_capped_ms, taken.reasons_ms) == (20_000, 10_000, 10_000)
    assert taken.held_down(taken.power_capped_ms) == 1
    none = metered(clock, [Steady(clock, "GPU-b", reasons=None)])
    pass_by(none, clock, 10)
    taken = none.take()
    assert (taken.device_ms, taken.reasons_ms, taken.held_down(taken.power_capped_ms)) == (10_000, 0, None)


def test_the_slowest_of_all_meters_is_told():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "GPU-a")], [], Steady(clock, "n", scope="node", counter=False, update_s=10.0))
    assert (meter.slowest_s, metered(clock, []).slowest_s) == (10.0, 0.0)


def test_a_meter_that_is_silent_for_seconds_loses_nothing_and_one_lost_for_good_does_not_hold_up_the_others():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "GPU-a", lost=[(1010, 1013)]), Steady(clock, "GPU-b", lost=[(1020, 9999)])])
    pass_by(meter, clock, 60)
    taken = meter.take()
    assert taken.gaps == 2
    assert taken.device_measured_mj == pytest.approx(500_000 * (60 + 20), abs=2 * 500 * 100)
    assert taken.device_unknown_ms == taken.gap_ms == pytest.approx(40_000, abs=150)
    assert taken.ms == 60_000
    assert "GPU-b no longer answers: GPU-b is lost" in meter.meters["notes"]
    assert "GPU-a" not in meter.meters["notes"]


def test_watts_that_nobody_looked_at_for_long_are_no_measurement_of_what_was_between():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "GPU-a", counter=False), Steady(clock, "GPU-b", reset_s=[1015.0])])
    pass_by(meter, clock, 10)
    clock.now += 30  # this process was stopped
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.gaps, taken.device_ms, taken.device_unknown_ms) == (2, 40_000, 60_000)
    assert (taken.device_measured_mj, taken.device_estimated_mj) == (500 * 40_000, 0)


# -- bins


def test_bins_begin_and_end_with_wall_clock_and_are_given_once_when_they_are_over():
    clock = Clock(wall=1_790_000_003.0)
    gpu = Waves(clock, "GPU-a", update_s=0.001)
    meter = metered(clock, [gpu], rest=100.0)
    bins = []
    for _ in range(40):
        pass_by(meter, clock, 1.37, jitter=0.5)
        bins += meter.take().bins
    assert [number for number, *_ in bins] == [179_000_001, 179_000_002, 179_000_003, 179_000_004]  # the one it began in is not whole
    for number, nodes, device_mj, node_mj in bins:
        begin = number * 10 - clock.ahead
        assert nodes == 1
        assert device_mj == pytest.approx(truth_mj([gpu], begin, begin + 10), rel=2e-3)
        assert node_mj - device_mj == pytest.approx(100_000 * 10, abs=2)


def test_a_clock_that_is_set_spoils_the_bins_it_cuts_and_no_joules():
    clock = Clock(wall=1_790_000_000.5)
    meter = metered(clock, [Steady(clock, "GPU-a", update_s=0.001)], rest=0.0)
    takes = []
    for step in (0, 3600, -3600, 0.2):
        clock.ahead += step
        pass_by(meter, clock, 25)
        takes.append(meter.take())
    taken = summed(takes)
    assert taken.device_measured_mj == pytest.approx(500_000 * 100, abs=1000)
    numbers = [number for number, *_ in taken.bins]
    assert numbers == sorted(set(numbers))
    assert all(device_mj == pytest.approx(500_000 * 10, abs=150_000) for _, _, device_mj, _ in taken.bins)


# -- what is added to what


def test_a_node_without_a_meter_is_devices_processors_and_the_rest_of_its_site():
    clock = Clock()
    sockets = [Steady(clock, "n", f"package-{number}", scope="cpu", watts=150) for number in range(2)]
    memory = [Steady(clock, "n", "package-0", "dram", scope="dram", watts=40)]
    meter = metered(clock, [Steady(clock, "GPU-a"), Steady(clock, "GPU-b")], sockets + memory, rest=1000.0)
    pass_by(meter, clock, 20)
    taken = meter.take()
    assert (taken.devices, taken.device_ms, taken.device_measured_mj, taken.cpu_mj) == (2, 40_000, 20_000_000, 6_800_000)
    assert (taken.node_measured_mj, taken.node_estimated_mj, taken.node_unknown_ms) == (26_800_000, 20_000_000 - 6_800_000, 0)
    assert meter.watts() == pytest.approx(2000)
    assert meter.meters["node"] == "devices + processors + rest of 1,000 W, estimated: the test"
    assert meter.least_s == 10


def test_processors_that_draw_more_than_the_rest_leave_no_rest():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "GPU-a")], [Steady(clock, "n", "package-0", scope="cpu", watts=400)], rest=300.0)
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.node_measured_mj, taken.node_estimated_mj) == (9_000_000, 0)


def test_a_site_that_knows_no_rest_has_nodes_of_which_a_part_is_unknown():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "GPU-a")])
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.node_measured_mj, taken.node_unknown_ms, taken.device_unknown_ms) == (5_000_000, 10_000, 0)
    assert meter.watts() is None
    assert meter.joules() == pytest.approx(5000)
    assert meter.meters["node"] == "devices + rest unknown"


def test_a_nodes_own_meter_is_the_node():
    clock = Clock()
    node = Steady(clock, "n", scope="node", watts=1700, counter=False, update_s=1.0)
    meter = metered(clock, [Steady(clock, "GPU-a")], [Steady(clock, "n", "package-0", scope="cpu", watts=200)], node, rest=5000.0)
    pass_by(meter, clock, 30)
    taken = meter.take()
    assert (taken.node_measured_mj, taken.node_estimated_mj, taken.cpu_mj) == (1700 * 30_000, 0, 200 * 30_000)
    assert "notes" not in meter.meters


def test_a_nodes_meter_that_does_not_see_the_gpus_is_rejected_and_named():
    clock = Clock()
    node = Steady(clock, "n", scope="node", watts=600, counter=False, update_s=1.0)
    meter = metered(clock, [Steady(clock, "GPU-a"), Steady(clock, "GPU-b")], [], node, rest=300.0)
    pass_by(meter, clock, 30)
    meter.take()
    pass_by(meter, clock, 30)
    taken = meter.take()
    assert (taken.node_measured_mj, taken.node_estimated_mj) == (1000 * 30_000, 300 * 30_000)
    assert "rejected: it says 600 W where the devices alone draw 1,000 W" in meter.meters["notes"]


def test_a_nodes_meter_that_falls_silent_is_replaced_by_the_estimate():
    clock = Clock()
    node = Steady(clock, "n", scope="node", watts=1700, lost=[(1030, 9999)])
    meter = metered(clock, [Steady(clock, "GPU-a")], [], node, rest=300.0)
    pass_by(meter, clock, 100)
    taken = meter.take()
    assert taken.node_measured_mj == pytest.approx(1700 * 30_000 + 500 * 70_000, rel=0.01)
    assert taken.node_estimated_mj == pytest.approx(300 * 70_000, rel=0.01)


def test_of_a_shared_node_the_jobs_share_is_counted_as_an_estimate():
    clock = Clock()
    gpus = [Steady(clock, "GPU-a"), Steady(clock, "GPU-b")]
    owned = metered(clock, gpus, [], Steady(clock, "n", scope="node", watts=6000), per_node=8)
    built = metered(clock, gpus, [Steady(clock, "n", "package-0", scope="cpu", watts=400)], rest=1200.0, per_node=8)
    for meter in (owned, built):
        clock.now = 1000.0
        pass_by(meter, clock, 10)
    taken = owned.take()
    assert (taken.node_measured_mj, taken.node_estimated_mj) == (10_000_000, 5_000_000)
    taken = built.take()
    assert (taken.node_measured_mj, taken.node_estimated_mj) == (10_000_000, 3_000_000)
    assert built.meters["share"].startswith("0.25 of the node")


def test_devices_without_a_meter_are_their_nameplate_or_unknown_and_never_nothing():
    clock = Clock()
    plated = metered(clock, [Steady(clock, "GPU-a")], rest=300.0, plate=700.0, unmetered=3)
    blind = metered(clock, [Steady(clock, "GPU-a")], rest=300.0, unmetered=3)
    for meter in (plated, blind):
        clock.now = 1000.0
        pass_by(meter, clock, 10)
    taken = plated.take()
    assert (taken.devices, taken.device_ms, taken.device_measured_mj, taken.device_nameplate_mj) == (4, 40_000, 5_000_000, 21_000_000)
    assert (taken.node_measured_mj, taken.node_nameplate_mj, taken.node_estimated_mj) == (5_000_000, 21_000_000, 3_000_000)
    assert plated.meters["device"] == "1 x counter of GPU-a; 3 x nameplate of 700 W: the test"
    taken = blind.take()
    assert (taken.device_ms, taken.device_unknown_ms, taken.node_unknown_ms) == (10_000, 30_000, 10_000)
    assert blind.watts() is None


def test_grace_is_within_its_module_and_is_told_but_not_added():
    clock = Clock()
    module = Steady(clock, "GPU-a", scope="module", watts=680)
    grace = Steady(clock, "n", "socket0", scope="cpu", watts=100, counter=False)
    meter = metered(clock, [module], [grace], rest=50.0)
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.cpu_mj, taken.node_measured_mj, taken.node_estimated_mj) == (1_000_000, 6_800_000, 500_000)
    assert "cpu GPU-a/n/socket0 (counter of socket0) lies within module GPU-a" in meter.meters["notes"]


def test_a_module_that_the_host_meters_is_not_added_to_the_gpus_within_it():
    clock = Clock()
    meter = metered(clock, [Steady(clock, "GPU-a")], [Steady(clock, "n", "module0", scope="module", watts=700)], rest=300.0)
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.node_measured_mj, taken.node_estimated_mj) == (5_000_000, 3_000_000)
    assert "lies within module" in meter.meters["notes"]


def test_a_cpu_nodes_processors_are_its_devices():
    clock = Clock()
    packages = [Steady(clock, "n", f"package-{number}", scope="cpu", watts=120) for number in range(2)]
    memory = Steady(clock, "n", "package-0", "dram", scope="dram", watts=30)
    meter = metered(clock, [], [*packages, memory])
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.devices, taken.device_measured_mj, taken.cpu_mj) == (2, 2_400_000, 2_700_000)
    assert (taken.node_measured_mj, taken.node_unknown_ms) == (2_700_000, 10_000)
    assert "the processors are the devices" in meter.meters["device"]
    rest = metered(clock, [], packages, rest=500.0)
    pass_by(rest, clock, 10)
    taken = rest.take()
    assert (taken.node_measured_mj, taken.node_estimated_mj) == (2_400_000, 2_600_000)
    psys = metered(clock, [], packages, Steady(clock, "n", scope="node", watts=400))
    pass_by(psys, clock, 10)
    taken = psys.take()
    assert (taken.device_measured_mj, taken.node_measured_mj, taken.node_unknown_ms) == (2_400_000, 4_000_000, 0)


def test_two_processes_of_a_machine_count_it_once():
    """One has two GPUs and the machine, the other the two others: with a meter of the node, and without."""
    for board in (None, 3500):
        clock = Clock()
        first = metered(
            clock, [Steady(clock, "GPU-a"), Steady(clock, "GPU-b")], [Steady(clock, "n", "package-0", scope="cpu", watts=200)],
            Steady(clock, "n", scope="node", watts=board) if board else None, rest=1000.0,
        )  # fmt: skip
        second = metered(clock, [Steady(clock, "GPU-c"), Steady(clock, "GPU-d")], rest=1000.0, whole=False, elsewhere=board is not None)
        for meter in (first, second):
            clock.now = 1000.0
            pass_by(meter, clock, 10)
        taken = summed([first.take(), second.take()])
        assert (taken.nodes, taken.ms, taken.devices, taken.device_measured_mj) == (1, 10_000, 4, 20_000_000)
        assert taken.node_measured_mj + taken.node_estimated_mj == (board or 3000) * 10_000


# -- what a killed process leaves


def held(clock, carry, run="r", **told):
    return metered(clock, [Steady(clock, "GPU-a", **told), Steady(clock, "GPU-b")], rest=300.0, carry=carry, run=run)


def test_what_a_killed_process_saw_and_never_told_is_told_once_by_the_next(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    clock, carry = Clock(), tmp_path / "carry.json"
    killed = held(clock, carry)
    pass_by(killed, clock, 30)
    told = killed.take()
    killed.kept()
    pass_by(killed, clock, 7)  # and dies
    clock.now += 1000
    following, late = held(clock, carry), held(clock, carry)
    assert not list(tmp_path.iterdir())
    pass_by(following, clock, 10)
    taken = following.take()
    assert told.recovered_mj == 0
    assert taken.recovered_mj == 1300 * 7_000
    assert (taken.node_measured_mj + taken.node_estimated_mj, taken.device_measured_mj, taken.ms) == (1300 * 17_000, 1000 * 17_000, 17_000)
    assert following.take().recovered_mj == 0
    pass_by(late, clock, 1)
    assert late.take().recovered_mj == 0


def test_what_was_told_and_not_kept_is_told_again(tmp_path, monkeypatch):
    """A report took it, and the process died before a row had it."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    clock, carry = Clock(), tmp_path / "carry.json"
    killed = held(clock, carry)
    pass_by(killed, clock, 30)
    killed.take()
    killed.kept()
    pass_by(killed, clock, 4)
    killed.take()
    pass_by(killed, clock, 3)
    killed.take()
    following = held(clock, carry)
    pass_by(following, clock, 1)
    assert following.take().recovered_mj == 1300 * 7_000


def test_a_process_that_dies_as_soon_as_a_row_has_it_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    clock, carry = Clock(), tmp_path / "carry.json"
    killed = held(clock, carry)
    pass_by(killed, clock, 30)
    killed.take()
    killed.kept()
    following = held(clock, carry)
    pass_by(following, clock, 10)
    assert following.take().ms == 10_000


def test_what_two_killed_processes_saw_is_told_by_the_third(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    clock, carry = Clock(), tmp_path / "carry.json"
    for seconds in (7, 5):
        pass_by(held(clock, carry), clock, seconds)
    third = held(clock, carry)
    pass_by(third, clock, 3)
    taken = third.take()
    assert (taken.recovered_mj, taken.ms) == (1300 * 12_000, 15_000)


def test_a_counter_that_went_round_just_before_the_end_is_taken_up_where_it_was_told(tmp_path, monkeypatch):
    """The other meter was silent for the last two seconds, so that what was told ends before the wrap."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    clock, carry, takes = Clock(), tmp_path / "carry.json", []
    for seconds in (20, 3):
        round_at_1019 = Steady(clock, "GPU-a", wrap_mj=509_500_000)
        meter = metered(clock, [round_at_1019, Steady(clock, "GPU-b", lost=[(1018, 1020.05)])], carry=carry)
        pass_by(meter, clock, seconds)
        takes.append(meter.take())
        meter.kept()
    assert takes[0].ms == pytest.approx(17_900, abs=1)
    assert summed(takes).device_measured_mj == pytest.approx(1000 * 23_000, abs=200)


@pytest.mark.parametrize("holds", ["SLURM_JOB_ID", "GIGATRAIN_SPAWNED"])
def test_in_a_held_allocation_the_counters_tell_what_was_drawn_meanwhile(tmp_path, monkeypatch, holds):
    """By a job, or by the supervisor of a command that starts its ranks again in place."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv(holds, "17")
    clock, carry = Clock(), tmp_path / "carry.json"
    killed = held(clock, carry)
    pass_by(killed, clock, 20)
    told = [killed.take()]
    killed.kept()
    pass_by(killed, clock, 5)
    clock.now += 93.21
    following = held(clock, carry)
    following.look()
    pass_by(following, clock, 20)
    taken = following.take()
    assert taken.recovered_mj == pytest.approx(1300 * 98_210, abs=1300 * 100)  # to the counter's last news
    told.append(taken)
    whole = summed(told)
    assert whole.device_measured_mj == 1000 * 138_200  # counters' news are of every 0.1 s
    assert whole.ms == pytest.approx(138_210, abs=1)
    assert following.joules() == pytest.approx(1300 * 20, rel=0.01)  # of this process only


def test_a_job_that_was_queued_again_is_not_charged_for_what_others_drew(tmp_path, monkeypatch):
    """It keeps its number, and its nodes were free meanwhile."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    clock, carry = Clock(), tmp_path / "carry.json"
    killed = held(clock, carry)
    pass_by(killed, clock, 20)
    killed.take()
    killed.kept()
    pass_by(killed, clock, 3)
    clock.now += 7200
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    following = held(clock, carry)
    pass_by(following, clock, 5)
    taken = following.take()
    assert (taken.recovered_mj, taken.ms) == (1300 * 3_000, 8_000)


def test_a_file_that_could_not_be_written_once_is_not_believed_later(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    clock, carry = Clock(), tmp_path / "carry.json"
    killed = held(clock, carry)
    pass_by(killed, clock, 20)
    written = meter_module._written

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(meter_module, "_written", full)
    pass_by(killed, clock, 20)
    told = killed.take()
    assert not carry.exists()
    monkeypatch.setattr(meter_module, "_written", written)
    following = held(clock, carry)
    pass_by(following, clock, 5)
    taken = following.take()
    assert (told.ms, taken.recovered_mj, taken.ms) == (40_000, 0, 5_000)
    assert killed.meters["notes"].count("would be lost") == 1


def test_a_counter_that_may_have_gone_round_between_two_processes_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    carry, taken = tmp_path / "carry.json", []
    clock = Clock()
    for seconds in (20, 5):
        source = Steady(clock, "n", "package-0", scope="cpu", watts=300, power=False)
        source.round_s = 65.0  # type: ignore[attr-defined]
        meter = metered(clock, [], [source], carry=carry)
        pass_by(meter, clock, seconds)
        taken.append(meter.take())
        meter.kept()
        clock.now += 240
    assert taken[1].device_measured_mj == pytest.approx(300 * 5_000, rel=0.05)
    assert taken[1].device_unknown_ms == pytest.approx(240_000, rel=0.02)


@pytest.mark.parametrize("changed", ["run", "boot", "node", "job", "counter", "torn"])
def test_what_is_not_this_runs_on_this_node_since_this_boot_is_not_taken_over(tmp_path, monkeypatch, changed):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    clock, carry = Clock(), tmp_path / "carry.json"
    killed = held(clock, carry)
    pass_by(killed, clock, 20)
    left = json.loads(carry.read_text())
    if changed in left and changed != "job":
        carry.write_text(json.dumps(left | {changed: "another"}))
    elif changed == "torn":
        carry.write_text(carry.read_text()[:40])
    elif changed == "job":
        monkeypatch.setenv("SLURM_JOB_ID", "18")
    clock.now += 100
    following = held(clock, carry, reset_s=[1060.0] if changed == "counter" else [])
    pass_by(following, clock, 10)
    taken = following.take()
    if changed == "job":
        assert (taken.recovered_mj, taken.ms) == (1300 * 20_000, 30_000)
    elif changed == "counter":  # one driver was reset meanwhile: its joules of then are unknown, the other's are not
        assert taken.gaps == 1
        assert taken.device_unknown_ms == pytest.approx(100_000, abs=200)
        assert taken.device_measured_mj == pytest.approx(1000 * 30_000 + 500 * 100_000, rel=0.01)
    else:
        assert (taken.recovered_mj, taken.ms) == (0, 10_000)
    assert ("notes" in following.meters) == (changed == "torn")


_KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from replay import Steady, metered
class Now:
    ahead = 0.0
    def __call__(self): return time.monotonic()
    wall = staticmethod(time.time)
clock = Now()
with metered(clock, [Steady(clock, "GPU-a", update_s=0.001)], rest=0.0, carry=Path(sys.argv[2]), every_s=0.02) as meter:
    time.sleep(0.2)
    taken = meter.take()
    print(taken.ms, taken.device_measured_mj, flush=True)
    time.sleep(60)
"""


def test_of_a_process_that_is_killed_for_real_nothing_is_lost_or_told_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    carry, here = tmp_path / "carry.json", str(Path(__file__).parent)
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", _KILLED, here, str(carry)], stdout=-1, text=True) as process:
        assert process.stdout is not None
        ms, mj = map(int, process.stdout.readline().split())
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    clock = Clock(time.monotonic(), time.time())
    meter = metered(clock, [Steady(clock, "GPU-a", update_s=0.001)], rest=0.0, carry=carry)
    pass_by(meter, clock, 1)
    taken = meter.take()
    assert ms > 0
    assert abs(mj - 500 * ms) <= 2_000
    assert 500 * 200 <= taken.recovered_mj <= 500_000 * (clock.now - began)
    assert abs(taken.device_measured_mj - 500 * taken.ms) <= 2_000
    assert not [one for one in tmp_path.iterdir() if one != carry]


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "another user's"])
def test_what_somebody_else_put_in_the_carry_files_place_is_neither_read_nor_followed(tmp_path, what):
    clock, carry = Clock(), tmp_path / "carry.json"
    pass_by(held(clock, carry), clock, 20)
    true = carry.read_bytes()
    victim = tmp_path / "victim"
    victim.write_bytes(true)
    if what == "another user's":
        if os.getuid() != 0:
            pytest.skip("only root can make a file another's")
        os.chown(carry, 65534, 65534)
    else:
        carry.unlink()
        {"link": lambda: carry.symlink_to(victim), "folder": carry.mkdir, "pipe": lambda: os.mkfifo(carry)}[what]()
    following = held(clock, carry)
    assert "is not read: it is no file of this user's" in following.meters["notes"]
    pass_by(following, clock, 10)
    taken = following.take()
    assert (taken.recovered_mj, taken.ms) == (0, 10_000)
    assert victim.read_bytes() == true
    assert sorted(path.name for path in tmp_path.iterdir()) == ["carry.json", "victim"]


def test_no_name_that_can_be_guessed_is_written_to(tmp_path, monkeypatch):
    clock, carry, victim = Clock(), tmp_path / "carry.json", tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"carry.json.{os.getpid()}").symlink_to(victim)
    pass_by(held(clock, carry), clock, 10)
    assert carry.is_file()
    assert victim.read_text() == "mine"
    meter = held(clock, carry)
    (tmp_path / f"carry.json.{meter._mark}").symlink_to(victim)  # guessed all the same
    pass_by(meter, clock, 10)
    assert victim.read_text() == "mine"
    assert "cannot be written" in meter.meters["notes"]


def test_a_file_that_cannot_be_written_is_told_and_no_failure(tmp_path):
    clock = Clock()
    meter = held(clock, tmp_path / "missing" / "carry.json")
    pass_by(meter, clock, 10)
    assert meter.take().device_measured_mj == 10_000_000
    assert "cannot be written" in meter.meters["notes"]


# -- its thread


class Now(Clock):
    """The real one."""

    @property
    def now(self):
        return time.monotonic()

    @now.setter
    def now(self, seconds):
        pass

    def wall(self):
        return time.time()


def test_a_thread_looks_and_closes_its_meters_and_joules_never_fall():
    clock = Now()
    gpus = [Steady(clock, "GPU-a", update_s=0.01), Steady(clock, "GPU-b", watts=400, counter=False)]
    with metered(clock, gpus, rest=100.0, every_s=0.02) as meter:
        began, seen = time.monotonic(), []
        while time.monotonic() < began + 0.5:
            seen.append(meter.joules())
            time.sleep(0.005)
    taken = meter.take()
    assert seen == sorted(seen)
    assert 400 <= taken.ms <= 5000
    assert taken.nodes == 1
    assert taken.device_measured_mj == pytest.approx(900 * taken.ms, rel=0.1)
    assert all(one.closed for one in gpus)


def test_joules_until_now_go_on_by_the_last_watts_and_never_fall():
    clock = Clock()
    meter = metered(clock, [Replay(clock, [(0, 1000), (10, 1000), (10.01, 0), (99, 0)], "GPU-a")], rest=0.0)
    pass_by(meter, clock, 10)
    before = meter.joules()
    clock.now += 1.5
    ahead = meter.joules()
    assert (before, ahead) == (pytest.approx(10_000, rel=0.02), pytest.approx(before + 1500, rel=0.01))
    meter.look(every=True)
    assert meter.joules() == ahead
    pass_by(meter, clock, 10)
    assert meter.joules() == ahead
    assert meter.take().node_measured_mj == pytest.approx(10_005_000, abs=100)


def looked_at(meter, clock, seconds):
    """How many looks its thread would have taken of the first device in so long."""
    source, looks, end = meter.parts.devices[0].source, [], clock.now + seconds
    read = source.read
    source.read = lambda: (looks.append(clock.now), read())[1]
    while clock.now < end:
        meter.look()
        clock.now = meter.parts.devices[0].due_s
    source.read = read
    return [until - since for since, until in pairwise(looks)]


def test_looks_are_irregular_and_become_fewer_where_they_are_dear_but_one_a_second():
    clock = Clock()
    meter = metered(clock, [Waves(clock, "GPU-a")])
    waits = looked_at(meter, clock, 30)
    assert len(waits) == pytest.approx(300, abs=3)
    assert (min(waits), max(waits)) == (pytest.approx(0.075, abs=0.001), pytest.approx(0.125, abs=0.001))
    assert meter.meters.get("looks") is None
    meter._pace(0.002)
    assert len(looked_at(meter, clock, 30)) == pytest.approx(75, abs=2)
    assert meter.meters["looks"].startswith("every 0.4 s, not every 0.1 s: more would take over 0.05 % of a core")
    meter._pace(0.02)
    assert max(looked_at(meter, clock, 30)) == pytest.approx(1.0, abs=0.01)
    for _ in range(3):
        meter._pace(0.0001)
    assert meter.meters["looks"] == "every 0.1 s"
    assert len(looked_at(meter, clock, 30)) == pytest.approx(300, abs=3)
    taken = meter.take()
    assert taken.integral_mj == pytest.approx(taken.counter_mj, rel=5e-3)


def test_a_meter_that_takes_long_to_answer_is_asked_less_often():
    clock = Clock()
    node = Steady(clock, "n", scope="node", counter=False, update_s=1.0)
    read, looks = node.read, []

    def slow():
        clock.now += 0.5
        looks.append(clock.now)
        return read()

    node.read = slow  # type: ignore[method-assign]
    meter = metered(clock, [Steady(clock, "GPU-a")], [], node)
    while clock.now < 1060:
        meter.look()
        clock.now += 0.1
    assert len(looks) <= 7
    taken = meter.take()
    assert (taken.gaps, taken.node_measured_mj) == (0, 500 * taken.ms)


def test_at_the_end_a_slow_meter_of_the_node_keeps_nobody_waiting():
    """Redfish is asked every 10 s: what was drawn since its last answer is estimated, and not forgotten."""
    clock = Clock()
    node = Steady(clock, "n", scope="node", watts=1700, counter=False, update_s=10.0)
    read, kept = node.read, []

    def polled():
        if not kept or clock.now - kept[-1].time_s >= 10:
            kept.append(read())
        return kept[-1]

    node.read = polled  # type: ignore[method-assign]
    meter = metered(clock, [Steady(clock, "GPU-a")], [], node, rest=300.0)
    pass_by(meter, clock, 27)
    assert meter.take().ms == pytest.approx(20_000, abs=200)
    meter.look(every=True, last=True)
    taken = meter.take()
    assert taken.ms == pytest.approx(7_000, abs=200)
    assert (taken.device_measured_mj, taken.node_measured_mj, taken.node_estimated_mj) == tuple(one * taken.ms for one in (500, 500, 300))


def test_a_mistake_of_ours_stops_the_meter_with_a_note_and_not_the_run():
    clock = Now()
    gpu = Steady(clock, "GPU-a")
    gpu.read = lambda: 1 / 0  # type: ignore[method-assign,assignment]
    with metered(clock, [gpu]) as meter:
        assert meter.take().nodes == 0
    assert "the meter stopped: ZeroDivisionError" in meter.meters["notes"]


def test_with_nothing_to_read_time_passes_and_all_is_unknown():
    clock = Clock()
    meter = metered(clock)
    pass_by(meter, clock, 10)
    taken = meter.take()
    assert (taken.nodes, taken.ms, taken.devices) == (1, 10_000, 1)
    assert taken.node_unknown_ms == taken.device_unknown_ms == 10_000
    assert (taken.device_measured_mj, taken.node_measured_mj, taken.bins) == (0, 0, [])
    assert (meter.watts(), meter.joules()) == (None, 0)
    assert meter.meters["device"] == "1 x unknown: no meter, no nameplate"


def test_a_machine_with_no_meter_is_opened_and_says_what_it_lacks(tmp_path):
    with opened(Power(sysfs=str(tmp_path), node="none"), Watts(), ["GPU-1", "GPU-2"], whole=True) as meter:
        assert meter.meters["device"] == "2 x unknown: no meter, no nameplate"
        assert "no NVML: " in meter.meters["notes"]
    assert meter.take().devices == 2


def test_a_cpu_machine_with_rapl_is_opened(tmp_path):
    zone = tmp_path / "class" / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("energy_uj", "1000000"), ("max_energy_range_uj", "262143328850")):
        (zone / name).write_text(text + "\n")
    with opened(Power(sysfs=str(tmp_path), node="none", every_s=0.02), Watts(), [], whole=True) as meter:
        time.sleep(0.1)
        (zone / "energy_uj").write_text("3500000\n")
    taken = meter.take()
    assert (taken.devices, taken.device_measured_mj, taken.cpu_mj, taken.node_measured_mj) == (1, 2500, 2500, 2500)
    assert os.uname().nodename not in meter.meters["device"]

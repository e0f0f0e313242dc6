"""What of a node is the job's: of one that others use too, and of a machine that several processes read."""

import pytest
from replay import Clock, Steady, figure, metered, pass_by, summed

from gigatrain.planning.watts import Watts
from gigatrain.power.boundary import look

WATTS = {"rest": 1602.0, "per_node": 8}


def gpus(clock, count, watts=700.0, first=0):
    return [Steady(clock, f"GPU-{first + number}", watts=watts) for number in range(count)]


def board(clock, watts):
    return None if watts is None else Steady(clock, "n", scope="node", watts=watts)


def told(*meters):
    """Watts of the node that these readers of one machine tell together, by provenance, and for which share of the time they are unknown."""
    taken = summed(meter.take() for meter in meters)
    return taken, [round(value / taken.ms, 2) for value in (taken.node_measured_mj, taken.node_estimated_mj, taken.node_unknown_ms)]


def metered_for(seconds, clock, *makers):
    """Each reader sees the same stretch."""
    made = [maker() for maker in makers]
    began_s = clock.now
    for meter in made:
        clock.now = began_s
        pass_by(meter, clock, seconds)
    return made


@pytest.mark.parametrize(
    ("others_watts", "node_watts"),
    [
        (7 * 700.0, [700.0, 200.25, 0.0]),  # like ours: an eighth of the node
        (
            7 * 70.0,
            [700.0, 200.25, 0.0],
        ),  # idle: ours, and an eighth of the 1,602 W of the rest; an eighth of the meter's 2,792 W is less than ours alone
        (7 * 1000.0, [700.0, 462.75, 0.0]),  # above ours: we cannot tell theirs from the rest
    ],
)
def test_one_of_eight_gpus_is_charged_its_own_and_an_eighth_of_the_rest(others_watts, node_watts):
    clock = Clock()
    meters = metered_for(20, clock, lambda: metered(clock, gpus(clock, 1), [], board(clock, 700 + others_watts + 1602), **WATTS))
    taken, found = told(*meters)
    assert found == node_watts
    seen, why = look(taken, Watts(accelerators=1, per_node=8, rest_watts=figure(1602.0)), 20.0)
    assert seen["node"] is not None
    assert "node" not in why
    assert seen["node"].layers["device"]["measured"] == pytest.approx(14_000)
    assert "others' devices are taken to draw like ours" in meters[0].meters["share"]


def test_beside_idle_gpus_a_rest_that_the_site_does_not_know_is_unknown_and_no_zero():
    clock = Clock()
    meters = metered_for(20, clock, lambda: metered(clock, gpus(clock, 1), [], board(clock, 700 + 490 + 1602), per_node=8))
    taken, found = told(*meters)
    assert found == [700.0, 0.0, 1.0]
    why = look(taken, Watts(accelerators=1, per_node=8), 20.0)[1]
    assert "of a node that others use too, power.node_watts" in why["node"]
    busy = metered_for(20, clock, lambda: metered(clock, gpus(clock, 1), [], board(clock, 8 * 700 + 1602), per_node=8))
    assert told(*busy)[1] == [700.0, 200.25, 0.0]


@pytest.mark.parametrize("meter_watts", [None, 7202.0])
def test_two_containers_of_four_gpus_are_one_whole_machine(meter_watts):
    """The reader of the machine is told that it is all the run's; the other counts its devices."""
    clock = Clock()
    meters = metered_for(
        20,
        clock,
        lambda: metered(clock, gpus(clock, 4), [], board(clock, meter_watts), share=1.0, **WATTS),
        lambda: metered(clock, gpus(clock, 4, first=4), whole=False, elsewhere=meter_watts is not None, **WATTS),
    )
    taken, found = told(*meters)
    assert sum(found[:2]) == 7202
    assert found[2] == 0
    assert (taken.nodes, taken.devices, taken.device_measured_mj) == (1, 8, 8 * 700 * 20_000)
    assert "share" not in meters[0].meters
    assert look(taken, Watts(accelerators=8, per_node=8), 20.0)[0]["node"] is not None


@pytest.mark.parametrize("meter_watts", [None, 7202.0, 4 * 700 + 4 * 70 + 1602.0])
def test_two_containers_of_two_gpus_are_half_a_machine(meter_watts):
    clock = Clock()
    meters = metered_for(
        20,
        clock,
        lambda: metered(clock, gpus(clock, 2), [], board(clock, meter_watts), share=0.5, **WATTS),
        lambda: metered(clock, gpus(clock, 2, first=2), whole=False, elsewhere=meter_watts is not None, **WATTS),
    )
    taken, found = told(*meters)
    assert sum(found[:2]) == 4 * 700 + 801
    assert look(taken, Watts(accelerators=4, per_node=8), 20.0)[0]["node"] is not None


def test_accelerators_by_nameplate_are_no_more_than_the_node():
    clock = Clock()
    shared = metered(clock, gpus(clock, 1), [], board(clock, 1500.0), rest=100.0, plate=900.0, unmetered=1, per_node=8)
    pass_by(shared, clock, 20)
    taken = shared.take()
    assert (taken.node_measured_mj, taken.node_estimated_mj, taken.node_nameplate_mj) == (700 * 20_000, 0, 800 * 20_000)


def test_a_job_without_accelerators_has_its_share_of_what_is_beside_the_processors():
    clock = Clock()
    package = Steady(clock, "n", "package-0", scope="cpu", watts=200)
    meter = metered(clock, [], [package], board(clock, 600.0), share=0.25)
    pass_by(meter, clock, 20)
    assert told(meter)[1] == [200.0, 100.0, 0.0]

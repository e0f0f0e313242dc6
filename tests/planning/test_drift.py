"""Windows beside ranges: what is a drift and what is not, and the cause that is named for it."""

import pytest

from gigatrain.planning.drift import FIRST, ROW, drift, planned_phases
from gigatrain.planning.expected import Expected, Range

GIB = 2**30
EXPECTED = Expected(
    step_s=Range(low=0.9, mid=1.0, high=1.1),
    tokens_per_s=Range(low=900, mid=1000, high=1100),
    phases={"gemm": 0.6, "attention": 0.1, "memory": 0.1, "exposed_tensor": 0.05, "exposed_shard": 0.05, "optimizer": 0.1},
    memory_bytes=Range(low=60 * GIB, mid=64 * GIB, high=68 * GIB),
    watts={"device": Range(low=9_000, mid=10_000, high=11_000), "node": Range(low=11_000, mid=12_000, high=13_000)},
    goodput=Range(low=0.92, mid=0.95, high=0.98),
    lost={"checkpoint": 0.01, "redone": 0.02, "restart": 0.01},
    checkpoint_every=500,
)
PHASES = {"data": 0.001, "forward": 0.25, "backward": 0.55, "reduce": 0.06, "optimizer": 0.1, "rest": 0.01}


def windows(count, step_s=1.0, start=0, **more):
    grown = {"phases": dict(PHASES), "watts": {"device": 10_000.0, "node": 12_000.0}, "process": "a"} | more
    return [{"step": 10 * (start + at + 1), "step_s": step_s, "tokens_per_s": 1000 / step_s, **grown} for at in range(count)]


def slow(**more):
    return windows(10) + windows(5, 1.4, 10, **more)


def test_a_run_as_planned_drifts_nowhere():
    quiet = {"peak_bytes": 64 * GIB, "goodput": {"wall_s": 9e4, "share": 0.95, "seconds": {"training": 8.5e4}}}
    assert drift(EXPECTED, windows(40, 1.09, **quiet)) == ()
    assert drift(Expected(), windows(40, 9.0)) == ()
    assert drift(EXPECTED, []) == ()


def test_first_windows_and_single_ones_are_not_judged():
    assert drift(EXPECTED, windows(FIRST, 9.0) + windows(10, start=FIRST)) == ()
    assert drift(EXPECTED, windows(FIRST + ROW - 1, 9.0)) == ()
    assert len(drift(EXPECTED, windows(FIRST + ROW, 9.0))) == 1
    single = [one for at in range(12) for one in windows(1, 1.5 if at % 2 else 1.0, at)]
    assert drift(EXPECTED, single, past=True) == ()
    again = windows(10) + windows(FIRST, 9.0, 10, process="b") + windows(5, start=12, process="b")  # a resume warms up again
    assert drift(EXPECTED, again, past=True) == ()


def test_what_is_over_is_told_of_a_whole_run_only():
    found = windows(10) + windows(4, 1.5, 10) + windows(6, start=14)
    assert drift(EXPECTED, found) == ()
    (one,) = drift(EXPECTED, found, past=True)
    assert (one.what, one.since, one.until, one.windows, one.lasts) == ("step", 110, 140, 4, False)
    assert "steps 110 to 140" in one.words


@pytest.mark.parametrize(
    ("cause", "more"),
    [
        ("the loader", {"phases": PHASES | {"data": 0.4}}),
        ("the fabric", {"phases": PHASES | {"reduce": 0.46}}),
        ("the optimizer", {"phases": PHASES | {"optimizer": 0.5}}),
        ("the host", {"phases": PHASES | {"rest": 0.4}}),
        ("forward and backward", {"phases": PHASES | {"backward": 0.95}}),
        ("power limit", {"phases": PHASES | {"backward": 0.95}, "capped_share": 0.8}),
        ("heat", {"phases": PHASES | {"backward": 0.95}, "thermal_share": 0.3, "capped_share": 0.8}),
        ("the run's own budget", {"phases": PHASES | {"backward": 0.95}, "cap_share": 0.7}),
        ("rank 7 on n3", {"phases": PHASES | {"reduce": 0.46}, "slowest": {"rank": 7, "node": "n3", "own_s": 0.5, "median_s": 0.25}}),
        ("the run waits 29 % of its time", {"spent": {"training": 10.0, "paced": 4.0}}),
        ("no trace", {"phases": None}),
    ],
)
def test_the_cause_of_a_slow_step(cause, more):
    (one,) = drift(EXPECTED, slow(**more))
    assert one.what == "step"
    assert one.ratio == pytest.approx(1.4)
    assert one.since == 110
    assert cause in one.cause
    assert one.advice
    assert f"planned 900 ms to 1.10 s (+40 %), since step 110: {one.cause}; {one.advice}" in one.words


def test_a_usual_share_at_the_power_limit_is_no_cause():
    found = windows(10, capped_share=0.6) + windows(5, 1.4, 10, capped_share=0.62, phases=PHASES | {"backward": 0.95})
    (one,) = drift(EXPECTED, found)
    assert "forward and backward" in one.cause


def test_slow_from_the_first_window_is_the_estimate_or_what_the_plan_lacks():
    (one,) = drift(EXPECTED, windows(10, 1.4, phases=PHASES | {"backward": 0.95}))
    assert "may not hold" in one.cause
    assert "--calibrate" in one.advice
    (one,) = drift(EXPECTED, windows(10, 1.4, phases=PHASES | {"data": 0.4}))
    assert "the loader" in one.cause
    assert "planned 0 ms" in one.cause
    (one,) = drift(EXPECTED, windows(10, 0.5))
    assert "faster" in one.cause


def test_memory_watts_and_goodput():
    (one,) = drift(EXPECTED, windows(3, peak_bytes=72 * GIB, reserved_bytes=79 * GIB))
    assert (one.what, one.unit) == ("memory of a rank", "bytes")
    assert "larger than planned" in one.cause
    (one,) = drift(EXPECTED, windows(3, peak_bytes=69 * GIB, reserved_bytes=90 * GIB))
    assert "fragmentation" in one.cause
    assert drift(EXPECTED, windows(3, peak_bytes=20 * GIB)) == ()  # another rank may be the fullest

    (one,) = drift(EXPECTED, windows(10, watts={"device": 12_500.0, "node": 14_500.0}))
    assert (one.what, one.unit) == ("watts, device", "W")  # and not the node again, which holds it
    (one,) = drift(EXPECTED, windows(10, watts={"device": 10_000.0, "node": 14_500.0}))
    assert "fans" in one.cause
    step, watts = drift(EXPECTED, windows(10) + windows(5, 1.4, 10, watts={"device": 7_000.0}))
    assert (step.what, watts.what) == ("step", "watts, device")
    assert "waits draws less" in watts.cause
    assert drift(EXPECTED, windows(10, spent={"training": 10.0, "checkpoint": 30.0}, watts={"device": 4_000.0})) == ()

    lost = {"wall_s": 1e5, "share": 0.8, "seconds": {"training": 8e4, "checkpoint": 1.5e4, "redone": 3e3, "starting": 2e3}}
    (one,) = drift(EXPECTED, windows(10, goodput=lost))
    assert one.what == "goodput"
    assert "checkpoint takes 15.0 % of wall-clock, planned 1.0 %" in one.cause
    assert "every 500 steps" in one.advice
    assert drift(EXPECTED, windows(10, goodput=lost | {"wall_s": 600.0})) == ()  # a start is most of it


def test_a_plan_with_a_speed_alone():
    expected = Expected(tokens_per_s=Range(low=900, mid=1000, high=1100))
    (one,) = drift(expected, slow(phases=PHASES | {"data": 0.4}))
    assert (one.what, one.unit) == ("tokens/s", "tokens/s")
    assert "the loader" in one.cause


def test_damaged_windows_are_left_out():
    damaged = [{"step": 5}, {"step": 6, "step_s": "x", "phases": 3, "watts": {"device": True}, "spent": 1}, {}]
    assert drift(EXPECTED, [*windows(10), *damaged]) == ()


def test_a_plans_phases_by_a_traces_names():
    found = planned_phases(EXPECTED)
    assert found == pytest.approx({"data": 0.0, "compute": 0.85, "reduce": 0.05, "optimizer": 0.1})
    assert planned_phases(Expected()) == {}

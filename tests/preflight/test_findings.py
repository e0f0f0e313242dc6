"""Checks that raise, hang or come too late: each is named, and none of them stops the others."""

import threading
import time

from gigatrain.preflight import findings
from gigatrain.preflight.findings import Check, Clock, Finding


def ok(name="fine"):
    return Check(name, lambda: Finding(name, "ok", "well"))


def hangs(never) -> list[Finding]:
    never.wait()
    return []


def broken():
    raise ValueError("of no use")


def test_a_check_that_raises_is_bad_with_its_error():
    found, hung = findings.run([Check("broken", broken), ok()], Clock(5))
    assert [(one.name, one.state) for one in found] == [("broken", "bad"), ("fine", "ok")]
    assert "ValueError: of no use (test_findings.py:" in found[0].said
    assert not hung


def test_a_check_that_hangs_is_left_behind_at_its_own_limit():
    never = threading.Event()
    begin = time.monotonic()
    found, hung = findings.run([Check("hangs", lambda: hangs(never), 0.2), ok()], Clock(60))
    assert time.monotonic() - begin < 10
    assert [(one.name, one.state, one.limit) for one in found] == [("hangs", "bad", 0.2), ("fine", "ok", None)]
    assert hung == ["hangs"]
    never.set()


def test_what_the_whole_limit_leaves_no_time_for_is_untested_by_name():
    never = threading.Event()
    found, hung = findings.run([Check("long", lambda: hangs(never), 30), ok("a"), ok("b")], Clock(0.3))
    assert [(one.name, one.state) for one in found] == [("long", "warn"), ("a", "untested"), ("b", "untested")]
    assert hung == ["long"]
    assert "all that was left of 0.3 s" in found[0].said
    assert "the whole limit of 0.3 s was spent" in found[1].said
    never.set()


def test_a_check_that_hung_is_bad_after_half_of_its_limit_unless_others_may_be_why():
    never = threading.Event()
    for limit_s, alone, state in ((0.5, True, "bad"), (30, True, "warn"), (0.5, False, "untested")):
        found, _ = findings.run([Check("burn", lambda: hangs(never), limit_s, alone)], Clock(0.3))
        assert (found[0].state, found[0].way_out) == (state, findings.HUNG)
    never.set()


def test_the_worst_part_speaks_for_all_and_says_how_many():
    parts = [Finding("x", "warn", f"port {index}", index, 0, "mend it") for index in range(10)] + [Finding("x", "ok", "fine")]
    found = findings.worst("x", parts, "all fine")
    assert (found.state, found.value, found.way_out) == ("warn", 0, "mend it")
    assert found.said.endswith("port 7; and 2 more")
    assert findings.worst("x", parts[-1:], "all fine").said == "all fine"
    assert findings.health([found]) == "suspect"
    assert findings.health([found, Finding("y", "bad", "")]) == "bad"
    assert findings.health([Finding("y", "untested", "")]) == "healthy"

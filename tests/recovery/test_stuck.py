"""Who is to blame for a hang, and how long ranks may be silent."""

import pytest

from gigatrain.recovery.stuck import Pace, View, culprit


def view(rank, *, state="S", silent_s=0.1, begun=10, marks=3, phase="forward", cores=0.0):
    return View(rank=rank, state=state, silent_s=silent_s, begun=begun, marks=marks, phase=phase, step=begun, cores=cores)


@pytest.mark.parametrize(
    ("blamed", "words"),
    [
        ({"state": "T", "silent_s": 9.0}, "stopped"),
        ({"state": "D"}, "disk or file system"),
        ({"silent_s": 9.0}, "Python's lock"),
        ({"marks": 1, "phase": "data"}, "the others are further"),
        ({"cores": 0.98}, "it computes"),
    ],
)
def test_the_culprit_is_told_from_those_that_wait(blamed, words):
    found, why = culprit([view(0), view(1, **blamed), view(2)])
    assert found is not None
    assert found.rank == 1
    assert words in why


def test_nobody_is_blamed_where_all_wait_alike():
    assert culprit([view(0), view(1)])[0] is None


def test_the_limit_is_learned_and_has_a_floor():
    pace = Pace(times=3, floor_s=0.2, slow_s=100, every=2)
    assert pace.limit_s(slow=False) == 100  # nothing is usual yet
    for _ in range(40):
        pace.stepped(1, 0.01)
    assert pace.limit_s(slow=False) == 0.2
    assert pace.limit_s(slow=True) == 100
    pace.quiet(0.5)  # the wait at a window's end, which was no hang
    assert pace.limit_s(slow=False) == pytest.approx(1.5)

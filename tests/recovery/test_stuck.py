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


def test_the_limit_is_learned_from_a_handful_of_steps_and_has_a_floor():
    pace = Pace(times=3, floor_s=0.2, slow_s=100, every=2)
    assert pace.limit_s(slow=False) == pytest.approx(0.8)  # nothing is usual yet
    assert pace.limit_s(slow=True) == 100
    for _ in range(5):
        pace.stepped(1, 0.01)
    assert pace.limit_s(slow=False) == 0.2
    assert pace.limit_s(slow=True) == 100
    for _ in range(50):
        pace.stepped(1, 0.5)  # the load has doubled
    assert pace.limit_s(slow=False) == pytest.approx(1.5)


@pytest.mark.parametrize("every", [2, 10, 400])
def test_the_wait_at_a_windows_end_is_usual(every):
    pace = Pace(times=3, floor_s=0.2, slow_s=100, every=every)
    for step in range(2 * every + 4):
        pace.stepped(1, 2.0 if step % every == every - 1 else 0.01)
    assert pace.limit_s(slow=False) == pytest.approx(6.0)


def test_a_process_that_was_stopped_once_does_not_stretch_the_limit():
    pace = Pace(times=3, floor_s=0.2, slow_s=1000, every=2)
    for step in range(200):
        pace.stepped(1, 50.0 if step == 50 else 0.01)
    assert pace.limit_s(slow=False) == 0.2


def test_the_lock_of_the_only_rank_is_told_of():
    found, why = culprit([view(0, silent_s=9.0)])
    assert found is not None
    assert "Python's lock" in why

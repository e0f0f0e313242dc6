"""When a rank is overdue, of what is seen of it: a clock of the test's own, and no processes."""

from types import SimpleNamespace
from typing import Any

import pytest

from gigatrain.recovery.board import Row
from gigatrain.recovery.lookout import Lookout, Overdue
from gigatrain.recovery.stuck import Pace

FLOOR_S, SLOW_S = 1.0, 60.0


class Seen:
    """Two ranks that step ten times a second, until they are told to stand; rank 1 may move bytes, or its own clock stand."""

    def __init__(self, *, hangs=True):
        self.now, self.turn = 1000.0, 0
        self.changes: dict[str, Any] = {}
        self.state, self.moves = "S", False
        self.rows: dict[int, Row] = {}
        board: Any = SimpleNamespace(row=self.rows.__getitem__)
        self.lookout = Lookout(board, Pace(times=3, floor_s=FLOOR_S, slow_s=SLOW_S, every=2), hangs=hangs)

    def rank(self, number: int) -> Any:
        state = self.state
        moved = self.turn << 20 if number == 1 and self.moves else 0
        return SimpleNamespace(rank=number, code=None, state=lambda: (state, 0.0), moved_bytes=lambda: moved, waits_in=lambda: "")

    def look(self, seconds: float, *, every_s=0.1, begun=True) -> Overdue | None:
        """For so long; ends where one is overdue."""
        for _ in range(round(seconds / every_s)):
            self.now, self.turn = self.now + every_s, self.turn + 1
            for number in (0, 1):
                row = Row(self.turn, self.turn, self.turn * begun, self.turn, 0, False, 1, "forward")
                if number in self.rows and self.changes:
                    kept = self.rows[number]
                    row = Row(
                        kept.beat_ns if number == 1 and "beat_ns" in self.changes else self.turn,
                        kept.beats, kept.begun, kept.step, kept.marks, self.changes.get("slow", False), 1, self.changes.get("phase", "forward"),
                    )  # fmt: skip
                self.rows[number] = row
            if (found := self.lookout.look([self.rank(0), self.rank(1)], self.now)) is not None:
                return found
        return None


def test_ranks_that_get_on_are_never_overdue_and_their_first_step_is_known():
    seen = Seen()
    assert seen.lookout.resumed is None
    assert seen.look(30) is None
    assert seen.lookout.resumed == 1


def test_steps_that_stand_are_overdue():
    seen = Seen()
    seen.look(5)
    seen.changes, began = {"beats": True}, seen.now
    found = seen.look(SLOW_S)
    assert found is not None
    assert found.seconds > found.limit_s == FLOOR_S
    assert seen.now - began == pytest.approx(FLOOR_S, abs=0.3)


def test_a_stalled_disk_gets_as_long_as_a_save():
    seen = Seen()
    seen.look(5)
    seen.changes, seen.state, began = {"beats": True}, "D", seen.now
    found = seen.look(2 * SLOW_S)
    assert found is not None
    assert seen.now - began == pytest.approx(SLOW_S, abs=0.5)


def test_where_no_hang_is_looked_for_nobody_is_overdue():
    seen = Seen(hangs=False)
    seen.look(5)
    seen.changes = {"beats": True}
    assert seen.look(3 * SLOW_S) is None


def test_whoever_moves_bytes_in_a_save_gets_on_and_the_others_wait_for_it():
    seen = Seen()
    seen.look(5)
    seen.changes, seen.moves = {"slow": True, "phase": "checkpoint"}, True
    assert seen.look(3 * SLOW_S) is None
    seen.moves = False
    found = seen.look(3 * SLOW_S)
    assert found is not None
    assert found.limit_s == SLOW_S


def test_a_rank_whose_own_clock_stands_is_overdue_in_a_save_too():
    seen = Seen()
    seen.look(5)
    seen.changes, seen.moves = {"slow": True, "phase": "checkpoint", "beat_ns": True}, True
    found = seen.look(SLOW_S)
    assert found is not None
    assert found.limit_s == FLOOR_S


def test_time_in_which_nobody_looked_does_not_count():
    """The supervisor was stopped with its ranks, or got no core: one look is a second at most."""
    seen = Seen()
    seen.look(5)
    seen.changes = {"beats": True}
    assert seen.look(0.5) is None
    seen.now += 3600
    found = seen.look(0.1)
    assert found is not None
    assert found.seconds == pytest.approx(1.5, abs=0.2)

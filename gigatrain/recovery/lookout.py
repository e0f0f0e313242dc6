"""One start of the ranks as it is seen from outside: how far each is, what it used, and whether one is overdue. Free of torch."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from gigatrain.recovery import board, stuck
from gigatrain.recovery.ranks import Rank

AWAKE_S = 1.0  # that one look counts for at most


class Overdue(NamedTuple):
    """For how long a rank gave no sign of progress, and how long it may."""

    seconds: float
    limit_s: float


class Lookout:
    """`look` some times a second; `culprit` once one is overdue."""

    def __init__(self, written: board.Board, pace: stuck.Pace, *, hangs: bool) -> None:
        """`written`: the board of these ranks. `pace` learns what a step takes, over all starts. `hangs`: whether a rank is ever overdue."""
        self.board, self.pace, self.hangs = written, pace, hangs
        self.resumed: int | None = None  # the step that the ranks went on from, once all have begun one
        self.looked_s = 0.0
        self._awake_s = 0.0  # that this process was there to look: where it is stopped with its ranks, or gets no core, time does not count
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: beats, and since when they stand, of the time awake
        self._heard: dict[int, tuple[int, float]] = {}  # the same of its own clock
        self._moved: dict[int, tuple[int, float]] = {}  # the same of what it read and wrote, in MiB
        self._used: dict[int, tuple[float, float, float]] = {}  # cores: when, seconds, cores in between
        self._stepped = (0, 0.0)
        self._slow = True

    def look(self, ranks: Sequence[Rank], now: float) -> Overdue | None:
        """At the board: how far all are, and whether one is overdue. `now`: of the monotonic clock."""
        self._awake_s += min(now - self.looked_s, AWAKE_S)
        self.looked_s = now
        alive = [rank for rank in ranks if rank.code is None]
        rows = {rank.rank: self.board.row(rank.rank) for rank in alive}
        slow = any(row.slow for row in rows.values()) or len(alive) < len(ranks)
        if self.resumed is None and len(alive) == len(ranks) and all(row.begun for row in rows.values()):
            self.resumed = (rows[0].step or 0) - rows[0].begun + 1  # it may have done some since
        begun, since_s = self._stepped
        first = min(row.begun for row in rows.values())
        if first > begun:
            if since_s and not slow and not self._slow:
                self.pace.stepped(first - begun, now - since_s)
            self._stepped, self._slow = (first, now), False
        self._slow = self._slow or slow
        limit_s, usual_s, slow_s = self.pace.limit_s(slow=slow), self.pace.limit_s(slow=False), self.pace.limit_s(slow=True)
        still: list[float] = []
        for rank in alive:
            row = rows[rank.rank]
            still_s = self._since(self._seen, rank.rank, row.beats)
            silent_s = self._since(self._heard, rank.rank, row.beat_ns)
            self._use(rank, now)
            if not self.hangs:
                continue
            # No phase is so slow that a rank's own clock stands still in it, once it has begun a step; nothing goes on in a process that is stopped.
            if silent_s > usual_s and ((row.begun and row.phase != board.LEAVING) or rank.state()[0] in "Tt"):
                return Overdue(silent_s, usual_s)
            if slow:  # a save, an export, a build: whoever moves bytes gets on
                still_s = min(still_s, self._since(self._moved, rank.rank, rank.moved_bytes() >> 20))
            elif still_s > limit_s and still_s > (slow_s if rank.state()[0] == "D" else limit_s):  # D: its file system stalls
                return Overdue(still_s, limit_s)
            still.append(still_s)
        if slow and still and min(still) > limit_s:  # else the others wait for one that gets on
            return Overdue(max(still), limit_s)
        return None

    def culprit(self, alive: Sequence[Rank]) -> tuple[stuck.View | None, str, list[stuck.View]]:
        """The rank to blame (None: all wait alike), what is the matter with it, and what was seen of each."""
        now = time.monotonic_ns()
        views = []
        for rank in alive:
            row = self.board.row(rank.rank)
            views.append(
                stuck.View(
                    rank=rank.rank,
                    state=rank.state()[0],
                    silent_s=(now - row.beat_ns) / 1e9 if row.beat_ns else 0.0,
                    begun=row.begun,
                    marks=row.marks,
                    phase=row.phase,
                    step=row.step,
                    cores=self._used.get(rank.rank, (0.0, 0.0, 0.0))[2],
                    waits_in=rank.waits_in(),
                )
            )
        return *stuck.culprit(views), views

    def _since(self, known: dict[int, tuple[int, float]], rank: int, value: int) -> float:
        """For how long, of the time awake, the value of a rank has stood."""
        last, at_s = known.get(rank, (value - 1, self._awake_s))
        if value != last:
            known[rank] = value, self._awake_s
            return 0.0
        return self._awake_s - at_s

    def _use(self, rank: Rank, now: float) -> None:
        """Once a second, what it used of a core since."""
        at_s, seconds, _ = self._used.get(rank.rank, (0.0, 0.0, 0.0))
        if now - at_s >= 1.0:
            _, used = rank.state()
            self._used[rank.rank] = now, used, (used - seconds) / (now - at_s) if at_s else 0.0

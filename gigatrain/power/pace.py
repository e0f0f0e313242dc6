"""What is ordered until the next decision, and the sleeping that keeps steps to it."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from gigatrain.power.line import LOW

MEET_S = 30.0  # in a pause ranks meet so often
SLICE_S = 0.2  # the longest sleep
MOST_WAIT_S = 60.0  # before a step whose length is not known yet


@dataclass(frozen=True, slots=True)
class Orders:
    """What is done until the next decision. None: nothing of the kind."""

    period_s: float | None = None  # least seconds between the starts of steps, once it is on its level
    pause_until_s: float | None = None  # wall-clock
    pause_from_s: float = 0.0  # when it was decided, or is to begin: what ranks count their meetings from
    pause_after: int = 0  # steps before it: alike on every rank, as a clock is not
    cap_share: float | None = None  # limit of each accelerator, over `watts.device_watts`
    why: str = ""
    share: float = 1.0  # of full speed
    busy_s: float | None = None  # what a step takes without waiting; None: not known yet, each rank measures
    slope: float | None = None  # how fast `share` may change, per second; None: at once
    low: float = LOW  # where a ramp begins after a stop, and ends before one
    brake_after: int | None = None  # after so many steps down to `low`
    then_s: float | None = None  # from this time on
    then_share: float = 1.0  # no more than this
    leave: bool = False  # a budget that cannot be kept, ever: save and leave
    notices: tuple[tuple[str, str], ...] = ()  # of what a user must know: its kind, and words that stay the same for as long as it holds

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self == replace(NOTHING, why=self.why, busy_s=self.busy_s, low=self.low, notices=self.notices)

    def json(self) -> dict[str, Any]:
        """For RUN/energy.jsonl: what is not None, and why."""
        found = asdict(self)
        return {name: found[name] for name in ("period_s", "pause_until_s", "cap_share", "share", "why")} | (
            {"leave": True} if self.leave else {}
        )


NOTHING = Orders()


class Pace:
    """Keeps steps to their orders by sleeping before them. Without orders `wait` returns at once.

    `ready` waits until the device has done what it was given (torch.cuda.synchronize); it is called only where there is something to wait for, since a host
    that runs ahead does not know how long a step takes. clock, sleep and wall are for tests.
    """

    def __init__(
        self,
        ready: Callable[[], None] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.orders = NOTHING
        self._ready, self._clock, self._sleep, self._wall = ready, clock, sleep, wall
        self._share: float | None = None  # now; None: nothing has begun
        self._steps = 0  # since these orders
        self._braking = False
        self._begun_s: float | None = None  # of the last step
        self._moved_s: float | None = None  # until when `_share` is true
        self._busy: list[float] = []
        self._waited_s = 0.0
        self._pauses = False

    def follow(self, orders: Orders) -> None:
        """These orders from the next step on."""
        if orders.slope is None:
            self._share = orders.share
        elif self._share is None:
            self._share = orders.low  # a cold start
        self.orders, self._steps, self._braking = orders, 0, False
        self._pauses = orders.pause_until_s is not None

    def restart(self) -> None:
        """After a save: whatever was drawn before, it now begins at rest again."""
        if self._braking:
            self.orders = replace(self.orders, brake_after=None)  # that was for this save
        self._braking, self._begun_s = False, None
        if self.orders.slope is not None:
            self._share, self._moved_s = self.orders.low, self._clock()

    def take_waited_s(self) -> float:
        """Seconds waited since this was last asked, pauses not among them."""
        found, self._waited_s = self._waited_s, 0.0
        return found

    def wait(self, stop: Callable[[], bool], alive: Callable[[], None], meet: Callable[[], bool] | None = None) -> float:
        """Wait until the next step may begin; returns the seconds of a pause that was in it.

        `stop`: whether to leave at once; `alive`: called at least every 0.2 s; `meet`: called in a pause every 30 s, on all ranks equally often whatever their
        clocks say, and leaves it where it says so (as `stop` of one rank alone must not, where ranks wait for each other).
        """
        if self.orders is NOTHING or self.orders.idle:
            self._begun_s = None
            return 0.0
        paused_s = self._pause(stop, alive, meet) if self._pauses and self._steps >= self.orders.pause_after else 0.0
        orders = self.orders
        self._braking = self._braking or (orders.brake_after is not None and self._steps >= orders.brake_after)
        self._steps += 1
        now = self._clock()
        if self._goal() >= 1.0 and (self._share or 0.0) >= 1.0:
            self._begun_s = None
            return paused_s
        if self._ready is not None:
            self._ready()
            now = self._clock()
        if self._begun_s is not None:
            base = self._base(now - self._begun_s)
            done = self._advance(self._begun_s if self._moved_s is None else max(self._begun_s, self._moved_s), now)
            began = now
            while (left := base - done) > 1e-9 and not stop():
                alive()
                share = max(self._share or 0.0, 1e-6)
                self._sleep(min(SLICE_S, left / share))
                later = self._clock()
                done += self._advance(now, later)
                now = later
                if orders.busy_s is None and now - began > MOST_WAIT_S:
                    break
            self._waited_s += now - began
        self._begun_s = self._moved_s = now
        return paused_s

    def _base(self, measured_s: float) -> float:
        """What a step takes without waiting, by the governor, else by this rank's last ones."""
        if self.orders.busy_s is not None:
            return self.orders.busy_s
        self._busy = [*self._busy[-2:], measured_s]
        return min(self._busy)

    def _goal(self) -> float:
        orders = self.orders
        goal = orders.share
        if orders.then_s is not None and self._wall() >= orders.then_s:
            goal = min(goal, orders.then_share)
        return min(goal, orders.low) if self._braking else goal

    def _advance(self, before: float, now: float) -> float:
        """Busy seconds that are allowed between two moments, while the share goes to its goal along the ramp."""
        goal, slope, seconds = self._goal(), self.orders.slope, max(0.0, now - before)
        share = self._share if self._share is not None else goal
        if slope is None or share == goal:
            self._share = goal
            return goal * seconds
        moving = min(seconds, abs(goal - share) / slope)
        reached = share + math.copysign(slope * moving, goal - share)
        self._share = goal if moving < seconds else reached
        return (share + reached) / 2 * moving + goal * (seconds - moving)

    def _pause(self, stop: Callable[[], bool], alive: Callable[[], None], meet: Callable[[], bool] | None) -> float:
        assert self.orders.pause_until_s is not None
        began_s, until_s, from_s = self._clock(), self.orders.pause_until_s, self.orders.pause_from_s
        meetings = 0 if meet is None else max(0, math.ceil((until_s - from_s) / MEET_S) - 1)
        met = 0
        while (now := self._wall()) < until_s or met < meetings:
            alive()
            if meet is not None:
                if met < meetings and now >= from_s + (met + 1) * MEET_S:
                    met += 1
                    if meet():
                        break
                    continue
            elif stop():
                break
            self._sleep(min(SLICE_S, max(0.0, until_s - now) or SLICE_S))
        self._pauses, self._begun_s = False, None
        if self.orders.slope is not None:
            self._share, self._moved_s = self.orders.low, self._clock()
        return self._clock() - began_s

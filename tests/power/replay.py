"""Meters whose truth is known: of a power that is a formula, or of a recorded trace; and a clock that a test moves."""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from gigatrain.errors import PowerError
from gigatrain.planning.watts import Watts
from gigatrain.power.meter import Meter
from gigatrain.power.parts import composed, described
from gigatrain.power.reading import Sample, Scope, Taken
from gigatrain.site import UNKNOWN, Figure


class Clock:
    """Seconds that pass when told to; wall-clock is so much later."""

    def __init__(self, now: float = 1000.0, wall: float = 1_790_000_000.0) -> None:
        self.now, self.ahead = now, wall - now

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.ahead


class Steady:
    """A meter of a constant power; a base for others. Spans are pairs of seconds of the clock."""

    def __init__(
        self, clock: Clock, *place: str, scope: Scope = "gpu", watts: float = 500.0, counter: bool = True, power: bool = True, update_s: float = 0.1,
        wrap_mj: int | None = None, reset_s: Sequence[float] = (), lost: Iterable[tuple[float, float]] = (), reasons: int | None = 0, name: str = "",
    ) -> None:  # fmt: skip
        self.clock, self.level = clock, watts
        self.place: tuple[str, ...] = place
        self.scope: Scope = scope
        self.update_s, self.wrap_mj, self.reset_s, self.lost, self.reasons = update_s, wrap_mj, list(reset_s), list(lost), reasons
        self.counts, self.powers = counter, power
        self.name, self.covers, self.closed = name or f"counter of {place[-1]}", (place[-1],), False

    def watts(self, at_s: float) -> float:
        return self.level

    def joules(self, at_s: float) -> float:
        return self.level * at_s

    def read(self) -> Sample:
        now = self.clock()
        if any(since <= now < until for since, until in self.lost):
            raise PowerError(f"{self.place[-1]} is lost")
        news = math.floor(now / self.update_s + 1e-9) * self.update_s
        since = max((one for one in self.reset_s if one <= now), default=0.0)
        drawn = round(1000 * (self.joules(max(news, since)) - self.joules(since)))
        if self.wrap_mj is not None:
            drawn %= self.wrap_mj
        return Sample(now, drawn if self.counts else None, round(1000 * self.watts(now)) if self.powers else None, self.reasons)

    def close(self) -> None:
        self.closed = True


class Waves(Steady):
    """Like a training step: a sine of `PERIOD` about the level and a square wave of three seconds."""

    PERIOD, SWING, STEP = 7.3, 150.0, 100.0

    def watts(self, at_s: float) -> float:
        return self.level + self.SWING * math.sin(2 * math.pi * at_s / self.PERIOD) + (self.STEP if at_s % 3.0 < 1.5 else 0.0)

    def joules(self, at_s: float) -> float:
        sine = self.SWING * self.PERIOD / (2 * math.pi) * (1 - math.cos(2 * math.pi * at_s / self.PERIOD))
        return self.level * at_s + sine + self.STEP * (1.5 * (at_s // 3.0) + min(at_s % 3.0, 1.5))


class Replay(Steady):
    """A recorded trace of (seconds from its beginning, watts), straight between its points, from the moment the clock stands at now."""

    def __init__(self, clock: Clock, trace: Sequence[tuple[float, float]], *place: str, **told: object) -> None:
        super().__init__(clock, *place, **told)  # type: ignore[arg-type]
        self.begin_s, self.trace, self.sums = clock(), trace, [0.0]
        for (at, watts), (then, later) in pairwise(trace):
            self.sums.append(self.sums[-1] + (then - at) * (watts + later) / 2)

    def watts(self, at_s: float) -> float:
        at = min(max(at_s - self.begin_s, self.trace[0][0]), self.trace[-1][0])
        index = min(bisect_right(self.trace, at, key=lambda one: one[0]), len(self.trace) - 1)
        (since, watts), (until, later) = self.trace[index - 1], self.trace[index]
        return watts + (later - watts) * (at - since) / (until - since)

    def joules(self, at_s: float) -> float:
        at = min(max(at_s - self.begin_s, self.trace[0][0]), self.trace[-1][0])
        index = max(bisect_right(self.trace, at, key=lambda one: one[0]) - 1, 0)
        return self.sums[index] + (at - self.trace[index][0]) * (self.trace[index][1] + self.watts(at_s)) / 2


def figure(watts: float | None) -> Figure:
    return UNKNOWN if watts is None else Figure(value=watts, basis="declared", source="the test")


def metered(
    clock: Clock, devices: Sequence[Steady] = (), processors: Sequence[Steady] = (), node: Steady | None = None, *, rest: float | None = None,
    plate: float | None = None, per_node: int = 0, carry=None, run: str = "r", every_s: float = 0.1, meter: Callable[..., Meter] = Meter, **told,
) -> Meter:  # fmt: skip
    """A meter of these without a thread: `pass_by` looks by hand."""
    watts = Watts(rest_watts=figure(rest), device_watts=figure(plate), per_node=per_node)
    notes: list[str] = []
    parts = composed(devices, processors, node, watts, every_s=every_s, notes=notes, **told)
    return meter(parts, described(parts, watts, notes), every_s=every_s, carry=carry, run=run, clock=clock, wall=clock.wall)


def pass_by(
    meter: Meter, clock: Clock, seconds: float, *, every_s: float = 0.1, jitter: float = 0.0, miss: float = 0.0, seed: int = 0
) -> None:
    """Look at it for so long, each time up to `jitter` of `every_s` too late or too early; a share `miss` of the looks does not happen."""
    dice, end = random.Random(seed), clock.now + seconds
    meter.look(every=True)
    while clock.now < end - 1e-9:
        clock.now = min(end, clock.now + every_s * (1 + jitter * dice.uniform(-1, 1)))
        if dice.random() >= miss or clock.now >= end - 1e-9:
            meter.look(every=True)


def summed(takes: Iterable[Taken]) -> Taken:
    """All of them as one; `devices` and `nodes` are sums too."""
    takes = list(takes)
    whole = Taken.of([sum(column) for column in zip(*(one.ints() for one in takes), strict=True)])
    whole.bins = [one for taken in takes for one in taken.bins]
    return whole

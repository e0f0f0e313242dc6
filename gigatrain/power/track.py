"""One meter over time: its joules so far at each look, and at any moment between two looks on a straight line.

The counter is the truth. Where it goes back (its driver was reset) its difference says nothing: that stretch is a gap, and its joules are the integral of
watts, which is an estimate, or unknown. A meter that does not answer for a while costs nothing if its counter ran on; after LOST_S its stretch is given up
as a gap, and stays one even if it comes back.
"""

from collections import deque
from typing import NamedTuple

from gigatrain.power.nvml import HW_POWER_BRAKE, HW_SLOWDOWN, HW_THERMAL, SW_POWER_CAP, SW_THERMAL
from gigatrain.power.reading import Sample, Source

LOST_S = 5.0  # or three of a slow meter's own periods: so long may a meter be silent before its stretch is given up
STEADY_S = 2.0  # or five looks: over longer stretches the mean of two looks at watts is no check of a counter
SLOW_S = 0.05  # of one look: a driver that answers in 1 s (IPMI) is then asked every 20 s
SLOWEST_S = 0.8  # and a quarter more by its turn: MLPerf wants a look a second
GOLDEN = 0.6180339887498949  # its multiples fill an interval evenly, in an order that no period meets
MICRO = 10**6  # µs in a second, and nJ in a mJ: mW times µs are nJ


class Drawn(NamedTuple):
    """What a meter saw, up to a moment or over a stretch; in whole nJ and µs, so that sums are exact."""

    measured_nj: int = 0
    estimated_nj: int = 0
    known_us: int = 0  # for which there are joules
    gap_us: int = 0
    capped_us: int = 0
    thermal_us: int = 0
    brake_us: int = 0
    counter_nj: int = 0  # of stretches that have both: by the counter,
    integral_nj: int = 0  # and by watts
    reasons_us: int = 0  # for which it said whether clocks were held down

    @property
    def nj(self) -> int:
        return self.measured_nj + self.estimated_nj


MEASURED, ESTIMATED, KNOWN, GAP, CAPPED, THERMAL, BRAKE, COUNTER, INTEGRAL, REASONS = range(len(Drawn._fields))


class Track:
    """A source, and what it had drawn at each look; times are monotonic microseconds."""

    def __init__(self, source: Source, every_s: float) -> None:
        self.source = source
        self.period_s = every_s if source.update_s <= 0.1 else max(every_s, source.update_s)  # not oftener than there is news
        self.due_s = 0.0
        self._turn = 0.0
        self.points: deque[tuple[int, tuple[int, ...]]] = deque()
        self.drawn = [0] * len(Drawn._fields)
        self.last: Sample | None = None  # from where the next stretch counts
        self.last_us = 0
        self.silent_us: int | None = None  # since when it does not answer
        self.why = ""
        self.gaps = 0
        self.most_mw = 0  # that it was seen to draw: tells whether its counter may have gone round twice
        self._asked: tuple[int, ...] = tuple(self.drawn)
        self._lost_us = round(max(LOST_S, 3 * source.update_s) * MICRO)
        self._steady_us = round(max(STEADY_S, 5 * self.period_s) * MICRO)
        self._wrap_mj = source.wrap_mj
        self._counts: bool | None = None  # whether it has a counter
        self._still_us = self._still_nj = 0  # for how long that has not moved, and the integral of watts meanwhile; -1: told

    def begin(self, at_us: int, counter_mj: int | None = None, most_mw: int = 0) -> None:
        """From here on it is counted; with the counter of then, if a former process knew it."""
        if not self.points:
            self.points.append((at_us, tuple(self.drawn)))
        if counter_mj is not None:
            self.last, self.last_us, self.most_mw, self._counts = Sample(at_us / MICRO, counter_mj), at_us, most_mw, True

    def looked(self, before_s: float, after_s: float, slower: float) -> None:
        """When it is looked at next: irregularly, so that a training step as long as a look does not show one side of itself only; `slower` times as late as
        it should, but once a second at least; and one that takes long to answer is asked less often."""
        self._turn = (self._turn + GOLDEN) % 1.0
        long_s, period_s = after_s - before_s, max(self.period_s, min(self.period_s * slower, SLOWEST_S))
        self.due_s = before_s + period_s * (0.75 + 0.5 * self._turn)
        if long_s > SLOW_S:
            self.due_s = max(self.due_s, after_s + 20 * long_s)
            self._lost_us = max(self._lost_us, round(3 * (self.due_s - before_s) * MICRO))  # what we do not ask is no silence

    def saw(self, sample: Sample) -> None:
        """One more look."""
        now_us = round(sample.time_s * MICRO)
        if self._counts is None:
            self._counts = sample.counter_mj is not None
        if self._counts and sample.counter_mj is None:  # only its watts: no answer to what was asked
            self.silent(now_us, "its counter was not told")
            return
        if self.points and now_us <= self.points[-1][0]:
            return
        if self.last is not None:
            self._stretch(self.last, sample, now_us - self.last_us)
        elif self.silent_us is not None:
            self.drawn[GAP] += now_us - self.points[-1][0]
        self.last, self.last_us, self.silent_us = sample, now_us, None
        self.points.append((now_us, tuple(self.drawn)))

    def _stretch(self, last: Sample, sample: Sample, long_us: int) -> None:
        drawn, area_nj, went_mj = self.drawn, None, None
        if last.milliwatts is not None and sample.milliwatts is not None:
            area_nj = (last.milliwatts + sample.milliwatts) * long_us // 2
        if self._counts and sample.counter_mj is not None and last.counter_mj is not None:
            went_mj = self._went(sample.counter_mj - last.counter_mj, area_nj, long_us)
            if went_mj is not None:
                drawn[MEASURED] += went_mj * MICRO
                drawn[KNOWN] += long_us
                if area_nj is not None and long_us <= self._steady_us:
                    drawn[COUNTER] += went_mj * MICRO
                    drawn[INTEGRAL] += area_nj
            else:
                drawn[GAP] += long_us
                if area_nj is not None and long_us <= self._lost_us:
                    drawn[ESTIMATED] += area_nj
                    drawn[KNOWN] += long_us
        elif area_nj is not None and long_us <= self._lost_us:  # watts alone: their integral is what is measured
            drawn[MEASURED] += area_nj
            drawn[KNOWN] += long_us
        else:
            self.gaps += 1
            drawn[GAP] += long_us
        reasons = sample.reasons
        if reasons is not None:
            drawn[REASONS] += long_us
        if reasons:
            if reasons & SW_POWER_CAP:
                drawn[CAPPED] += long_us
            if reasons & (SW_THERMAL | HW_THERMAL):
                drawn[THERMAL] += long_us
            if reasons & HW_POWER_BRAKE or (reasons & HW_SLOWDOWN and not reasons & HW_THERMAL):  # HW_SLOWDOWN stands beside what it is of
                drawn[BRAKE] += long_us

    def _went(self, went_mj: int, area_nj: int | None, long_us: int) -> int | None:
        """What the counter went on by; None where it does not tell."""
        if self._wrap_mj is not None:
            went_mj = went_mj + self._wrap_mj if went_mj < 0 else went_mj
            if 2 * self.most_mw * long_us > self._wrap_mj * MICRO:  # perhaps more than once around
                went_mj = -1
            self.most_mw = max(self.most_mw, went_mj * MICRO // long_us)
        if went_mj < 0:
            self.gaps += 1
            return None
        if went_mj:
            told = self._still_nj < 0
            self._still_us = self._still_nj = 0
            return None if told else went_mj  # it may have caught up: what it stood still for is told already, by watts, and not again
        # What runs draws something: a counter that stands still is broken, and its zero is no measurement.
        self._still_us += long_us
        if self._still_us <= self._lost_us:
            self._still_nj += area_nj or 0
            return went_mj
        if self._still_nj >= 0:
            self.gaps += 1
            self.drawn[ESTIMATED] += self._still_nj
            self._still_nj = -1
        return None

    def silent(self, now_us: int, why: str) -> None:
        """A look without an answer."""
        at_us = self.points[-1][0]
        if self.silent_us is None:
            self.silent_us, self.why = at_us, why
            self.gaps += 1
        if now_us - self.silent_us > self._lost_us and now_us > at_us:
            self.last = None
            self.drawn[GAP] += now_us - at_us
            self.points.append((now_us, tuple(self.drawn)))

    def at(self, at_us: int) -> tuple[int, ...]:
        """What it had drawn by this moment; the looks before are forgotten."""
        points = self.points
        while len(points) > 1 and points[1][0] <= at_us:
            points.popleft()
        start_us, first = points[0]
        if at_us <= start_us or len(points) == 1:
            return first
        end_us, second = points[1]
        part, span = at_us - start_us, end_us - start_us
        return tuple(one + (other - one) * part // span for one, other in zip(first, second, strict=True))

    def counter_at(self, at_us: int) -> int | None:
        """What its counter said at this moment, which is not after the last look."""
        if self.last is None or self.last.counter_mj is None:
            return None
        counter = self.last.counter_mj - (self.drawn[MEASURED] - self.at(at_us)[MEASURED]) // MICRO
        return counter if counter >= 0 else counter + self._wrap_mj if self._wrap_mj is not None else None

    def since(self, at_us: int) -> Drawn:
        """What it drew from where this was last asked for to this moment."""
        now = self.at(at_us)
        before, self._asked = self._asked, now
        return Drawn(*(one - other for one, other in zip(now, before, strict=True)))

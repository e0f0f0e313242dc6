"""From what is drawn to what is done: a budget kept, changes no faster than the grid bears, a schedule followed. Pure arithmetic; pace.py sleeps.

`Governor` decides once a window, on every rank alike from the same reduced numbers; it reads no clock and no file. What it believes of a run is

    watts = rest + swing x duty            duty: the share of time in which steps run, over what they take without waiting

and both numbers are learnt from what was measured, with their uncertainty (line.py, a Kalman filter of two numbers): an order keeps the budget with `SURE`
standard deviations of what is not known yet, and of the noise of a 10-s mean. So it begins low, and rises as it learns. Orders go through hysteresis.

What it can do, in this order: lower the limits of accelerators (`power.caps`; guard.py), if that is enough; else space the starts of steps; else pause. Limits
are fed back, not learnt: until a new one was seen to be enough, steps stay spaced as under the one before. Steps are not cut: a step that alone is longer than
ten seconds' share of the budget is kept within it over its period, not over ten seconds, and `why` says so. Several stops of a run (saves, its end) are met by
slowing down along the ramp before them and up again after them, which costs time (cost.py).

Watts are those of the widest boundary that is known. Where that is not the facility, the budget is held against a lower bound, and the orders say so. Where a
meter falls silent, what was ordered goes on. A budget of the recipe or its schedule that nothing can be held against ends the run.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from gigatrain.config import Power
from gigatrain.planning.budget import shown as shown_watts
from gigatrain.planning.watts import Watts
from gigatrain.power.cost import Cost, rates
from gigatrain.power.line import LOW, MEAN_S, SETTLE_S, SURE, Line
from gigatrain.power.pace import NOTHING, Orders
from gigatrain.power.reading import BOUNDARIES, Seen
from gigatrain.power.schedule import Now, Schedule, shown

NOISY = 3.0  # standard deviations of a 10-s mean's noise
FIRST = 0.15  # of full speed, until anything is measured: slower, and the first measurement would be long in coming
UP = 1.03  # faster only if at least so much
ROOM = 1.02  # an order is dropped only if full speed would be under the budget by so much
HORIZON_S = 2 * 3600.0  # so far ahead limits are looked for
BLIND_S = 60.0  # a run that was never measured for so long will not be
CAP_RAMP, CAP_RAMP_S = (
    0.8,
    30.0,
)  # of the ramp's watts of the time since the last one, at most of so long, one change of the accelerators' limits may take
HALF = 0.5  # of the site's own limit: a run that cannot reach so much need not look at it
CANNOT = "give the site's file what would say it (power.node_watts, power.pue), a meter (POWER.md), or leave the budget out"


@dataclass(frozen=True, slots=True)
class _Mean:
    """What windows of together at least ten seconds say."""

    watts: float
    device: float | None
    duty: float


_NAMED = {"device": "the devices", "node": "the nodes", "it": "the IT", "facility": "the facility"}


class Governor:
    """Decides what a run may draw now. `power`: the recipe's; `watts`: the plan's figures; `began_s`: when the process began, seconds since 1970."""

    def __init__(self, power: Power, watts: Watts, *, began_s: float, schedule: Schedule | None = None) -> None:
        self.power, self.watts, self.schedule, self.began_s = power, watts, schedule, began_s
        ramp = power.ramp_megawatts_min * 1e6 if power.ramp_megawatts_min is not None else watts.ramp_watts_min.value
        self.ramp = ramp / 60 if ramp else None  # watts per second
        near = watts.cap_watts.known and ((most := reach(watts)) is None or most >= HALF * (watts.cap_watts.value or 0.0))
        self.site_watts = watts.cap_watts.value if near else None
        self.acts = power.megawatts is not None or self.ramp is not None or schedule is not None or near
        full = expected(watts)
        self.line = Line.prior(full) if full else None
        self.busy_s: float | None = None
        self.share = 1.0
        self.sure, self.dared = SURE, 0
        self.cap: float | None = None
        self.high = 0.0  # watts at full speed under `cap`
        self.extra = 0.0  # watts kept free because ten seconds were above the budget
        self.spent = Cost()
        self.orders = NOTHING  # the last
        self.boundary = BOUNDARIES[-1]  # that all watts here are of
        self.blind_s = 0.0  # since there was anything measured
        self._mean: _Mean | None = None  # that nothing was made of yet
        self._capped_s = began_s  # when the limits were changed last
        self._pending: list[Seen] = []
        self._begun = False
        self._limit: float | None = None  # that the last target was for
        self._sure = False  # whether anything was measured

    @property
    def promised(self) -> str:
        """Which budget of the recipe, beside pauses, can only be kept by what is measured; empty: none."""
        if self.power.megawatts is not None:
            return "power.megawatts"
        return "the schedule" if self.schedule is not None and any(row[1] for row in self.schedule.rows) else ""

    def decide(self, seen: Seen) -> Orders:
        """What to do until the next decision. Raises nothing; the same for the same history of `seen`."""
        if not self.acts:
            return NOTHING
        now = self.schedule.at(seen.now_s) if self.schedule is not None else Now()
        seen = self._alike(seen)
        self.spent.above(self._over(seen))
        self.spent.window(seen, self._full(), rates(now, self.watts))
        self._take(seen)
        limit, what = self._budget(now)
        news = not self._pending and not (self.blind_s and self._sure)
        if news or limit != self._limit or not self._begun or seen.steps == 0:
            self.dared = self.dared if limit == self._limit else 0
            self._limit = limit
            self._aim(limit, what, seen)
        self._begun = True
        self.orders = self._orders(seen, now, limit, what)
        return self.orders

    def leaving(self, grace_s: float) -> tuple[Orders, int]:
        """A signal has come, and in `grace_s` seconds the last save must begin: how to slow down along the ramp, and for how many steps more; without a
        ramp none. The same on all ranks that agree on the grace."""
        orders = self.orders
        if orders.slope is None or self.busy_s is None or orders.share <= orders.low:
            return orders, 0
        seconds = min(grace_s, (orders.share - orders.low) / orders.slope)
        reached = orders.share - orders.slope * seconds
        return replace(orders, brake_after=0), max(0, math.floor(seconds * (orders.share + reached) / 2 / self.busy_s))

    def cost(self) -> dict[str, Any]:
        """What acting has cost so far (cost.py)."""
        return self.spent.told()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values: what was learnt and what it cost; a resume that loads it need not learn again."""
        return {
            "line": None if self.line is None else asdict(self.line),
            "busy_s": self.busy_s,
            "sure": self._sure,
            "boundary": self.boundary,
            "cost": asdict(self.spent),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The opposite of `state`. Other nodes draw otherwise: what was learnt is believed half as much."""
        self.spent = Cost(**state["cost"])
        if state["line"] is not None and state["sure"]:
            self.line, self.busy_s, self._sure, self.boundary = (
                Line(**state["line"]),
                state["busy_s"],
                True,
                state.get("boundary", self.boundary),
            )
            self.line.var_rest, self.line.var_swing, self.line.both = (
                4 * one for one in (self.line.var_rest, self.line.var_swing, self.line.both)
            )

    # What is known

    def _alike(self, seen: Seen) -> Seen:
        """`seen` at the boundary that the run is kept at: the widest that was ever known, so that a meter that fails for a while makes nothing lighter."""
        if seen.watts is None or seen.boundary == self.boundary:
            return seen
        if self._sure and BOUNDARIES.index(seen.boundary) < BOUNDARIES.index(self.boundary):
            return replace(seen, watts=None, watts_device=None, bins=())
        if self._sure:  # what was learnt is of less
            self.line, self._sure, self.cap, self.extra, self._mean, self._pending = None, False, None, 0.0, None, []
        self.boundary = seen.boundary
        return seen

    def _take(self, seen: Seen) -> None:
        """Windows are put together until they are ten seconds; then there is something to learn from."""
        if seen.steps:
            self.blind_s = 0.0 if seen.watts is not None else self.blind_s + (seen.window_s or seen.steps * (seen.step_s or 0.0))
        if seen.steps == 0 or seen.window_s <= 0:
            return
        self._pending.append(seen)
        seconds = sum(one.window_s for one in self._pending)
        if seconds < MEAN_S and not self._is_over(seen):
            return
        used = [one for one in self._pending if not one.mixed and one.step_s]
        self._pending = []
        timed = sum(one.steps for one in used)
        if timed:
            busy_s = sum(one.steps * (one.step_s or 0.0) * one.busy_share for one in used) / timed
            self.busy_s = busy_s if self.busy_s is None or self.cap is not None else self.busy_s + 0.5 * (busy_s - self.busy_s)
        metered = [one for one in used if one.watts is not None]
        if not metered or self.busy_s is None:
            return
        seconds = sum(one.window_s for one in metered)
        watts = sum((one.watts or 0.0) * one.window_s for one in metered) / seconds
        duty = min(1.0, sum(one.steps for one in metered) * self.busy_s / seconds)
        over = [watts for one in metered for watts in self._over(one)]
        limit = self._limit
        if over and limit is not None and self._sure and self.line is not None and not self._too_long(limit):
            self.extra = min(0.2 * limit, max(0.995 * self.extra, self.extra + max(over)))
        device = [(one.watts_device, one.window_s) for one in metered if one.watts_device is not None]
        self._mean = _Mean(watts, sum(one * long_s for one, long_s in device) / seconds if len(device) == len(metered) else None, duty)
        if self.cap is not None:
            return  # another line; it is fed back, not learnt
        if self.line is None or not self._sure:
            self.line, self._sure = Line.first(watts, duty, seconds), True  # one look at this machine says more than figures of others
        else:
            self.line.learn(watts, duty, seconds)

    def _too_long(self, limit: float) -> bool:
        """Whether one step alone is above a budget's ten seconds."""
        assert self.line is not None
        alone = self.line.duty(limit, 0.0)
        return self.busy_s is not None and 0 < alone < 1 and self.busy_s > MEAN_S * alone

    def _is_over(self, seen: Seen) -> bool:
        """Far above the budget: no time to wait for ten seconds."""
        limit = self._limit
        return limit is not None and seen.watts is not None and seen.window_s >= SETTLE_S and seen.watts > 1.05 * limit

    def _more(self, limit: float) -> float:
        """Watts that are kept free for the noise of a ten-second mean."""
        return max(0.005 * limit, NOISY * math.sqrt(self.line.noise) if self.line is not None else 0.0) + self.extra

    # What is wanted

    def _budget(self, now: Now) -> tuple[float | None, str]:
        """The facility's watts that the run may draw, and who says so."""
        given = [
            (watts, what)
            for watts, what in (
                (None if self.power.megawatts is None else 1e6 * self.power.megawatts, "power.megawatts"),
                (None if now.megawatts is None else 1e6 * now.megawatts, "the schedule"),
                (self.site_watts, f"power.cap_watts of {self.watts.site or 'the site'}"),
            )
            if watts is not None
        ]
        return min(given) if given else (None, "")

    def _over(self, seen: Seen) -> list[float]:
        """By how much each ten-second mean is above its limit (below: negative): the laxer of those at its begin and its end."""
        found = []
        for begin_s, watts in seen.bins:
            begin, end = (
                self._budget(self.schedule.at(at_s) if self.schedule is not None else Now())[0] for at_s in (begin_s, begin_s + MEAN_S)
            )
            if begin is not None and end is not None:
                found.append(watts - max(begin, end))
        return found

    def _slow(self, now: Now) -> float | None:
        """The share of full power, while price or carbon is above what the recipe says; 1: it is not; None: not followed, or not known."""
        if self.power.follow is None or self.power.slow_above is None:
            return None
        value = now.price_eur_mwh if self.power.follow == "price" else now.carbon_g_kwh
        return None if value is None else self.power.slow_to if value > self.power.slow_above else 1.0

    def _aim(self, limit: float | None, what: str, seen: Seen) -> None:
        """Set cap or share for a budget."""
        if limit is None:
            self.share = 1.0
            if self.cap is not None:
                self._cap(1.0, seen)
            return
        if self.line is None:  # nothing was measured and nothing is declared: little, until there is a measurement
            unseen = self.blind_s >= MEAN_S and what not in ("power.megawatts", "the schedule")  # what only the site says ends no run
            self.share = 1.0 if unseen else FIRST
            return
        more = self._more(limit)
        full = self.line.at(1.0) + SURE * self.line.unsure(1.0) + more
        if self.cap is None and full <= (limit if self.share >= 1.0 else limit / ROOM):
            self.share = 1.0
            return
        if self._capped(limit, more, seen):
            return
        duty = self.line.duty(limit, more, self.sure)
        if not self._sure and self.blind_s >= MEAN_S:  # no meter says it: by the site's figures then
            duty = self.line.duty(limit, 0.0, 0.0)
        wanted = self._spaced(duty if self._sure else max(FIRST, duty))
        most = self._fullest(self.share)
        held = self.line.at(most) + min(SURE, self.sure) * self.line.unsure(most) + more <= 1.0015 * limit
        if self.share < 1.0 and held and wanted <= UP * self.share:
            # Where nothing changes nothing is learnt: what it is not sure of counts for less, until it dares a step up; after each, later.
            dares = self._spaced(self.line.duty(limit, more, 0.0)) > 1.1 * self.share
            self.sure *= 0.7 ** (1 / (1 + self.dared) ** 2) if dares else 1.0
        else:
            self.dared += self.sure < SURE and wanted > self.share
            self.share, self.sure = wanted, SURE

    def _spaced(self, duty: float) -> float:
        """The share of full speed at which no ten seconds have more than this duty: so many whole steps fit into them, and a part of one."""
        if duty >= 1.0:
            return 1.0
        if self.busy_s is None or duty <= 0.0:
            return max(LOW, min(1.0, duty))
        busy_s = 1.02 * self.busy_s  # some steps take longer than others
        whole = math.floor(MEAN_S * duty / busy_s)
        period_s = busy_s + MEAN_S * (1 - duty) / whole if whole else busy_s / duty
        return max(LOW, self.busy_s / period_s)

    def _fullest(self, share: float) -> float:
        """The duty of the fullest ten seconds at a share of full speed: the opposite of `_spaced`, where one step fits into them."""
        if self.busy_s is None or share >= 1.0:
            return share
        busy_s, period_s = 1.02 * self.busy_s, self.busy_s / share
        whole = math.floor(MEAN_S / period_s)
        fullest = (whole * busy_s + min(busy_s, MEAN_S - whole * period_s)) / MEAN_S
        return fullest if whole and fullest < 1.0 else share

    def _capped(self, limit: float, more: float, seen: Seen) -> bool:
        """Whether the accelerators' limits are part of what keeps the budget; sets them, and the share for as long as they are not enough."""
        most, least, mean, line = self.watts.device_watts.value, seen.cap_min_share, self._mean, self.line
        if not self.power.caps or least is None or not most or not seen.devices or line is None:
            self.cap = None
            return False
        self._mean = None
        each = most * seen.devices * self._factor()  # watts of a whole share
        if self.cap is None:
            top = 1.0  # a device's draw at full speed, over its limit: the devices' share of what is drawn, which at full speed is at least as large
            if mean is not None and mean.device is not None and mean.watts:
                top = min(1.0, mean.device / mean.watts * line.at(1.0) / (most * seen.devices))
            self.high = line.at(1.0) + SURE * line.unsure(1.0)
            if not self._sure or SURE * line.unsure(1.0) > 0.1 * limit:
                return False  # until more is known steps are spaced
            wanted = top - (self.high + more - limit) / each
            if wanted < least - 0.05:
                return False
            self.cap = top
            self._cap(max(least, wanted), seen)
        elif mean is not None and seen.steps:
            self.high = line.rest + max(0.0, mean.watts - line.rest) / max(mean.duty, LOW)
            off, wanted = limit - more - self.high, self.cap
            if off > 0.015 * limit and self.share >= 1.0:
                wanted += 0.7 * off / each
            elif off < 0:
                top = 1.0 if mean.device is None else mean.device / (most * seen.devices) * max(1.0, self.high / mean.watts)
                wanted = min(self.cap, top + 0.02) + off / each
            self._cap(max(least, wanted), seen)
        self.share = 1.0 if self.high + 0.5 * more <= limit else self._level(limit)
        return True

    def _cap(self, wanted: float, seen: Seen) -> None:
        """Move the accelerators' limits towards a share, no faster than the ramp; 1 takes them away."""
        assert self.cap is not None
        if self.ramp is not None and self.line is not None:
            each = max(self.line.swing, (self.watts.device_watts.value or 0.0) * seen.devices * self._factor())
            step = CAP_RAMP * self.ramp * min(CAP_RAMP_S, max(0.0, seen.now_s - self._capped_s)) / each
            wanted = max(self.cap - step, min(self.cap + step, wanted))
        if wanted != self.cap:
            self._capped_s = seen.now_s
        self.cap = None if wanted >= 1.0 else wanted

    def _level(self, limit: float) -> float:
        """The share of full speed that keeps a limit, under the limits that the accelerators have now."""
        assert self.line is not None
        more = self._more(limit)
        if self.cap is None:
            return self._spaced(self.line.duty(limit, more))
        return self._spaced((limit - more - self.line.rest) / max(self.high - self.line.rest, 1e-3 * self.high, 1e-9))

    def _factor(self) -> float:
        """Watts at the boundary of one more watt of a device; where PUE is unknown 1, which takes more off the device than need be."""
        pue = (self.watts.pue.value or 1.0) if self.boundary == "facility" else 1.0
        return pue * (1.0 + (self.watts.storage_share.value or 0.0) if self.boundary in ("it", "facility") else 1.0)

    # What is ordered

    def _orders(self, seen: Seen, now: Now, limit: float | None, what: str) -> Orders:
        why, notices = self._said(now, limit, what)
        if self._unknown(limit):
            said = f"{what} allows {shown_watts(limit or 0.0)}, which cannot be kept: what the run draws is unknown at every boundary; {CANNOT}"
            return Orders(why=said, share=self.share, busy_s=self.busy_s, leave=True)
        leave = self._too_little(limit, what, why)
        followed, asleep = self._followed(now, why)
        pause = bool(leave) or asleep
        share, slope, low = self._ramped(min(self.share, followed), why, notices)
        until_s = self._wakes(now) if pause else None
        if pause and until_s is None and leave:
            said = "; ".join([*why, leave])
            return Orders(cap_share=self.cap, why=said, share=max(LOW, share), busy_s=self.busy_s, slope=slope, low=low, leave=True)
        if until_s is not None and until_s > seen.now_s:
            if slope is None or seen.steps == 0 or self._duty(seen) <= 2 * low + 0.02:
                notices.append(("paused", f"paused until {shown(until_s)}: {why[-1]}"))
                why.append(f"paused until {shown(until_s)}")
                return Orders(
                    pause_until_s=until_s,
                    pause_from_s=seen.now_s,
                    cap_share=self.cap,
                    why="; ".join(why),
                    share=self._after(until_s, low),
                    busy_s=self.busy_s,
                    slope=slope,
                    low=low,
                    notices=tuple(notices),
                )
            share = low
            why.append("slowed down along the ramp, to pause")
        brake = None
        if slope is not None and seen.stops_after is not None:
            seconds = max(0.0, share - low) / slope
            brake = max(0, seen.stops_after - math.ceil(seconds * (share + low) / 2 / self.busy_s) - 1) if self.busy_s else None
        then_s, then_share = self._ahead(seen.now_s, share, slope, low)
        soon = self._pauses_soon(seen, now, share) if slope is None and not pause else None
        if soon is not None:
            share = min(share, self._after(soon[1], low))
            why.append(f"paused until {shown(soon[1])} after {soon[0]} more steps")
            notices.append(("paused", f"paused from {shown(now.until_s or 0.0)} until {shown(soon[1])}, as the schedule says"))
        period_s = self.busy_s / share if self.busy_s is not None and share < 1.0 else None
        if share < 1.0:
            why.append(f"{100 * share:.0f} % of full speed" + (f", a step every {period_s:.3g} s" if period_s is not None else ""))
            if limit is not None and self.busy_s is not None and self.line is not None and self._too_long(limit):
                why.append(f"kept over {period_s or 0:.0f} s, not over 10 s: one step is busy for {self.busy_s:.0f} s")
                notices.append(
                    (
                        "long",
                        f"{what} is kept over the period of a step, not over 10 s: one step alone is busy for longer than its share of them",
                    )
                )
        return Orders(
            period_s=period_s,
            pause_until_s=soon[1] if soon is not None else None,
            pause_from_s=now.until_s or 0.0 if soon is not None else 0.0,
            pause_after=soon[0] if soon is not None else 0,
            cap_share=self.cap,
            why="; ".join(why),
            share=share,
            busy_s=self.busy_s,
            slope=slope,
            low=low,
            brake_after=brake,
            then_s=then_s,
            then_share=then_share,
            notices=tuple(notices),
        )

    def _unknown(self, limit: float | None) -> bool:
        """Whether a budget of the recipe can be held against nothing, and it was waited for long enough."""
        return limit is not None and limit > 0.0 and self.line is None and self.blind_s >= BLIND_S and bool(self.promised)

    def _too_little(self, limit: float | None, what: str, why: list[str]) -> str:
        """The way out of a budget below what is drawn at rest, which only a pause keeps; empty: it is none. Adds to `why`."""
        if limit is None or (limit > 0.0 and not self._hopeless(limit)):
            return ""
        if limit > 0.0 and self.line is not None:
            why.append(f"at rest it draws {shown_watts(self.line.rest)}, and {what} allows {shown_watts(limit)}, which cannot be kept")
        else:
            why.append(f"{what} allows 0 W")
        way = f"raise {what}"
        if what == "the schedule" and self.schedule is not None:
            way = f"give {self.schedule.source or 'it'} a row that allows more"
        return f"{way}, or take fewer nodes" if limit > 0.0 else f"{way}, or leave power.schedule out"

    def _followed(self, now: Now, why: list[str]) -> tuple[float, bool]:
        """The most of full speed while price or carbon is high, and whether only a pause draws so little. Adds to `why`."""
        slow = self._slow(now)
        if slow is None or slow >= 1.0:
            return 1.0, False
        value, unit = (now.price_eur_mwh, "EUR/MWh") if self.power.follow == "price" else (now.carbon_g_kwh, "g CO2e/kWh")
        why.append(f"{value:g} {unit} are above {self.power.slow_above:g}")
        asleep = self._sleeps(slow)
        if asleep and slow > 0.0 and self.line is not None:
            rest = self.line.rest / (self.line.rest + self.line.swing)
            why.append(f"at rest it draws {100 * rest:.0f} % of full power, more than the {100 * slow:.0f} % of slow_to")
        return max(LOW if self._sure else FIRST, self._slowed(slow)), asleep

    def _ramped(self, share: float, why: list[str], notices: list[tuple[str, str]]) -> tuple[float, float | None, float]:
        """(share, how fast it may change per second, where a ramp begins and ends). Adds to `why` and `notices`."""
        slope = self.slope
        low = LOW if slope is None else min(1.0, max(LOW, slope * MEAN_S))
        if self.ramp is not None and slope is None:
            if self.blind_s >= MEAN_S:
                why.append("the ramp is not kept: what the run draws is unknown at every boundary")
                notices.append(("ramp", why[-1]))
            else:
                share, low = min(share, LOW), LOW
                why.append("the ramp begins when it is known what the run draws")
        elif slope is not None and low >= 1.0:
            slope = None  # from rest to full is no more than ten seconds of the ramp
        return share, slope, low

    def _said(self, now: Now, limit: float | None, what: str) -> tuple[list[str], list[tuple[str, str]]]:
        """What holds of a budget now: for the orders, and what is told to the user when it begins to."""
        why, notices = [now.note] if now.note else [], list[tuple[str, str]]()
        blind = self.blind_s >= MEAN_S
        if self._sure and blind and (limit is not None or self.ramp is not None):
            why.append(f"nothing was measured of {_NAMED[self.boundary]} for {self.blind_s:.0f} s: what was ordered before goes on")
            notices.append(
                ("silent", f"nothing is measured of {_NAMED[self.boundary]} any more: what was ordered before goes on until it is")
            )
        elif not blind and self.boundary != BOUNDARIES[-1] and (limit is not None or self.ramp is not None):
            why.append(f"{what or 'the ramp'} is held against {_NAMED[self.boundary]} only: what the facility draws beyond is unknown")
            notices.append(("narrow", why[-1]))
        if limit is None or limit <= 0.0:
            return why, notices
        allowed = f"{what} allows {shown_watts(limit)}"
        if self.line is None:
            why.append(f"{allowed}, and what the run draws is {'unknown' if blind else 'not measured yet'}")
            if blind and self.share >= 1.0:
                notices.append(("unknown", f"{allowed}, which cannot be kept: what the run draws is unknown at every boundary"))
        elif not self._sure and blind:
            why.append(f"{allowed}: nothing is measured, and slowed by the site's figures")
            notices.append(("figures", f"{allowed}; nothing measures what the run draws, so it is kept by the site's figures alone"))
        elif self.cap is not None:
            why.append(f"{allowed}: accelerators at {100 * self.cap:.0f} % of their limit")
        elif self.share < 1.0:
            why.append(allowed)
        return why, notices

    def _slowed(self, slow: float) -> float:
        """The share of full speed at which it draws so much of full power."""
        rest, swing = (self.line.rest, self.line.swing) if self.line is not None else (0.5, 0.5)
        return (slow * (rest + swing) - rest) / swing

    def _sleeps(self, slow: float) -> bool:
        """Whether only a pause draws so little; until that is known of this run it is not paused for it."""
        return slow == 0.0 or (slow < 1.0 and self._sure and self._slowed(slow) <= LOW)

    def _pauses_soon(self, seen: Seen, now: Now, share: float) -> tuple[int, float] | None:
        """After how many steps, and until when, to pause for what the schedule says next, if that comes before there is another decision."""
        if self.schedule is None or now.until_s is None or self.busy_s is None or self._runs(after := self.schedule.at(now.until_s)):
            return None
        steps = max(0, math.floor((now.until_s - SETTLE_S - seen.now_s) * share / self.busy_s))
        until_s = self._wakes(after) if steps < seen.steps else None
        return None if until_s is None else (steps, until_s)

    def _runs(self, now: Now) -> bool:
        """Whether steps may run at all under what the schedule says."""
        limit, slow = self._budget(now)[0], self._slow(now)
        return not (limit is not None and (limit <= 0.0 or self._hopeless(limit))) and not (slow is not None and self._sleeps(slow))

    def _wakes(self, now: Now) -> float | None:
        """When a pause ends: the next time at which the schedule lets steps run; None: never."""
        for _ in range(len(self.schedule.rows) + 2 if self.schedule is not None else 0):
            if self.schedule is None or now.until_s is None:
                break
            at_s = now.until_s
            now = self.schedule.at(at_s)
            if self._runs(now):
                return at_s
        return None

    @property
    def slope(self) -> float | None:
        """Share of full speed per second that the ramp allows, by the largest swing that is likely; None: no ramp, or nothing known."""
        if self.ramp is None or self.line is None:
            return None
        unsure = math.sqrt(self.line.var_swing)
        return self.ramp / (1.1 * (self.line.swing + SURE * (min(unsure, 0.3 * self.line.swing) if self._sure else unsure)))

    def _hopeless(self, limit: float) -> bool:
        """Whether even at rest the budget is exceeded, beyond doubt."""
        return self.line is not None and self._sure and self.line.rest - SURE * math.sqrt(self.line.var_rest) > limit

    def _ahead(self, now_s: float, share: float, slope: float | None, low: float) -> tuple[float | None, float]:
        """When, before the schedule allows less, to go down, and how far: the earliest of all changes that are near."""
        found: tuple[float | None, float] = (None, 1.0)
        if self.schedule is None or self.line is None:
            return found
        at_s, limit = now_s, self._limit
        for _ in range(200):
            until_s = self.schedule.at(at_s).until_s
            if until_s is None or until_s > now_s + HORIZON_S:
                break
            at_s = until_s
            before, (limit, _) = limit, self._budget(self.schedule.at(at_s))
            if limit is None or limit == before:
                continue
            wanted = max(low, self._level(limit))
            if wanted < share:
                begin_s = at_s - SETTLE_S - (min(MEAN_S, self.busy_s or 0.0)) - ((share - wanted) / slope if slope is not None else 0.0)
                if found[0] is None or begin_s < found[0]:
                    found = (begin_s, wanted)
        return found

    def _after(self, until_s: float, low: float) -> float:
        """The share with which a pause ends, until there is a decision."""
        then = self.schedule.at(until_s) if self.schedule is not None else Now()
        limit, _ = self._budget(then)
        if self._slow(then) not in (None, 1.0) or self.line is None:
            return low
        return 1.0 if limit is None else self._level(limit)

    def _duty(self, seen: Seen) -> float:
        return seen.steps * self.busy_s / seen.window_s if self.busy_s is not None and seen.window_s > 0 else 1.0

    # What it cost

    def _full(self) -> float | None:
        """Watts at full speed, once anything was measured."""
        return self.line.at(1.0) if self.line is not None and self._sure else None

    def paused(self, seconds: float, from_s: float) -> None:
        """A pause is over that began at a wall-clock time: of all ranks alike, for the account."""
        swing = self.line.swing if self.line is not None and self._sure else None
        stretches = self.schedule.between(from_s, from_s + seconds) if self.schedule is not None else iter([(seconds, Now())])
        self.spent.pause(seconds, swing, ((stretch_s, rates(now, self.watts)) for stretch_s, now in stretches))


def expected(watts: Watts) -> float | None:
    """The run's facility watts by the figures of its site, before anything is measured; None: unknown."""
    nodes = -(-watts.accelerators // watts.per_node) if watts.per_node and watts.accelerators else 0
    if watts.facility_watts.value is not None and nodes:
        return watts.facility_watts.value * nodes
    if watts.node_watts.value is None or watts.pue.value is None or not nodes:
        return None
    shared = watts.accelerators * ((watts.fabric_watts.value or 0.0) + (watts.storage_watts.value or 0.0))
    return (watts.node_watts.value * nodes + shared) * (1.0 + (watts.storage_share.value or 0.0)) * watts.pue.value


def reach(watts: Watts) -> float | None:
    """What the run could draw by the figures of its site: what it is expected to, or its accelerators alone at their limit; None: unknown."""
    devices = watts.accelerators * watts.device_watts.value if watts.device_watts.value is not None and watts.accelerators else None
    return max((one for one in (expected(watts), devices) if one is not None), default=None)


def stagger(run_id: str, every: int) -> int:
    """The offset in steps at which this run saves: when (step + offset) % every == 0. By a hash of its name, so that the saves of many runs spread evenly."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8], "big") % max(1, every)

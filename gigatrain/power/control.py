"""From what is drawn to what is done: a budget kept, changes no faster than the grid bears, a schedule followed. Pure arithmetic, but for `Pace`, which sleeps.

`Governor` decides once a window, on every rank alike from the same reduced numbers; it reads no clock and no file. What it believes of a run is

    watts = rest + swing x duty            duty: the share of time in which steps run, over what they take without waiting

and both numbers are learnt from what was measured, with their uncertainty (a Kalman filter of two numbers): an order keeps the budget with `SURE` standard
deviations of what is not known yet, and of the noise of a 10-s mean. So it begins low, and rises as it learns. Orders go through hysteresis.

What it can do, in this order: lower the limits of accelerators (`power.caps`; guard.py), if that is enough; else space the starts of steps; else pause. Steps
are not cut: a step that alone is longer than ten seconds' share of the budget is kept within it over its period, not over ten seconds, and `why` says so.
Several stops of a run (saves, its end) are met by slowing down along the ramp before them and up again after them, which costs time: `cost()` has it.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gigatrain.config import Power
from gigatrain.planning.watts import Watts
from gigatrain.power.schedule import Now, Schedule, shown

MEAN_S = 10.0  # a budget is kept over means of so long; the same is the least that is learnt from
SURE = 2.0  # standard deviations of what is not known of the model
NOISY = 3.0  # standard deviations of a 10-s mean's noise
LOW = 0.05  # of full speed: the least that a run is slowed to before it is paused
FIRST = 0.15  # of full speed, until anything is measured: slower, and the first measurement would be long in coming
UP = 1.03  # faster only if at least so much
ROOM = 1.02  # an order is dropped only if full speed would be under the budget by so much
SETTLE_S = 2.0  # of a meter's mean: earlier by so much before a drop
HORIZON_S = 2 * 3600.0  # so far ahead limits are looked for
MEET_S = 30.0  # in a pause ranks meet so often
SLICE_S = 0.2  # the longest sleep
MOST_WAIT_S = 60.0  # before a step whose length is not known yet


@dataclass(frozen=True, slots=True)
class Seen:
    """What all ranks know of the time since the last decision: reduced, so the same everywhere. Before the first step: `steps` 0."""

    now_s: float  # one wall-clock for all, seconds since 1970
    watts_facility: float | None  # mean over `window_s`, everything included; None: unknown
    watts_device: float | None = None
    step_s: float | None = None  # mean seconds between the starts of two steps, without saves and validations
    busy_share: float = 1.0  # of `step_s`, what was not waited in Pace
    devices: int = 0
    window_s: float = 0.0
    steps: int = 0
    tokens: int = 0
    stops_after: int | None = (
        None  # steps to the next save that holds them up, or the run's end; one that follows this decision at once is not meant
    )
    peak_watts: float | None = None  # the highest of the 10-s bins that closed in it, of the facility, where known
    mixed: bool = False  # a validation, a restart or a compilation is within it: nothing is learnt
    cap_min_share: float | None = None  # the least limit of its accelerators, over `watts.device_watts`; None: limits cannot be set


@dataclass(frozen=True, slots=True)
class Orders:
    """What is done until the next decision. None: nothing of the kind."""

    period_s: float | None = None  # least seconds between the starts of steps, once it is on its level
    pause_until_s: float | None = None  # wall-clock
    pause_from_s: float = 0.0  # when it was decided: what ranks count their meetings from
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

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self == replace(_NOTHING, why=self.why, busy_s=self.busy_s, low=self.low)

    def json(self) -> dict[str, Any]:
        """For RUN/energy.jsonl: what is not None, and why."""
        found = asdict(self)
        return {name: found[name] for name in ("period_s", "pause_until_s", "cap_share", "share", "why")} | (
            {"leave": True} if self.leave else {}
        )


_NOTHING = Orders()


@dataclass
class _Line:
    """watts = rest + swing x duty, and how sure that is."""

    rest: float
    swing: float
    var_rest: float
    var_swing: float
    both: float  # their covariance
    noise: float  # variance of a mean over MEAN_S
    looks: int = 0
    duty_before: float | None = None

    @classmethod
    def prior(cls, full: float) -> "_Line":
        """From what the run is expected to draw, which is a figure of alike machines: rest about 45 % of it, the sum within 25 %."""
        return cls(0.45 * full, 0.55 * full, (0.2 * full) ** 2, (0.32 * full) ** 2, -0.04 * full**2, (0.01 * full) ** 2)

    @classmethod
    def first(cls, watts: float, duty: float, seconds: float) -> "_Line":
        """From one look only: rest is between a quarter and two thirds of full power, as of all machines that were metered, and the look fits."""
        duty = max(duty, LOW / 2)

        def of(share: float) -> float:
            return share * watts / (share + (1 - share) * duty)

        rest = of(0.45)
        off = max(0.02 * watts, (of(0.65) - of(0.25)) / 2)
        swing = max(0.01 * watts, (watts - rest) / duty)
        late = SETTLE_S * swing * duty / seconds  # it began at rest, and draw and meter followed
        return cls(rest, swing, off**2 + late**2, 1.02 * (off / duty) ** 2, -(off**2) / duty, (0.01 * watts) ** 2, duty_before=duty)

    def at(self, duty: float) -> float:
        return self.rest + self.swing * duty

    def unsure(self, duty: float) -> float:
        return math.sqrt(max(0.0, self.var_rest + 2 * duty * self.both + duty * duty * self.var_swing))

    def learn(self, watts: float, duty: float, seconds: float) -> None:
        scale = (watts * 1e-3) ** 2 * seconds / MEAN_S  # what may have changed since
        self.var_rest = min(self.var_rest + scale, (0.3 * watts) ** 2)
        self.var_swing = min(self.var_swing + 9 * scale, (watts / max(duty, LOW)) ** 2)
        self._sound(watts)
        off, spread = watts - self.at(duty), self.unsure(duty) ** 2
        # Draw and meter follow a change of duty within SETTLE_S: that much of the time may belong to what was before.
        late = (SETTLE_S * self.swing * (duty - (duty if self.duty_before is None else self.duty_before)) / seconds) ** 2
        noise, self.duty_before = self.noise * MEAN_S / seconds, duty
        if off * off > 9 * (spread + late + noise):  # what no noise explains is a change, and believed as one
            self.var_swing += off * off / max(duty, 0.3) ** 2
        else:  # of what is off, noise's share is noise's
            part = noise / (spread + late + noise)
            self.looks += 1
            self.noise += max(0.1, 1 / (self.looks + 2)) * part * (off * off * part * seconds / MEAN_S - self.noise)
        self.noise = max(self.noise, (watts * 2e-3) ** 2)
        gain = self.var_rest + duty * self.both, self.both + duty * self.var_swing
        total = gain[0] + duty * gain[1] + noise + late
        self.rest += gain[0] / total * off
        self.swing += gain[1] / total * off
        self.var_rest -= gain[0] * gain[0] / total
        self.both -= gain[0] * gain[1] / total
        self.var_swing -= gain[1] * gain[1] / total
        self.rest = max(0.0, self.rest)
        self.swing = max(0.15 * self.rest, self.swing)  # no machine that trains draws less for it
        self._sound(watts)

    def _sound(self, watts: float) -> None:
        """Keep the covariance one, whatever was cut or rounded off."""
        self.var_rest, self.var_swing = max(self.var_rest, (1e-4 * watts) ** 2), max(self.var_swing, (1e-4 * watts) ** 2)
        most = 0.999 * math.sqrt(self.var_rest * self.var_swing)
        self.both = max(-most, min(most, self.both))

    def duty(self, watts: float, more: float, sure: float = SURE) -> float:
        """The most duty that stays under so many watts, with what is unsure and `more` on top; below 0 if none does."""
        low, high = -0.5, 1.5
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle) + sure * self.unsure(max(0.0, middle)) + more <= watts else (low, middle)
        return low


@dataclass
class _Cost:
    seconds: float = 0.0  # of all windows
    waited_s: float = 0.0
    paused_s: float = 0.0
    lost_tokens: float = 0.0
    reference_tokens_s: float | None = None
    reference_watts: float | None = None
    saved: dict[str, float] = field(default_factory=dict)  # at the price of its hour: what full speed would have drawn more
    spent_rate: dict[str, list[float]] = field(default_factory=dict)  # [sum of rate x seconds, seconds] while it was not slowed
    over_s: float = 0.0  # above the budget
    over_watts: float = 0.0  # at most


class Governor:
    """Decides what a run may draw now. `power`: the recipe's; `watts`: the plan's figures; `began_s`: when the process began, seconds since 1970."""

    def __init__(self, power: Power, watts: Watts, *, began_s: float, schedule: Schedule | None = None) -> None:
        self.power, self.watts, self.schedule, self.began_s = power, watts, schedule, began_s
        ramp = power.ramp_megawatts_min * 1e6 if power.ramp_megawatts_min is not None else watts.ramp_watts_min.value
        self.ramp = ramp / 60 if ramp else None  # watts per second
        self.acts = power.megawatts is not None or self.ramp is not None or schedule is not None
        full = expected(watts)
        self.line = _Line.prior(full) if full else None
        self.busy_s: float | None = None
        self.share = 1.0
        self.sure, self.dared = SURE, 0
        self.cap: float | None = None
        self.capless = 0.0  # a budget of so much was too little for limits
        self.extra = 0.0  # watts kept free because ten seconds were above the budget
        self.spent = _Cost()
        self.orders = _NOTHING  # the last
        self._pending: list[Seen] = []
        self._begun = False
        self._limit: float | None = None  # that the last target was for
        self._sure = False  # whether anything was measured
        self._unmetered = 0.0

    def decide(self, seen: Seen) -> Orders:
        """What to do until the next decision. Raises nothing; the same for the same history of `seen`."""
        if not self.acts:
            return _NOTHING
        now = self.schedule.at(seen.now_s) if self.schedule is not None else Now()
        self._account(seen, now)
        self._take(seen)
        limit, what = self._budget(now)
        if not self._pending or limit != self._limit or not self._begun or seen.steps == 0:
            self.dared = self.dared if limit == self._limit else 0
            self._limit = limit
            self._aim(limit, seen)
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
        """What acting has cost so far. `eur` and `kg_co2e`: `not_drawn` is what full speed would have drawn more, at the prices of those hours; `to_catch_up`
        what the tokens that were not trained cost at full speed at the mean price of the hours in which it was not slowed; `saved` the difference, null
        while a price is unknown."""
        cost = self.spent
        found: dict[str, Any] = {
            "seconds": round(cost.seconds, 3),
            "waited_s": round(cost.waited_s, 3),
            "paused_s": round(cost.paused_s, 3),
            "tokens_not_trained": None if cost.reference_tokens_s is None else round(max(0.0, cost.lost_tokens)),
            "over_budget_s": round(cost.over_s, 3),
            "over_budget_watts": round(cost.over_watts, 3),
        }
        for name, unit in (("eur", 1 / 3.6e9), ("kg_co2e", 1 / 3.6e9)):
            free = cost.saved.get(name)
            total, seconds = cost.spent_rate.get(name, (0.0, 0.0))
            catch_up = None
            if seconds and cost.reference_tokens_s and cost.reference_watts:
                catch_up = max(0.0, cost.lost_tokens) / cost.reference_tokens_s * cost.reference_watts * total / seconds * unit
            free = None if free is None else free * unit
            saved = None if free is None or catch_up is None else free - catch_up
            found[name] = {"not_drawn": free, "to_catch_up": catch_up, "saved": saved}
        return found

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values: what was learnt and what it cost; a resume that loads it need not learn again."""
        return {
            "line": None if self.line is None else asdict(self.line),
            "busy_s": self.busy_s,
            "sure": self._sure,
            "cost": asdict(self.spent),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The opposite of `state`. Other nodes draw otherwise: what was learnt is believed half as much."""
        self.spent = _Cost(**state["cost"])
        if state["line"] is not None and state["sure"]:
            self.line, self.busy_s, self._sure = _Line(**state["line"]), state["busy_s"], True
            self.line.var_rest, self.line.var_swing, self.line.both = (
                4 * one for one in (self.line.var_rest, self.line.var_swing, self.line.both)
            )

    # What is known

    def _take(self, seen: Seen) -> None:
        """Windows are put together until they are ten seconds; then there is something to learn from."""
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
            self.busy_s = busy_s if self.busy_s is None else self.busy_s + 0.5 * (busy_s - self.busy_s)
        metered = [one for one in used if one.watts_facility is not None]
        self._unmetered = 0.0 if metered else self._unmetered + seconds
        if not metered or self.busy_s is None:
            return
        seconds = sum(one.window_s for one in metered)
        watts = sum((one.watts_facility or 0.0) * one.window_s for one in metered) / seconds
        duty = min(1.0, sum(one.steps for one in metered) * self.busy_s / seconds)
        limits = [limit for one in metered if (limit := self._held(one)) is not None]
        peaks = [one.peak_watts for one in metered if one.peak_watts is not None]
        if len(limits) == len(metered) and peaks and self._sure and self.line is not None and not self._too_long(max(limits)):
            self.extra = min(0.2 * max(limits), max(0.995 * self.extra, self.extra + max(peaks) - max(limits)))
        if self.cap is not None:
            return  # another line; it is fed back, not learnt
        if self.line is None or not self._sure:
            self.line, self._sure = _Line.first(watts, duty, seconds), True  # one look at this machine says more than figures of others
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
        return limit is not None and seen.watts_facility is not None and seen.window_s >= SETTLE_S and seen.watts_facility > 1.05 * limit

    def _more(self, limit: float) -> float:
        """Watts that are kept free for the noise of a ten-second mean."""
        return max(0.005 * limit, NOISY * math.sqrt(self.line.noise) if self.line is not None else 0.0) + self.extra

    # What is wanted

    def _budget(self, now: Now) -> tuple[float | None, str]:
        """The facility's watts that the run may draw, and who says so."""
        given = [
            (1e6 * megawatts, what)
            for megawatts, what in ((self.power.megawatts, "power.megawatts"), (now.megawatts, "the schedule"))
            if megawatts is not None
        ]
        return min(given) if given else (None, "")

    def _held(self, seen: Seen) -> float | None:
        """The limit that a window was under: of those at its begin and its end the laxer."""
        begin, end = (
            self._budget(self.schedule.at(at_s) if self.schedule is not None else Now())[0]
            for at_s in (seen.now_s - seen.window_s, seen.now_s)
        )
        return None if begin is None or end is None else max(begin, end)

    def _slow(self, now: Now) -> float | None:
        """The share of full power, while price or carbon is above what the recipe says; 1: it is not; None: not followed, or not known."""
        if self.power.follow is None or self.power.slow_above is None:
            return None
        value = now.price_eur_mwh if self.power.follow == "price" else now.carbon_g_kwh
        return None if value is None else self.power.slow_to if value > self.power.slow_above else 1.0

    def _aim(self, limit: float | None, seen: Seen) -> None:
        """Set cap or share for a budget."""
        if limit is None:
            self.share, self.cap = 1.0, None
            return
        if self.line is None:  # nothing was measured and nothing is declared: the least, until there is a measurement
            self.share = FIRST if self._unmetered == 0.0 else 1.0
            return
        more = self._more(limit)
        full = self.line.at(1.0) + SURE * self.line.unsure(1.0) + more
        if self.cap is None and full <= (limit if self.share >= 1.0 else limit / ROOM):
            self.share = 1.0
            return
        if self._capped(limit, more, seen):
            self.share = 1.0
            return
        duty = self.line.duty(limit, more, self.sure)
        if not self._sure and self._unmetered:  # no meter will ever say it: by the site's figures then
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
        """Whether limits of the accelerators are enough; sets them."""
        most, least = self.watts.device_watts.value, seen.cap_min_share
        if not self.power.caps or least is None or not most or not seen.devices or limit <= self.capless or self.line is None:
            self.cap = None
            return False
        each = most * seen.devices * self._factor()  # facility watts of a whole share
        if self.cap is None:
            mean = 1.0  # a device's draw at full speed, over its limit: the devices' share of what is drawn, which at full speed is at least as large
            if seen.watts_device is not None and seen.watts_facility:
                mean = min(1.0, seen.watts_device / seen.watts_facility * self.line.at(1.0) / (most * seen.devices))
            if not self._sure or SURE * self.line.unsure(1.0) > 0.1 * limit:
                return False  # until more is known steps are spaced
            wanted = mean - (self.line.at(1.0) + SURE * self.line.unsure(1.0) + more - limit) / each
            if wanted < least - 0.05:
                self.capless = max(self.capless, 1.03 * limit)
                return False
            wanted = max(least, wanted)
        elif seen.watts_facility is None or seen.steps == 0:
            return True
        else:
            mean = seen.watts_device / (most * seen.devices) if seen.watts_device is not None else 1.0
            off = limit - more - seen.watts_facility
            wanted = self.cap
            if off > 0.015 * limit:
                wanted += 0.7 * off / each
            elif off < 0:
                wanted = min(self.cap, mean + 0.02) + off / each
            if self.cap <= least and off < 0:
                self.cap, self.capless = None, max(self.capless, 1.03 * limit)
                return False
            wanted = max(least, wanted)
        self.cap = None if wanted >= 1.0 and self._sure else min(1.0, wanted)
        return True

    def _factor(self) -> float:
        """Facility watts of one more watt of a device; where PUE is unknown 1, which takes more off the device than need be."""
        return (self.watts.pue.value or 1.0) * (1.0 + (self.watts.storage_share.value or 0.0))

    # What is ordered

    def _orders(self, seen: Seen, now: Now, limit: float | None, what: str) -> Orders:
        share, why = self.share, []
        if now.note:
            why.append(now.note)
        if limit is not None and self.line is None and not self._unmetered:
            why.append(f"{what} allows {_watts(limit)}, and what the run draws is not measured yet")
        elif limit is not None and self._unmetered:
            why.append(
                f"{_watts(limit)} of {what} cannot be kept: what the run draws at the facility is unknown"
                + (", and slowed by the site's figures" if self.line is not None else "")
            )
        elif limit is not None and self.cap is not None:
            why.append(f"{what} allows {_watts(limit)}: accelerators at {100 * self.cap:.0f} % of their limit")
        elif limit is not None and share < 1.0:
            why.append(f"{what} allows {_watts(limit)}")
        slow = self._slow(now)
        pause, leave = False, False
        if self.line is not None and limit is not None and self._hopeless(limit):
            why.append(f"at rest it draws {_watts(self.line.rest)}, and {what} allows {_watts(limit)}, which cannot be kept")
            pause = now.until_s is not None and what == "the schedule"  # else nothing will ever change it
            leave = not pause
            if leave:
                why.append("raise power.megawatts, or take fewer nodes")
        if slow is not None and slow < 1.0:
            value, unit = (now.price_eur_mwh, "EUR/MWh") if self.power.follow == "price" else (now.carbon_g_kwh, "g CO2e/kWh")
            why.append(f"{value:g} {unit} are above {self.power.slow_above:g}")
            rest, swing = (self.line.rest, self.line.swing) if self.line is not None else (0.5, 0.5)
            wanted = (slow * (rest + swing) - rest) / swing
            if slow == 0.0 or wanted <= LOW:
                pause = True
                if slow > 0.0:
                    why.append(
                        f"at rest it draws {100 * rest / (rest + swing):.0f} % of full power, more than the {100 * slow:.0f} % of slow_to"
                    )
            share = min(share, max(LOW, wanted))
        slope = self.slope
        low = LOW if slope is None else min(1.0, max(LOW, slope * MEAN_S))
        if self.ramp is not None and slope is None:
            share, low = min(share, LOW), LOW
            why.append("the ramp begins when it is known what the run draws")
        elif slope is not None and low >= 1.0:
            slope = None  # from rest to full is no more than ten seconds of the ramp
        until_s = now.until_s
        if pause and until_s is not None and until_s > seen.now_s:
            if slope is None or seen.steps == 0 or self._duty(seen) <= 2 * low + 0.02:
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
                )
            share = low
            why.append("slowed down along the ramp, to pause")
        brake = None
        if slope is not None and seen.stops_after is not None:
            seconds = max(0.0, share - low) / slope
            brake = max(0, seen.stops_after - math.ceil(seconds * (share + low) / 2 / self.busy_s) - 1) if self.busy_s else None
        then_s, then_share = self._ahead(seen.now_s, share, slope, low)
        period_s = self.busy_s / share if self.busy_s is not None and share < 1.0 else None
        if share < 1.0:
            why.append(f"{100 * share:.0f} % of full speed" + (f", a step every {period_s:.3g} s" if period_s is not None else ""))
            if limit is not None and self.busy_s is not None and self.line is not None and self._too_long(limit):
                why.append(f"kept over {period_s or 0:.0f} s, not over 10 s: one step is busy for {self.busy_s:.0f} s")
        return Orders(
            period_s=period_s,
            cap_share=self.cap,
            why="; ".join(why),
            share=share,
            busy_s=self.busy_s,
            slope=slope,
            low=low,
            brake_after=brake,
            then_s=then_s,
            then_share=then_share,
            leave=leave,
        )

    @property
    def slope(self) -> float | None:
        """Share of full speed per second that the ramp allows, by the largest swing that is likely; None: no ramp, or nothing known."""
        if self.ramp is None or self.line is None:
            return None
        unsure = math.sqrt(self.line.var_swing)
        return self.ramp / (1.1 * (self.line.swing + SURE * (min(unsure, 0.3 * self.line.swing) if self._sure else unsure)))

    def _hopeless(self, limit: float) -> bool:
        """Whether even at rest the budget is exceeded, beyond doubt."""
        assert self.line is not None
        return self._sure and self.line.rest - SURE * math.sqrt(self.line.var_rest) > limit

    def _ahead(self, now_s: float, share: float, slope: float | None, low: float) -> tuple[float | None, float]:
        """When, before the schedule allows less, to go down, and how far: the earliest of all changes that are near."""
        found: tuple[float | None, float] = (None, 1.0)
        if self.schedule is None or self.line is None or self.cap is not None:
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
            wanted = max(low, self._spaced(self.line.duty(limit, self._more(limit))))
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
        return 1.0 if limit is None or self.cap is not None else self._spaced(self.line.duty(limit, self._more(limit)))

    def _duty(self, seen: Seen) -> float:
        return seen.steps * self.busy_s / seen.window_s if self.busy_s is not None and seen.window_s > 0 else 1.0

    # What it cost

    def _account(self, seen: Seen, now: Now) -> None:
        cost = self.spent
        if seen.window_s <= 0 or seen.steps == 0:
            return
        cost.seconds += seen.window_s
        stepping_s = min(seen.window_s, seen.steps * (seen.step_s or 0.0))
        waited_s = stepping_s * (1.0 - seen.busy_share)
        cost.waited_s += waited_s
        held = self._held(seen)
        if held is not None and seen.watts_facility is not None:
            over = (seen.peak_watts if seen.peak_watts is not None else seen.watts_facility) - held
            if over > 0:
                cost.over_watts = max(cost.over_watts, over)
                cost.over_s += seen.window_s if seen.peak_watts is None else min(seen.window_s, MEAN_S)
        busy_s = stepping_s - waited_s
        if seen.tokens and busy_s > 0 and not seen.mixed:
            speed = seen.tokens / busy_s
            cost.reference_tokens_s = (
                speed if cost.reference_tokens_s is None else cost.reference_tokens_s + 0.2 * (speed - cost.reference_tokens_s)
            )
        if cost.reference_tokens_s is not None:
            cost.lost_tokens += waited_s * cost.reference_tokens_s
        full = self.line.at(1.0) if self.line is not None and self._sure else None
        if full is None or seen.watts_facility is None:
            return
        cost.reference_watts = full
        price = now.price_eur_mwh if now.price_eur_mwh is not None else self.watts.price_eur_mwh.value
        carbon = now.carbon_g_kwh if now.carbon_g_kwh is not None else self.watts.carbon_g_kwh.value
        slowed = waited_s > 0.01 * seen.window_s
        for name, rate in (("eur", price), ("kg_co2e", carbon)):
            if rate is None:
                continue
            if slowed:
                cost.saved[name] = (
                    cost.saved.get(name, 0.0) + max(0.0, full * stepping_s / seen.window_s - seen.watts_facility) * seen.window_s * rate
                )
            else:
                kept = cost.spent_rate.setdefault(name, [0.0, 0.0])
                kept[0] += rate * seen.window_s
                kept[1] += seen.window_s

    def paused(self, seconds: float, from_s: float) -> None:
        """A pause is over that began at a wall-clock time: of all ranks alike, for the account."""
        cost, full = self.spent, self.line
        cost.seconds += seconds
        cost.paused_s += seconds
        if cost.reference_tokens_s is not None:
            cost.lost_tokens += seconds * cost.reference_tokens_s
        if full is None or not self._sure:
            return
        stretches = self.schedule.between(from_s, from_s + seconds) if self.schedule is not None else iter([(seconds, Now())])
        for stretch_s, now in stretches:
            price = now.price_eur_mwh if now.price_eur_mwh is not None else self.watts.price_eur_mwh.value
            carbon = now.carbon_g_kwh if now.carbon_g_kwh is not None else self.watts.carbon_g_kwh.value
            for name, rate in (("eur", price), ("kg_co2e", carbon)):
                if rate is not None:
                    cost.saved[name] = cost.saved.get(name, 0.0) + full.swing * stretch_s * rate


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
        self.orders = _NOTHING
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
        if self.orders is _NOTHING or self.orders.idle:
            self._begun_s = None
            return 0.0
        paused_s = self._pause(stop, alive, meet) if self._pauses else 0.0
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


def expected(watts: Watts) -> float | None:
    """The run's facility watts by the figures of its site, before anything is measured; None: unknown."""
    nodes = -(-watts.accelerators // watts.per_node) if watts.per_node and watts.accelerators else 0
    if watts.facility_watts.value is not None and nodes:
        return watts.facility_watts.value * nodes
    if watts.node_watts.value is None or watts.pue.value is None or not nodes:
        return None
    shared = watts.accelerators * ((watts.fabric_watts.value or 0.0) + (watts.storage_watts.value or 0.0))
    return (watts.node_watts.value * nodes + shared) * (1.0 + (watts.storage_share.value or 0.0)) * watts.pue.value


def stagger(run_id: str, every: int) -> int:
    """The offset in steps at which this run saves: when (step + offset) % every == 0. By a hash of its name, so that the saves of many runs spread evenly."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8], "big") % max(1, every)


def _watts(watts: float) -> str:
    if watts < 9_999.5:
        return f"{watts:,.0f} W"
    return f"{watts / 1e3:,.1f} kW" if watts < 999_950 else f"{watts / 1e6:,.2f} MW"

"""What keeping to a budget cost a run: seconds waited and paused, tokens that were not trained, euro and carbon that were not drawn, and to catch up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gigatrain.planning.watts import Watts
from gigatrain.power.line import MEAN_S
from gigatrain.power.reading import Seen
from gigatrain.power.schedule import Now

UNITS = {"eur": 1 / 3.6e9, "kg_co2e": 1 / 3.6e9}  # of joules at EUR/MWh, and at g/kWh


def rates(now: Now, watts: Watts) -> dict[str, float]:
    """EUR/MWh and g CO2e/kWh by the schedule, else by the site; what neither knows is left out."""
    price = now.price_eur_mwh if now.price_eur_mwh is not None else watts.price_eur_mwh.value
    carbon = now.carbon_g_kwh if now.carbon_g_kwh is not None else watts.carbon_g_kwh.value
    return {name: rate for name, rate in (("eur", price), ("kg_co2e", carbon)) if rate is not None}


@dataclass
class Cost:
    """Sums over a run, which a checkpoint keeps."""

    seconds: float = 0.0  # of all windows
    waited_s: float = 0.0
    paused_s: float = 0.0
    lost_tokens: float = 0.0
    reference_tokens_s: float | None = None
    reference_watts: float | None = None
    saved: dict[str, float] = field(default_factory=dict)  # at the price of its hour: what full speed would have drawn more
    spent_rate: dict[str, list[float]] = field(default_factory=dict)  # [sum of rate x seconds, seconds] while it was not slowed
    over_s: float = 0.0  # of ten-second means above the budget
    over_watts: float = 0.0  # by how much, at most

    def above(self, watts: Sequence[float]) -> None:
        """Ten-second means that have closed, less their limits."""
        over = [one for one in watts if one > 0.0]
        self.over_s += MEAN_S * len(over)
        self.over_watts = max([self.over_watts, *over])

    def window(self, seen: Seen, full: float | None, rate: Mapping[str, float]) -> None:
        """A window of steps. `full`: watts at full speed, None where they are unknown; `rate`: of `rates`."""
        if seen.window_s <= 0 or seen.steps == 0:
            return
        self.seconds += seen.window_s
        stepping_s = min(seen.window_s, seen.steps * (seen.step_s or 0.0))
        waited_s = stepping_s * (1.0 - seen.busy_share)
        self.waited_s += waited_s
        busy_s = stepping_s - waited_s
        if seen.tokens and busy_s > 0 and not seen.mixed:
            speed, known = seen.tokens / busy_s, self.reference_tokens_s
            self.reference_tokens_s = speed if known is None else known + 0.2 * (speed - known)
        if self.reference_tokens_s is not None:
            self.lost_tokens += waited_s * self.reference_tokens_s
        if full is None or seen.watts is None:
            return
        self.reference_watts = full
        slowed = waited_s > 0.01 * seen.window_s
        for name, one in rate.items():
            if slowed:
                more = max(0.0, full * stepping_s / seen.window_s - seen.watts)
                self.saved[name] = self.saved.get(name, 0.0) + more * seen.window_s * one
            else:
                kept = self.spent_rate.setdefault(name, [0.0, 0.0])
                kept[0] += one * seen.window_s
                kept[1] += seen.window_s

    def pause(self, seconds: float, swing: float | None, stretches: Iterable[tuple[float, Mapping[str, float]]]) -> None:
        """A pause is over. `swing`: watts that steps add to rest, None where they are unknown; `stretches`: its (seconds, `rates`)."""
        self.seconds += seconds
        self.paused_s += seconds
        if self.reference_tokens_s is not None:
            self.lost_tokens += seconds * self.reference_tokens_s
        if swing is None:
            return
        for stretch_s, rate in stretches:
            for name, one in rate.items():
                self.saved[name] = self.saved.get(name, 0.0) + swing * stretch_s * one

    def told(self) -> dict[str, Any]:
        """As JSON values. `eur` and `kg_co2e`: `not_drawn` is what full speed would have drawn more, at the prices of those hours; `to_catch_up` what the
        tokens that were not trained cost at full speed at the mean price of the hours in which it was not slowed; `saved` the difference, null while a price
        is unknown."""
        found: dict[str, Any] = {
            "seconds": round(self.seconds, 3),
            "waited_s": round(self.waited_s, 3),
            "paused_s": round(self.paused_s, 3),
            "tokens_not_trained": None if self.reference_tokens_s is None else round(max(0.0, self.lost_tokens)),
            "over_budget_s": round(self.over_s, 3),
            "over_budget_watts": round(self.over_watts, 3),
        }
        for name, unit in UNITS.items():
            free = self.saved.get(name)
            total, seconds = self.spent_rate.get(name, (0.0, 0.0))
            catch_up = None
            if seconds and self.reference_tokens_s and self.reference_watts:
                catch_up = max(0.0, self.lost_tokens) / self.reference_tokens_s * self.reference_watts * total / seconds * unit
            free = None if free is None else free * unit
            saved = None if free is None or catch_up is None else free - catch_up
            found[name] = {"not_drawn": free, "to_catch_up": catch_up, "saved": saved}
        return found

"""What a run draws now: from the newest rows of energy.jsonl, each read once. `gigatrain watch`, Prometheus and whoever else follows a run ask here.

The whole account of a run, with restarts and held time, is account.py's.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from gigatrain.planning.watts import Watts
from gigatrain.power.boundary import look, widest
from gigatrain.power.reading import BIN_S, BOUNDARIES, Taken
from gigatrain.power.spans import LATEST_S, MOST, count_of, number_of, plus, taken_of

ROWS = 64  # that are kept to make up WINDOW_S
WINDOW_S = 10.0  # shorter ones tell nothing: a counter has news every 0.1 s
BINS = 360  # an hour


class Live:
    """Takes rows as they come."""

    def __init__(self) -> None:
        self.total, self.seconds = Taken(), 0.0
        self.rows: deque[tuple[Mapping[str, Any], Taken, float]] = deque(maxlen=ROWS)
        self.bins: dict[int, tuple[int, int, int]] = {}
        self.nodes = 0
        self.partial: set[int] = set()  # bins in which a process began
        self._before_s = 0.0

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """New rows of energy.jsonl, oldest first."""
        for row in rows:
            said, time_s, process = row.get("taken"), number_of(row, "time_s"), row.get("process")
            if time_s is None or not 0 <= time_s < LATEST_S or not isinstance(process, str) or not isinstance(said, dict):
                continue
            taken = taken_of(said)
            if not self.rows or self.rows[-1][0].get("process") != process:
                self.rows.clear()
                self.partial.add(int(time_s // BIN_S))
            answered = any(one.nodes for _, one, _ in self.rows)  # before that a meter's time comes with what it says first
            seconds = taken.ms / taken.nodes / 1e3 if taken.nodes else max(0.0, time_s - self._before_s) if answered else 0.0
            self._before_s = time_s
            self.rows.append((row, taken, seconds))
            plus(self.total, taken)
            self.seconds += seconds
            self.nodes = max(self.nodes, taken.nodes)
            bins = row.get("bins")
            for one in bins if isinstance(bins, list) else ():
                if (
                    isinstance(one, list)
                    and len(one) == 4
                    and all(type(word) is int and abs(word) < MOST for word in one)
                    and one[0] not in self.partial
                ):
                    self.bins[one[0]] = (one[1], one[2], one[3])
        while len(self.bins) > BINS:
            self.bins.pop(next(iter(self.bins)))

    def seen(self, watts: Watts | Mapping[str, Any] | None) -> dict[str, Any]:
        """Over the newest rows that make up 10 s, as JSON values: `watts`, `tokens_per_s_mw`, `joules_per_token` {boundary}, `boundary` (the widest that is
        known), `provenance` in words, `measured_share`, `capped_share`, `thermal_share`, `why` (something is unknown), `orders`; over all rows,
        `joules` {boundary}; over the last hour `ramp_watts`, the largest change in ten seconds. `watts`: the plan's, or as plan.json has them."""
        if not isinstance(watts, Watts):
            try:
                watts = Watts.model_validate(watts or {})
            except ValidationError:
                watts = Watts()
        taken, seconds, before, newest = Taken(), 0.0, None, None
        for row, one, spent in reversed(self.rows):
            if seconds >= WINDOW_S:
                before = row
                break
            if newest is None:
                newest = row
            elif row.get("event") in ("begin", "steps"):  # a start is no training
                before = row
                break
            plus(taken, one)
            seconds += spent
        found, why = look(taken, watts, seconds)
        known, name = widest(found)
        tokens = None
        if newest is not None and before is not None:
            ends = count_of(newest, "tokens"), count_of(before, "tokens")
            tokens = max(0, ends[0] - ends[1]) if ends[0] is not None and ends[1] is not None else None
        orders = newest.get("orders") if newest is not None else None
        total = look(self.total, watts, self.seconds)[0]
        return {
            "watts": {key: one.watts if one else None for key, one in found.items()} if known else None,
            "boundary": name,
            "provenance": known.words if known else None,
            "measured_share": known.shares["measured"] if known else None,
            "tokens_per_s_mw": {
                key: tokens / one.joules * 1e6 if one and tokens is not None and one.joules else None for key, one in found.items()
            },
            "joules_per_token": {key: one.joules / tokens if one and tokens else None for key, one in found.items()},
            "joules": {key: one.joules if one else None for key, one in total.items()},
            "capped_share": taken.held_down(taken.power_capped_ms) if watts.accelerators else None,
            "thermal_share": taken.held_down(taken.thermal_ms) if watts.accelerators else None,
            "ramp_watts": self._ramp(watts, name),
            "orders": str(orders.get("why")) if isinstance(orders, dict) and orders.get("why") else None,
            "why": next((why[key] for key in reversed(BOUNDARIES) if key in why), "") if self.rows else "",
        }

    def _ramp(self, watts: Watts, name: str | None) -> float | None:
        if name is None:
            return None
        factor, column = over(watts, name), 1 if name == "device" else 2
        changes = [
            abs(self.bins[number + 1][column] - one[column]) / 1e3 / BIN_S * factor
            for number, one in self.bins.items()
            if one[0] >= self.nodes and self.bins.get(number + 1, (0, 0, 0))[0] >= max(1, self.nodes)
        ]
        return max(changes, default=None)


def over(watts: Watts, name: str) -> float:
    """By how much a change of the node's watts is larger at a boundary; what does not change, as the fabric's nameplate, drops out of a difference."""
    factor = 1 + (watts.storage_share.value or 0.0) if name in ("it", "facility") else 1.0
    return factor * max(1.0, watts.pue.value or 1.0) if name == "facility" else factor

"""What a run drew, what was got for it and what keeping to a budget took: from its energy.jsonl and power/account.py's account of it."""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigatrain.errors import GigatrainError, PowerError
from gigatrain.observe.report.figures import SLACK, finite, known, utc, word
from gigatrain.observe.report.thinning import POINTS, extremes
from gigatrain.observe.tail import Tail
from gigatrain.power.reading import BIN_S, BOUNDARIES, PROVENANCES
from gigatrain.power.schedule import Schedule
from gigatrain.power.spans import MOST

ASKED = ("megawatts", "schedule", "follow", "ramp_megawatts_min", "caps")  # of watts, in plan.json
CHANGES = 500  # of a limit that are drawn
CARRIED_S = 1.0  # a cost of more seconds than its process has stepped was taken over from a checkpoint


def account(folder: Path, summary: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """power/account.py's account; or nothing, and why."""
    try:
        if (folder / "energy.jsonl").is_file():
            return importlib.import_module("gigatrain.power.account").account(folder), ""
    except GigatrainError as failure:
        return {}, str(failure)
    if isinstance(kept := summary.get("energy"), dict):
        return kept | {"windows": []}, ""
    return {}, "the run recorded no energy: it has no energy.jsonl"


def at_boundary(energy: Mapping[str, Any], name: str, boundary: str) -> Any:
    found = energy.get(name)
    return found.get(boundary) if isinstance(found, Mapping) else None


def headline_of(energy: Mapping[str, Any], lacking: str) -> dict[str, Any]:
    """What the run's energy comes to: at the boundary that the account chose, money and carbon at the facility."""
    chosen = energy.get("headline")
    chosen = chosen if isinstance(chosen, Mapping) else {}
    boundary = chosen.get("boundary")
    why = lacking or word(chosen.get("why")) or "no boundary's joules are known"
    speed = known(chosen.get("tokens_per_s_mw"), why)
    if boundary in BOUNDARIES and speed["value"] is not None:
        speed |= {
            "boundary": boundary,
            "low": finite(chosen.get("low")),
            "high": finite(chosen.get("high")),
            "why": word(chosen.get("why")),
        }
        speed["provenance"] = shares(at_boundary(energy, "provenance", boundary))
    widest = next((name for name in reversed(BOUNDARIES) if finite(at_boundary(energy, "joules", name)) is not None), None)
    joules = finite(at_boundary(energy, "joules", widest)) if widest else None
    spent = known(None if joules is None else joules / 3.6e9, why)
    if widest and spent["value"] is not None:
        spent |= {"boundary": widest, "provenance": shares(at_boundary(energy, "provenance", widest))}
    found = {"tokens_per_s_mw": speed, "mwh": spent}
    for name in ("eur", "kg_co2e"):
        found[name] = known(energy.get(name), lacking or why_not(energy, name) or _uncounted(energy, name))
    return found


def _uncounted(energy: Mapping[str, Any], name: str) -> str:
    """Which of the two that make up a cost is not known."""
    what, key = ("price", "price_eur_mwh") if name == "eur" else ("carbon of a kWh", "carbon_g_kwh")
    given = energy.get("sources")
    there = any(isinstance(one, Mapping) and one.get("what") == key for one in given) if isinstance(given, list) else False
    why = [] if there else [f"the {what} is unknown: neither the site nor a schedule has {key}"]
    if finite(at_boundary(energy, "joules", "facility")) is None:
        why.append(f"the facility's energy is unknown: {why_not(energy, 'facility') or 'no reason given'}")
    return "; ".join(why) or "not recorded"


def differs(energy: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Where summary.json has another figure than the files beside it give now: one account of one run's files has one figure, so another version wrote it."""
    kept = summary.get("energy")
    then, now = (
        finite(one.get("tokens_per_s_mw")) if isinstance(found, Mapping) and isinstance(one := found.get("headline"), Mapping) else None
        for found in (kept, energy)
    )
    if then is None or now is None or abs(then - now) <= 1e-9 * abs(now):
        return ""
    return (
        f"summary.json says {then:,.0f} tokens/s/MW, and this version's account of the same files {now:,.0f}: the run was finished by another version, "
        "or its files were changed since"
    )


def why_not(energy: Mapping[str, Any], name: str) -> str:
    said = energy.get("unknown")
    return (word(said.get(name)) or "") if isinstance(said, Mapping) else ""


def shares(said: Any) -> dict[str, float]:
    """The provenance of a number, by kind."""
    if not isinstance(said, Mapping):
        return {}
    return {kind: share for kind in PROVENANCES if (share := finite(said.get(kind))) is not None and share > 0}


def watts_over_time(energy: Mapping[str, Any], began_s: float | None) -> dict[str, Any]:
    """Watts and tokens/s/MW of each boundary over the seconds since the run began; a None parts what no reading joins."""
    rows = [row for row in energy.get("windows") or () if isinstance(row, Mapping) and finite(row.get("time_s")) is not None]
    rows = [row for row in rows if (finite(row.get("seconds")) or 0) > 0]
    zero = began_s if began_s is not None else rows[0]["time_s"] - rows[0]["seconds"] if rows else 0.0
    series: list[Mapping[str, Any] | None] = []
    gaps, end = 0, None
    for row in rows:
        start = row["time_s"] - row["seconds"]
        if end is not None and start - end > 1.0 + 0.02 * row["seconds"]:
            series.append(None)
            gaps += 1
        end = row["time_s"]
        series.append(row)
    widest = next(
        (name for name in reversed(BOUNDARIES) if any(row and finite(at_boundary(row, "watts", name)) is not None for row in series)), None
    )
    stepped = len(series) <= POINTS // 2
    if not stepped and widest:  # the extremes of both pictures
        heights = [[finite(at_boundary(row, name, widest)) if row else None for row in series] for name in ("watts", "tokens_per_s_mw")]
        series = [series[at] for at in sorted({at for one in heights for at in extremes(one, POINTS // 2)})]
    found: dict[str, Any] = {"t_s": [], "watts": {name: [] for name in BOUNDARIES}, "tokens_per_s_mw": {name: [] for name in BOUNDARIES}}
    for row in series:
        for at in () if row is None else (row["time_s"] - row["seconds"], row["time_s"]) if stepped else (row["time_s"],):
            found["t_s"].append(at - zero)
            for name in BOUNDARIES:
                found["watts"][name].append(finite(at_boundary(row or {}, "watts", name)))
                found["tokens_per_s_mw"][name].append(finite(at_boundary(row or {}, "tokens_per_s_mw", name)))
        if row is None and found["t_s"]:
            found["t_s"].append(None)
            for name in BOUNDARIES:
                found["watts"][name].append(None)
                found["tokens_per_s_mw"][name].append(None)
    return found | {"windows": len(rows), "gaps": gaps, "planned": {}, "planned_tokens_per_s_mw": {}}


def budget_of(folder: Path, plan: Mapping[str, Any], energy: Mapping[str, Any], began_s: float | None) -> dict[str, Any]:
    """The limit, the highest ten-second mean of the facility against it, and what was spent; empty where nothing was asked for.

    A ten-second bin counts if every node has closed it, times facility over node of the whole run. A bin in which the limit changed is held to the laxer one.
    """
    power = plan.get("power")
    asked = {name: power.get(name) for name in ASKED if power.get(name)} if isinstance(power, Mapping) else {}
    rows = [row for row in Tail(folder / "energy.jsonl").rows()[0] if finite(row.get("time_s")) is not None]
    if not asked and not any(isinstance(row.get("orders"), dict) and row["orders"] for row in rows):
        return {}
    megawatts, path, unread = finite(asked.get("megawatts")), asked.get("schedule"), ""
    schedule = None
    if isinstance(path, str):
        try:
            schedule = Schedule.read(path)
        except (PowerError, OSError, ValueError) as failure:
            unread = f"its schedule cannot be read any more: {failure}"

    def limit(at_s: float) -> float | None:
        by_time = finite(schedule.at(at_s).megawatts) if schedule is not None else None
        return min((one * 1e6 for one in (megawatts, by_time) if one is not None), default=None)

    bins = _bins(rows, finite(energy.get("nodes")))
    node, facility = (finite(at_boundary(energy, "joules", name)) for name in ("node", "facility"))
    ratio = facility / node if facility is not None and node else None
    drawn: list[tuple[float, float, float | None]] = []
    for number, node_mj in bins.items() if ratio is not None else ():
        first, last = limit(number * BIN_S), limit((number + 1) * BIN_S - 1e-3)
        laxer = None if first is None or last is None else max(first, last)
        drawn.append((node_mj / 1e3 / BIN_S * (ratio or 0.0), float(number * BIN_S), laxer))
    held = [one for one in drawn if one[2] is not None]
    top = max(held, key=lambda one: one[0] / one[2] if one[2] else math.inf, default=None) or max(
        drawn, key=lambda one: one[0], default=None
    )
    why = (
        "no ten seconds were closed by all nodes" if ratio is not None else why_not(energy, "facility") or "the facility's draw is unknown"
    )
    ordered = [row for row in rows if isinstance(row.get("orders"), dict)]
    said = [(row, text) for row in ordered if (text := word(row["orders"].get("why")))]
    begin, end = (rows[0]["time_s"], rows[-1]["time_s"]) if rows else (0.0, 0.0)
    zero = began_s if began_s is not None else begin
    above = [one for one in held if one[2] is not None and one[0] > one[2] * (1 + SLACK)]
    return {
        "asked": {name: word(one) if isinstance(one, str) else one for name, one in asked.items()},
        "unread": unread,
        "limit": [[at_s - zero, watts] for at_s, watts in _changing(limit, schedule, begin, end)],
        "highest": known(top[0] if top else None, why) | ({"time": utc(top[1]), "limit_watts": top[2]} if top else {}),
        "bins": len(drawn),
        "bins_held": len(held),
        "bins_above": len(above),
        "above_s": len(above) * BIN_S,
        "cost": _spent(rows),
        "why": said[-1][1] if said else "",
        "since": utc(said[-1][0]["time_s"]) if said else None,
        "over": bool(said) and said[-1][0] is not ordered[-1],  # the last order of all is to do nothing
    }


def _bins(rows: Sequence[Mapping[str, Any]], nodes: float | None) -> dict[int, float]:
    """Node millijoules by number, of those that all nodes have closed."""
    found: dict[int, tuple[int, int]] = {}
    for row in rows:
        given = row.get("bins")
        for one in given if isinstance(given, list) else ():
            if isinstance(one, list) and len(one) == 4 and all(type(word) is int and 0 <= word < MOST for word in one):
                found[one[0]] = (one[1], one[3])
    most = nodes or max((count for count, _ in found.values()), default=0)
    return {number: float(joules) for number, (count, joules) in sorted(found.items()) if count >= most}


def _changing(
    limit: Callable[[float], float | None], schedule: Schedule | None, begin: float, end: float
) -> Iterator[tuple[float, float | None]]:
    """The limit by time, each level with both its ends."""
    at_s = begin
    for _ in range(CHANGES):
        until = schedule.at(at_s).until_s if schedule is not None else None
        next_s = end if until is None or until <= at_s else min(end, until)
        level = limit(at_s)
        yield at_s, level
        yield next_s, level
        if next_s >= end:
            return
        at_s = next_s


def _spent(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What keeping to it took, over all processes: each one's last word, less what it took over from the checkpoint that it went on from."""
    sessions: dict[Any, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    steps: dict[Any, float] = {}
    for row in rows:
        process, orders = str(row.get("process")), row.get("orders")
        if row.get("event") == "steps" or process not in steps:
            steps[process] = row["time_s"]
        cost = orders.get("cost") if isinstance(orders, Mapping) else None
        if isinstance(cost, Mapping):
            sessions.setdefault(process, []).append((row, cost))
    total: dict[str, float | None] = {}
    earlier: list[dict[str, float | None]] = []
    for process, said in sessions.items():
        costs = [_flat(cost) for _, cost in said]
        begun = (costs[0].get("seconds") or 0.0) - max(0.0, said[0][0]["time_s"] - steps[process])
        before: dict[str, float | None] = {}
        if begun > CARRIED_S and earlier:
            before = min(earlier, key=lambda one: abs((one.get("seconds") or 0.0) - begun))
        for name, now in costs[-1].items():
            if name == "over_budget_watts":
                total[name] = max((one for one in (total.get(name), now) if one is not None), default=None)
            elif name not in total or total[name] is not None:
                total[name] = None if now is None else (total.get(name) or 0.0) + now - (before.get(name) or 0.0)
        earlier += costs
    return total


def _flat(cost: Mapping[str, Any]) -> dict[str, float | None]:
    """Its numbers by name, money and carbon as `eur_saved` and alike; None: unknown."""
    found = {
        name: finite(cost.get(name))
        for name in ("seconds", "waited_s", "paused_s", "tokens_not_trained", "over_budget_s", "over_budget_watts")
    }
    for name in ("eur", "kg_co2e"):
        found |= {f"{name}_{what}": finite(at_boundary(cost, name, what)) for what in ("not_drawn", "to_catch_up", "saved")}
    return found

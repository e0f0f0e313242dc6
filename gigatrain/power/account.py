"""From what meters counted to tokens/s/MW at four boundaries, over a run's whole wall-clock. POWER.md has the definition, this file computes it.

`boundaries` (boundary.py) goes from what meters summed to joules at each boundary. `account` does that for a run's folder: every process of it, what was
drawn for steps that a restart did again, and the time for which nodes were held and nobody trained (spans.py). What is unknown stays unknown, with a reason.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gigatrain.architectures import Architecture
from gigatrain.errors import PowerError, RunError
from gigatrain.launching import job
from gigatrain.planning.watts import Watts
from gigatrain.power import legs
from gigatrain.power import schedule as schedules
from gigatrain.power.boundary import Boundary, boundaries, disagreement, unknown, widest
from gigatrain.power.live import over
from gigatrain.power.reading import BIN_S, BOUNDARIES, Taken
from gigatrain.power.spans import MOST, Session, Spans, number_of, one_object, plus, retained, sessions_of, taken_of, times, until_of
from gigatrain.site import Figure

__all__ = ["Boundary", "account", "boundaries", "taken_of", "unknown"]
WINDOW_S = 10.0  # the shortest that joules are told of: 100 updates of a counter that has news every 0.1 s
UPDATES = 100
WINDOWS = 2000  # that `windows` holds; those of a longer run are longer
J_PER_KWH = 3.6e6


class Now(Protocol):
    """What holds at some time, until `until_s` (None: for good); power/schedule.py gives it."""

    @property
    def price_eur_mwh(self) -> float | None: ...
    @property
    def carbon_g_kwh(self) -> float | None: ...
    @property
    def until_s(self) -> float | None: ...


class Schedule(Protocol):
    """Prices and carbon by time."""

    def at(self, time_s: float) -> Now: ...


def account(run: Path, *, schedule: Schedule | None = None, until: float | None = None) -> dict[str, Any]:
    """What a run drew and what was got for it, as JSON values; a figure that is not known is None. POWER.md defines each.

    `schedule` gives prices and carbon by time; without one that of the plan, and where that has none the site's. `until` leaves out what came later. Keys, each
    {boundary} one of device, node, it, facility:

    `tokens` that the run stands on; `wall_s` from its first process's begin to the last row, and `queued_s` for which no nodes were held, not in it;
    `joules`, `bounds` ([low, high]), `watts`, `tokens_per_s_mw`, `tokens_per_joule`, `kwh_per_gtoken`, `model_flop_per_joule` (by the project's count, with
    attention), `flop6n_per_joule` (6 per parameter that a token meets), each {boundary}; `unknown` {boundary: why}; `provenance` {boundary: {kind: share}}
    and `mix` {boundary: words}; `headline` {boundary, tokens_per_s_mw, low, high, tokens_per_joule, joules, watts, why}; `eur`, `eur_per_gtoken`, `kg_co2e`,
    `kg_co2e_per_gtoken` at the facility; `phases` {name: joules of rank 0's node}; `held` {seconds, joules, why}; `disagreement` of counter and integral;
    `gap_share` of the accelerators' time; `capped_share`, `thermal_share`, `brake_share` of that for which their meters gave reasons; `cpu_joules`; `ramp`
    {max_watts_per_10s, at_s, boundary}; `windows` [{time_s, event (starting, steps, held), process, step, seconds, tokens, redone, watts, tokens_per_s_mw,
    provenance, capped_share}]; `meters`; `sources` [{what, value, basis, source}];
    `legs` [{number, site, seconds, joules, watts, unknown, boundary, provenance, mix, eur, kg_co2e, processes}], each by its own plan's site, whose sums the
    run's figures are; `nodes`, `accelerators`, `processes`, `rows`, `notes`.

    Raises RunError where there is no folder.
    """
    if not run.is_dir():
        raise RunError(f"{run} is no folder; a run's is what `gigatrain train` prints last, or --run names")
    plan = one_object(run / "plan.json")
    rows, events = until_of(run / "energy.jsonl", until), until_of(run / "logs" / "progress.jsonl", until)
    sessions = sessions_of(events, rows)
    parts, notes = legs.cut(run, plan, sessions), list[str]()
    for part in parts:
        notes += [f"{part.name}: {note}" if len(parts) > 1 else note for note in part.notes]
        part.prices = _planned(part.plan, notes) if schedule is None else schedule
    legs.measure(parts, job.history(run) if (run / "launch" / "history.jsonl").is_file() else [])
    watts, spans = parts[-1].watts, legs.together(parts)
    taken, wall_s, nodes, devices = spans.sum, spans.seconds, spans.nodes, spans.devices
    notes += spans.notes
    found, why = legs.look(parts)
    if not sessions:
        why |= dict.fromkeys(BOUNDARIES, "the run has no rows in energy.jsonl and no progress")
    elif not any(session.rows for session in sessions):
        why |= dict.fromkeys(BOUNDARIES, "not measured: energy.jsonl has no rows")
        found.update(dict.fromkeys(BOUNDARIES))
    tokens = retained(sessions, run)
    chunks = _chunks(sessions, spans, plan, wall_s)
    where = {session.process: part for part in parts for session in part.sessions}
    windows = [chunk.told(where[chunk.process].watts) for chunk in chunks]
    joules = {name: one.joules if one else None for name, one in found.items()}
    per_joule = {name: tokens / one.joules if one and tokens is not None and one.joules else None for name, one in found.items()}
    flops, active = number_of(plan, "flops_per_token"), _active(plan)
    off = disagreement(taken)
    device_ms = taken.device_ms + taken.device_unknown_ms
    shares = [
        _costs([one for one in chunks if where[one.process] is part], part.watts, part.look()[0]["facility"], part.prices) for part in parts
    ]
    costs = shares[-1] if len(parts) == 1 else _summed(shares, parts, found["facility"])
    return {
        "tokens": tokens,
        "wall_s": round(wall_s, 3),
        "queued_s": round(spans.queued_s, 3),
        "joules": joules,
        "bounds": {name: [one.low, one.high] if one else None for name, one in found.items()},
        "watts": {name: one.watts if one else None for name, one in found.items()},
        "tokens_per_s_mw": {name: times(value, 1e6) for name, value in per_joule.items()},
        "tokens_per_joule": per_joule,
        "kwh_per_gtoken": {name: 1e9 / value / J_PER_KWH if value else None for name, value in per_joule.items()},
        "unknown": {name: why[name] for name in BOUNDARIES if found[name] is None},
        "provenance": {name: one.shares if one else None for name, one in found.items()},
        "mix": {name: one.words if one else None for name, one in found.items()},
        "headline": _headline(found, why, tokens),
        **{key: costs[key] for key in ("eur", "kg_co2e")},
        **{f"{key}_per_gtoken": times(costs[key], 1e9 / tokens) if tokens else None for key in ("eur", "kg_co2e")},
        "model_flop_per_joule": {name: times(value, flops) for name, value in per_joule.items()},
        "flop6n_per_joule": {name: times(value, 6 * active if active is not None else None) for name, value in per_joule.items()},
        "phases": _phases(rows, sessions),
        "held": legs.held(parts, spans, found),
        "disagreement": off,
        "gap_share": taken.gap_ms / device_ms if device_ms else None,
        "capped_share": taken.held_down(taken.power_capped_ms) if watts.accelerators else None,
        "thermal_share": taken.held_down(taken.thermal_ms) if watts.accelerators else None,
        "brake_share": taken.held_down(taken.brake_ms) if watts.accelerators else None,
        "cpu_joules": taken.cpu_mj / 1e3 if taken.cpu_mj else None,
        "ramp": _ramp(rows, sessions, nodes, watts, found),
        "windows": windows,
        "meters": _meters(rows),
        "sources": _sources(watts, found, wall_s, nodes, costs["words"], spans),
        "legs": [legs.told(part, share) for part, share in zip(parts, shares, strict=True)],
        "nodes": nodes,
        "accelerators": devices,
        "processes": len(sessions),
        "rows": sum(len(session.rows) for session in sessions),
        "notes": notes,
    }


def _headline(found: Mapping[str, Boundary | None], why: Mapping[str, str], tokens: int | None) -> dict[str, Any]:
    """The facility if it is known, else the widest boundary that is."""
    one, name = widest(found)
    if one is None:
        keys = ("boundary", "tokens_per_s_mw", "low", "high", "tokens_per_joule", "joules", "watts")
        return dict.fromkeys(keys) | {"why": f"no boundary is known: {why.get('device', why.get('node', ''))}"}
    rates = [tokens / joules if tokens is not None and joules else None for joules in (one.joules, one.high, one.low)]
    wider = "" if name == "facility" else f"the {name} boundary is the widest that is known; facility: {why['facility']}; "
    return {
        "boundary": name,
        "tokens_per_s_mw": times(rates[0], 1e6),
        "low": times(rates[1], 1e6),
        "high": times(rates[2], 1e6),
        "tokens_per_joule": rates[0],
        "joules": one.joules,
        "watts": one.watts,
        "why": wider + one.words,
    }


def _planned(plan: Mapping[str, Any], notes: list[str]) -> Schedule | None:
    """The schedule that the run followed, if it can still be read."""
    power = plan.get("power")
    path = power.get("schedule") if isinstance(power, dict) else None
    if not isinstance(path, str):
        return None
    try:
        return schedules.Schedule.read(path)
    except PowerError as failure:
        notes.append(f"the run's schedule cannot be read: {failure}; prices and carbon are the site's")
        return None


def _active(plan: Mapping[str, Any]) -> float | None:
    """Parameters that one token meets."""
    said = plan.get("architecture")
    if not isinstance(said, dict):
        return None
    if "products" in said:  # gigatrain.foreign: weights that a token is multiplied with
        return number_of(said, "products")
    with contextlib.suppress(ValueError, ArithmeticError):
        return float(Architecture.model_validate_json(json.dumps(said)).active_parameters())
    return None


# ---- Windows, ramp, phases ----


@dataclass
class _Chunk:
    """Rows of one process that are told together."""

    process: str
    event: str
    end_s: float
    step: int | None = None
    seconds: float = 0.0
    tokens: float = 0.0  # that were kept
    redone: float = 0.0
    taken: Taken = field(default_factory=Taken)

    def told(self, watts: Watts) -> dict[str, Any]:
        found = boundaries(self.taken, watts, self.seconds)
        known, _ = widest(found)
        return {
            "time_s": self.end_s,
            "event": self.event,
            "process": self.process,
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "tokens": round(self.tokens),
            "redone": round(self.redone),
            "watts": {name: one.watts if one else None for name, one in found.items()},
            "tokens_per_s_mw": {name: self.tokens / one.joules * 1e6 if one and one.joules else None for name, one in found.items()},
            "provenance": known.shares if known else None,
            "capped_share": self.taken.held_down(self.taken.power_capped_ms) if watts.accelerators else None,
        }


def _chunks(sessions: list[Session], spans: Spans, plan: Mapping[str, Any], wall_s: float) -> list[_Chunk]:
    """Rows put together until each lasts as long as joules can be told of: 10 s, or 100 readings; longer where there would be too many."""
    power = plan.get("power")
    every_s = number_of(power, "every_s") if isinstance(power, dict) else None
    least_s = max(WINDOW_S, UPDATES * (every_s or 0.0), wall_s / WINDOWS)
    begins = [session.began if session.began is not None else math.inf for session in sessions]
    found: list[_Chunk] = []
    for index, session in enumerate(sessions):
        cut = min(begins[index + 1 :], default=math.inf)
        at, tokens = session.began, session.began_tokens
        opened: _Chunk | None = None
        first = len(found)
        for row in session.rows:
            starting = row.event in ("begin", "steps")
            if opened is None or (opened.event == "starting") != starting:
                opened = _Chunk(session.process, "starting" if starting else "steps", row.time_s)
                found.append(opened)
            opened.end_s, opened.step = row.time_s, row.step if row.step is not None else opened.step
            opened.seconds += row.seconds
            plus(opened.taken, row.taken)
            if row.event in ("window", "end") and row.step is not None and row.tokens is not None:
                if at is not None and tokens is not None and row.step > at:
                    kept = min(1.0, max(0.0, (cut - at) / (row.step - at)))
                    gained = max(0, row.tokens - tokens)
                    opened.tokens += gained * kept
                    opened.redone += gained * (1 - kept)
                at, tokens = row.step, row.tokens
            elif row.event == "steps":
                at, tokens = row.step, row.tokens
            if not starting and opened.seconds >= least_s:
                opened = None
        last = found[-1] if len(found) > first else None
        if last is not None and last.event == "steps" and last.seconds < least_s and len(found) - first > 1 and found[-2].event == "steps":
            found.pop()
            before = found[-1]
            before.end_s, before.step, before.seconds = last.end_s, last.step, before.seconds + last.seconds
            before.tokens, before.redone = before.tokens + last.tokens, before.redone + last.redone
            plus(before.taken, last.taken)
        for stretch in spans.stretches:
            if stretch.before is session:
                end_s = stretch.begin_s + stretch.seconds
                found.append(_Chunk(session.process, "held", end_s, seconds=stretch.seconds, taken=stretch.taken))
    return found


def _phases(rows: list[dict[str, Any]], sessions: list[Session]) -> dict[str, float]:
    """Joules of rank 0's node by what its loop did."""
    ours, found = {session.process for session in sessions}, dict[str, float]()
    for row in rows:
        said = row.get("phases")
        if isinstance(said, dict) and row["process"] in ours:
            for name in said:
                if (joules := number_of(said, name)) is not None:
                    found[str(name)] = found.get(str(name), 0.0) + joules
    return {name: round(joules, 3) for name, joules in found.items()}


def _ramp(
    rows: list[dict[str, Any]], sessions: list[Session], nodes: int, watts: Watts, found: Mapping[str, Boundary | None]
) -> dict[str, Any] | None:
    """The largest change between neighbouring ten-second bins that every node has closed; the bin in which a process began is not whole."""
    partial = {int(session.begin_s // BIN_S) for session in sessions}
    bins: dict[int, tuple[float, float]] = {}
    for row in rows:
        said = row.get("bins")
        for one in said if isinstance(said, list) else ():
            if isinstance(one, list) and len(one) == 4 and all(isinstance(word, int) and abs(word) < MOST for word in one):
                number, closed, device_mj, node_mj = one
                if closed >= nodes and number not in partial:
                    bins[number] = (device_mj / 1e3 / BIN_S, node_mj / 1e3 / BIN_S)
    _, name = widest(found)
    if name is None:
        return None
    factor = over(watts, name)
    column = 0 if name == "device" else 1
    steps = [(abs(bins[number + 1][column] - bins[number][column]) * factor, (number + 1) * BIN_S) for number in bins if number + 1 in bins]
    if not steps:
        return None
    largest, at_s = max(steps)
    return {"max_watts_per_10s": largest, "at_s": at_s, "boundary": name}


def _meters(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Of the last process that said what it reads."""
    said = [row["meters"] for row in rows if isinstance(row.get("meters"), dict)]
    return {str(what): str(how) for what, how in said[-1].items()} if said else {}


# ---- Euro, carbon, sources ----


def _costs(chunks: list[_Chunk], watts: Watts, facility: Boundary | None, schedule: Schedule | None) -> dict[str, Any]:
    """Euro and kg CO2e of the facility's joules: by the schedule's price of each window's time, else by the site's; None where neither has one."""
    found: dict[str, Any] = {"eur": None, "kg_co2e": None, "words": {}}
    for key, attribute, figure, per_joule in (
        ("eur", "price_eur_mwh", watts.price_eur_mwh, 1 / 3.6e9),
        ("kg_co2e", "carbon_g_kwh", watts.carbon_g_kwh, 1e-3 / J_PER_KWH),
    ):
        value, basis, how = figure.value, figure.basis, figure.source
        if schedule is not None:
            whole = priced = filled = 0.0
            for begin_s, end_s, joules in _drawn(chunks, watts):
                mean, covered = _mean(schedule, attribute, begin_s, end_s)
                covered = covered if figure.known else 1.0  # of one stretch, the rest like what is known of it
                if mean is None and not figure.known:
                    continue
                whole += joules
                filled += joules * (1 - covered)
                priced += joules * ((mean or 0.0) * covered + (figure.value or 0.0) * (1 - covered))
            if filled < whole:
                value, basis, how = priced / whole, "declared", "the schedule, by the time of each window"
                how += f"; it has none for {100 * filled / whole:.1f} % of the joules: {figure.source}" if filled else ""
        if value is not None:
            found["words"][attribute] = (value, basis, how)
        if facility is not None and value is not None:
            found[key] = facility.joules * value * per_joule
    return found


def _summed(shares: list[dict[str, Any]], parts: list[legs.Leg], facility: Boundary | None) -> dict[str, Any]:
    """Of several legs: euro and carbon where each leg's are known, and what each took them from."""
    found: dict[str, Any] = {"words": {}}
    drew = [share for share, part in zip(shares, parts, strict=True) if part.sessions]
    for key in ("eur", "kg_co2e"):
        known = [share[key] for share in drew]
        found[key] = None if facility is None or None in known else sum(known)
    for share, part in zip(shares, parts, strict=True):
        found["words"] |= {f"{what} of {part.name}": said for what, said in share["words"].items()}
    return found


def _drawn(chunks: list[_Chunk], watts: Watts) -> Iterable[tuple[float, float, float]]:
    """(begin, end, joules at the widest known boundary) of everything that was drawn."""
    for chunk in chunks:
        one, _ = widest(boundaries(chunk.taken, watts, chunk.seconds))
        if one is not None:
            yield chunk.end_s - chunk.seconds, chunk.end_s, one.joules


def _mean(schedule: Schedule, attribute: str, begin_s: float, end_s: float) -> tuple[float | None, float]:
    """Mean over a stretch of time of a schedule's column, and for which share of it there is one."""
    total = covered = 0.0
    at_s = begin_s
    for _ in range(10_000):  # a stretch is hours, a row of a schedule minutes
        now = schedule.at(at_s)
        next_s = min(end_s, now.until_s if now.until_s is not None and now.until_s > at_s else end_s)
        value = getattr(now, attribute)
        if value is not None:
            total += value * max(next_s - at_s, 1e-9)
            covered += max(next_s - at_s, 1e-9)
        if next_s >= end_s:
            break
        at_s = next_s
    return (total / covered if covered else None), min(1.0, covered / max(end_s - begin_s, 1e-9))


def _sources(
    watts: Watts, found: Mapping[str, Boundary | None], wall_s: float, nodes: int, costs: Mapping[str, Any], spans: Spans
) -> list[dict[str, Any]]:
    """Every figure that the account took from elsewhere than a meter, with its basis and where it was read; and what it is compared with."""
    said = []
    for name in ("device_watts", "rest_watts", "fabric_watts", "storage_watts", "storage_share", "pue"):
        figure: Figure = getattr(watts, name)
        if figure.known or name in ("fabric_watts", "pue"):
            said.append({"what": name, "value": figure.value, "basis": figure.basis, "source": figure.source})
    said += [{"what": name, "value": value, "basis": basis, "source": source} for name, (value, basis, source) in costs.items()]
    if spans.held_s:
        said.append({"what": "held", "value": round(spans.held_s, 3), "basis": "assumed", "source": "; ".join(spans.whys)})
    site, ours = watts.facility_watts, found["facility"]
    if site.value is not None and ours is not None and ours.watts is not None:
        per_node = ours.watts / nodes
        text = f"compared only: by the site's own total a node has {site.value:,.0f} W of the facility, by this account {per_node:,.0f} W; {site.source}"
        said.append({"what": "facility_watts", "value": site.value, "basis": site.basis, "source": text})
    return said

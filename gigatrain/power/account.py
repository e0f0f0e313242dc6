"""From what meters counted to tokens/s/MW at four boundaries, over a run's whole wall-clock. POWER.md has the definition, this file computes it.

`boundaries` is pure: integers that meters summed, the plan's figures and seconds in; joules at the device, the node, IT and the facility out, each with
where they are from. `account` does that for a run's folder: every process of it, what was drawn for steps that a restart did again, and the time for which
nodes were held and nobody trained. Nothing that is unknown is taken for 0: it stays unknown, with the reason.
"""

import contextlib
import datetime
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from gigatrain.architectures import Architecture
from gigatrain.errors import RunError
from gigatrain.launching import job
from gigatrain.planning.watts import Watts
from gigatrain.power.reading import BIN_S, BOUNDARIES, FIELDS, PROVENANCES, Provenance, Taken
from gigatrain.site import Figure

UNSEEN = 0.01  # of the time: below it joules are scaled up, above it the boundary is unknown. What hides there draws 0 to twice the mean: 1 % of the sum
WITHIN_NODE = (
    0.95  # a node's meter that shows less than this share of its devices' joules is no meter of the whole node (both are good to 5 %)
)
WINDOW_S = 10.0  # the shortest that joules are told of: 100 updates of a counter that has news every 0.1 s
UPDATES = 100
WINDOWS = 2000  # that `windows` holds; those of a longer run are longer
# How far the truth may lie from each kind of joules, as factors (POWER.md, "How sure"): bounds, added as if all erred the same way.
SURE: dict[Provenance, tuple[float, float]] = {
    "measured": (0.95, 1.05),
    "estimated": (0.5, 1.5),
    "nameplate": (0.67, 1.0),
    "declared": (0.8, 1.2),
}
J_PER_KWH = 3.6e6
Kinds = dict[Provenance, float]
Layers = dict[str, Kinds]
_NAMES = {
    "device": "accelerators",
    "node": "rest of the nodes",
    "nodes": "nodes",
    "fabric": "fabric",
    "storage": "storage",
    "cooling": "cooling",
}


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


@dataclass(frozen=True)
class Boundary:
    """Joules within one boundary over some seconds. `layers`: what of it (device, node, fabric, ...) and of which provenance; `low` and `high` bound it."""

    joules: float
    seconds: float
    low: float
    high: float
    layers: Layers

    @property
    def watts(self) -> float | None:
        return self.joules / self.seconds if self.seconds > 0 else None

    @property
    def parts(self) -> Kinds:
        """Joules by provenance."""
        found: Kinds = dict.fromkeys(PROVENANCES, 0.0)
        for layer in self.layers.values():
            for kind, joules in layer.items():
                found[kind] += joules
        return found

    @property
    def shares(self) -> Kinds:
        """The parts over the whole; all 0 where nothing was drawn."""
        return {kind: joules / self.joules if self.joules else 0.0 for kind, joules in self.parts.items()}

    @property
    def words(self) -> str:
        """`accelerators 71 % measured, rest of the nodes 17 % measured, fabric 10 % nameplate`, of the whole."""
        said = [
            f"{_NAMES[name]} {joules / self.joules:.0%} {kind}".replace("%", " %")
            for name, layer in self.layers.items()
            for kind, joules in layer.items()
            if self.joules and joules / self.joules >= 0.005
        ]
        return ", ".join(said) or "nothing was drawn"


def boundaries(taken: Taken, watts: Watts, seconds: float) -> dict[str, Boundary | None]:
    """Device, node, IT and facility over `seconds` of the whole run (not summed over its nodes); None: unknown, and `unknown` says why.

    Joules that belong to a killed process (`recovered_mj`) are not of these seconds and left out.
    """
    return _found(taken, watts, seconds)[0]


def unknown(taken: Taken, watts: Watts, seconds: float) -> dict[str, str]:
    """Why a boundary of `boundaries` is None."""
    return _found(taken, watts, seconds)[1]


def _found(taken: Taken, watts: Watts, seconds: float) -> tuple[dict[str, Boundary | None], dict[str, str]]:
    found: dict[str, Boundary | None] = dict.fromkeys(BOUNDARIES)
    why: dict[str, str] = {}
    off = _disagreement(taken)
    error = max(1 - SURE["measured"][0], abs(off or 0.0))
    sure: dict[Provenance, tuple[float, float]] = {**SURE, "measured": (1 - error, 1 + error)}
    nodes = _nodes(watts)
    missing_ms = max(0, nodes - taken.nodes) * seconds * 1e3 if taken.nodes else 0.0  # of nodes from which nothing came
    device: Kinds = {
        "measured": taken.device_measured_mj / 1e3,
        "estimated": taken.device_estimated_mj / 1e3,
        "nameplate": taken.device_nameplate_mj / 1e3,
    }
    unseen_ms = taken.device_unknown_ms + missing_ms * watts.per_node
    if not taken.nodes:
        why["device"] = why["node"] = "no meter told anything"
    elif not taken.devices and not taken.device_ms and not unseen_ms:
        why["device"] = "the run has no accelerators"
    elif said := _unseen(unseen_ms, taken.device_ms + unseen_ms, "accelerators' time nobody knows what they drew"):
        why["device"] = said
    else:
        device["estimated"] += _scaled(sum(device.values()), unseen_ms, taken.device_ms + unseen_ms)
        found["device"] = _boundary({"device": device}, seconds, sure)

    node: Kinds = {
        "measured": max(0, taken.node_measured_mj - taken.recovered_mj) / 1e3,
        "estimated": taken.node_estimated_mj / 1e3,
        "nameplate": taken.node_nameplate_mj / 1e3,
    }
    unseen_ms = taken.node_unknown_ms + missing_ms
    if taken.nodes:
        text = "nodes' time nobody knows what they drew beside their accelerators (a meter of the node, or power.node_watts in the site's file, would say)"
        inner = found["device"]
        if said := _unseen(unseen_ms, taken.ms + missing_ms, text):
            why["node"] = said
        elif inner is not None and sum(node.values()) < WITHIN_NODE * inner.joules:
            why["node"] = (
                f"the nodes' meters show {sum(node.values()):,.0f} J and their accelerators alone {inner.joules:,.0f} J: they are not of the whole node"
            )
        else:
            node["estimated"] += _scaled(sum(node.values()), unseen_ms, taken.ms + missing_ms)
            # A node's meter stands for all within it, also for what of its accelerators only a rule knows: then the two are not told apart.
            rest: Kinds = {kind: node[kind] - (device[kind] if inner is not None else 0.0) for kind in node}
            split = inner is not None and min(rest.values()) >= -1e-3
            layers: Layers = {"nodes": node}
            if split:
                rest = {kind: max(0.0, joules) for kind, joules in rest.items()}
                layers = {"device": device, "node": rest}
            found["node"] = _boundary(layers, seconds, sure)

    within = found["node"]
    if within is None:
        why["it"] = f"the node is unknown: {why['node']}"
    else:
        fabric, storage = _share(watts.fabric_watts, watts, seconds), _share(watts.storage_watts, watts, seconds)
        if fabric is None:
            why["it"] = _lacks("fabric_watts", watts, watts.fabric_watts)
        elif storage is None and not watts.storage_share.known:
            why["it"] = _lacks("storage_watts", watts, watts.storage_watts)
        else:
            kind: Provenance = "nameplate" if watts.fabric_nameplate else _kind(watts.fabric_watts)
            inner = _boundary({**within.layers, "fabric": {kind: fabric}}, seconds, sure)
            if storage is None:
                found["it"] = _more(inner, "storage", watts.storage_share, sure)
            else:
                found["it"] = _boundary({**inner.layers, "storage": {_kind(watts.storage_watts): storage}}, seconds, sure)

    within = found["it"]
    if within is None:
        why["facility"] = f"IT is unknown: {why['it']}"
    elif watts.pue.value is None:
        why["facility"] = f"the PUE of site {watts.site or '?'} is unknown (power.pue)"
    else:
        over = watts.pue.model_copy(update={"value": max(0.0, watts.pue.value - 1)})
        found["facility"] = _more(within, "cooling", over, sure)
    return found, why


def _boundary(layers: Layers, seconds: float, sure: Mapping[Provenance, tuple[float, float]]) -> Boundary:
    """Sums the layers and their bounds; empty ones are left out."""
    kept: Layers = {name: {kind: joules for kind, joules in layer.items() if joules} for name, layer in layers.items()}
    every: list[tuple[Provenance, float]] = [(kind, joules) for layer in kept.values() for kind, joules in layer.items()]
    low, high = sum(joules * sure[kind][0] for kind, joules in every), sum(joules * sure[kind][1] for kind, joules in every)
    return Boundary(sum(joules for _, joules in every), seconds, low, high, {name: layer for name, layer in kept.items() if layer})


def _more(within: Boundary, name: str, share: Figure, sure: Mapping[Provenance, tuple[float, float]]) -> Boundary:
    """What is a share of all that is within: it errs with that, and by itself."""
    kind, value = _kind(share), share.value or 0.0
    layers: Layers = {**within.layers, name: {kind: within.joules * value}} if value else within.layers
    low, high = within.low * (1 + value * sure[kind][0]), within.high * (1 + value * sure[kind][1])
    return Boundary(within.joules * (1 + value), within.seconds, low, high, layers)


def _nodes(watts: Watts) -> int:
    """That the run has at least, by its plan; 0: it does not say."""
    return math.ceil(watts.accelerators / watts.per_node) if watts.accelerators and watts.per_node else 0


def _unseen(unseen_ms: float, all_ms: float, text: str) -> str:
    if all_ms <= 0:
        return f"for all of the {text}"
    return f"for {unseen_ms / all_ms:.1%} of the {text}".replace("%", " %") if unseen_ms > UNSEEN * all_ms else ""


def _scaled(joules: float, unseen_ms: float, all_ms: float) -> float:
    """What the little that nobody saw drew, if it drew as the rest did."""
    return joules * unseen_ms / (all_ms - unseen_ms) if unseen_ms else 0.0


def _share(figure: Figure, watts: Watts, seconds: float) -> float | None:
    """Joules of what the plan knows per accelerator; None where it does not know, or counts no accelerators."""
    if figure.value is None or (not watts.accelerators and figure.value):
        return None
    return figure.value * watts.accelerators * seconds


def _lacks(name: str, watts: Watts, figure: Figure) -> str:
    if figure.known:
        return f"power.{name} is by accelerator, and the run has none"
    return f"power.{name} of site {watts.site or '?'} is unknown" + (f": {figure.source}" if figure.source else "")


def _kind(figure: Figure) -> Provenance:
    """A figure of the site was measured some other day: to this run it is declared."""
    return "estimated" if figure.basis == "assumed" else "declared"


def _disagreement(taken: Taken) -> float | None:
    """The integral of watts over the counter, less 1."""
    return taken.integral_mj / taken.counter_mj - 1 if taken.counter_mj > 0 else None


# ---- A run ----


@dataclass
class _Row:
    """A row of energy.jsonl as it is needed."""

    time_s: float
    event: str
    step: int | None
    tokens: int | None
    taken: Taken
    seconds: float = 0.0


@dataclass
class _Session:
    """One process that had the run."""

    process: str
    attempt: int | None = None
    began: int | None = None  # the step from which it trained
    began_tokens: int | None = None
    ended: bool = False  # it said so
    rows: list[_Row] = field(default_factory=list)
    reports: list[tuple[int, int | None]] = field(default_factory=list)  # step, tokens
    start_s: float | None = None  # its first word in progress.jsonl,
    said_s: float | None = None  # and its last

    @property
    def begin_s(self) -> float:
        """Its first word, by whichever file has it."""
        return min(one for one in (self.start_s, self.rows[0].time_s if self.rows else None) if one is not None)

    @property
    def last_s(self) -> float:
        return max(one for one in (self.said_s, self.rows[-1].time_s if self.rows else None) if one is not None)


def account(run: Path, *, schedule: Schedule | None = None, until: float | None = None) -> dict[str, Any]:
    """What a run drew and what was got for it, as JSON values; a figure that is not known is None. POWER.md defines each.

    `schedule` gives prices and carbon by time; without one, or where it has none, the site's. `until` leaves out what came later. Keys, each
    {boundary} one of device, node, it, facility:

    `tokens` that the run stands on; `wall_s` from its first process's begin to the last row, and `queued_s` for which no nodes were held, not in it;
    `joules`, `bounds` ([low, high]), `watts`, `tokens_per_s_mw`, `tokens_per_joule`, `kwh_per_gtoken`, `model_flop_per_joule` (by the project's count, with
    attention), `flop6n_per_joule` (6 per parameter that a token meets), each {boundary}; `unknown` {boundary: why}; `provenance` {boundary: {kind: share}}
    and `mix` {boundary: words}; `headline` {boundary, tokens_per_s_mw, low, high, tokens_per_joule, joules, watts, why}; `eur`, `eur_per_gtoken`, `kg_co2e`,
    `kg_co2e_per_gtoken` at the facility; `phases` {name: joules of rank 0's node}; `held` {seconds, joules, why}; `disagreement` of counter and integral;
    `gap_share`, `capped_share`, `thermal_share`, `brake_share` of the accelerators' time; `cpu_joules`; `ramp` {max_watts_per_10s, at_s, boundary}; `windows`
    [{time_s, event, step, seconds, tokens, watts, tokens_per_s_mw, provenance, capped_share}]; `meters`; `sources` [{what, value, basis, source}];
    `nodes`, `accelerators`, `processes`, `rows`, `notes`.

    Raises RunError where there is no folder.
    """
    if not run.is_dir():
        raise RunError(f"{run} is no folder; a run's is what `gigatrain train` prints last, or --run names")
    plan = _object(run / "plan.json")
    watts, notes = _watts(plan)
    rows, events = _until(run / "energy.jsonl", until), _until(run / "logs" / "progress.jsonl", until)
    sessions = _sessions(events, rows)
    nodes = max([_nodes(watts), *(row.taken.nodes for session in sessions for row in session.rows)], default=0) or 1
    devices = max([watts.accelerators, *(row.taken.devices for session in sessions for row in session.rows)], default=0)
    for session in sessions:
        for row in session.rows:
            _complete(row, nodes, devices)
    spans = _Spans(nodes, devices, job.history(run) if (run / "launch" / "history.jsonl").is_file() else [])
    for index, session in enumerate(sessions):
        spans.take(session, sessions[index - 1] if index else None)
    taken, wall_s = spans.sum, spans.seconds
    found, why = _found(taken, watts, wall_s)
    if not sessions:
        why |= dict.fromkeys(BOUNDARIES, "the run has no rows in energy.jsonl and no progress")
    elif not any(session.rows for session in sessions):
        why |= dict.fromkeys(BOUNDARIES, "not measured: energy.jsonl has no rows")
        found.update(dict.fromkeys(BOUNDARIES))
    tokens = _retained(sessions, run)
    chunks = _chunks(sessions, plan, wall_s)
    windows = [chunk.told(watts) for chunk in chunks]
    joules = {name: one.joules if one else None for name, one in found.items()}
    per_joule = {name: tokens / one.joules if one and tokens is not None and one.joules else None for name, one in found.items()}
    flops, active = _number(plan, "flops_per_token"), _active(plan)
    off = _disagreement(taken)
    device_ms = taken.device_ms + taken.device_unknown_ms
    costs = _costs(chunks, spans, watts, found["facility"], schedule)
    return {
        "tokens": tokens,
        "wall_s": round(wall_s, 3),
        "queued_s": round(spans.queued_s, 3),
        "joules": joules,
        "bounds": {name: [one.low, one.high] if one else None for name, one in found.items()},
        "watts": {name: one.watts if one else None for name, one in found.items()},
        "tokens_per_s_mw": {name: _times(value, 1e6) for name, value in per_joule.items()},
        "tokens_per_joule": per_joule,
        "kwh_per_gtoken": {name: 1e9 / value / J_PER_KWH if value else None for name, value in per_joule.items()},
        "unknown": {name: why[name] for name in BOUNDARIES if found[name] is None},
        "provenance": {name: one.shares if one else None for name, one in found.items()},
        "mix": {name: one.words if one else None for name, one in found.items()},
        "headline": _headline(found, why, tokens),
        **{key: costs[key] for key in ("eur", "kg_co2e")},
        **{f"{key}_per_gtoken": _times(costs[key], 1e9 / tokens) if tokens else None for key in ("eur", "kg_co2e")},
        "model_flop_per_joule": {name: _times(value, flops) for name, value in per_joule.items()},
        "flop6n_per_joule": {name: _times(value, 6 * active if active is not None else None) for name, value in per_joule.items()},
        "phases": _phases(rows, sessions),
        "held": spans.told(watts, found),
        "disagreement": off,
        "gap_share": taken.gap_ms / device_ms if device_ms else None,
        "capped_share": taken.power_capped_ms / device_ms if device_ms else None,
        "thermal_share": taken.thermal_ms / device_ms if device_ms else None,
        "brake_share": taken.brake_ms / device_ms if device_ms else None,
        "cpu_joules": taken.cpu_mj / 1e3 if taken.cpu_mj else None,
        "ramp": _ramp(rows, sessions, nodes, watts, found),
        "windows": windows,
        "meters": _meters(rows),
        "sources": _sources(watts, found, wall_s, nodes, costs["words"], spans),
        "nodes": nodes,
        "accelerators": devices,
        "processes": len(sessions),
        "rows": sum(len(session.rows) for session in sessions),
        "notes": notes + spans.notes,
    }


def _headline(found: Mapping[str, Boundary | None], why: Mapping[str, str], tokens: int | None) -> dict[str, Any]:
    """The facility if it is known, else the widest boundary that is."""
    name = next((name for name in reversed(BOUNDARIES) if found[name] is not None), None)
    one = found[name] if name is not None else None
    if one is None:
        keys = ("boundary", "tokens_per_s_mw", "low", "high", "tokens_per_joule", "joules", "watts")
        return dict.fromkeys(keys) | {"why": f"no boundary is known: {why.get('device', why.get('node', ''))}"}
    rates = [tokens / joules if tokens is not None and joules else None for joules in (one.joules, one.high, one.low)]
    wider = "" if name == "facility" else f"the {name} boundary is the widest that is known; facility: {why['facility']}; "
    return {
        "boundary": name,
        "tokens_per_s_mw": _times(rates[0], 1e6),
        "low": _times(rates[1], 1e6),
        "high": _times(rates[2], 1e6),
        "tokens_per_joule": rates[0],
        "joules": one.joules,
        "watts": one.watts,
        "why": wider + one.words,
    }


def _watts(plan: Mapping[str, Any]) -> tuple[Watts, list[str]]:
    try:
        return Watts.model_validate(plan.get("watts") or {}), [] if plan.get("watts") else [
            "plan.json does not say what the site's watts are"
        ]
    except ValidationError as failure:
        return Watts(), [f"plan.json's watts cannot be read: {failure.errors()[0]['msg']}"]


def _active(plan: Mapping[str, Any]) -> float | None:
    """Parameters that one token meets."""
    said = plan.get("architecture")
    if not isinstance(said, dict):
        return None
    if "products" in said:  # gigatrain.foreign: weights that a token is multiplied with
        return _number(said, "products")
    with contextlib.suppress(ValueError, ArithmeticError):
        return float(Architecture.model_validate_json(json.dumps(said)).active_parameters())
    return None


# ---- Sessions: what each process said ----


def _sessions(events: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[_Session]:
    """By process, in the order in which they had the run; who came after the one that finished it is no part of it (observe/watch.py cuts the same)."""
    found: dict[str, _Session] = {}
    finished, late = False, set[str]()
    for event in events:
        process = event["process"]
        if finished and process not in found:
            late.add(process)
            continue
        session = found.setdefault(process, _Session(process))
        time_s, step, tokens = event["time_s"], _count(event, "step"), _count(event, "tokens")
        session.attempt = _count(event, "attempt") if session.attempt is None else session.attempt
        session.start_s, session.said_s = time_s if session.start_s is None else session.start_s, time_s
        kind = event.get("event")
        if kind == "steps" and session.began is None:
            session.began = step
        elif kind == "report" and step is not None:
            session.reports.append((step, tokens))
        elif kind == "end":
            session.ended, finished = True, finished or event.get("why") == "finished"
    order, before = list(found), None
    for row in rows:
        process = row["process"]
        if process in late:
            continue
        if process not in found:  # its progress is lost
            found[process] = _Session(process)
            order.insert(order.index(before) + 1 if before in order else len(order), process)
        _add(found[process], row)
        before = process
    return [found[process] for process in order]


def taken_of(said: Mapping[str, Any]) -> Taken:
    """`taken` of a row; what is missing or no count is 0."""
    taken = Taken()
    for name in FIELDS:
        if (number := _count(said, name)) is not None:
            setattr(taken, name, number)
    return taken


def _add(session: _Session, row: Mapping[str, Any]) -> None:
    """One row of energy.jsonl to its process."""
    said, time_s = row.get("taken"), row["time_s"]
    taken = taken_of(said) if isinstance(said, dict) else Taken()
    before_s = session.rows[-1].time_s if session.rows else session.start_s if session.start_s is not None else time_s
    event, step, tokens = str(row.get("event")), _count(row, "step"), _count(row, "tokens")
    # Meters count by a clock that nobody sets; only where none answered the wall-clock must do.
    seconds = taken.ms / taken.nodes / 1e3 if taken.nodes else max(0.0, time_s - before_s)
    session.rows.append(_Row(time_s, event, step, tokens, taken, seconds))
    session.attempt = _count(row, "attempt") if session.attempt is None else session.attempt
    session.ended |= event == "end"
    if event == "steps":
        session.began = step if session.began is None else session.began
        session.began_tokens = tokens


def _complete(row: _Row, nodes: int, devices: int) -> None:
    """What nodes that did not answer drew nobody knows."""
    missing = nodes - row.taken.nodes
    if missing > 0:
        ms = round(row.seconds * 1e3 * missing)
        row.taken.nodes = nodes
        row.taken.ms += ms
        row.taken.node_unknown_ms += ms
        row.taken.device_unknown_ms += round(ms * devices / nodes)


def _retained(sessions: list[_Session], run: Path) -> int | None:
    """Tokens at the step that the run stands at: at the last report of the last process that came to a step, or where that one began."""
    known: dict[int, int] = {0: 0}
    for session in sessions:
        known |= {step: tokens for step, tokens in session.reports if tokens is not None}
        known |= {row.step: row.tokens for row in session.rows if row.step is not None and row.tokens is not None and row.event != "begin"}
    for session in reversed(sessions):
        steps = [step for step, _ in session.reports] + [
            row.step for row in session.rows if row.step is not None and row.event in ("window", "end")
        ]
        if session.began is None and not session.reports:
            continue
        at = max([session.began or 0, *steps])
        if at in known:
            return known[at]
        below = max(
            step for step in known if step <= at
        )  # a process that was killed before its first report: its checkpoint lay between two reports
        above = min((step for step in known if step > at), default=None)
        return known[below] if above is None else known[below] + round((known[above] - known[below]) * (at - below) / (above - below))
    told = [tokens for row in _objects(run / "metrics.jsonl") if (tokens := _count(row, "tokens")) is not None]
    return told[-1] if told else None


# ---- Spans of time: metered, at the edges, held, queued ----


class _Spans:
    """Adds up every stretch of the run's wall-clock: what meters saw and what a rule says of the rest."""

    def __init__(self, nodes: int, devices: int, history: list[dict[str, Any]]) -> None:
        self.nodes, self.devices, self.history = nodes, devices, history
        self.sum, self.seconds, self.queued_s = Taken(), 0.0, 0.0
        self.held, self.held_s, self.whys = Taken(), 0.0, dict[str, float]()
        self.stretches: list[tuple[float, float]] = []  # (begin, end) of what a rule was taken for: for prices
        self.notes: list[str] = []

    def take(self, session: _Session, before: _Session | None) -> None:
        if before is not None:
            self._between(before, session)
        for row in session.rows:
            self._metered(row)
        head_s = tail_s = 0.0
        if session.rows and session.start_s is not None and session.said_s is not None:
            first, last = session.rows[0], session.rows[-1]
            head_s = max(0.0, first.time_s - first.seconds - session.start_s)
            tail_s = max(0.0, session.said_s - last.time_s)
        elif not session.rows:
            head_s = max(0.0, session.last_s - session.begin_s)
        if head_s + tail_s > 0:
            self._by_rule(session.rows, head_s + tail_s, held=False)

    def _metered(self, row: _Row) -> None:
        self.seconds += row.seconds
        _plus(self.sum, row.taken)
        self.sum.recovered_mj -= row.taken.recovered_mj  # of the process before: `_between` has counted it
        self.sum.node_measured_mj -= min(row.taken.recovered_mj, row.taken.node_measured_mj)

    def _nobody(self, seconds: float, into: Taken) -> None:
        """Nobody knows what the nodes drew."""
        row = _Row(0.0, "", None, None, Taken(), seconds)
        _complete(row, self.nodes, self.devices)
        _plus(into, row.taken)

    def _by_rule(self, rows: list[_Row], seconds: float, *, held: bool) -> None:
        """`seconds` that no meter saw, at the mean watts of the process's last window (its rows; whichever of them lasted)."""
        self.seconds += seconds
        self.held_s += seconds if held else 0.0
        model = _last(rows)
        for into in (self.sum, self.held) if held else (self.sum,):
            if model is None:
                self._nobody(seconds, into)
            else:
                _plus(into, _like(model.taken, seconds / model.seconds))

    def _between(self, before: _Session, after: _Session) -> None:
        """From a process's last word to the next one's first: held, as far as the job's history says so, or queued."""
        gap_s = max(0.0, after.begin_s - before.last_s)
        held_s, why = _held_s(before, after, self.history)
        held_s = min(gap_s, held_s)
        recovered = sum(row.taken.recovered_mj for row in after.rows)
        model = _last(before.rows)
        tail_s = 0.0
        if recovered:
            drawn = max(0, _node_mj(model.taken)) / 1e3 / model.seconds if model is not None else 0.0
            tail_s = min(gap_s, recovered / 1e3 / drawn) if drawn else 0.0
            self._recovered(recovered, tail_s, model)
            why = why or "a process was killed: the next one found its node's count"
        elif not before.ended and not held_s and model is not None:
            tail_s = min(gap_s, model.seconds / 2)
            self._by_rule(before.rows, tail_s, held=True)
            why = "a process left no end: it is taken to have lived for half a window more, at its last window's watts"
        if (rest_s := max(0.0, held_s - (tail_s if recovered else 0.0))) > 0:
            self._by_rule(before.rows, rest_s, held=True)
        spent_s = max(held_s, tail_s)
        if spent_s:
            self.whys[why] = self.whys.get(why, 0.0) + spent_s
            self.stretches.append((before.last_s, before.last_s + spent_s))
        self.queued_s += gap_s - spent_s

    def _recovered(self, mj: int, seconds: float, model: _Row | None) -> None:
        """What a killed process drew after its last row, as its node's meter counted; the devices' part of it by their share before."""
        self.seconds += seconds
        self.held_s += seconds
        for into in (self.sum, self.held):
            into.nodes = max(into.nodes, self.nodes)
            into.ms += round(seconds * 1e3 * self.nodes)
            into.node_measured_mj += mj
            if model is not None and (whole := _node_mj(model.taken)) > 0:
                into.device_estimated_mj += round(mj * _device_mj(model.taken) / whole)
                into.device_ms += round(seconds * 1e3 * self.devices)
            else:
                into.device_unknown_ms += round(seconds * 1e3 * self.devices)

    def told(self, watts: Watts, found: Mapping[str, Boundary | None]) -> dict[str, Any]:
        """Of the time in which nodes were held and no process trained."""
        name = next((name for name in reversed(BOUNDARIES) if found[name] is not None), None)
        one = boundaries(self.held, watts, self.held_s)[name] if name is not None and self.held_s else None
        none = 0.0 if not self.held_s else None
        words = "; ".join(f"{spent:,.1f} s: {why}" for why, spent in self.whys.items())
        return {
            "seconds": round(self.held_s, 3),
            "joules": one.joules if one else none,
            "why": words or "no time between processes was held",
        }


def _held_s(before: _Session, after: _Session, history: list[dict[str, Any]]) -> tuple[float, str]:
    """For how long nodes were held between two processes, by the job's history: a new attempt of the same allocation holds them all the time; one that was
    queued again until the old job's end and from the new one's start."""
    if before.attempt is None or after.attempt is None or before.attempt == after.attempt:
        return 0.0, ""
    judged = next((event for event in history if event["event"] == "judged" and event.get("attempt") == before.attempt), None)
    started = next((event for event in history if event["event"] == "started" and event.get("attempt") == after.attempt), None)
    if judged is not None and judged.get("verdict") == "again":
        return math.inf, "nodes were held for a new attempt in the same job; at the last window's watts"
    old_s, new_s = _when(judged), _when(started)
    held_s = max(0.0, min(old_s, after.begin_s) - before.last_s) if old_s is not None else 0.0
    held_s += max(0.0, after.begin_s - max(new_s, before.last_s)) if new_s is not None else 0.0
    return held_s, "nodes were held until a job ended and from when the next one started; at the last window's watts"


def _when(event: Mapping[str, Any] | None) -> float | None:
    if event is None:
        return None
    with contextlib.suppress(TypeError, ValueError):
        return datetime.datetime.fromisoformat(str(event.get("time"))).timestamp()
    return None


def _last(rows: list[_Row]) -> _Row | None:
    """The last window of a process: the last row of at least a second, else the longest; None where no meter ever told it anything."""
    seen = [row for row in rows if row.seconds > 0 and (_node_mj(row.taken) > 0 or _device_mj(row.taken) > 0)]
    return next((row for row in reversed(seen) if row.seconds >= 1), max(seen, key=lambda row: row.seconds, default=None))


def _device_mj(taken: Taken) -> int:
    return taken.device_measured_mj + taken.device_estimated_mj + taken.device_nameplate_mj


def _node_mj(taken: Taken) -> int:
    """Without what belongs to a process before."""
    return taken.node_measured_mj + taken.node_estimated_mj + taken.node_nameplate_mj - taken.recovered_mj


def _like(taken: Taken, factor: float) -> Taken:
    """As much of everything for a stretch that is `factor` times as long, all of it estimated."""
    made = Taken(nodes=taken.nodes, devices=taken.devices)
    for name in ("ms", "device_ms", "node_unknown_ms", "device_unknown_ms"):
        setattr(made, name, round(getattr(taken, name) * factor))
    made.device_estimated_mj, made.node_estimated_mj = round(_device_mj(taken) * factor), round(_node_mj(taken) * factor)
    return made


def _plus(into: Taken, more: Taken) -> None:
    """Sums, but for the counts of things, which are the most that were there at once."""
    for name in FIELDS:
        held, new = getattr(into, name), getattr(more, name)
        setattr(into, name, max(held, new) if name in ("nodes", "devices") else held + new)


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
        widest = next((found[name] for name in reversed(BOUNDARIES) if found[name] is not None), None)
        device_ms = self.taken.device_ms + self.taken.device_unknown_ms
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
            "provenance": widest.shares if widest else None,
            "capped_share": self.taken.power_capped_ms / device_ms if device_ms else None,
        }


def _chunks(sessions: list[_Session], plan: Mapping[str, Any], wall_s: float) -> list[_Chunk]:
    """Rows put together until each lasts as long as joules can be told of: 10 s, or 100 readings; longer where there would be too many."""
    power = plan.get("power")
    every_s = _number(power, "every_s") if isinstance(power, dict) else None
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
            _plus(opened.taken, row.taken)
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
            _plus(before.taken, last.taken)
    return found


def _phases(rows: list[dict[str, Any]], sessions: list[_Session]) -> dict[str, float]:
    """Joules of rank 0's node by what its loop did."""
    ours, found = {session.process for session in sessions}, dict[str, float]()
    for row in rows:
        said = row.get("phases")
        if isinstance(said, dict) and row["process"] in ours:
            for name in said:
                if (joules := _number(said, name)) is not None:
                    found[str(name)] = found.get(str(name), 0.0) + joules
    return {name: round(joules, 3) for name, joules in found.items()}


def _ramp(
    rows: list[dict[str, Any]], sessions: list[_Session], nodes: int, watts: Watts, found: Mapping[str, Boundary | None]
) -> dict[str, Any] | None:
    """The largest change between neighbouring ten-second bins that every node has closed; the bin in which a process began is not whole."""
    partial = {int(session.begin_s // BIN_S) for session in sessions}
    bins: dict[int, tuple[float, float]] = {}
    for row in rows:
        said = row.get("bins")
        for one in said if isinstance(said, list) else ():
            if isinstance(one, list) and len(one) == 4 and all(isinstance(word, int) for word in one):
                number, closed, device_mj, node_mj = one
                if closed >= nodes and number not in partial:
                    bins[number] = (device_mj / 1e3 / BIN_S, node_mj / 1e3 / BIN_S)
    name = next((name for name in reversed(BOUNDARIES) if found[name] is not None), None)
    if name is None:
        return None
    # What does not change from bin to bin, as the fabric's nameplate, drops out of a difference.
    factor = 1 + (watts.storage_share.value or 0.0) if name in ("it", "facility") else 1.0
    factor *= max(1.0, watts.pue.value or 1.0) if name == "facility" else 1.0
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


def _costs(chunks: list[_Chunk], spans: _Spans, watts: Watts, facility: Boundary | None, schedule: Schedule | None) -> dict[str, Any]:
    """Euro and kg CO2e of the facility's joules: by the schedule's price of each window's time, else by the site's; None where neither has one."""
    found: dict[str, Any] = {"eur": None, "kg_co2e": None, "words": {}}
    for key, attribute, figure, per_joule in (
        ("eur", "price_eur_mwh", watts.price_eur_mwh, 1 / 3.6e9),
        ("kg_co2e", "carbon_g_kwh", watts.carbon_g_kwh, 1e-3 / J_PER_KWH),
    ):
        value, basis, how = figure.value, figure.basis, figure.source
        if schedule is not None:
            whole = priced = filled = 0.0
            for begin_s, end_s, joules in _drawn(chunks, spans, watts):
                mean, covered = _mean(schedule, attribute, begin_s, end_s)
                covered = covered if figure.known else 1.0  # of one stretch, the rest like what is known of it
                if mean is None and not figure.known:
                    continue
                whole += joules
                filled += joules * (1 - covered)
                priced += joules * ((mean or 0.0) * covered + (figure.value or 0.0) * (1 - covered))
            if filled < whole:
                value, basis, how = priced / whole, "declared", "the schedule, by the time of each window"
                how += f"; it has none for {filled / whole:.1%} of the joules: {figure.source}".replace("%", " %") if filled else ""
        if value is not None:
            found["words"][attribute] = (value, basis, how)
        if facility is not None and value is not None:
            found[key] = facility.joules * value * per_joule
    return found


def _drawn(chunks: list[_Chunk], spans: _Spans, watts: Watts) -> Iterable[tuple[float, float, float]]:
    """(begin, end, joules at the widest known boundary) of everything that was drawn."""
    for chunk in chunks:
        one = next((one for one in reversed(list(boundaries(chunk.taken, watts, chunk.seconds).values())) if one is not None), None)
        if one is not None:
            yield chunk.end_s - chunk.seconds, chunk.end_s, one.joules
    one = next((one for one in reversed(list(boundaries(spans.held, watts, spans.held_s).values())) if one is not None), None)
    for begin_s, end_s in spans.stretches:
        if one is not None and one.watts is not None:
            yield begin_s, end_s, one.watts * (end_s - begin_s)


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
    watts: Watts, found: Mapping[str, Boundary | None], wall_s: float, nodes: int, costs: Mapping[str, Any], spans: _Spans
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


# ---- Reading ----


def _objects(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that are objects; half a line, or one that is none, is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(line), dict):
                    found.append(row)
    return found


def _until(path: Path, until: float | None) -> list[dict[str, Any]]:
    """Those with a time and a process."""
    said = [row for row in _objects(path) if _number(row, "time_s") is not None and isinstance(row.get("process"), str)]
    return [row for row in said if until is None or row["time_s"] <= until]


def _object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_bytes()), dict):
            return found
    return {}


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _count(row: Mapping[str, Any], key: str) -> int | None:
    value = _number(row, key)
    return int(value) if value is not None and value >= 0 else None


def _times(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor

"""A run's joules by leg: what was drawn under each plan goes through that plan's own site, and the run's are the sum.

A run that moved has been on several sites, of other nodes, PUE, prices and carbon: one site's factors say nothing of what another drew.
"""

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gigatrain.planning import legs as planned
from gigatrain.planning.watts import Watts
from gigatrain.power import boundary
from gigatrain.power.boundary import Boundary, Layers, nodes_of
from gigatrain.power.reading import BOUNDARIES
from gigatrain.power.spans import Session, Spans, one_object, plus


@dataclass
class Leg:
    """A stretch under one plan: its processes, and what was drawn."""

    number: int
    plan: Mapping[str, Any]
    watts: Watts
    sessions: list[Session]
    spans: Spans
    notes: list[str] = field(default_factory=list)
    prices: Any = None  # power/account.py's Schedule

    @property
    def name(self) -> str:
        """For a reader: `leg 1 (lumi)`."""
        return f"leg {self.number + 1} ({self.watts.site or self.plan.get('site') or '?'})"

    def look(self) -> tuple[dict[str, Boundary | None], dict[str, str]]:
        """Joules at each boundary by the leg's own site, and why one is None."""
        return boundary.look(self.spans.sum, self.watts, self.spans.seconds)


def began(run: Path) -> list[float]:
    """When each leg of a run began, by its run.json; one that is damaged or of before there were legs is one leg."""
    said = one_object(run / "run.json").get("legs")
    found = []
    for one in said if isinstance(said, list) else ():
        with contextlib.suppress(TypeError, ValueError, KeyError):
            found.append(datetime.datetime.fromisoformat(str(one["began"])).timestamp())
    return found if found == sorted(found) and found else [0.0]


def at(begins: Sequence[float], last_s: float) -> int:
    """The leg of a process whose last word was then: it says that a leg begins before it trains in it."""
    return max((number for number, begin_s in enumerate(begins) if number == 0 or begin_s <= last_s + 1e-3), default=0)


def cut(run: Path, plan: Mapping[str, Any], sessions: Sequence[Session]) -> list[Leg]:
    """The legs of a run, `plan` being what its plan.json holds, each with its processes. A leg before which no plan is kept has the newest plan's."""
    begins = began(run)
    parts: list[list[Session]] = [[] for _ in begins]
    least = 0
    for session in sessions:
        least = max(least, at(begins, session.last_s))  # a clock that is set back moves no process to a leg that is over
        parts[least].append(session)
    found = []
    for number, part in enumerate(parts):
        own = plan if number == len(parts) - 1 else one_object(planned.kept(run, number)) or plan
        watts, notes = _watts(own)
        rows = [row for session in part for row in session.rows]
        nodes = max([nodes_of(watts), *(row.taken.nodes for row in rows)], default=0) or 1
        devices = max([watts.accelerators, *(row.taken.devices for row in rows)], default=0)
        found.append(Leg(number, own, watts, part, Spans(nodes, devices, []), notes))
    return found


def measure(legs: Sequence[Leg], history: list[dict[str, Any]]) -> None:
    """Adds up every stretch of wall-clock in the leg whose nodes were there: those that lie between two processes in that of the first of them."""
    for leg in legs:
        leg.spans.history = history
    whole = [(leg, session) for leg in legs for session in leg.sessions]
    for index, (leg, session) in enumerate(whole):
        if index:
            before = whole[index - 1]
            before[0].spans.between(before[1], session)
        leg.spans.take(session, whole[index + 1][1] if index + 1 < len(whole) else None)


def together(legs: Sequence[Leg]) -> Spans:
    """All of their time, of one leg its own."""
    if len(legs) == 1:
        return legs[0].spans
    whole = Spans(max(leg.spans.nodes for leg in legs), max(leg.spans.devices for leg in legs), legs[0].spans.history)
    for leg in legs:
        spans = leg.spans
        plus(whole.sum, spans.sum)
        plus(whole.held, spans.held)
        whole.seconds, whole.queued_s, whole.held_s = (
            whole.seconds + spans.seconds,
            whole.queued_s + spans.queued_s,
            whole.held_s + spans.held_s,
        )
        for why, spent_s in spans.whys.items():
            whole.whys[why] = whole.whys.get(why, 0.0) + spent_s
        whole.stretches += spans.stretches
        whole.notes += spans.notes
    return whole


def look(legs: Sequence[Leg]) -> tuple[dict[str, Boundary | None], dict[str, str]]:
    """Joules of the whole run at each boundary, known where they are of every leg that drew anything; and why one is None."""
    found: dict[str, Boundary | None] = dict.fromkeys(BOUNDARIES)
    why: dict[str, str] = {}
    alone = len(legs) == 1
    seen = [(leg, *leg.look()) for leg in legs if alone or leg.sessions] or [(legs[-1], *legs[-1].look())]
    for name in BOUNDARIES:
        parts = [(leg, known[name], said) for leg, known, said in seen]
        lacking = [(leg, said[name]) for leg, one, said in parts if one is None]
        if lacking:
            why[name] = lacking[0][1] if alone else "; ".join(f"{leg.name}: {text}" for leg, text in lacking)
        else:
            found[name] = _sum([one for _, one, _ in parts if one is not None])
    return found, why


def held(legs: Sequence[Leg], spans: Spans, found: Mapping[str, Boundary | None]) -> dict[str, Any]:
    """Of the time in which nodes were held and no process trained; joules by each leg's own site."""
    if len(legs) == 1:
        return spans.told(legs[0].watts, found)
    parts = [leg.spans.told(leg.watts, found)["joules"] for leg in legs]
    told = spans.told(legs[-1].watts, found)
    return told | {"joules": None if any(one is None for one in parts) else sum(parts)}


def told(leg: Leg, costs: Mapping[str, Any]) -> dict[str, Any]:
    """A leg's draw as JSON values."""
    found, why = leg.look()
    none: dict[str, Boundary | None] = dict.fromkeys(BOUNDARIES)
    measured = any(session.rows for session in leg.sessions)
    if not measured:
        found, why = none, dict.fromkeys(BOUNDARIES, "not measured: no process of it has rows in energy.jsonl")
    one, name = boundary.widest(found)
    return {
        "number": leg.number,
        "site": leg.watts.site or leg.plan.get("site"),
        "seconds": round(leg.spans.seconds, 3),
        "joules": {key: known.joules if known else None for key, known in found.items()},
        "watts": {key: known.watts if known else None for key, known in found.items()},
        "unknown": {key: why[key] for key in BOUNDARIES if found[key] is None},
        "boundary": name,
        "provenance": one.shares if one else None,
        "mix": one.words if one else None,
        "eur": costs["eur"] if measured else None,
        "kg_co2e": costs["kg_co2e"] if measured else None,
        "processes": len(leg.sessions),
    }


def _sum(parts: Sequence[Boundary]) -> Boundary:
    if len(parts) == 1:
        return parts[0]
    layers: Layers = {}
    for part in parts:
        for name, layer in part.layers.items():
            into = layers.setdefault(name, {})
            for kind, joules in layer.items():
                into[kind] = into.get(kind, 0.0) + joules
    joules, seconds = sum(part.joules for part in parts), sum(part.seconds for part in parts)
    return Boundary(joules, seconds, sum(part.low for part in parts), sum(part.high for part in parts), layers)


def _watts(plan: Mapping[str, Any]) -> tuple[Watts, list[str]]:
    if not plan.get("watts"):
        return Watts(), ["plan.json does not say what the site's watts are"]
    try:
        return Watts.model_validate(plan["watts"]), []
    except ValidationError as failure:
        return Watts(), [f"plan.json's watts cannot be read: {failure.errors()[0]['msg']}"]

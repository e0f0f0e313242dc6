"""The legs of a run as they went: where and how each was computed, how fast, how much of its time was kept. Free of torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigatrain.observe.goodput import Session, Sessions, goodput_of, number
from gigatrain.power import legs as power
from gigatrain.power.reading import BOUNDARIES

NAMED = {"device": "devices", "node": "nodes", "it": "IT"}
KEPT = 40  # changes that are told of a leg


def passed(record: Mapping[str, Any], sessions: Sessions) -> list[float]:
    """The steps at which `legs_of` needs tokens that no report told yet."""
    steps = [step for one in _known(record) if (step := number(one, "step")) is not None]
    told = [one for one in (sessions.stands, *(session.report for session in sessions.all)) if one is not None]
    return steps + [one["step"] for one in told if one["event"] != "report" or number(one, "tokens") is None]


def _known(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    said = record.get("legs")
    return [one for one in said if isinstance(one, dict)] if isinstance(said, list) else []


def legs_of(run: Path, record: Mapping[str, Any], sessions: Sessions, now: float | None) -> list[dict[str, Any]]:
    """Each stretch of the run under one plan: where and how it was computed, what it did, and what share of its time was kept.

    `sessions` have been asked for what is `passed`.
    """
    known = _known(record)
    if not known:
        return []
    parts: list[list[Session]] = [[] for _ in known]
    begins, least = power.began(run), 0
    for session in sessions.all:
        least = max(least, min(len(known) - 1, power.at(begins, session.last["time_s"])))
        parts[least].append(session)
    stands = sessions.stands
    ends = [number(one, "step") for one in known[1:]] + [None if stands is None else stands["step"]]
    found, stood_from = [], None
    for index, (one, part, end) in enumerate(zip(known, parts, ends, strict=True)):
        last = index == len(known) - 1
        begin, tokens, seconds = max(0, number(one, "step") or 0), 0.0, 0.0
        for session in part:
            if session.began is not None and session.report is not None:
                tokens += max(0.0, sessions.told(session.report) - sessions.tokens(session.began["step"]))
                seconds += session.stepping_s
        mesh = one.get("mesh")
        until = None if end is None else sessions.told(stands) if last and stands is not None else sessions.tokens(end)
        found.append(
            {
                key: one[key] if isinstance(one.get(key), str) else None
                for key in ("site", "device", "engine", "precision", "states", "began")
            }
            | {"ranks": number(one, "ranks"), "changed": _texts(one.get("changed"))}
            | {"mesh": {str(axis): size for axis, size in mesh.items() if isinstance(size, int)} if isinstance(mesh, dict) else {}}
            | {
                "number": index + 1,
                "step": begin,
                "until": None if end is None else max(begin, end),
                "tokens": None if until is None else round(max(0.0, until - sessions.tokens(begin))),
                "tokens_per_s": tokens / seconds if seconds else None,
                "goodput": goodput_of(part, now if last else None),
                "stood_s": None if stood_from is None or not part else round(max(0.0, part[0].first["time_s"] - stood_from), 3),
                "processes": len(part),
            }
        )
        stood_from = part[-1].last["time_s"] if part else stood_from
    return found


def _texts(said: Any) -> list[str]:
    return [text for text in said if isinstance(text, str)][:KEPT] if isinstance(said, list) else []


def place_words(leg: Mapping[str, Any]) -> str:
    """`lumi, native, 2 ranks (shard 2), bf16`."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in leg["mesh"].items())
    ranks = "" if leg["ranks"] is None else f", {leg['ranks']:,} rank{'s' * (leg['ranks'] != 1)}{f' ({mesh})' * bool(mesh)}"
    return f"{leg['site'] or 'unknown site'}, {leg['engine'] or 'unknown engine'}{ranks}, {leg['precision'] or 'unknown precision'}"


def leg_words(leg: Mapping[str, Any]) -> str:
    """One leg in a line: where, which steps, how fast, how much of its time was kept, what it drew."""
    steps = f"steps {leg['step']:,} to {'?' if leg['until'] is None else format(leg['until'], ',')}"
    speed = "tokens/s not measured" if leg["tokens_per_s"] is None else f"{leg['tokens_per_s']:,.0f} tokens/s"
    kept = leg["goodput"]["share"] if leg["goodput"] else None
    goodput = "goodput unknown" if kept is None else f"goodput {kept:.1%} of {span(leg['goodput']['wall_s'])}"
    watts, joules, name = drew(leg)
    draw = "watts not measured" if watts is None else f"{si(watts)}W, {joules / 3.6e6:.3g} kWh ({NAMED.get(str(name), name)})"
    return f"{place_words(leg)}: {steps}, {speed}, {goodput}, {draw}"


def drew(leg: Mapping[str, Any]) -> tuple[float | None, float, str | None]:
    """Watts, joules and their boundary of a leg; None where they are not known."""
    power = leg.get("power")
    name = power.get("boundary") if isinstance(power, dict) else None
    if not isinstance(power, dict) or name not in BOUNDARIES or power["watts"][name] is None:
        return None, 0.0, None
    return power["watts"][name], power["joules"][name] or 0.0, name


def span(seconds: float | None) -> str:
    """A duration as people say it."""
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h" if minutes < 2880 else f"{minutes / 1440:.1f} days"


def si(value: float) -> str:
    """A number before its unit, three digits of it: `8 k`, `1.23 M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if abs(value) >= size:
            return f"{value / size:.0f} {prefix}" if abs(value) >= 100 * size else f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "

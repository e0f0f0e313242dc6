"""The cards of what a run drew: its watts, what was got for them, what it was told to keep to, joules with their cost, and its meters."""

from collections.abc import Mapping, Sequence
from typing import Any

from gigatrain.observe.report import words
from gigatrain.observe.report.curves import Axes, Curve, gaps, layers, lines
from gigatrain.observe.report.figures import finite
from gigatrain.observe.report.parts import Shown, bars, card, cell, column, head, lacking, pairs, scrolled, sentence, table, unknown
from gigatrain.observe.report.words import WITHIN, clock, escaped, exact, number, per_cent, provenance, span
from gigatrain.power.reading import BOUNDARIES

Value = Mapping[str, Any]
HOLDS = {"device": "the accelerators", "node": "whole nodes", "it": "with fabric and storage", "facility": "with cooling and losses"}
LAYERS = {"device": "devices", "node": "node rest", "it": "fabric", "facility": "cooling"}
LEAST = 0.005  # of the whole: a thinner layer is no layer
ROOM = 3.0  # a limit that is so many times what was drawn is told and not drawn


def powered(tag: str, value: Value) -> list[str]:
    """Draw, tokens/s/MW and the table by boundary; one card with the reason where nothing is known."""
    if not value["energy"]:
        return [lacking(tag, "Energy", value["headline"]["mwh"].get("unknown", "no reason given"), wide=True)]
    return [_draw(tag, value), _efficiency(tag, value), *_budget(tag, value), _energy(tag, value)]


def _budget(tag: str, value: Value) -> list[str]:
    """Whether what was asked of its watts was kept, and what that took; nothing where nothing was asked."""
    budget = value["budget"]
    if not budget:
        return []
    asked, cost, highest = budget["asked"], budget["cost"], budget["highest"]
    levels = [watts for _, watts in budget["limit"] if watts is not None]
    if not levels and (megawatts := finite(asked.get("megawatts"))) is not None:
        levels = [megawatts * 1e6]
    found = []
    if levels:
        ends = dict.fromkeys(words.watts(one) for one in (min(levels), max(levels)))
        by = " and ".join(f"power.{name}" for name in ("megawatts", "schedule") if asked.get(name))
        found.append(("limit, at the facility", f"{' to '.join(ends)}, by {by}"))
    elif "schedule" in asked:
        found.append(("limit, at the facility", "its schedule sets none" if not budget["unread"] else f"unknown: {budget['unread']}"))
    if "follow" in asked:
        found.append(("follows", str(asked["follow"])))
    if (ramp := finite(asked.get("ramp_megawatts_min"))) is not None:
        found.append(("ramp", f"{words.watts(ramp * 1e6)} a minute"))
    if asked.get("caps"):
        found.append(("limits of accelerators", "may be set"))
    if highest["value"] is None:
        found.append(("highest ten-second mean", f"unknown: {highest['unknown']}"))
    else:
        held, when = finite(highest.get("limit_watts")), _when(highest.get("time"))
        off = highest["value"] / held - 1 if held else 0.0
        share = f"{per_cent(abs(off))} {'above' if off > 0 else 'below'} the limit" if held else "no limit then"
        found.append(("highest ten-second mean", f"{words.watts(highest['value'])}, {share}{f', at {when}' if when else ''}"))
    if budget["bins_held"]:
        found.append(
            (
                "ten-second means above it",
                f"{budget['bins_above']:,} of {budget['bins_held']:,}" + (f", {span(budget['above_s'])}" * bool(budget["bins_above"])),
            )
        )

    def spent(name: str, what: str, shown: Shown, why: str) -> None:
        if cost:
            amount = cost.get(what)
            found.append((name, f"unknown: {why}" if amount is None else shown(amount)))

    reports = "the run told none"
    spent(
        "above it, as the run counted",
        "over_budget_s",
        lambda it: span(it) + (f", by {words.watts(cost['over_budget_watts'])} at most" if it and cost.get("over_budget_watts") else ""),
        reports,
    )
    spent("waited before steps", "waited_s", span, reports)
    spent("paused", "paused_s", span, reports)
    spent(
        "tokens not trained meanwhile", "tokens_not_trained", lambda it: number(it, 6 if it < 1e6 else 4), "full speed was never measured"
    )
    for key, unit, price in (("eur", "€", "price"), ("kg_co2e", "kg CO2e", "carbon of a kWh")):
        parts = [cost.get(f"{key}_{what}") for what in ("not_drawn", "to_catch_up", "saved")]
        if any(one is not None for one in parts):
            said = ["unknown" if one is None else f"{number(one, 3)} {unit}" for one in parts]
            found.append((f"{unit} saved", f"{said[2]}: {said[0]} not drawn, {said[1]} to catch up later"))
        elif cost:
            found.append((f"{unit} saved", f"unknown: there is no {price}, or full speed was never measured"))
    text = ""
    if budget["bins_held"]:
        of = f"{budget['bins_held']:,} ten-second means"
        text = (
            f"Not kept: {budget['bins_above']:,} of {of} above the limit. "
            if budget["bins_above"]
            else f"Kept: none of {of} was above the limit. "
        )
    elif levels:
        text = f"Whether it was kept is unknown: {highest.get('unknown') or 'no ten seconds had a limit'}. "
    text += "What the run was told to keep to, and what that took. A limit is of each ten seconds of wall-clock that all nodes have closed."
    last = ""
    if budget["why"]:
        when = _when(budget["since"])
        later = "; since then nothing was asked of it" if budget["over"] else ""
        last = f"<p>Last order{f', {escaped(when)}' if when else ''}: {escaped(budget['why'])}{later}.</p>"
    return [card(tag, "Budget", text, pairs(found, "kv2") + last, wide=True)]


def _when(text: Any) -> str:
    return str(text or "").replace("T", " ").replace("+00:00", " UTC")


def _seconds_of_restarts(value: Value) -> list[float]:
    began = value["run"]["began_s"]
    return [one["time_s"] - began for one in value["restarts"] if one["time_s"] is not None and began is not None]


def _why_not(value: Value, boundary: str) -> str:
    said = value["energy"].get("unknown")
    return str(said.get(boundary) or "no reason given") if isinstance(said, Mapping) else "no reason given"


def _draw(tag: str, value: Value) -> str:
    """Watts of the boundaries upon each other; what no meter read is a gap."""
    watts = value["watts"]
    known = [name for name in BOUNDARIES if any(one is not None for one in watts["watts"][name])]
    if not known:
        return lacking(tag, "Draw", _why_not(value, "node"))
    there, flat = seen_layers(watts["watts"], known)
    scale, unit = clock(max(one for one in watts["t_s"] if one is not None))
    times = [None if one is None else one / scale for one in watts["t_s"]]
    heights = [
        (LAYERS[name] if at or name == "device" else f"{WITHIN[name]}, all", f"{WITHIN[name]}, all within", watts["watts"][name])
        for at, name in enumerate(there)
    ]
    outer = known[-1]
    inner = f"{WITHIN[outer]}, all" if len(there) == 1 < len(known) else heights[-1][0]
    heights[-1] = (inner, f"{WITHIN[outer]}, all within", watts["watts"][outer])
    planned = watts["planned"].get(outer)
    why = "".join(f" Boundary {WITHIN[name]} unknown: {_why_not(value, name)}." for name in BOUNDARIES if name not in known)
    text = (
        f"Up to the {WITHIN[outer]} boundary, by what it is of; fabric with storage, cooling with losses."
        + " Hatched: no reading." * bool(watts["gaps"])
    )
    text += " Dashed: as planned." if planned else f" Plan: {value['plan']['watts'][outer].get('unknown', 'not planned')}."
    if flat:
        text += f" Below {LEAST * 100:.1f} % of the whole all the time, and not drawn apart: {', '.join(LAYERS[name] for name in flat)}."
    limit = [[at / scale, one] for at, one in value["budget"].get("limit", ())] if outer == "facility" else []
    allowed = [one for _, one in limit if one is not None]
    highest = max(one for one in watts["watts"][outer] if one is not None)
    if allowed and max(allowed) > ROOM * max(highest, planned or 0.0):
        text += f" The limit of the budget, {words.watts(min(allowed))} and more, lies far above this picture."
        limit = []
    elif allowed:
        text += " Solid line: the limit of the budget, for each ten seconds; windows here are as long as a figure needs."
    axes = Axes(
        unit, shown=words.watts, tick=words.watts, zero=True, marks=[at / scale for at in _seconds_of_restarts(value)], gaps=gaps(times),
        planned=planned, planned_text="plan", limit=limit,
    )  # fmt: skip
    return layers(tag, "Draw", text + (" ↻ marks a restart." if value["restarts"] else "") + why, times, heights, axes)


def seen_layers(watts: Mapping[str, Sequence[float | None]], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of nested boundaries those that add anything that can be seen, and those that never do."""
    outer, there, flat = watts[known[-1]], [known[0]], []
    for name in known[1:]:
        rises = zip(watts[there[-1]], watts[name], outer, strict=True)
        if any(high - (low or 0.0) > LEAST * (whole or high) for low, high, whole in rises if high is not None):
            there.append(name)
        else:
            flat.append(name)
    return there, flat


def _efficiency(tag: str, value: Value) -> str:
    """Tokens/s per MW over time at the headline's boundary, and what it would be at the plan's watts."""
    watts, speed = value["watts"], value["headline"]["tokens_per_s_mw"]
    boundary = speed.get("boundary")
    if boundary is None:
        return lacking(tag, "Tokens/s per MW", speed.get("unknown") or "no boundary is known")
    scale, unit = clock(max((one for one in watts["t_s"] if one is not None), default=0.0))
    planned = watts["planned_tokens_per_s_mw"].get(boundary)
    text = f"Each window's retained tokens over its joules, {WITHIN[boundary]}. "
    text += (
        "Dashed: the mean speed at the plan's watts."
        if planned
        else f"Plan: {value['plan']['watts'][boundary].get('unknown', 'not planned')}."
    )
    axes = Axes(
        unit, zero=True, marks=[at / scale for at in _seconds_of_restarts(value)],
        gaps=gaps([None if one is None else one / scale for one in watts["t_s"]]),
        planned=planned, planned_text="plan's watts",
    )  # fmt: skip
    curve = Curve("tokens/s/MW", timed(watts, boundary, scale), label="")
    return lines(tag, "Tokens/s per MW", text, [curve], axes, "no window has both tokens and joules")


def timed(watts: Value, boundary: str, scale: float) -> list[list[float | None]]:
    return [[None if at is None else at / scale, one] for at, one in zip(watts["t_s"], watts["tokens_per_s_mw"][boundary], strict=True)]


def _of(energy: Value, name: str, boundary: str) -> float | None:
    found = energy.get(name)
    return finite(found.get(boundary)) if isinstance(found, Mapping) else None


def _energy(tag: str, value: Value) -> str:
    """Boundary by boundary, each row with its provenance; money and carbon below."""
    energy, rows = value["energy"], []
    columns: list[tuple[str, str, Shown]] = [
        ("mean draw", "watts", words.watts),
        ("energy", "joules", words.energy),
        ("tokens/s/MW", "tokens_per_s_mw", number),
        ("tokens/J", "tokens_per_joule", number),
        ("kWh per 10^9 tokens", "kwh_per_gtoken", number),
        ("model GFLOP/J", "model_flop_per_joule", lambda it: number(it / 1e9)),
    ]
    said = energy.get("provenance")
    for name in BOUNDARIES:
        if _of(energy, "joules", name) is None:
            rows.append(head(WITHIN[name], HOLDS[name]) + unknown(_why_not(value, name), len(columns) + 1))
            continue
        found = [(_of(energy, key, name), shown) for _, key, shown in columns]
        cells = "".join(unknown("no tokens or FLOPs known") if one is None else cell(shown(one)) for one, shown in found)
        rows.append(
            f"{head(WITHIN[name], HOLDS[name])}{cells}{sentence(provenance(said.get(name) if isinstance(said, Mapping) else None))}"
        )
    whole = table(("boundary", *(name for name, _, _ in columns), "provenance of the row"), rows, right=range(1, len(columns) + 1))
    shares, money = provenance(value["headline"]["mwh"].get("provenance")), []
    for what, unit, key in (("cost", "€", "eur"), ("carbon", "kg CO2e", "kg_co2e")):
        why = value["headline"][key].get("unknown", "")
        both = (finite(energy.get(key)), finite(energy.get(f"{key}_per_gtoken")))
        cells = "".join(unknown(why or "no tokens were kept") if one is None else cell(f"{number(one, 3)} {unit}") for one in both)
        money.append(f"{head(what)}{cells}{sentence(shares)}")
    below = table(("of the facility's energy", "whole run", "per 10^9 tokens", "provenance of the energy"), money, right=(1, 2))
    text = "Over all of wall-clock: evaluation, saves, restarts and held time included. Tokens that a restart threw away are not counted."
    text += " Each boundary holds the one above it."
    return card(tag, "Energy, cost and carbon", text, scrolled("Energy by boundary", whole) + scrolled("Cost and carbon", below), wide=True)


def metered(tag: str, value: Value) -> list[str]:
    """Joules by phase, what the meters say of themselves, and what the rest was taken from."""
    energy = value["energy"]
    if not energy:
        return []
    said = energy.get("phases")
    phases = {name: joules for name, one in said.items() if (joules := finite(one)) is not None} if isinstance(said, Mapping) else {}
    whole = sum(phases.values())
    if whole > 0:
        rows = [
            (name, "", 0.0, joules / whole, 0, " ".join(words.scaled(joules, "J")), per_cent(joules / whole))
            for name, joules in phases.items()
        ]
        first = card(
            tag,
            "Joules by phase",
            "Of rank 0's node, by what its loop did meanwhile.",
            bars(("phase", "of its joules", "joules", "share"), rows),
        )
    else:
        first = lacking(tag, "Joules by phase", "no meter counted while its loop ran")
    found = [column(first), column(card(tag, "Meters", "What they are, and what they say of themselves.", pairs(_told(energy))))]
    given = energy.get("sources")
    sources = [one for one in given if isinstance(one, Mapping)] if isinstance(given, list) else []
    if sources:
        rows = []
        for one in sources[:40]:
            amount = finite(one.get("value"))
            shown = cell(exact(amount)) if amount is not None else cell(one["value"]) if isinstance(one.get("value"), str) else unknown("")
            rows.append(
                head(str(one.get("what") or "unnamed"))
                + shown
                + sentence(str(one.get("basis") or "unknown"))
                + sentence(str(one.get("source") or "none"))
            )
        text = "What the energy, its cost and its carbon rest on beside the meters."
        found.append(
            card(tag, "Sources", text, scrolled("Sources", table(("figure", "value", "basis", "source"), rows, right=(1,))), wide=True)
        )
    return found


def _told(energy: Value) -> list[tuple[str, str]]:
    def share(name: str, why: str, of: str = "") -> str:
        found = finite(energy.get(name))
        return f"unknown: {why}" if found is None else per_cent(found) + of

    reasons, time = "these meters give no reasons for clocks", " of the time"
    found = [
        ("power-capped", share("capped_share", reasons, time)),
        ("held down by heat", share("thermal_share", reasons, time)),
        ("braked by hardware", share("brake_share", reasons, time)),
        ("integral less counter", share("disagreement", "no accelerator has both")),
        ("without a reading", share("gap_share", "no accelerator is metered", time)),
    ]
    ramp, held = energy.get("ramp"), energy.get("held")
    steepest = finite(ramp.get("max_watts_per_10s")) if isinstance(ramp, Mapping) else None
    found.append(("largest change in 10 s", "unknown: too few whole bins" if steepest is None else words.watts(steepest)))
    if isinstance(held, Mapping) and finite(held.get("seconds")):
        joules = finite(held.get("joules"))
        spent = "joules unknown" if joules is None else words.energy(joules)
        found.append(("held without a process", f"{span(held['seconds'])}, {spent}" + (f": {held['why']}" if held.get("why") else "")))
    meters, notes = energy.get("meters"), energy.get("notes")
    said = meters if isinstance(meters, Mapping) else {}
    found += [(f"meter of {what}", str(how)) for what, how in said.items() if what != "notes"]
    found += [("not metered", one) for one in str(said["notes"]).split("; ")] if said.get("notes") else []
    return found + [("note", str(note)) for note in (notes if isinstance(notes, list) else ())[:20]]

"""The page: what collect.py found, as one HTML file that needs nothing beside it and runs no script.

Every curve has a table of its numbers behind it, no two differ by colour alone, and colours come in a light and a dark set (PALETTE), whose contrast tests
hold. Every text that a file gave is escaped (words.py), and the page's own policy forbids scripts and the network even if one were not.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigatrain.observe.report import words
from gigatrain.observe.report.collect import NONE, letters, names
from gigatrain.observe.report.curves import DASHES, TONES, Axes, Curve, gaps, histogram, layers, lines
from gigatrain.observe.report.figures import DRIFT, SLACK, finite
from gigatrain.observe.report.parts import (
    Shown,
    bars,
    card,
    cell,
    column,
    figure,
    head,
    lacking,
    pairs,
    scrolled,
    sentence,
    svg,
    table,
    unknown,
)
from gigatrain.observe.report.words import clock, escaped, exact, number, per_cent, provenance, quoted, signed, span
from gigatrain.power.reading import BOUNDARIES

Value = Mapping[str, Any]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
WITHIN = {"device": "device", "node": "node", "it": "IT", "facility": "facility"}
HOLDS = {"device": "the accelerators", "node": "whole nodes", "it": "with fabric and storage", "facility": "with cooling and losses"}
LAYERS = {"device": "devices", "node": "node rest", "it": "fabric", "facility": "cooling"}
CLASSES = {
    "training": "steps that were kept",
    "redone": "steps that a restart did again",
    "data": "waited for a batch",
    "compile": "kernels made and judged, and the first step",
    "validation": "evaluation",
    "checkpoint": "saving",
    "restore": "a checkpoint read",
    "paced": "waited, to keep to a power budget",
    "starting": "from a process's begin to its first step",
    "stopped": "nobody had the run",
    "other": "what nothing else explains",
}
PALETTE = {
    "light": {
        "bg": "#f6f6f3", "card": "#ffffff", "ink": "#1a1d21", "muted": "#596069", "rule": "#e2e3df", "edge": "#858c94",
        "t0": "#0f5c9c", "t1": "#9a4d00", "t2": "#0b7261", "t3": "#84408f", "t4": "#4d5660", "t5": "#a3263e",
        "warn": "#7d4300", "warnbg": "#fcefd9",
    },
    "dark": {
        "bg": "#111316", "card": "#191c20", "ink": "#eceef0", "muted": "#a6aeb8", "rule": "#2d3238", "edge": "#7b848e",
        "t0": "#7db7ef", "t1": "#e6a35c", "t2": "#5cc4b0", "t3": "#d09ada", "t4": "#b3bcc6", "t5": "#f08c9c",
        "warn": "#f4c584", "warnbg": "#33260e",
    },
}  # fmt: skip
RANKS = 8  # whose step times are shown
LEAST = 0.005  # of the whole: a thinner layer is no layer
ROOM = 3.0  # a limit that is so many times what was drawn is told and not drawn
LATEST = 20  # restarts, and legs, that are shown
SHOWN = 6  # changes of a leg


def page(values: Sequence[Value]) -> str:
    """The whole file, of one run or of several side by side."""
    called = names(values)
    if len(values) == 1:
        title = str(values[0]["run"]["name"])
        parts = [f"<header>{_head(values[0], 'h1', title)}</header><main>{_body(values[0], 'h2')}"]
    else:
        title = f"{len(values)} runs side by side"
        links = "".join(f"<li><a href='#run-{at}'>{escaped(name, 80)}</a></li>" for at, name in enumerate(called))
        parts = [f"<header><h1>{title}</h1><nav aria-label=Runs><ul>{links}</ul></nav></header><main>{_comparison(values, called)}"]
        for at, value in enumerate(values):
            top = f"<div class=title id='run-{at}'>{_head(value, 'h2', called[at])}</div>"
            parts.append(f"<section aria-label={quoted(called[at])}>{top}{_body(value, 'h3')}</section>")
    made = f"Made by gigatrain report at {values[0]['collected']}, from the runs' own files. Unknown is said to be unknown. "
    made += "Of a curve with more points than fit, each stretch's lowest and highest are drawn."
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped(title, 120)} | gigatrain report</title>\n<style>\n{style()}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n</main>\n<footer><p>{escaped(made)}</p></footer>\n</body>\n</html>\n"
    )


def style() -> str:
    """page.css with both sets of colours."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    tones = (
        f".c{at} {{ stroke: var(--t{at}) }}\n.f{at} {{ fill: var(--t{at}) }}\n.chart .x{at} {{ color: var(--t{at}) }}"
        for at in range(TONES)
    )
    style = style.replace("TONES", "\n".join(tones))
    for mode, colours in PALETTE.items():
        style = style.replace(mode.upper(), "; ".join(f"--{name}: {colour}" for name, colour in colours.items()))
    return style


# The head: what it is, what to know before anything else, and ten figures.


def _head(value: Value, tag: str, title: str) -> str:
    run = value["run"]
    tone = {"finished": "good", "running": "good", "silent": "bad", "ended": "warn"}.get(run["state"], "quiet")
    state = f"ended: {run['why']}" if run["state"] == "ended" and run["why"] else run["state"]
    ranks = f"{run['ranks']:,} rank{'s' * (run['ranks'] != 1)}" if run["ranks"] else ""
    begun = f"begun {run['began'].replace('T', ' ').replace('+00:00', ' UTC')}" if run["began"] else ""
    where = ", ".join(text for text in (f"on {run['site']}" if run["site"] else "", ranks, begun) if text)
    what = f"<p>{escaped(run['summary'])}</p>" if run["summary"] else ""
    said = f"<p class=quiet><span class='state {tone}'>{escaped(state, 200)}</span>{escaped(where)}</p>"
    alarm = ""
    if run["failure"]:
        alarm = f"<div class=alarm role=note><strong class=bad>Why it failed</strong><pre>{escaped(run['failure'], 4000)}</pre></div>"
    return f"<{tag}>{escaped(title, 200)}</{tag}>{what}{said}{alarm}<ul class=short>{''.join(f'<li>{text}</li>' for text in _short(value))}</ul>"


def _short(value: Value) -> list[str]:
    """Sentences as HTML."""
    said, run, goodput, energy = [], value["run"], value["goodput"], value["energy"]
    if run["step"] is not None and run["steps"]:
        said.append(f"{number(run['step'], 9)} of {number(run['steps'], 9)} steps ({per_cent(run['step'] / run['steps'])}).")
    if "share" in goodput:
        lost = {name: spent for name, spent in goodput["seconds"].items() if name != "training"}
        most = max(lost, key=lambda name: lost[name])
        text = f"{per_cent(goodput['share'])} of {span(goodput['wall_s'])} of wall-clock went into steps that were kept"
        rest = f"; most of the rest was {most}, {span(lost[most])} ({per_cent(lost[most] / goodput['wall_s'])})" if lost[most] else ""
        said.append(f"{text}{rest}.")
    if value["restarts"]:
        count, redone = len(value["restarts"]), goodput.get("seconds", {}).get("redone")
        again = f"; {span(redone)} of steps were done again" if redone else ""
        said.append(f"{count:,} restart{'s' * (count > 1)}{again}. Before the last: {escaped(value['restarts'][-1]['why'], 200)}.")
    for name, what in (("capped_share", "the power limit"), ("thermal_share", "heat"), ("brake_share", "a hardware brake")):
        if (share := finite(energy.get(name))) is not None and share >= 0.01:
            said.append(f"Clocks were held down by {what} {per_cent(share)} of the time.")
    said += [f"<span class=mark>drift</span> {escaped(one['words'])}." for one in value["plan"]["drifts"]]
    drifted = [row for row in value["plan"]["rows"] if row["drifted"] and not row.get("caused")]
    draws = [row for row in drifted if row["what"].startswith("mean draw")]
    for row in drifted:
        if row not in draws[:-1]:  # of nested draws the widest stands for all
            beside = f"{_amount(row['actual']['value'], row['unit'])}, {row.get('noun', 'planned')} {_amount(row['planned']['value'], row['unit'])}"
            where = f" {row['note']}" if row.get("note") else ""
            said.append(f"{_drift(row)} {escaped(row['what'] + where)}: {escaped(beside)}.")
    if value["refused_steps"]:
        said.append(f"{number(value['refused_steps'])} updates were refused: they were not finite.")
    if value["summary_differs"]:
        said.append(f"{escaped(value['summary_differs'])}.")
    return said + [f"Missing: {escaped(text)}." for text in value["missing"]]


def _tile(name: str, found: Value, shown: Callable[[float], tuple[str, str]], note: str = "", *, hero: bool = False) -> str:
    kind = " class=hero" if hero else ""
    if found["value"] is None:
        return f"<div{kind}><dt>{name}</dt><dd class='v un'>unknown</dd><dd class=n>{escaped(found['unknown'], 160)}</dd></div>"
    text, unit = shown(found["value"])
    after = f"<span class=unit>{escaped(unit)}</span>" if unit else ""
    note = note or found.get("note", "")
    below = f"<dd class=n>{escaped(note, 400)}</dd>" if note else ""
    return f"<div{kind}><dt>{name}</dt><dd class=v>{escaped(text)}{after}</dd>{below}</div>"


def _errs(speed: Value) -> str:
    """What bounds are made of, by POWER.md's table."""
    widths = {"measured": "± 5 %", "estimated": "± 50 %", "nameplate": "− 33 %", "declared": "± 20 %"}
    shares = speed.get("provenance")
    kinds = [kind for kind in widths if isinstance(shares, Mapping) and shares.get(kind)]
    said = ", ".join(f"{kind} {widths[kind]}" for kind in kinds)
    return f", if all of it errs one way: {said}, by POWER.md" if said else ""


def _tiles(value: Value) -> str:
    said = value["headline"]
    speed, spent, checked = said["tokens_per_s_mw"], said["mwh"], said["val_loss"]
    low, high = speed.get("low"), speed.get("high")
    between = f"Bounds {number(low)} to {number(high)}{_errs(speed)}" if low is not None and high is not None else "Bounds unknown"
    rests = speed.get("why") or provenance(speed.get("provenance"))
    of = f"{WITHIN.get(spent.get('boundary'), 'boundary unknown')}: {provenance(spent.get('provenance'))}"
    loss = f"validation {checked['value']:.4f}" if checked["value"] is not None else f"validation unknown: {checked['unknown']}"
    wall = said["wall_s"]["value"]
    tiles = [
        _tile(
            f"Tokens/s per MW, {WITHIN[speed['boundary']]}" if speed.get("boundary") else "Tokens/s per MW",
            speed, lambda it: (number(it), ""), f"{between}; {rests}", hero=True,
        ),
        _tile("Loss", said["loss"], lambda it: (f"{it:.4f}", ""), loss),
        _tile("Tokens, retained", said["tokens"], lambda it: (number(it, 6 if it < 1e6 else 4), "")),
        _tile("Tokens/s", said["tokens_per_s"], lambda it: (number(it), "")),
        _tile("MFU", said["mfu"], lambda it: (f"{it * 100:.1f}", "%")),
        _tile("Goodput", said["goodput"], lambda it: (f"{it * 100:.1f}", "%"), f"of {span(wall)} of wall-clock" if wall is not None else ""),
        _tile("Energy", spent, lambda it: words.scaled(it * 1e6, "Wh"), of),
        _tile("Cost of energy", said["eur"], lambda it: (number(it, 3), "€"), of),
        _tile("Carbon", said["kg_co2e"], lambda it: (number(it, 3), "kg CO2e"), of),
    ]  # fmt: skip
    return f"<dl class=tiles>{''.join(tiles)}</dl>"


# The body: cards.


def _body(value: Value, tag: str) -> str:
    marks = [one["step"] for one in value["restarts"] if one["step"] is not None]
    note = " ↻ marks a restart." if value["restarts"] else ""
    mfu = value["headline"]["mfu"]
    flops, each = f"MFU unknown: {mfu.get('unknown')}.", value["mfu_per_token_per_s"]
    if mfu["value"] is not None:
        flops = f"MFU {per_cent(mfu['value'])} {mfu['note']} in the mean; it is this same curve, {per_cent(each * 1e5)} for every 100,000 tokens/s."
    curves = value["curves"]
    cards = [
        lines(
            tag, "Loss", f"Mean of each window, and of each validation.{note}",
            [Curve("training", curves["loss"]), Curve("validation", curves["val_loss"], 1, dots=True)],
            Axes("step", shown=lambda it: f"{it:.4g}", marks=marks), "no window with a loss yet",
        ),
        lines(
            tag, "Tokens/s", f"While it trained. {flops}{note}", [Curve("tokens/s", curves["tokens_per_s"], label="")],
            Axes("step", zero=True, marks=marks), "no window with a speed yet",
        ),
        *_legs(tag, value),
        *_power(tag, value),
        _waterfall(tag, value),
        column(_phases(tag, value), _restarts(tag, value)),
        column(_step_times(tag, value)),
        _plan(tag, value),
        *_metered(tag, value),
        _memory(tag, value),
        _settings(tag, value),
        _identity(tag, value),
    ]  # fmt: skip
    return f"{_tiles(value)}<div class=cards>{''.join(cards)}</div>"


def _legs(tag: str, value: Value) -> list[str]:
    """Where a run that moved has been, and what each stretch was; nothing of one that stayed."""
    if len(value["legs"]) < 2:
        return []

    def told(found: Value, shown: Shown, note: str = "") -> str:
        return unknown(found["unknown"]) if found["value"] is None else cell(shown(found["value"]), note)

    rows = []
    for one in value["legs"][-LATEST:]:
        stood = "" if not one["stood_s"] else f"nobody had the run for {span(one['stood_s'])} before it"
        until = "unknown" if one["until"] is None else number(one["until"], 9)
        at = f"{WITHIN[one['boundary']]}: {provenance(one['provenance'])}" if one["boundary"] else ""
        rows.append(
            head(f"{one['number']}. {one['place']}", stood)
            + cell(f"{number(one['step'] or 0, 9)} to {until}")
            + told(one["tokens_per_s"], number)
            + told(one["goodput"], per_cent, "" if one["wall_s"]["value"] is None else f"of {span(one['wall_s']['value'])}")
            + told(one["watts"], words.watts, at)
            + told(one["kwh"], lambda it: words.energy(it * 3.6e6))
            + told(one["tokens_per_s_mw"], number)
            + sentence("; ".join(one["changed"][:SHOWN]) + f"; and {len(one['changed']) - SHOWN} more" * (len(one["changed"]) > SHOWN))
        )
    named = ("leg", "steps", "tokens/s", "goodput", "draw", "energy", "tokens/s/MW", "what changed")
    more = f" The last {LATEST} of {len(value['legs']):,}." if len(value["legs"]) > LATEST else ""
    text = f"Each stretch of the run under one plan. Joules are by the leg's own site; time between legs is no leg's.{more}"
    return [card(tag, "Legs", text, scrolled("Legs", table(named, rows, kind="plain", right=range(1, 7))), wide=True)]


def _power(tag: str, value: Value) -> list[str]:
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
    curve = Curve("tokens/s/MW", _timed(watts, boundary, scale), label="")
    return lines(tag, "Tokens/s per MW", text, [curve], axes, "no window has both tokens and joules")


def _timed(watts: Value, boundary: str, scale: float) -> list[list[float | None]]:
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


def _waterfall(tag: str, value: Value) -> str:
    """From all of wall-clock down to what was kept, class by class."""
    found = value["goodput"]
    if "seconds" not in found:
        return lacking(tag, "Goodput", found["unknown"])
    wall, spent = found["wall_s"] or 1.0, found["seconds"]
    rows = [("wall-clock", "since the first process had the run", 0.0, 1.0, 4, span(found["wall_s"]), per_cent(1.0))]
    left = 1.0
    for name in sorted((name for name in spent if name != "training"), key=lambda name: -spent[name]):
        left -= spent[name] / wall
        rows.append(
            (f"−\u00a0{name}", CLASSES[name], max(0.0, left), spent[name] / wall, 1, span(spent[name]), per_cent(spent[name] / wall))
        )
    rows.append(("=\u00a0training", CLASSES["training"], 0.0, found["share"], 2, span(spent["training"]), per_cent(found["share"])))
    text = "Every second of wall-clock is in one class; they add up to it."
    return card(tag, "Goodput", text, bars(("class", "of wall-clock", "time", "share"), rows), wide=True)


def _phases(tag: str, value: Value) -> str:
    found = value["phases"]
    if "shares" not in found:
        return lacking(tag, "Phases", found["unknown"])
    waited = found["exposed_communication"]
    said = f"{per_cent(waited['value'])} {waited['note']}" if waited["value"] is not None else f"unknown: {waited['unknown']}"
    text = f"Where rank 0's time went, by its trace. Exposed communication: {said}; what the backward hides, or waits for within itself, is not in it."
    rows = [(name, "", 0.0, share, 0, span(found["seconds"][name]), per_cent(share)) for name, share in found["shares"].items()]
    return card(tag, "Phases", text, bars(("phase", "of its time", "time", "share"), rows))


def _step_times(tag: str, value: Value) -> str:
    """A histogram, its percentiles as lines, and each rank's in a table."""
    found = value["step_s"]
    if "p50" not in found:
        return lacking(tag, "Step times", found["unknown"])
    bins, marks = found["histogram"], ("p50", "p90", "p99")
    scale, unit = (1e3, "milliseconds") if bins["high"] < 2 else (1.0, "seconds")
    said = ", ".join(f"{name} {words.seconds(found[name])}" for name in marks)
    longest = f"longest {words.seconds(found['longest'])}"
    label = f"Histogram of {found['steps']:,} step times: {said}, {longest}"
    places = [(name, found[name] * scale) for name in marks]
    picture = histogram(label, bins["low"] * scale, bins["high"] * scale, bins["counts"], places, f"{unit}; height: steps")
    rows = [
        head(f"rank {one['rank']}") + cell(number(one["steps"], 9)) + "".join(cell(words.seconds(one[name])) for name in marks)
        for one in found["ranks"][:RANKS]
    ]
    more = f" {len(found['ranks']) - RANKS:,} more ranks are in --json." if len(found["ranks"]) > RANKS else ""
    longer = f" {bins['longer']:,} longer than drawn." if bins["longer"] else ""
    text = f"{said}; {longest}; {found['steps']:,} steps that rank {found['ranks'][0]['rank']} traced, without saves and validations.{longer}{more}"
    return figure(tag, "Step times", text, picture, table(("rank", "steps", *marks), rows, right=(1, 2, 3, 4)))


def _restarts(tag: str, value: Value) -> str:
    if "seconds" not in value["goodput"]:
        return lacking(tag, "Restarts", value["goodput"]["unknown"])
    if not value["restarts"]:
        return card(tag, "Restarts", "None: one process has had the run all the time.")
    rows = []
    for one in value["restarts"][-LATEST:]:
        when = (one["time"] or "unknown").replace("T", " ").replace("+00:00", "")
        rows.append(
            sentence(when) + (cell("before its first") if one["step"] is None else cell(number(one["step"], 9))) + sentence(one["why"])
        )
    more = f" The last {LATEST} of {len(value['restarts']):,}." if len(value["restarts"]) > LATEST else ""
    return card(
        tag,
        "Restarts",
        f"Each process after the first.{more}",
        table(("when, UTC", "from step", "why the one before ended"), rows, kind="plain", right=(1,)),
    )


def _memory(tag: str, value: Value) -> str:
    found = value["memory"]
    planned, peak = found["planned_bytes"]["value"], found["peak_bytes"]
    if planned is None:
        return lacking(tag, "Memory of a rank", found["planned_bytes"]["unknown"])
    whole = max(planned, peak["value"] or 0.0) or 1.0
    rows = [(name, "", 0.0, part / whole, 0, words.size(part), per_cent(part / whole)) for name, part in found["parts_bytes"].items()]
    rows.append(("planned", "all of these", 0.0, planned / whole, 4, words.size(planned), per_cent(planned / whole)))
    text = "The plan's parts; activations and workspace are estimates."
    if peak["value"] is None:
        text += f" Measured peak: {peak['unknown']}."
    else:
        rows.append(("peak", "measured", 0.0, peak["value"] / whole, 2, words.size(peak["value"]), per_cent(peak["value"] / whole)))
    return card(tag, "Memory of a rank", text, bars(("part", "of the larger", "bytes", "share"), rows), wide=True)


def _amount(value: float, unit: str) -> str:
    known: dict[str, Shown] = {"bytes": words.size, "W": words.watts, "s": words.seconds, "share": per_cent}
    shown = (known | {"MWh": lambda it: words.energy(it * 3.6e9), "€": lambda it: f"{number(it, 3)} €"}).get(unit)
    return shown(value) if shown else number(value, 6 if value == int(value) and value < 1e6 else 4)


def _drift(row: Value) -> str:
    mark = "drift" if not row["most"] else "above the limit" if row.get("noun") == "allowed" else "above the most"
    return f"<span class=mark>{mark} {signed(row['drift'])}</span>"


def _plan(tag: str, value: Value) -> str:
    rows = []
    for row in value["plan"]["rows"]:
        both = (row["planned"], row["actual"])
        between = f"{_amount(row['low'], row['unit'])} to {_amount(row['high'], row['unit'])}" if "low" in row else ""
        cells = "".join(
            unknown(one["unknown"]) if one["value"] is None else cell(_amount(one["value"], row["unit"]), between * (one is row["planned"]))
            for one in both
        )
        if row["planned"]["value"] == 0 and row["actual"]["value"] is not None:
            cells += sentence("planned none")
        elif row["drift"] is None:
            cells += "<td class=un>not comparable</td>"
        elif row["drifted"]:
            cells += f"<td>{_drift(row)}</td>"
        else:
            more = f", {row.get('noun', 'planned')} at most" if row["most"] else ""
            if "low" in row:
                more = ", within" if row["low"] <= row["actual"]["value"] <= row["high"] else ", in the mean"
            cells += sentence(signed(row["drift"]) + (", not at its end" if row["open"] and row["drift"] < 0 else more))
        rows.append(head(row["what"], row.get("note", "")) + cells)
    text = f"What is more than {DRIFT * 100:.0f} % from the plan, or {SLACK * 100:.1f} % above a most, is marked. Draws are means over all of wall-clock."
    causes = ""
    if value["plan"]["expects"]:
        text += " Where the plan has a range, small below its middle, windows are judged: three in a row beyond it, without the first two of each process."
        causes = "".join(f"<p>{escaped(one['words'])}.</p>" for one in value["plan"]["drifts"])
        judged = value["plan"]["judged"]
        none = (
            f"{judged:,} windows, the last ones, were held against the plan's ranges; none drifted"
            if judged
            else "no window was there to be judged"
        )
        causes = causes or f"<p>{none}.</p>"
    whole = table(("what", "planned", "actual", "difference"), rows, kind="plain", right=(1, 2))
    return card(tag, "Plan and actual", text, whole + causes, wide=True)


def _metered(tag: str, value: Value) -> list[str]:
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


def _settings(tag: str, value: Value) -> str:
    if not value["settings"]:
        return lacking(tag, "Recipe", "plan.json is not there, or is none", wide=True)
    return card(
        tag,
        "Recipe",
        "Main settings, as the plan has them.",
        pairs([(name, said) for name, said in value["settings"].items() if said != NONE], "kv2"),
        wide=True,
    )


def _identity(tag: str, value: Value) -> str:
    run = value["run"]
    keys = ("folder", "id", "created", "plan_sha256", "identity", "corpus", "weights_sha256")
    said = [(key.replace("_", " "), run[key] if run[key] is not None else "unknown: not recorded") for key in keys]
    versions = list(value["versions"].items()) or [("versions", "unknown: they are written when a run finishes")]
    text = "What this run is, and what it stood on."
    return card(tag, "Identity and versions", text, pairs(said) + f"<div class=gapped>{pairs(versions, 'kv2')}</div>", wide=True)


# Several runs.


def _comparison(values: Sequence[Value], called: Sequence[str]) -> str:
    """The headline figures side by side with their differences from the first, and the curves over each other."""
    short = letters(len(values))
    figures: list[tuple[str, Callable[[Value], Value], Shown]] = [
        ("loss, last", lambda it: it["headline"]["loss"], lambda it: f"{it:.4f}"),
        ("validation loss, last", lambda it: it["headline"]["val_loss"], lambda it: f"{it:.4f}"),
        ("tokens, retained", lambda it: it["headline"]["tokens"], lambda it: number(it, 6 if it < 1e6 else 4)),
        ("tokens/s", lambda it: it["headline"]["tokens_per_s"], number),
        ("MFU", lambda it: it["headline"]["mfu"], per_cent),
        ("goodput", lambda it: it["headline"]["goodput"], per_cent),
        ("wall-clock", lambda it: it["headline"]["wall_s"], span),
        ("tokens/s/MW", lambda it: it["headline"]["tokens_per_s_mw"], number),
        ("energy", lambda it: it["headline"]["mwh"], lambda it: words.energy(it * 3.6e9)),
        ("cost of energy, €", lambda it: it["headline"]["eur"], number),
        ("carbon, kg CO2e", lambda it: it["headline"]["kg_co2e"], number),
        ("step time, p50", lambda it: _step(it, "p50"), words.seconds),
        ("step time, p99", lambda it: _step(it, "p99"), words.seconds),
    ]
    done = [value["headline"]["tokens"]["value"] for value in values]
    common = values[0]["headline"].get("loss_common", {}).get("tokens")
    if len(set(done)) > 1 and common is not None:
        at_common = f"loss at {number(common, 6 if common < 1e6 else 4)} tokens, the last that all report"
        figures.insert(2, (at_common, lambda it: it["headline"]["loss_common"], lambda it: f"{it:.4f}"))
    if any(value["budget"] for value in values):
        figures.append(("highest ten seconds, facility, W", lambda it: _kept(it, "highest"), number))
        figures.append(("waited for a budget", lambda it: _kept(it, "waited_s"), span))
    rows = []
    for name, pick, shown in figures:
        found = [pick(value) for value in values]
        cells = []
        for at, one in enumerate(found):
            others = name.endswith(", last") and done[at] != done[0]  # a run that is further has a lower loss
            cells.append(_beside(one, found[0] if at else None, shown, "at other tokens, not comparable" if others else ""))
        rows.append(head(name) + "".join(cells))
    keys = [
        svg(f"line of run {letter}", f"<path class='cv c{at % TONES} d{at % DASHES}' d='M2 6h40'/>", "0 0 44 12", "key")
        for at, letter in enumerate(short)
    ]
    drawn = head("curves below") + "".join(f"<td class=r>{key}</td>" for key in keys)
    whole = table(("figure", *called), [drawn, *rows], right=range(1, len(values) + 1))
    settings = [value["settings"] for value in values]
    differ = [name for name in dict.fromkeys(name for one in settings for name in one) if len({one.get(name) for one in settings}) > 1]
    unlike = "<p class=quiet>None of the main settings differs.</p>"
    if differ:
        others = [
            head(name) + "".join(cell(one[name]) if name in one else unknown("not in its plan") for one in settings) for name in differ
        ]
        unlike = scrolled("Settings that differ", table(("setting", *called), others, right=range(1, len(values) + 1)))

    def overlaid(title: str, text: str, points: Callable[[Value], Any], axes: Axes, empty: str) -> str:
        curves = [
            Curve(name, points(value), at, letter) for at, (value, name, letter) in enumerate(zip(values, called, short, strict=True))
        ]
        return lines("h2", title, text, curves, axes, empty)

    scale, unit = clock(max((one for value in values for one in value["watts"]["t_s"] if one is not None), default=0.0))

    def efficiency(value: Value) -> list[list[float | None]]:
        boundary = value["headline"]["tokens_per_s_mw"].get("boundary")
        return _timed(value["watts"], boundary, scale) if boundary else []

    text = f"Differences are from {called[0]}. Curves below have each run's letter, colour and pattern."
    cards = [
        card("h2", "Figures", text, scrolled("Figures of the runs", whole), wide=True),
        overlaid(
            "Loss", "Mean of each window.", lambda it: it["curves"]["loss"], Axes("step", shown=lambda it: f"{it:.4g}"), "no window yet"
        ),
        overlaid("Tokens/s", "While they trained.", lambda it: it["curves"]["tokens_per_s"], Axes("step", zero=True), "no window yet"),
        overlaid(
            "Tokens/s per MW",
            "Each at its headline's boundary: only alike ones compare.",
            efficiency,
            Axes(unit, zero=True),
            "no run has known joules",
        ),
        card("h2", "Settings that differ", "Of the main settings.", unlike),
    ]
    return f"<section aria-label='Side by side'><div class='cards gapped'>{''.join(cards)}</div></section>"


def _step(value: Value, name: str) -> Value:
    found = value["step_s"]
    return {"value": found[name]} if name in found else {"value": None, "unknown": found["unknown"]}


def _kept(value: Value, name: str) -> Value:
    budget = value["budget"]
    if not budget:
        return {"value": None, "unknown": "not asked for"}
    if name == "highest":
        return budget["highest"]
    return {"value": budget["cost"].get(name), "unknown": "the run told none"}


def _beside(found: Value, first: Value | None, shown: Shown, other: str = "") -> str:
    """A run's figure and its difference from the first run's, where both are of the same boundary."""
    if found["value"] is None:
        return unknown(found["unknown"])
    notes = []
    if first is not None and other:
        notes.append(other)
    elif first is not None and first["value"]:
        if found.get("boundary") != first.get("boundary"):
            notes.append("another boundary, not comparable")
        elif shown is per_cent:
            notes.append(signed(found["value"] - first["value"]).replace("%", "points"))
        else:
            notes.append(signed(found["value"] / first["value"] - 1))
    if found.get("boundary"):
        notes.append(f"{WITHIN[found['boundary']]}: {provenance(found.get('provenance'))}")
    return cell(shown(found["value"]), "; ".join(notes))

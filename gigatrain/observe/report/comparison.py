"""Several runs side by side: their figures with the differences from the first, and their curves over each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gigatrain.observe.report import words
from gigatrain.observe.report.collect import letters
from gigatrain.observe.report.curves import DASHES, TONES, Axes, Curve, lines
from gigatrain.observe.report.drawn_cards import timed
from gigatrain.observe.report.parts import Shown, card, cell, head, scrolled, svg, table, unknown
from gigatrain.observe.report.words import WITHIN, clock, number, per_cent, provenance, signed, span

Value = Mapping[str, Any]


def comparison(values: Sequence[Value], called: Sequence[str]) -> str:
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
        return timed(value["watts"], boundary, scale) if boundary else []

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

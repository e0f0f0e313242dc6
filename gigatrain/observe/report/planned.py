"""The page of a plan: where time, bytes and watts go, the layouts beside each other, the roof, the scaling curve, losses, cost and what-if, as one HTML file.

It is the run report's page in look and rules: nothing beside it, no network, every curve with its numbers behind it, every given text escaped. It has one
script, planned.js, for its sliders; the page's own policy names that script's hash, and allows no other.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from gigatrain.errors import RunError
from gigatrain.observe.report import planned_cards, whatif, words
from gigatrain.observe.report.palette import style
from gigatrain.observe.report.parts import card, cell, column, head, pairs, table, unknown
from gigatrain.observe.report.words import escaped, number, per_cent
from gigatrain.planning.expected import Expected, Range
from gigatrain.planning.picture import PlanPicture

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'"


def write(picture: PlanPicture, path: Path) -> None:
    """Writes the page; raises RunError where it cannot."""
    try:
        path.write_text(page(picture), encoding="utf-8")
    except OSError as failure:
        raise RunError(f"{path} cannot be written: {failure.strerror or failure}; name another --report") from None


def page(picture: PlanPicture) -> str:
    """The whole file."""
    script = Path(__file__).with_name("planned.js").read_text(encoding="utf-8")
    more = Path(__file__).with_name("planned.css").read_text(encoding="utf-8")
    tones = "\n".join(f".s{at} {{ background: var(--t{at}) }}" for at in range(6))
    hashed = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    given = whatif.given(picture)
    scripts = ""
    if given is not None:
        data = json.dumps(given, allow_nan=False).replace("<", "\\u003c")
        scripts = f"<script type='application/json' id=given>{data}</script>\n<script>\n{script}</script>\n"
    made = "Made by gigatrain plan --report. Every figure is an estimate with a 90 % interval where one is given; what is unknown is said to be unknown."
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(hashed)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped(picture.title, 120)} | gigatrain plan</title>\n<style>\n{style()}{more}{tones}\n</style>\n</head>\n<body>\n"
        f"<header>{_head(picture)}</header>\n<main>{_tiles(picture)}<div class=cards>{''.join(_cards(picture))}</div></main>\n"
        f"<footer><p>{escaped(made)}</p></footer>\n{scripts}</body>\n</html>\n"
    )


def _head(picture: PlanPicture) -> str:
    expected, said = picture.expected, []
    if expected.limits:
        said.append(f"Limited by {expected.limits}.")
    if picture.estimate is not None and picture.estimate.fits is False:
        said.append("It does not fit the accelerator's memory.")
    if lost := sorted(expected.lost.items(), key=lambda one: -one[1])[:1]:
        said.append(f"Of the wall-clock, {per_cent(sum(expected.lost.values()))} is lost, most to {lost[0][0]} ({per_cent(lost[0][1])}).")
    said += [f"Outside of what was calibrated: {one}." for one in expected.outside]
    if expected.unknown:
        said.append(f"Unknown: {', '.join(expected.unknown)}; the end of the page says why.")
    marked = [f"<li>{'<span class=mark>outside</span> ' if one.startswith('Outside') else ''}{escaped(one)}</li>" for one in said]
    what = f"<p>{escaped(picture.summary)}</p>" if picture.summary else ""
    plan = "<p class=quiet><span class='state quiet'>plan</span>nothing was started; figures are of the whole run unless they say otherwise</p>"
    return f"<h1>{escaped(picture.title, 200)}</h1>{what}{plan}<ul class=short>{''.join(marked)}</ul>"


def _tiles(picture: PlanPicture) -> str:
    expected = picture.expected
    why = expected.unknown

    def tile(name: str, key: str, range_: Range | float | None, shown: Any, unit: str = "", *, hero: bool = False) -> str:
        kind = " class=hero" if hero else ""
        if range_ is None:
            return f"<div{kind}><dt>{escaped(name)}</dt><dd class='v un'>unknown</dd><dd class=n>{escaped(why.get(key, 'not estimated'), 160)}</dd></div>"
        mid = range_.mid if isinstance(range_, Range) else range_
        text, after = shown(mid) if unit == "" else (shown(mid), unit)
        ends = ""
        if isinstance(range_, Range):
            both = [shown(one) for one in (range_.low, range_.high)]
            ends = " to ".join(" ".join(one).strip() if isinstance(one, tuple) else one for one in both)
        note = f"<dd class=n>{escaped(ends)}</dd>" if ends else ""
        return f"<div{kind}><dt>{escaped(name)}</dt><dd class=v>{escaped(text)}<span class=unit>{escaped(after)}</span></dd>{note}</div>"

    def plain(value: float) -> tuple[str, str]:
        return number(value, 3), ""

    tiles = [
        tile("Tokens/s per MW, facility, losses taken off", "tokens_per_s_mw", expected.tokens_per_s_mw, plain, hero=True),
        tile("Step", "step_s", expected.step_s, _seconds),
        tile("Tokens/s", "tokens_per_s", expected.tokens_per_s, plain),
        tile("MFU, of dense bf16", "mfu", expected.mfu, lambda it: (f"{it * 100:.1f}", "%")),
        tile("Memory, fullest rank", "memory_bytes", expected.memory_bytes, lambda it: (f"{it / 2**30:,.1f}", "GiB")),
        tile("Goodput", "goodput", expected.goodput, lambda it: (f"{it * 100:.1f}", "%")),
        tile("Wall-clock", "days", expected.days, lambda it: (number(it, 3), "days")),
        tile("Energy, facility", "mwh", expected.mwh, lambda it: words.scaled(it * 1e6, "Wh")),
        tile("Cost of energy", "eur", expected.eur, lambda it: (number(it, 3), "€")),
    ]
    return f"<dl class=tiles>{''.join(tiles)}</dl>"


def _seconds(value: float) -> tuple[str, str]:
    return (f"{value * 1e3:,.3g}", "ms") if value < 1 else (f"{value:,.3g}", "s")


def _cards(picture: PlanPicture) -> list[str]:
    return [
        planned_cards.step(picture),
        planned_cards.roles(picture),
        planned_cards.held(picture),
        planned_cards.layouts(picture),
        planned_cards.roof(picture),
        column(planned_cards.drawn(picture.boundaries, picture.expected)),
        column(planned_cards.states(picture.states)),
        *planned_cards.scaling(picture),
        planned_cards.losses(picture),
        column(planned_cards.sensitivity(picture)),
        _cost(picture.expected),
        *whatif.sliders(picture),
        _said(picture),
    ]


def _cost(expected: Expected) -> str:
    def shown(range_: Range | None, key: str, say: Any) -> str:
        if range_ is None:
            return unknown(expected.unknown.get(key, "not estimated"), 3)
        return "".join(cell(say(one)) for one in (range_.low, range_.mid, range_.high))

    figures = (
        ("wall-clock, days", expected.days, "days", lambda it: number(it, 3)),
        ("energy at the facility", expected.mwh, "mwh", lambda it: words.energy(it * 3.6e9)),
        ("cost of energy, €", expected.eur, "eur", lambda it: number(it, 4)),
        ("CO2, tonnes", expected.tco2, "tco2", lambda it: number(it, 4)),
        ("tokens/s per MW, facility", expected.tokens_per_s_mw, "tokens_per_s_mw", lambda it: number(it, 4)),
        ("tokens/s of a rank", expected.tokens_per_s_per_rank, "tokens_per_s_per_rank", lambda it: number(it, 4)),
    )
    rows = [head(name) + shown(range_, key, say) for name, range_, key, say in figures]
    return card(
        "h2", "Cost and intervals", "Ends of 90 % intervals.", table(("figure", "low", "middle", "high"), rows, right=(1, 2, 3)), wide=True
    )


def _said(picture: PlanPicture) -> str:
    """The plan itself, and what it rests on."""
    expected = picture.expected
    inside = pairs(picture.facts, "kv2") if picture.facts else ""
    for title, some in (
        ("Outside of what was calibrated", expected.outside),
        (
            "Assumed",
            (*expected.assumed, *(one for one in (picture.estimate.assumed if picture.estimate else ()) if one not in expected.assumed)),
        ),
        ("Sources", picture.sources),
        ("Unknown", tuple(f"{name}: {why}" for name, why in expected.unknown.items())),
    ):
        listed = "".join(f"<li>{escaped(one)}</li>" for one in some)
        if title == "Sources" and not some:
            continue
        inside += f"<h3 class=sub>{title}</h3><ul class=plainlist>{listed or '<li>nothing</li>'}</ul>"
    if picture.lines:
        text = escaped("\n".join(picture.lines), 40000)
        inside += "<h3 class=sub>As gigatrain plan prints it</h3><div class=asis role=region tabindex=0 aria-label='The plan as text'>"
        inside += f"<pre>{text}</pre></div>"
    return card("h2", "The plan, and what it rests on", "", inside, wide=True)

"""Sliders of a plan's page: what planned.js reckons with, and the form that it reads. Everything is drawn through the plan's own figures."""

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log
from typing import Any

from gigatrain.observe.report.parts import card, head, table
from gigatrain.observe.report.words import escaped
from gigatrain.planning.expected import Range
from gigatrain.planning.picture import PlanPicture, Scale


def given(picture: PlanPicture) -> dict[str, Any] | None:
    """What planned.js reckons with; None where there is no speed to begin from."""
    asked, expected = picture.what_if, picture.expected
    known = [row for row in picture.scaling if row.tokens_per_s]
    if asked is None or not known or expected.tokens_per_s is None:
        return None
    rows = [{"x": row.accelerators, "speed": row.tokens_per_s, "goodput": row.goodput} for row in known]
    goodput = expected.goodput.mid if expected.goodput is not None else None
    here = _between(known, asked.accelerators)
    caps = [{"x": one.watts, "speed": one.speed, "watts": one.device_watts} for one in sorted(asked.caps, key=lambda one: one.watts)]
    days = asked.tokens / (expected.tokens_per_s.mid * (1.0 if goodput is None else goodput)) / 86400 if goodput != 0 else 0.0
    watts = None if asked.it_watts is None or asked.pue is None else asked.it_watts * asked.accelerators * asked.pue
    mwh = None if watts is None else watts * days * 24 / 1e6  # as if it drew as much while it waits; what is known of that is in the factor
    cap = caps[-1] if caps else None  # as sold, or as it is set: the last
    return {
        "rows": rows,
        "caps": caps,
        "speed_factor": expected.tokens_per_s.mid / here[0],
        "goodput_factor": goodput / here[1] if goodput is not None and here[1] else 1.0,
        "goodput": goodput,
        "days_factor": _over(expected.days, days),
        "mwh_factor": _over(expected.mwh, mwh),
        "efficiency_factor": _over(expected.tokens_per_s_mw, asked.tokens / days / 86400 / watts * 1e6 if watts and days else None),
        "cap_speed": cap["speed"] if cap else 1.0,
        "cap_watts": cap["watts"] if cap else 0.0,
        "tokens": asked.tokens,
        "save": asked.save_s,
        "recovery": asked.recovery_s,
        "it_watts": asked.it_watts,
        "base": {
            "count": asked.accelerators,
            "pue": asked.pue,
            "price": asked.eur_mwh,
            "carbon": asked.g_kwh,
            "failures": asked.failures_per_day,
            "cap": cap["x"] if cap else None,
        },
    }


def _over(range_: Range | None, mine: float | None) -> float:
    """What the sliders' own figure is off the plan's, so that they begin at it."""
    return range_.mid / mine if range_ is not None and mine else 1.0


def _between(rows: Sequence[Scale], count: float) -> tuple[float, float | None]:
    """Tokens/s, and goodput, at a number of accelerators: as planned.js has them."""
    if count <= rows[0].accelerators:
        return rows[0].tokens_per_s or 0.0, rows[0].goodput
    for low, high in pairwise(rows):
        if count <= high.accelerators:
            share = log(count / low.accelerators) / log(high.accelerators / low.accelerators)
            speed = exp((1 - share) * log(low.tokens_per_s or 1.0) + share * log(high.tokens_per_s or 1.0))
            good = None if low.goodput is None or high.goodput is None else (1 - share) * low.goodput + share * high.goodput
            return speed, good
    return rows[-1].tokens_per_s or 0.0, rows[-1].goodput


def sliders(picture: PlanPicture) -> list[str]:
    found = given(picture)
    if found is None:
        return []
    rows, base = found["rows"], found["base"]
    sliders = [("count", "accelerators", log(rows[0]["x"]), log(rows[-1]["x"]), log(base["count"]), 0.001)]
    if base["pue"] is not None and found["it_watts"] is not None:
        sliders.append(("pue", "PUE", 1.0, max(2.0, base["pue"]), base["pue"], 0.01))
    if base["price"] is not None and found["it_watts"] is not None:
        sliders.append(("price", "€ a MWh", 0.0, max(300.0, 2 * base["price"]), base["price"], 1.0))
    if found["caps"]:
        caps = found["caps"]
        sliders.append(("cap", "limit of an accelerator, W", caps[0]["x"], caps[-1]["x"], base["cap"], 1.0))
    if base["failures"] and found["save"] is not None and found["recovery"] is not None:
        sliders.append(
            (
                "failures",
                "failures a day, of 1,000 accelerators",
                log(base["failures"] / 10),
                log(base["failures"] * 10),
                log(base["failures"]),
                0.001,
            )
        )
    inputs = "".join(
        f"<label for=in-{name}>{escaped(label)}<output id=said-{name} for=in-{name}></output>"
        f"<input type=range id=in-{name} name={name} min={low:.8g} max={high:.8g} value={value:.8g} step=any></label>"
        for name, label, low, high, value, _ in sliders
    )
    figures = (
        ("speed", "tokens/s while it trains"), ("goodput", "goodput"), ("days", "days of wall-clock"), ("megawatts", "MW at the facility"),
        ("efficiency", "tokens/s per MW, losses taken off"), ("mwh", "MWh"), ("eur", "€"), ("tco2", "tonnes of CO2"),
    )  # fmt: skip
    lines = [f"{head(name)}<td class=r id=now-{key}></td><td class=r id=by-{key}></td>" for key, name in figures]
    text = "Interpolated, not planned anew: between the rows of the scaling picture by the logarithm of accelerators, between limits in a straight line, "
    text += "and goodput by the first-order rule (a save every √(2 · save · time between failures)), all drawn through this plan's own "
    text += "figures. No layout is searched."
    inside = f"<form id=whatif hidden>{inputs}<button type=reset>As planned</button></form>"
    inside += table(("figure", "what if", "against the plan"), lines, right=(1, 2))
    inside += "<noscript><p>The sliders and this table need the page's own script, which is not allowed here.</p></noscript>"
    return [card("h2", "What if", text, inside, wide=True)]

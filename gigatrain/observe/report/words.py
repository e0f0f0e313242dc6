"""Texts and numbers as a reader of a page meets them: escaped, short, with their unit."""

import html
import math
import re
from collections.abc import Mapping
from typing import Any

from gigatrain.observe import legs, logs
from gigatrain.observe.report.figures import finite

_APART = re.compile(r"(?<=[±<>−]) (?=\d)")  # a sign and its number stay on one line
MINUTES_S = 600.0  # from where on a duration is told in minutes: below, its share beside it would not fit it
WITHIN = {"device": "device", "node": "node", "it": "IT", "facility": "facility"}
_HIDDEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")  # what turns or hides the words around it


def escaped(text: Any, most: int = 600) -> str:
    """A text as HTML, in an element or in a quoted attribute: without control characters, and not longer than anybody reads."""
    shown = _HIDDEN.sub("", logs.printable(str(text))).encode("utf-8", "replace").decode("utf-8").replace(" %", "\u00a0%")
    shown = _APART.sub("\u00a0", shown)
    return html.escape(shown if len(shown) <= most else shown[: most - 1] + "…", quote=True)


def quoted(text: Any) -> str:
    """An attribute's value with its quotes."""
    return f'"{escaped(text)}"'


def number(value: float, digits: int = 4) -> str:
    """1,234 and 0.0123; a million and above by a letter."""
    factor, letter = _letter(value)
    return f"{_digits(value / factor, digits)} {letter}".rstrip()


def _letter(value: float) -> tuple[float, str]:
    units = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    return next(((limit, letter) for limit, letter in units if abs(value) >= limit), (1.0, ""))


def _digits(value: float, digits: int) -> str:
    size = abs(value)
    if size and size < 1e-4:
        factor, _, power = f"{value:.{max(0, digits - 3)}e}".partition("e")
        return f"{factor} × 10^{int(power)}"
    if size >= 10 ** (digits - 1) or value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.{max(0, digits - 1 - (math.floor(math.log10(size)) if size else 0))}f}"


def exact(value: float) -> str:
    """A figure that somebody wrote down, or a tick: as it is, without zeros behind it."""
    factor, letter = _letter(value)
    return f"{value / factor:,.6g} {letter}".rstrip() if abs(value) >= 1e-4 or not value else number(value)


def signed(share: float) -> str:
    """A difference: `+1.0 %`, `−30.8 %`."""
    return f"{share * 100:+,.1f} %".replace("-", "−")


def scaled(value: float, unit: str, digits: int = 3) -> tuple[str, str]:
    """A number and its unit, by thousands: (`1.23`, `kW`)."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return _digits(value / factor, digits), letter + unit
    return _digits(value, digits), unit


def watts(value: float) -> str:
    return " ".join(scaled(value, "W"))


def energy(joules: float) -> str:
    return " ".join(scaled(joules / 3600, "Wh"))


def size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**27 else f"{count / 2**20:,.1f} MiB"


def span(seconds: float) -> str:
    """A duration as people say it, from milliseconds to days."""
    if seconds >= MINUTES_S:
        return legs.span(seconds)
    return f"{seconds:.1f} s" if seconds >= 0.9995 or not seconds else f"{seconds * 1e3:.0f} ms"


def seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def per_cent(share: float) -> str:
    return f"{share * 100:.1f} %"


def provenance(shares: Any) -> str:
    """71 % measured, 29 % estimated; whole per cents, and never 0 for what is there, nor 100 beside it."""
    said = shares if isinstance(shares, Mapping) else {}
    parts = [(kind, share) for kind, given in said.items() if (share := finite(given))]

    def shown(share: float) -> str:
        return "< 1" if share < 0.005 else "> 99" if share >= 0.995 and len(parts) > 1 else f"{share * 100:.0f}"

    return ", ".join(f"{shown(share)} % {kind}" for kind, share in parts) or "provenance unknown"


def clock(longest_s: float) -> tuple[float, str]:
    """The unit of a time axis that is so long: its seconds, and its name."""
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    return next(((each, name) for each, name in units if longest_s >= 3 * each), (1.0, "seconds"))

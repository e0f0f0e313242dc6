"""Figures of a report: a number with its note, or none with the reason; and a plan's beside what came of it."""

import contextlib
import datetime
from typing import Any

from gigatrain.observe import logs
from gigatrain.observe.goodput import LARGEST

SLACK = 0.005  # above a limit, before it is pointed at: a counter's edge may be off by one in a hundred
SHOWN = 4000  # characters of a text that a file gave
DRIFT = 0.10  # a difference from the plan that is pointed at


def known(value: Any, why: str = "", note: str = "") -> dict[str, Any]:
    """A figure; `why` is said where it has no value, `note` where it has one."""
    number = finite(value)
    if number is None:
        return {"value": None, "unknown": why or "not recorded"}
    return {"value": number} | ({"note": note} if note else {})


def finite(value: Any) -> float | int | None:
    """A number, or None for what is none: words, true, infinity, and what is larger than anything that a run counts."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < LARGEST else None


def against(
    what: str, unit: str, planned: dict[str, Any], actual: dict[str, Any], *, open: bool = False, most: bool = False
) -> dict[str, Any]:
    """`open`: the run has not ended, so less is no drift; `most`: less than planned is as it should be."""
    wanted, got = planned["value"], actual["value"]
    drift = None if wanted is None or got is None or not wanted else finite(got / wanted - 1)
    drifted = drift is not None and (drift > SLACK if most else abs(drift) > DRIFT and not (open and drift < 0))
    return {
        "what": what,
        "unit": unit,
        "planned": planned,
        "actual": actual,
        "drift": drift,
        "drifted": drifted,
        "open": open,
        "most": most,
    }


def word(value: Any) -> str | None:
    """A text that a file gave, without what moves a cursor, and no longer than is read."""
    return None if value is None else logs.printable(str(value))[:SHOWN]


def utc(time_s: Any) -> str | None:
    with contextlib.suppress(OverflowError, ValueError, OSError, TypeError):
        return datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat(timespec="seconds")
    return None

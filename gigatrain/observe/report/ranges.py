"""What a plan expected, as ranges, beside the means of a run's windows, and what drifted from it with its likely cause."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gigatrain.observe import beside
from gigatrain.observe.reader import slowest_of
from gigatrain.observe.report.figures import against, finite, known
from gigatrain.observe.tail import Tail
from gigatrain.planning.drift import FIRST, Drift, planned_phases
from gigatrain.planning.expected import Expected, Range
from gigatrain.planning.watts import Watts
from gigatrain.power.reading import BOUNDARIES

JUDGED = 5_000  # windows, the last, that are held against the plan's ranges
TRACE_BYTES = 4 << 20  # of rank 0's trace, its end
TRACED = {"compute": ("forward", "backward")}  # a trace's phases, where they are called otherwise


def ranged(
    expected: Expected,
    value: Mapping[str, Any],
    folder: Path,
    windows: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    seen: Mapping[str, Any],
    plan: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """collect.py's rows of plan and actual with the plan's ranges, and what drifted from them. A figure with a range is judged by it alone."""
    try:
        watts = Watts.model_validate(plan.get("watts") or {})
    except ValidationError:
        watts = None
    found = beside.windows(
        windows[-JUDGED:], events, Tail(folder / "energy.jsonl").rows()[0], beside.traced(folder, TRACE_BYTES), watts,
        goodput=seen["goodput"], slowest=slowest_of(folder, seen["slowest_ranks"], seen["attempt"]),
        peak_bytes=finite(summary.get("peak_bytes")),
    )  # fmt: skip
    drifts, judged = beside.drifts(expected, found, past=True), found[FIRST:]

    def mean(pick: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
        numbers = [number for window in judged if (number := finite(pick(window))) is not None]
        return known(sum(numbers) / len(numbers) if numbers else None, "not of any window that is judged")

    def drawn(name: str) -> tuple[str, str, Range | None, dict[str, Any], bool]:
        said = "IT" if name == "it" else name
        return f"watts, {said}", "W", expected.watts.get(name), mean(lambda window: (window.get("watts") or {}).get(name)), False

    headline, open = value["headline"], value["run"]["state"] != "finished"
    spent = headline["mwh"] if headline["mwh"].get("boundary") == "facility" else known(None, "the facility's energy is unknown")
    figures = (
        ("step", "s", expected.step_s, mean(lambda window: window.get("step_s")), False),
        ("tokens/s", "tokens/s", expected.tokens_per_s, mean(lambda window: window.get("tokens_per_s")), False),
        *(drawn(name) for name in BOUNDARIES),
        ("memory of a rank", "bytes", expected.memory_bytes, value["memory"]["peak_bytes"], False),
        ("goodput", "share", expected.goodput, headline["goodput"], open),
        ("energy, facility", "MWh", expected.mwh, spent, open),
        ("cost of energy", "€", expected.eur, headline["eur"], open),
    )
    rows = [
        _between(what, unit, range_, actual, [one for one in drifts if one.what == what], unended)
        for what, unit, range_, actual, unended in figures
        if range_ is not None
    ]
    for name, seconds in planned_phases(expected).items():
        parts = [mean(lambda window, phase=phase: (window.get("phases") or {}).get(phase)) for phase in TRACED.get(name, (name,))]
        took = None if any(one["value"] is None for one in parts) else sum(one["value"] for one in parts)
        note = "products, passes over memory, launches, and transfers that layers wait for" if name == "compute" else ""
        rows.append(
            against(f"of a step: {name}", "s", known(seconds), known(took, "no trace of these windows")) | {"drifted": False, "note": note}
        )
    replaced = {one["what"] for one in rows}
    judged_draws = {
        f"mean draw, {'IT' if name == 'it' else name}" for name in expected.watts
    }  # those of the site's figures are no longer the plan's word
    before = [one for one in value["plan"]["rows"] if one["what"] not in replaced]
    rows = [one | {"drifted": False} if one["what"] in judged_draws and not one["most"] else one for one in before] + rows
    return {"rows": rows, "drifts": [beside.said(one) for one in drifts], "expects": True, "judged": len(judged)}


def _between(what: str, unit: str, range_: Range, actual: dict[str, Any], drifts: Sequence[Drift], open: bool) -> dict[str, Any]:
    """A row with a range, which has drifted where windows, one after the other, lay beyond it."""
    drifted = {"drifted": bool(drifts), "caused": bool(drifts)}
    return against(what, unit, known(range_.mid), actual, open=open) | {"low": range_.low, "high": range_.high} | drifted

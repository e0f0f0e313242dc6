"""A run's windows with all that its folder says of each: what planning/drift.py holds beside a plan. Free of torch.

The row of metrics.jsonl is joined by its step with the report of logs/progress.jsonl, the row of energy.jsonl and rank 0's trace; what one of them lacks is
absent from the window, never 0.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gigatrain.observe.tail import ending
from gigatrain.planning.drift import Drift, drift
from gigatrain.planning.expected import Expected
from gigatrain.planning.watts import Watts
from gigatrain.power.boundary import look
from gigatrain.power.spans import taken_of

TRACE_BYTES = 1 << 18  # of rank 0's trace, its end: some 1,500 steps
METERED = 0.5  # of a boundary's joules that meters counted, below which its watts are the plan's own figures coming back
_KEPT = ("step", "step_s", "tokens_per_s", "peak_bytes", "reserved_bytes")


def expected_of(plan: Mapping[str, Any]) -> Expected | None:
    """What plan.json expects; None of a plan that expects nothing, or of another version's."""
    said = plan.get("expected")
    if not isinstance(said, Mapping) or not said:
        return None
    try:  # not model_validate: JSON has no tuples, which strict models ask for
        found = Expected.model_validate_json(json.dumps(said))
    except (ValidationError, ValueError):
        return None
    return None if found == Expected() else found


def windows(
    metrics: Sequence[Mapping[str, Any]],
    events: Iterable[Mapping[str, Any]] = (),
    energy: Iterable[Mapping[str, Any]] = (),
    traced: Mapping[int, Mapping[str, float]] | None = None,
    watts: Watts | None = None,
    *,
    goodput: Mapping[str, Any] | None = None,
    slowest: Mapping[str, Any] | None = None,
    peak_bytes: float | None = None,
) -> list[dict[str, Any]]:
    """One for each row of `metrics`; `goodput`, `slowest` and `peak_bytes` are of now, so the last window has them. `traced`: phases by step, from 0."""
    reports = {event["step"]: event for event in events if event.get("event") == "report" and _whole(event.get("step"))}
    drawn = {row["step"]: row for row in energy if row.get("event") in ("window", "end") and _whole(row.get("step"))}
    found: list[dict[str, Any]] = []
    before: int | None = None
    for row in metrics:
        if not _whole(row.get("step")):
            continue
        step = int(row["step"])
        window: dict[str, Any] = {key: row[key] for key in _KEPT if row.get(key) is not None}
        if step in reports:
            window["process"] = reports[step].get("process")
            window["spent"] = reports[step].get("seconds")
        if step in drawn:
            window |= _drawn(drawn[step], watts or Watts())
        if traced and before is not None and before < step:
            steps = [traced[at] for at in range(max(before, step - 100_000), step) if at in traced]
            names = dict.fromkeys(name for phases in steps for name in phases)
            if steps:
                window["phases"] = {name: sum(phases.get(name, 0.0) for phases in steps) / len(steps) for name in names}
        found.append(window)
        before = step
    if found:
        last = {"goodput": goodput, "slowest": slowest, "peak_bytes": peak_bytes}
        found[-1] |= {key: value for key, value in last.items() if value is not None}
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _drawn(row: Mapping[str, Any], watts: Watts) -> dict[str, Any]:
    """Mean watts of the boundaries that meters counted most of, and what held clocks down."""
    said, orders = row.get("taken"), row.get("orders")
    taken = taken_of(said) if isinstance(said, dict) else None
    if taken is None or not taken.nodes or not taken.ms:
        return {}
    found = look(taken, watts, taken.ms / taken.nodes / 1e3)[0]
    window: dict[str, Any] = {
        "watts": {name: one.watts for name, one in found.items() if one is not None and one.shares["measured"] >= METERED},
    }
    if watts.accelerators:
        window |= {"capped_share": taken.held_down(taken.power_capped_ms), "thermal_share": taken.held_down(taken.thermal_ms)}
    if isinstance(orders, Mapping):
        window["cap_share"] = orders.get("cap_share")
    return {key: value for key, value in window.items() if value is not None}


def traced(run: Path, most: int = TRACE_BYTES) -> dict[int, dict[str, float]]:
    """Phases of the steps at the end of rank 0's trace, those that a profiler slowed and what lies between steps left out."""
    found: dict[int, dict[str, float]] = {}
    for row in ending(run / "trace" / "rank-00000.jsonl", most):
        if _whole(row.get("step")) and isinstance(said := row.get("phases"), dict) and not row.get("profiled"):
            found[row["step"]] = {
                name: seconds
                for name, seconds in said.items()
                if name not in ("validation", "checkpoint", "paced", "profile") and isinstance(seconds, (int, float)) and 0 <= seconds < 1e9
            }
    return found


def judges(expected: Expected | None) -> bool:
    """Whether a plan expects anything that a window can be held against."""
    return expected is not None and any((expected.step_s, expected.memory_bytes, expected.watts, expected.goodput))


def drifts(expected: Expected | None, found: Sequence[Mapping[str, Any]], *, past: bool = False) -> tuple[Drift, ...]:
    """`planning.drift.drift`, of a plan that may expect nothing."""
    return () if expected is None else drift(expected, found, past=past)


def said(one: Drift) -> dict[str, Any]:
    """A drift as JSON values, with its sentence."""
    return asdict(one) | {"expected": one.expected.model_dump(), "words": one.words}

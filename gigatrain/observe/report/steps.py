"""The steps that ranks recorded: how long they took, and where rank 0's time went."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gigatrain.observe.report.figures import finite, known
from gigatrain.observe.tail import ending

BINS = 40  # of the histogram of step times
TRACE_BYTES = 64 << 20  # of the first rank's trace, its end: some 350,000 steps; of the others' a sixteenth
RANKS = 64  # whose traces are read
WITHIN_STEP = ("data", "forward", "backward", "reduce", "optimizer", "rest")  # the other phases lie between steps
PHASES = (*WITHIN_STEP[:-1], "validation", "checkpoint", "paced", "profile", "rest")
LONGEST_S = 1e9  # of a phase of a step: thirty years


def _traced(path: Path, most: int) -> Iterator[tuple[dict[str, float], bool]]:
    """Phases of each whole step in the last `most` bytes of a rank's trace, and whether it was profiled."""
    for row in ending(path, most):
        if isinstance(said := row.get("phases"), dict):
            found = {name: number for name, spent in said.items() if (number := finite(spent)) is not None and 0 <= number < LONGEST_S}
            if found:
                yield found, bool(row.get("profiled"))


def steps_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the steps that ranks recorded and no profiler slowed: percentiles and a histogram, and where rank 0's time went."""
    paths = sorted((folder / "trace").glob("rank-*.jsonl"))
    ranks, first, totals, count = [], [], {}, 0
    for path in paths[:RANKS]:
        if not (number := path.stem.removeprefix("rank-")).isdecimal():
            continue
        seconds = []
        for phases, profiled in _traced(path, TRACE_BYTES if path == paths[0] else TRACE_BYTES // 16):
            if profiled:
                continue
            seconds.append(sum(spent for phase, spent in phases.items() if phase in WITHIN_STEP))
            if path == paths[0]:
                for phase, spent in phases.items():
                    totals[phase] = totals.get(phase, 0.0) + spent
        if not seconds:
            continue
        seconds.sort()
        ranks.append({"rank": int(number), "steps": len(seconds), **{f"p{share}": _nearest(seconds, share) for share in (50, 90, 99)}})
        if not first:
            first, count = seconds, len(seconds)
    why = "no steps in trace/rank-*.jsonl" if paths else "the run has no trace/"
    if not first:
        return {"unknown": why}, {"unknown": why}
    whole = sum(totals.values())
    steps = {
        "steps": count,
        "mean": sum(first) / count,
        "longest": first[-1],
        "histogram": _histogram(first),
        "ranks": ranks,
        "ranks_left_out": max(0, len(paths) - RANKS),
        **{f"p{share}": _nearest(first, share) for share in (50, 90, 99)},
    }
    if not whole:
        return steps, {"unknown": "its steps took no time"}
    order = [name for name in PHASES if name in totals] + sorted(totals.keys() - set(PHASES))
    phases = {"seconds": {name: totals[name] for name in order}, "shares": {name: totals[name] / whole for name in order}}
    within = sum(spent for name, spent in totals.items() if name in WITHIN_STEP)
    reduced = totals["reduce"] / within if within and "reduce" in totals else None
    phases["exposed_communication"] = known(reduced, "no step has the phase reduce", "of the time of its steps, in the phase reduce")
    return steps, phases


def _nearest(ordered: Sequence[float], share: float) -> float:
    """The nearest rank, as observe/metrics.py has it."""
    return ordered[min(len(ordered) - 1, max(0, round(share / 100 * len(ordered)) - 1))]


def _histogram(ordered: Sequence[float]) -> dict[str, Any]:
    """Counts from the shortest to a little over the 99th percentile; what is longer is counted in `longer`."""
    low, high = ordered[0], max(_nearest(ordered, 99) * 1.05, ordered[0] * 1.01)
    counts, longer, width = [0] * BINS, 0, (high - low) / BINS
    for seconds in ordered:
        at = int((seconds - low) / width) if width else 0
        if at < BINS:
            counts[at] += 1
        else:
            longer += 1
    return {"low": low, "high": high, "counts": counts, "longer": longer}

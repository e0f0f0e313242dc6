"""The steady stretch of a run: what its folder says that was drawn, and made, once it had settled; and which meters there are to say it.

A run's windows count from `settle_s` of steps until its last report. Start, settling, validation and saves are left out of the figures, and recorded.
A stretch shorter than the meters allow gives no figure.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigatrain.bench.report import OK, Row
from gigatrain.config import Power
from gigatrain.errors import PowerError, RunError
from gigatrain.planning.plan import Plan
from gigatrain.planning.watts import Watts
from gigatrain.power.reading import BOUNDARIES, FIELDS, Taken
from gigatrain.power.spans import taken_of

LEAST_S = 10.0  # a window is at least so long,
LEAST_UPDATES = 100  # and so many of the slowest meter's updates: a counter is news every 20 to 100 ms, and an edge may be off by one
NEAR_S = 0.1  # between a run's two words of one report
LOOK_S = 1.5  # long enough for the slowest counter of a device to move


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of RUN/energy.jsonl or RUN/logs/progress.jsonl, without a last line that a kill tore off; RunError where there are none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{path} is not there: the run wrote down no energy; power.measure must be true") from None
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass(frozen=True)
class Stretch:
    """The steady part of a run: what its meters saw, over how long, for how many tokens; and what was left out before it."""

    taken: Taken
    seconds: float
    tokens: int
    settle_s: float
    startup_s: float


def stretch(rows: Sequence[Mapping[str, Any]], progress: Sequence[Mapping[str, Any]], settle_s: float) -> Stretch:
    """The windows after `settle_s` of steps, from report to report. RunError where there is none.

    A window of energy.jsonl is an edge if progress.jsonl has a report of its step from the same moment: the last one also holds the validation and the save.
    """
    began_s = next((row["time_s"] for row in progress if row["event"] == "steps"), None)
    reports = {row["step"]: row["time_s"] for row in progress if row["event"] == "report"}
    edges = [
        place
        for place, row in enumerate(rows)
        if row["event"] == "window" and abs(row["time_s"] - reports.get(row["step"], -math.inf)) <= NEAR_S
    ]
    if began_s is None or not edges:
        raise RunError("the run told no window of its steps' energy; more --steps or --seconds")
    settled = [place for place in edges if rows[place]["time_s"] - began_s >= settle_s]
    if len(settled) < 2:
        took = rows[edges[-1]]["time_s"] - began_s
        raise RunError(
            f"its windows end {took:.1f} s after its first step, and what counts begins with the first that ends {settle_s:.1f} s after it; more --steps or "
            "--seconds"
        )
    edge, end = rows[settled[0]], rows[settled[-1]]
    return Stretch(
        added(row["taken"] for row in rows[settled[0] + 1 : settled[-1] + 1]),
        end["time_s"] - edge["time_s"],
        end["tokens"] - edge["tokens"],
        edge["time_s"] - began_s,
        began_s - rows[0]["time_s"],
    )


def added(taken: Iterable[Mapping[str, int]]) -> Taken:
    """One `Taken` of several that follow each other: counts of things are the most that answered, all else is summed."""
    made = Taken()
    for one in taken:
        told = taken_of(one)
        for name in FIELDS:
            before, now = getattr(made, name), getattr(told, name)
            setattr(made, name, max(before, now) if name in ("nodes", "devices") else before + now)
    return made


def measured(taken: Taken) -> bool:
    """Whether any meter counted a joule: a nameplate draws the same whatever is trained."""
    return taken.device_measured_mj + taken.node_measured_mj + taken.cpu_mj > 0


def figures(folder: Path, made: Plan, *, settle_s: float, least_s: float) -> Row:
    """What a finished run's folder says, as columns of a row. RunError for a stretch that is too short, PowerError where nothing was measured."""
    from gigatrain.power import account

    found = stretch(rows_of(folder / "energy.jsonl"), rows_of(folder / "logs" / "progress.jsonl"), settle_s)
    taken = found.taken
    if not measured(taken):
        raise PowerError("no meter counted a joule of the run")
    row: Row = {"window_s": found.seconds, "settle_s": found.settle_s, "startup_s": found.startup_s}
    if found.seconds < least_s:
        return row | {"status": f"its steady window of {found.seconds:.1f} s is below the {least_s:.1f} s that its meters need: no figure"}
    speed = found.tokens / found.seconds
    metered_s = taken.ms / 1e3 / max(1, taken.nodes)  # of these joules: meters are read a moment before the report
    known = account.boundaries(taken, made.watts, metered_s)
    row |= {"status": OK, "tokens_per_s": speed, "unknown": pairs(account.unknown(taken, made.watts, metered_s))}
    words = []
    for name in BOUNDARIES:
        at = known.get(name)
        if at is None or not at.watts:
            continue
        row |= {f"watts_{name}": at.watts, f"tokens_per_joule_{name}": speed / at.watts, f"joules_per_token_{name}": at.watts / speed}
        words.append(f"{name}: {at.words}")
    return row | {
        "provenance": "; ".join(words),
        "capped_share": taken.held_down(taken.power_capped_ms),
        "thermal_share": taken.held_down(taken.thermal_ms),
        "disagreement": abs(taken.integral_mj / taken.counter_mj - 1) if taken.counter_mj else None,
        "gaps": taken.gaps,
    }


def losses(folder: Path) -> Row:
    """The last window's loss and the validation's, and how long all its steps took, from RUN/summary.json."""
    found = summary(folder)
    return {"loss": found["loss"], "val_loss": found["val_loss"], "steps_s": found["tokens"] / (found["tokens_per_s"] or math.inf)}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def pairs(found: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in found.items())


def looked(power: Power, watts: Watts, uuids: Sequence[str]) -> tuple[float, dict[str, str]]:
    """(the shortest window that the meters here allow, what they are): PowerError where none counts anything, with how that is mended."""
    from gigatrain.power import meter

    with meter.opened(power, watts, uuids, whole=True) as found:
        time.sleep(LOOK_S)
        taken = found.take()
        meters = dict(found.meters)
    if not measured(taken):
        seen = [f"{what}: {how}" for what, how in meters.items() if what not in ("looks", "notes")]
        lacking = meters.get("notes", "").replace("; no ", "\n  no ")  # one kind of meter a line
        raise PowerError(
            "no meter counts here, so there is no energy to compare. A GPU's counter needs the driver and nvidia-ml-py; a processor's RAPL read rights on "
            f'{power.sysfs}/class/powercap/intel-rapl:*/energy_uj (root); a node\'s own meter is looked for with power.node = "pm_counters", "redfish" or '
            '"dcmi". Without any, `python benchmarks/step.py` tells the speed alone, and `gigatrain plan` the watts that a site would draw. Found here:\n  '
            + "\n  ".join(filter(None, (*seen, lacking)))
        )
    return max(LEAST_S, LEAST_UPDATES * max(found.slowest_s, power.every_s)), meters

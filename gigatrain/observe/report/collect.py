"""A run's folder as one JSON value: what `gigatrain report --json` prints, and all that the page and the pictures are made of. Free of torch.

A figure is {"value": number, "note": words} or {"value": null, "unknown": why}: what the folder does not say is never 0 and never guessed. Curves are
thinned to about 600 points, of which each stretch keeps its lowest and its highest, so that a spike of one window in 100,000 is still there.
"""

import contextlib
import datetime
import importlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gigatrain.errors import GigatrainError, PowerError
from gigatrain.observe import beside, evals, logs
from gigatrain.observe.goodput import CLASSES
from gigatrain.observe.legs import place_words
from gigatrain.observe.reader import Reader
from gigatrain.observe.report.figures import SLACK, against, finite, known
from gigatrain.observe.report.ranges import ranged
from gigatrain.observe.tail import Tail
from gigatrain.planning.watts import Watts
from gigatrain.power.reading import BIN_S, BOUNDARIES, PROVENANCES
from gigatrain.power.schedule import Schedule
from gigatrain.power.spans import MOST
from gigatrain.site import Figure

POINTS = 600  # of a curve
BINS = 40  # of the histogram of step times
ASKED = ("megawatts", "schedule", "follow", "ramp_megawatts_min", "caps")  # of watts, in plan.json
TRACE_BYTES = 64 << 20  # of the first rank's trace, its end: some 350,000 steps; of the others' a sixteenth
POWERED = ("power budget", "power schedule", "power ramp", "power follows", "power limits")  # settings of a run without any:
NONE = "none"
RANKS = 64  # whose traces are read
WITHIN_STEP = ("data", "forward", "backward", "reduce", "optimizer", "rest")  # the other phases lie between steps
JUDGED = ("accuracy", "reward_chosen", "reward_rejected")  # of runs whose objective is of pairs
PHASES = (*WITHIN_STEP[:-1], "validation", "checkpoint", "paced", "profile", "rest")
SETS, ROWS = 40, 200  # validation sets, and rows of evaluations, that are shown
LONGEST_S = 1e9  # of a phase of a step: thirty years
SAMPLES = 8  # answers that are shown
SHOWN = 4000  # characters of a failure
CHANGES = 500  # of a limit that are drawn
CARRIED_S = 1.0  # a cost of more seconds than its process has stepped was taken over from a checkpoint

Point = tuple[float, float | None]


class _Quiet(Reader):
    """A page is of what the folder holds: no scheduler is asked."""

    def _asked(self) -> None:
        return None


def collect(run: Path, *, now: Callable[[], float] = time.time) -> dict[str, Any]:
    """Everything that a report says of one run. Raises RunError where `run` is no run's folder; what is missing in it is named in `missing`."""
    reader = _Quiet(run, now)
    seen, folder = reader.seen(), reader.run
    plan, record, summary = (_object(folder / name) for name in ("plan.json", "run.json", "summary.json"))
    windows, validations = _windows(folder)
    events = [row for row in Tail(folder / "logs" / "progress.jsonl").rows()[0] if finite(row.get("time_s")) is not None]
    began_s = events[0]["time_s"] if events else None
    last = windows[-1] if windows else {}
    steps, phases = _steps(folder)
    energy, lacking = _energy(folder, summary)
    unreported = "no window was reported yet"
    mean = seen["tokens_per_s_mean"]
    mfu_per_token = seen["mfu"] / seen["tokens_per_s"] if seen["mfu"] is not None and seen["tokens_per_s"] else None
    goodput = _goodput(seen["goodput"])
    tokens = known(last.get("tokens"), unreported)
    loss = known(last.get("loss"), "the last window's was not finite" if windows else unreported)
    value = {
        "format": 1,
        "collected": _utc(now()),
        "run": {
            "folder": str(folder),
            "id": _word(record.get("id")),
            "name": _word(seen["name"]) or folder.name,
            "summary": _word(plan.get("summary")) or "",
            "site": _word(seen["site"]),
            "state": seen["state"],
            "why": _word(seen["why"]),
            "failure": (seen["failure"] or seen["hang"] or "")[:SHOWN],
            "created": _word(record.get("created")),
            "began": _utc(began_s),
            "began_s": began_s,
            "plan_sha256": _word(record.get("plan_sha256")),
            "identity": _word(record.get("identity")),
            "corpus": _word(record.get("corpus")),
            "weights_sha256": _word(summary.get("weights_sha256")),
            "device": _word(plan.get("device")),
            "ranks": finite(plan.get("ranks")),
            "step": finite(seen["step"]),
            "steps": finite(seen["steps"]),
        },
        "empty": not any(folder.iterdir()),
        "missing": _missing(folder),
        "headline": {
            "loss": loss,
            "val_loss": known(seen["val_loss"], "no validation was run"),
            "tokens": tokens,
            "tokens_per_s": known(mean, unreported, "in the mean of its steps"),
            "mfu": known(mean * mfu_per_token if mean and mfu_per_token else None, seen["mfu_why"] or unreported, "of dense bf16"),
            "goodput": known(goodput.get("share"), goodput.get("unknown", "")),
            "wall_s": known(goodput.get("wall_s"), goodput.get("unknown", "")),
            **_headline(energy, lacking),
        },
        "curves": {
            "loss": thinned([(row["step"], finite(row.get("loss"))) for row in windows]),
            "val_loss": thinned([(row["step"], finite(row.get("val_loss"))) for row in validations]),
            "tokens_per_s": thinned([(row["step"], finite(row.get("tokens_per_s"))) for row in windows]),
            "grad_norm": thinned([(row["step"], finite(row.get("grad_norm"))) for row in windows]),
            **{name: thinned([(row["step"], finite(row[name])) for row in windows if name in row]) for name in JUDGED},
            **{
                f"val_{name}": thinned([(row["step"], finite(row[f"val_{name}"])) for row in validations if f"val_{name}" in row])
                for name in JUDGED
            },
        },
        "sets": _sets(validations),
        "evals": _evals(folder),
        "mfu_per_token_per_s": mfu_per_token,
        "refused_steps": finite(seen["bad_steps"]),
        "step_s": steps,
        "phases": phases,
        "goodput": goodput,
        "restarts": [
            {"time": _utc(one["time_s"]), "time_s": finite(one["time_s"]), "step": finite(one["step"]), "attempt": one["attempt"]}
            | {"why": _word(one["why"]) or "unknown"}
            for one in seen["restarts"]
        ],
        "legs": _legs(seen["legs"], energy, lacking),
        "memory": _memory(plan, summary),
        "energy": {name: said for name, said in energy.items() if name != "windows"},  # they are in `watts`, thinned
        "samples": _samples(folder),
        "budget": _budget(folder, plan, energy, began_s),
        "summary_differs": _differs(energy, summary),
        "watts": _watts(energy, began_s),
        "settings": _settings(plan),
        "versions": {str(name): _word(said) or "unknown" for name, said in versions.items()}
        if isinstance(versions := summary.get("versions"), dict)
        else {},
    }
    value["plan"] = _compared(value, plan, summary)
    expected = beside.expected_of(plan)
    value["plan"] |= {"drifts": [], "expects": False}
    if expected is not None and beside.judges(expected):
        value["plan"] |= ranged(expected, value, folder, windows, events, seen, plan, summary)
    planned = value["plan"]["watts"]
    rate = mean  # of a plan that expects no speed: as if every watt had been as planned, at the measured one
    if expected is not None and expected.tokens_per_s is not None and expected.goodput is not None:
        rate = expected.tokens_per_s.mid * expected.goodput.mid
    for boundary in BOUNDARIES:
        watts = planned[boundary]["value"]
        value["watts"]["planned"][boundary] = watts
        value["watts"]["planned_tokens_per_s_mw"][boundary] = rate / watts * 1e6 if rate and watts else None
    return _clean(value)


def _samples(folder: Path) -> list[dict[str, str]]:
    """Prompts of held-out conversations, what was held out and what the model wrote."""
    rows = Tail(folder / "samples.jsonl").rows()[0][:SAMPLES]
    names = ("prompt", "held_out", "written")
    return [{name: row[name][-SHOWN:] for name in names} for row in rows if all(isinstance(row.get(name), str) for name in names)]


def thinned(points: Sequence[Point], limit: int = POINTS) -> list[list[float | None]]:
    """At most about `limit` of the points: each stretch's lowest and highest in their order, the first and the last; a None parts a curve."""
    if len(points) <= limit:
        return [list(point) for point in points]
    return [list(points[at]) for at in _kept([y for _, y in points], limit)]


def _kept(heights: Sequence[float | None], limit: int) -> list[int]:
    """Which to keep, of so many heights: in each stretch the lowest, the highest, and one that has none."""
    buckets = max(1, limit // 2 - 1)
    kept = {0, len(heights) - 1}
    for number in range(buckets):
        stretch = range(number * len(heights) // buckets, (number + 1) * len(heights) // buckets)
        values = [(height, at) for at in stretch if (height := heights[at]) is not None]
        if values:
            kept |= {min(values)[1], max(values)[1]}
        if len(values) < len(stretch):
            kept.add(next(at for at in stretch if heights[at] is None))
    return sorted(kept)


def _windows(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Windows and validations by step; of a step that is there twice, the later one."""
    windows: dict[float, dict[str, Any]] = {}
    validations: dict[float, dict[str, Any]] = {}
    for row in Tail(folder / "metrics.jsonl").rows()[0]:
        if (step := finite(row.get("step"))) is not None:
            if "val_loss" in row:
                validations[step] = row
            elif "tokens" in row:
                windows[step] = row
    return [windows[step] for step in sorted(windows)], [validations[step] for step in sorted(validations)]


def _sets(validations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each validation set at the last validation, with the curve of its loss; nothing of a run that has but one."""
    said = validations[-1].get("val_sets") if validations else None
    found = []
    for name, last in list(said.items())[:SETS] if isinstance(said, Mapping) else ():
        if isinstance(last, Mapping):
            rows = [
                (row["step"], finite(one.get("loss")))
                for row in validations
                if isinstance(sets := row.get("val_sets"), Mapping) and isinstance(one := sets.get(name), Mapping)
            ]
            figures = {key: finite(last.get(key)) for key in ("loss", "perplexity", "bits_per_byte", "targets")}
            found.append({"name": _word(name), "step": finite(validations[-1]["step"]), **figures, "curve": thinned(rows)})
    return found


def _evals(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What `gigatrain eval` found of this run: the newest of each task and of each text."""
    tasks = [
        {
            "task": _word(task),
            "metric": _word(name),
            "value": finite(one.get("value")),
            "stderr": finite(one.get("stderr")),
            **{key: finite(row.get(key)) for key in ("few_shot", "samples", "limit", "step")},
        }
        for task, row in evals.latest(folder).items()
        for name, one in row["metrics"].items()
    ]
    texts = [
        {"text": _word(row["text"])}
        | {key: finite(row.get(key)) for key in ("bits_per_byte", "loss", "bytes", "tokens", "context", "step")}
        for row in evals.texts(folder)
    ]
    return {"tasks": tasks[:ROWS], "texts": texts[:ROWS]}


def _traced(path: Path, most: int) -> Iterator[tuple[dict[str, float], bool]]:
    """Phases of each whole step in the last `most` bytes of a rank's trace, and whether it was profiled."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - most))
        if size > most:
            file.readline()  # the rest of a line
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(said := row.get("phases"), dict):
                    found = {
                        name: number for name, spent in said.items() if (number := finite(spent)) is not None and 0 <= number < LONGEST_S
                    }
                    if found:
                        yield found, bool(row.get("profiled"))


def _steps(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _goodput(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every second of wall-clock in one of CLASSES."""
    if found is None or found["share"] is None:
        return {"unknown": "logs/progress.jsonl has no events, or no time between them"}
    said = (found["wall_s"], found["share"], *found["seconds"].values())
    if any(finite(one) is None or one < 0 for one in said):
        return {"unknown": "logs/progress.jsonl has times that are no numbers, or below 0"}
    seconds = {name: found["seconds"][name] for name in CLASSES}
    rounding_s = max(1e-3 * (len(seconds) + 1), 1e-9 * found["wall_s"])  # each was rounded to a millisecond
    assert abs(sum(seconds.values()) - found["wall_s"]) <= rounding_s, "the classes do not add up to wall-clock"
    return {"wall_s": found["wall_s"], "share": found["share"], "seconds": seconds}


def _energy(folder: Path, summary: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """power/account.py's account; or nothing, and why."""
    try:
        if (folder / "energy.jsonl").is_file():
            return importlib.import_module("gigatrain.power.account").account(folder), ""
    except GigatrainError as failure:
        return {}, str(failure)
    if isinstance(kept := summary.get("energy"), dict):
        return kept | {"windows": []}, ""
    return {}, "the run recorded no energy: it has no energy.jsonl"


def _of(energy: Mapping[str, Any], name: str, boundary: str) -> Any:
    found = energy.get(name)
    return found.get(boundary) if isinstance(found, Mapping) else None


def _headline(energy: Mapping[str, Any], lacking: str) -> dict[str, Any]:
    """What the run's energy comes to: at the boundary that the account chose, money and carbon at the facility."""
    chosen = energy.get("headline")
    chosen = chosen if isinstance(chosen, Mapping) else {}
    boundary = chosen.get("boundary")
    why = lacking or _word(chosen.get("why")) or "no boundary's joules are known"
    speed = known(chosen.get("tokens_per_s_mw"), why)
    if boundary in BOUNDARIES and speed["value"] is not None:
        speed |= {
            "boundary": boundary,
            "low": finite(chosen.get("low")),
            "high": finite(chosen.get("high")),
            "why": _word(chosen.get("why")),
        }
        speed["provenance"] = _shares(_of(energy, "provenance", boundary))
    widest = next((name for name in reversed(BOUNDARIES) if finite(_of(energy, "joules", name)) is not None), None)
    joules = finite(_of(energy, "joules", widest)) if widest else None
    spent = known(None if joules is None else joules / 3.6e9, why)
    if widest and spent["value"] is not None:
        spent |= {"boundary": widest, "provenance": _shares(_of(energy, "provenance", widest))}
    found = {"tokens_per_s_mw": speed, "mwh": spent}
    for name in ("eur", "kg_co2e"):
        found[name] = known(energy.get(name), lacking or _unknown(energy, name) or _uncounted(energy, name))
    return found


def _legs(legs: Sequence[Mapping[str, Any]], energy: Mapping[str, Any], lacking: str) -> list[dict[str, Any]]:
    """Each stretch under one plan, with figures; joules are by its own site, and tokens/s/MW are its own tokens over them."""
    told, found = energy.get("legs"), []
    drawn = told if isinstance(told, list) and len(told) == len(legs) else [None] * len(legs)
    for leg, power in zip(legs, drawn, strict=True):
        whole = _goodput(leg["goodput"])
        name = power.get("boundary") if isinstance(power, Mapping) else None
        name, unknown = name if name in BOUNDARIES else None, _of(power or {}, "unknown", "node") or _of(power or {}, "unknown", "device")
        why = f"not measured: {lacking or _word(unknown) or 'no boundary of it is known'}"
        joules = finite(_of(power or {}, "joules", name)) if name is not None else None
        tokens = finite(leg["tokens"])
        found.append(
            {key: _word(leg[key]) for key in ("site", "device", "engine", "precision", "states", "began")}
            | {"number": leg["number"], "ranks": finite(leg["ranks"]), "mesh": leg["mesh"], "place": _word(place_words(leg))}
            | {"changed": [_word(text) for text in leg["changed"]], "processes": leg["processes"], "stood_s": finite(leg["stood_s"])}
            | {"step": finite(leg["step"]), "until": finite(leg["until"]), "tokens": known(tokens, "no report of it")}
            | {
                "tokens_per_s": known(finite(leg["tokens_per_s"]), "no window of it was reported"),
                "goodput": known(whole.get("share"), whole.get("unknown", "")),
                "wall_s": known(whole.get("wall_s"), whole.get("unknown", "")),
                "watts": known(finite(_of(power or {}, "watts", name)) if name is not None else None, why),
                "kwh": known(None if joules is None else joules / 3.6e6, why),
                "tokens_per_s_mw": known(tokens / joules * 1e6 if tokens is not None and joules else None, why),
                "eur": known(finite(power.get("eur")) if isinstance(power, Mapping) else None, "no price, or no joules at its facility"),
                "kg_co2e": known(
                    finite(power.get("kg_co2e")) if isinstance(power, Mapping) else None, "no carbon, or no joules at its facility"
                ),
                "boundary": name,
                "provenance": _shares(power.get("provenance")) if isinstance(power, Mapping) else {},
            }
        )
    return found


def _uncounted(energy: Mapping[str, Any], name: str) -> str:
    """Which of the two that make up a cost is not known."""
    what, key = ("price", "price_eur_mwh") if name == "eur" else ("carbon of a kWh", "carbon_g_kwh")
    given = energy.get("sources")
    there = any(isinstance(one, Mapping) and one.get("what") == key for one in given) if isinstance(given, list) else False
    why = [] if there else [f"the {what} is unknown: neither the site nor a schedule has {key}"]
    if finite(_of(energy, "joules", "facility")) is None:
        why.append(f"the facility's energy is unknown: {_unknown(energy, 'facility') or 'no reason given'}")
    return "; ".join(why) or "not recorded"


def _differs(energy: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Where summary.json has another figure than the files beside it give now: one account of one run's files has one figure, so another version wrote it."""
    kept = summary.get("energy")
    then, now = (
        finite(one.get("tokens_per_s_mw")) if isinstance(found, Mapping) and isinstance(one := found.get("headline"), Mapping) else None
        for found in (kept, energy)
    )
    if then is None or now is None or abs(then - now) <= 1e-9 * abs(now):
        return ""
    return (
        f"summary.json says {then:,.0f} tokens/s/MW, and this version's account of the same files {now:,.0f}: the run was finished by another version, "
        "or its files were changed since"
    )


def _unknown(energy: Mapping[str, Any], name: str) -> str:
    said = energy.get("unknown")
    return (_word(said.get(name)) or "") if isinstance(said, Mapping) else ""


def _shares(said: Any) -> dict[str, float]:
    """The provenance of a number, by kind."""
    if not isinstance(said, Mapping):
        return {}
    return {kind: share for kind in PROVENANCES if (share := finite(said.get(kind))) is not None and share > 0}


def _watts(energy: Mapping[str, Any], began_s: float | None) -> dict[str, Any]:
    """Watts and tokens/s/MW of each boundary over the seconds since the run began; a None parts what no reading joins."""
    rows = [row for row in energy.get("windows") or () if isinstance(row, Mapping) and finite(row.get("time_s")) is not None]
    rows = [row for row in rows if (finite(row.get("seconds")) or 0) > 0]
    zero = began_s if began_s is not None else rows[0]["time_s"] - rows[0]["seconds"] if rows else 0.0
    series: list[Mapping[str, Any] | None] = []
    gaps, end = 0, None
    for row in rows:
        start = row["time_s"] - row["seconds"]
        if end is not None and start - end > 1.0 + 0.02 * row["seconds"]:
            series.append(None)
            gaps += 1
        end = row["time_s"]
        series.append(row)
    widest = next(
        (name for name in reversed(BOUNDARIES) if any(row and finite(_of(row, "watts", name)) is not None for row in series)), None
    )
    stepped = len(series) <= POINTS // 2
    if not stepped and widest:  # the extremes of both pictures
        heights = [[finite(_of(row, name, widest)) if row else None for row in series] for name in ("watts", "tokens_per_s_mw")]
        series = [series[at] for at in sorted({at for one in heights for at in _kept(one, POINTS // 2)})]
    found: dict[str, Any] = {"t_s": [], "watts": {name: [] for name in BOUNDARIES}, "tokens_per_s_mw": {name: [] for name in BOUNDARIES}}
    for row in series:
        for at in () if row is None else (row["time_s"] - row["seconds"], row["time_s"]) if stepped else (row["time_s"],):
            found["t_s"].append(at - zero)
            for name in BOUNDARIES:
                found["watts"][name].append(finite(_of(row or {}, "watts", name)))
                found["tokens_per_s_mw"][name].append(finite(_of(row or {}, "tokens_per_s_mw", name)))
        if row is None and found["t_s"]:
            found["t_s"].append(None)
            for name in BOUNDARIES:
                found["watts"][name].append(None)
                found["tokens_per_s_mw"][name].append(None)
    return found | {"windows": len(rows), "gaps": gaps, "planned": {}, "planned_tokens_per_s_mw": {}}


# ---- What was asked of its watts, and what keeping to it took ----


def _budget(folder: Path, plan: Mapping[str, Any], energy: Mapping[str, Any], began_s: float | None) -> dict[str, Any]:
    """The limit, the highest ten-second mean of the facility against it, and what was spent; empty where nothing was asked for.

    A ten-second bin counts if every node has closed it, times facility over node of the whole run. A bin in which the limit changed is held to the laxer one.
    """
    power = plan.get("power")
    asked = {name: power.get(name) for name in ASKED if power.get(name)} if isinstance(power, Mapping) else {}
    rows = [row for row in Tail(folder / "energy.jsonl").rows()[0] if finite(row.get("time_s")) is not None]
    if not asked and not any(isinstance(row.get("orders"), dict) and row["orders"] for row in rows):
        return {}
    megawatts, path, unread = finite(asked.get("megawatts")), asked.get("schedule"), ""
    schedule = None
    if isinstance(path, str):
        try:
            schedule = Schedule.read(path)
        except (PowerError, OSError, ValueError) as failure:
            unread = f"its schedule cannot be read any more: {failure}"

    def limit(at_s: float) -> float | None:
        by_time = finite(schedule.at(at_s).megawatts) if schedule is not None else None
        return min((one * 1e6 for one in (megawatts, by_time) if one is not None), default=None)

    bins = _bins(rows, finite(energy.get("nodes")))
    node, facility = (finite(_of(energy, "joules", name)) for name in ("node", "facility"))
    ratio = facility / node if facility is not None and node else None
    drawn: list[tuple[float, float, float | None]] = []
    for number, node_mj in bins.items() if ratio is not None else ():
        first, last = limit(number * BIN_S), limit((number + 1) * BIN_S - 1e-3)
        laxer = None if first is None or last is None else max(first, last)
        drawn.append((node_mj / 1e3 / BIN_S * (ratio or 0.0), float(number * BIN_S), laxer))
    held = [one for one in drawn if one[2] is not None]
    top = max(held, key=lambda one: one[0] / one[2] if one[2] else math.inf, default=None) or max(
        drawn, key=lambda one: one[0], default=None
    )
    why = (
        "no ten seconds were closed by all nodes" if ratio is not None else _unknown(energy, "facility") or "the facility's draw is unknown"
    )
    ordered = [row for row in rows if isinstance(row.get("orders"), dict)]
    said = [(row, text) for row in ordered if (text := _word(row["orders"].get("why")))]
    begin, end = (rows[0]["time_s"], rows[-1]["time_s"]) if rows else (0.0, 0.0)
    zero = began_s if began_s is not None else begin
    above = [one for one in held if one[2] is not None and one[0] > one[2] * (1 + SLACK)]
    return {
        "asked": {name: _word(one) if isinstance(one, str) else one for name, one in asked.items()},
        "unread": unread,
        "limit": [[at_s - zero, watts] for at_s, watts in _changing(limit, schedule, begin, end)],
        "highest": known(top[0] if top else None, why) | ({"time": _utc(top[1]), "limit_watts": top[2]} if top else {}),
        "bins": len(drawn),
        "bins_held": len(held),
        "bins_above": len(above),
        "above_s": len(above) * BIN_S,
        "cost": _spent(rows),
        "why": said[-1][1] if said else "",
        "since": _utc(said[-1][0]["time_s"]) if said else None,
        "over": bool(said) and said[-1][0] is not ordered[-1],  # the last order of all is to do nothing
    }


def _bins(rows: Sequence[Mapping[str, Any]], nodes: float | None) -> dict[int, float]:
    """Node millijoules by number, of those that all nodes have closed."""
    found: dict[int, tuple[int, int]] = {}
    for row in rows:
        given = row.get("bins")
        for one in given if isinstance(given, list) else ():
            if isinstance(one, list) and len(one) == 4 and all(type(word) is int and 0 <= word < MOST for word in one):
                found[one[0]] = (one[1], one[3])
    most = nodes or max((count for count, _ in found.values()), default=0)
    return {number: float(joules) for number, (count, joules) in sorted(found.items()) if count >= most}


def _changing(
    limit: Callable[[float], float | None], schedule: Schedule | None, begin: float, end: float
) -> Iterator[tuple[float, float | None]]:
    """The limit by time, each level with both its ends."""
    at_s = begin
    for _ in range(CHANGES):
        until = schedule.at(at_s).until_s if schedule is not None else None
        next_s = end if until is None or until <= at_s else min(end, until)
        level = limit(at_s)
        yield at_s, level
        yield next_s, level
        if next_s >= end:
            return
        at_s = next_s


def _spent(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What keeping to it took, over all processes: each one's last word, less what it took over from the checkpoint that it went on from."""
    sessions: dict[Any, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    steps: dict[Any, float] = {}
    for row in rows:
        process, orders = str(row.get("process")), row.get("orders")
        if row.get("event") == "steps" or process not in steps:
            steps[process] = row["time_s"]
        cost = orders.get("cost") if isinstance(orders, Mapping) else None
        if isinstance(cost, Mapping):
            sessions.setdefault(process, []).append((row, cost))
    total: dict[str, float | None] = {}
    earlier: list[dict[str, float | None]] = []
    for process, said in sessions.items():
        costs = [_flat(cost) for _, cost in said]
        begun = (costs[0].get("seconds") or 0.0) - max(0.0, said[0][0]["time_s"] - steps[process])
        before: dict[str, float | None] = {}
        if begun > CARRIED_S and earlier:
            before = min(earlier, key=lambda one: abs((one.get("seconds") or 0.0) - begun))
        for name, now in costs[-1].items():
            if name == "over_budget_watts":
                total[name] = max((one for one in (total.get(name), now) if one is not None), default=None)
            elif name not in total or total[name] is not None:
                total[name] = None if now is None else (total.get(name) or 0.0) + now - (before.get(name) or 0.0)
        earlier += costs
    return total


def _flat(cost: Mapping[str, Any]) -> dict[str, float | None]:
    """Its numbers by name, money and carbon as `eur_saved` and alike; None: unknown."""
    found = {
        name: finite(cost.get(name))
        for name in ("seconds", "waited_s", "paused_s", "tokens_not_trained", "over_budget_s", "over_budget_watts")
    }
    for name in ("eur", "kg_co2e"):
        found |= {f"{name}_{what}": finite(_of(cost, name, what)) for what in ("not_drawn", "to_catch_up", "saved")}
    return found


def _memory(plan: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of one rank: the plan's parts, and the most that was in use where the run says so."""
    said = plan.get("memory")
    parts = {name: size for name, given in said.items() if (size := finite(given)) is not None} if isinstance(said, Mapping) else {}
    return {
        "parts_bytes": parts,
        "planned_bytes": known(sum(parts.values()) if parts else None, "plan.json has no memory"),
        "peak_bytes": known(summary.get("peak_bytes"), "not recorded"),
    }


def planned_watts(watts: Watts) -> dict[str, dict[str, Any]]:
    """What the plan's figures let expect at each boundary, of the whole run; where they do not, why."""
    count, nodes = watts.accelerators, watts.accelerators / watts.per_node if watts.per_node else None
    if not count:
        return {name: known(None, "not planned: the site's figures name no accelerator") for name in BOUNDARIES}

    def lacking(*names: str) -> str:
        return f"not planned: {', '.join(name for name in names if not getattr(watts, name).known)} of {watts.site or 'the site'} unknown"

    def says(*figures: Figure) -> str:
        return "; ".join(dict.fromkeys(f"{figure.basis}: {figure.source}" for figure in figures if figure.known))

    found = {"device": known(_product(count, watts.device_watts.value), lacking("device_watts"), f"at most; {says(watts.device_watts)}")}
    node = _product(nodes, watts.node_watts.value)
    found["node"] = known(node, lacking("node_watts") if nodes else "not planned: accelerators of a node unknown", says(watts.node_watts))
    fabric, storage = _product(count, watts.fabric_watts.value), _product(count, watts.storage_watts.value)
    if storage is None and node is not None and fabric is not None:
        storage = _product(node + fabric, watts.storage_share.value)
    parts = (watts.node_watts, watts.fabric_watts, watts.storage_watts, watts.storage_share)
    whole = None if node is None or fabric is None or storage is None else node + fabric + storage
    found["it"] = known(whole, lacking("node_watts", "fabric_watts", "storage_watts"), says(*parts))
    facility = _product(nodes, watts.facility_watts.value)
    if facility is not None:
        found["facility"] = known(facility, note=says(watts.facility_watts))
    else:
        found["facility"] = known(_product(whole, watts.pue.value), lacking("node_watts", "fabric_watts", "pue"), says(*parts, watts.pue))
    return found


def _product(count: float | None, each: float | None) -> float | None:
    return None if count is None or each is None else count * each


def _compared(value: Mapping[str, Any], plan: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The plan beside what came of it; `drifted` where they are more than DRIFT apart and nothing else explains it."""
    headline, energy, done = value["headline"], value["energy"], value["run"]["state"] == "finished"
    try:
        watts = planned_watts(Watts.model_validate(plan["watts"])) if "watts" in plan else None
    except ValidationError:
        watts = None
    watts = watts or {name: known(None, "not planned: plan.json has no watts that this version reads") for name in BOUNDARIES}
    rows = [
        against(
            "steps", "steps", known(plan.get("steps"), "plan.json has none"), known(value["run"]["step"], "no window yet"), open=not done
        ),
        against("tokens", "tokens", known(plan.get("tokens"), "plan.json has none"), headline["tokens"], open=not done),
        against("tokens/s", "tokens/s", known(None, "not planned: a plan has no speed"), headline["tokens_per_s"]),
    ]
    for name in BOUNDARIES:
        mean = known(_of(energy, "watts", name), _unknown(energy, name) or headline["mwh"].get("unknown", "") or "unknown")
        if watts[name]["value"] is not None or mean["value"] is not None or name == "facility":
            rows.append(against(f"mean draw, {name if name != 'it' else 'IT'}", "W", watts[name], mean, most=name == "device"))
    budget = value["budget"]
    levels = [watts for _, watts in budget.get("limit", ()) if watts is not None] or [
        one * 1e6 for one in [finite(budget.get("asked", {}).get("megawatts"))] if one is not None
    ]
    if levels:
        highest = budget["highest"]
        held = finite(highest.get("limit_watts"))
        rows.append(
            against("budget, facility", "W", known(min(levels) if held is None else held), highest, most=True)
            | {"note": "in its highest ten seconds", "noun": "allowed"}
        )
    memory = value["memory"]
    rows.append(against("memory of a rank", "bytes", memory["planned_bytes"], memory["peak_bytes"]))
    return {"rows": rows, "watts": watts}


def _settings(plan: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's main settings, as the plan has them."""
    found: dict[str, str] = {}

    def add(name: str, *path: str, say: str = "{}") -> None:
        at: Any = plan
        for key in path:
            at = at.get(key) if isinstance(at, Mapping) else None
        if at is not None and not isinstance(at, (Mapping, list)):
            number = finite(at)
            found[name] = say.format(f"{number:,}" if isinstance(number, int) else f"{number:g}" if number is not None else _word(at))

    add("model", "architecture", "family")
    add("parameters", "parameters")
    add("layers", "architecture", "layers")
    add("hidden", "architecture", "hidden")
    add("vocabulary", "architecture", "vocab")
    add("sequence", "sequence", say="{} tokens")
    add("batch", "batch", say="{} samples")
    add("microbatch", "microbatch")
    add("accumulation", "accumulation")
    add("steps", "steps")
    add("precision", "precision")
    add("optimizer", "optim", "name")
    add("peak learning rate", "optim", "lr")
    add("weight decay", "optim", "weight_decay")
    add("schedule", "schedule", "kind")
    add("warm-up", "schedule", "warmup")
    add("engine", "engine", "name")
    mesh = plan.get("mesh")
    axes = ("replicate", "shard", "expert", "context", "tensor", "pipeline")
    sizes = {axis: size for axis in axes if (size := finite(mesh.get(axis))) is not None and size > 1} if isinstance(mesh, Mapping) else {}
    if isinstance(mesh, Mapping):
        found["mesh"] = " x ".join(f"{axis} {size:,}" for axis, size in sizes.items()) or "one rank"
    add("recompute", "recompute")
    add("compile", "compile")
    kernels = plan.get("kernels")
    if isinstance(kernels, list):
        chosen = [one for one in kernels if isinstance(one, Mapping) and one.get("kernel") != "reference"]
        found["kernels"] = ", ".join(f"{_word(one.get('op'))} {_word(one.get('kernel'))}" for one in chosen) or "all reference"
    add("checkpoint every", "checkpoint", "every", say="{} steps")
    add("validation every", "validation", "every", say="{} steps")
    add("seed", "seed")
    power = plan.get("power")
    if isinstance(power, Mapping):
        found |= dict.fromkeys(POWERED, NONE)
        add("power budget", "power", "megawatts", say="{} MW")
        add("power schedule", "power", "schedule")
        add("power ramp", "power", "ramp_megawatts_min", say="{} MW a minute")
        if power.get("follow"):
            above, slow = finite(power.get("slow_above")), finite(power.get("slow_to"))
            said = ("unknown" if above is None else f"{above:g}", "unknown" if slow is None else f"{slow * 100:g} %")
            found["power follows"] = f"{_word(power['follow'])}: above {said[0]} down to {said[1]}"
        if power.get("caps") is True:
            found["power limits"] = "may be set"
    return found


def compare(values: Sequence[dict[str, Any]]) -> None:
    """Fill in the loss of each run at the last number of tokens that all of them report one at: runs of other lengths have other last losses."""
    losses = [
        {
            tokens: loss
            for row in _windows(Path(value["run"]["folder"]))[0]
            if (tokens := finite(row.get("tokens"))) is not None and (loss := finite(row.get("loss"))) is not None
        }
        for value in values
    ]
    common = max(set.intersection(*(set(one) for one in losses)), default=None) if losses else None
    for value, found in zip(values, losses, strict=True):
        value["headline"]["loss_common"] = known(None if common is None else found[common], "no report of all runs at as many tokens")
        value["headline"]["loss_common"]["tokens"] = common


def _missing(folder: Path) -> list[str]:
    """What a whole run has and this one lacks."""
    told = {
        "plan.json": "no plan, so nothing to compare with",
        "metrics.jsonl": "no losses and speeds",
        "logs/progress.jsonl": "no clock, so no goodput and no restarts",
        "trace": "no phases and percentiles of steps",
        "energy.jsonl": "no energy was recorded: the run is older than the meter, or power.measure was off",
        "summary.json": "not finished, so no versions and no final sums",
    }
    return [f"{name}: {why}" for name, why in told.items() if not (folder / name).exists()]


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of the folder, or an empty one where there is none, or half of one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
            return found
    return {}


def _word(value: Any) -> str | None:
    """A text that a file gave, without what moves a cursor, and no longer than is read."""
    return None if value is None else logs.printable(str(value))[:SHOWN]


def _utc(time_s: Any) -> str | None:
    with contextlib.suppress(OverflowError, ValueError, OSError, TypeError):
        return datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat(timespec="seconds")
    return None


def _clean(value: Any) -> Any:
    """The same without infinities, which JSON has no word for, and without halves of characters, which UTF-8 has none for."""
    if isinstance(value, Mapping):
        return {_clean(str(key)): _clean(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(one) for one in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return finite(value) if isinstance(value, float) else value


def letters(count: int) -> list[str]:
    """Names of runs that stand side by side: A, B, ..., Z, A2, ..."""
    return [chr(65 + at % 26) + (str(at // 26 + 1) if at >= 26 else "") for at in range(count)]


def names(values: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of runs, each with its letter."""
    found = [str(value["run"]["name"]) for value in values]
    return [f"{letter} {name}" for letter, name in zip(letters(len(found)), found, strict=True)]

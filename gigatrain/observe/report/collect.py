"""A run's folder as one JSON value: what `gigatrain report --json` prints, and all that the page and the pictures are made of. Free of torch.

A figure is {"value": number, "note": words} or {"value": null, "unknown": why}: what the folder does not say is never 0 and never guessed. Curves are
thinned to about 600 points, of which each stretch keeps its lowest and its highest, so that a spike of one window in 100,000 is still there.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gigatrain.observe import beside, evals
from gigatrain.observe.goodput import CLASSES
from gigatrain.observe.legs import place_words
from gigatrain.observe.reader import Reader
from gigatrain.observe.report.drawn import account, at_boundary, budget_of, differs, headline_of, shares, watts_over_time, why_not
from gigatrain.observe.report.figures import SHOWN, against, finite, known, utc, word
from gigatrain.observe.report.ranges import ranged
from gigatrain.observe.report.steps import steps_of
from gigatrain.observe.report.thinning import thinned
from gigatrain.observe.tail import Tail
from gigatrain.planning.watts import Watts
from gigatrain.power.reading import BOUNDARIES
from gigatrain.power.spans import one_object
from gigatrain.site import Figure

POWERED = ("power budget", "power schedule", "power ramp", "power follows", "power limits")  # settings of a run without any:
NONE = "none"
JUDGED = ("accuracy", "reward_chosen", "reward_rejected")  # of runs whose objective is of pairs
SETS, ROWS = 40, 200  # validation sets, and rows of evaluations, that are shown
SAMPLES = 8  # answers that are shown


class _Quiet(Reader):
    """A page is of what the folder holds: no scheduler is asked."""

    def _asked(self) -> None:
        return None


def collect(run: Path, *, now: Callable[[], float] = time.time) -> dict[str, Any]:
    """Everything that a report says of one run. Raises RunError where `run` is no run's folder; what is missing in it is named in `missing`."""
    reader = _Quiet(run, now)
    seen, folder = reader.seen(), reader.run
    plan, record, summary = (one_object(folder / name) for name in ("plan.json", "run.json", "summary.json"))
    windows, validations = _windows(folder)
    events = [row for row in Tail(folder / "logs" / "progress.jsonl").rows()[0] if finite(row.get("time_s")) is not None]
    began_s = events[0]["time_s"] if events else None
    steps, phases = steps_of(folder)
    energy, lacking = account(folder, summary)
    mfu_per_token = seen["mfu"] / seen["tokens_per_s"] if seen["mfu"] is not None and seen["tokens_per_s"] else None
    goodput, versions = _goodput(seen["goodput"]), summary.get("versions")
    value = {
        "format": 1,
        "collected": utc(now()),
        "run": _identity(folder, seen, plan, record, summary, began_s),
        "empty": not any(folder.iterdir()),
        "missing": _missing(folder),
        "headline": _headline(seen, windows, goodput, mfu_per_token) | headline_of(energy, lacking),
        "curves": _curves(windows, validations),
        "sets": _sets(validations),
        "evals": _evals(folder),
        "mfu_per_token_per_s": mfu_per_token,
        "refused_steps": finite(seen["bad_steps"]),
        "step_s": steps,
        "phases": phases,
        "goodput": goodput,
        "restarts": [
            {"time": utc(one["time_s"]), "time_s": finite(one["time_s"]), "step": finite(one["step"]), "attempt": one["attempt"]}
            | {"why": word(one["why"]) or "unknown"}
            for one in seen["restarts"]
        ],
        "legs": _legs(seen["legs"], energy, lacking),
        "memory": _memory(plan, summary),
        "energy": {name: said for name, said in energy.items() if name != "windows"},  # they are in `watts`, thinned
        "samples": _samples(folder),
        "budget": budget_of(folder, plan, energy, began_s),
        "summary_differs": differs(energy, summary),
        "watts": watts_over_time(energy, began_s),
        "settings": _settings(plan),
        "versions": {str(name): word(said) or "unknown" for name, said in versions.items()} if isinstance(versions, dict) else {},
    }
    value["plan"] = _compared(value, plan, summary)
    expected = beside.expected_of(plan)
    value["plan"] |= {"drifts": [], "expects": False}
    if expected is not None and beside.judges(expected):
        value["plan"] |= ranged(expected, value, folder, windows, events, seen, plan, summary)
    planned = value["plan"]["watts"]
    rate = seen["tokens_per_s_mean"]  # of a plan that expects no speed: as if every watt had been as planned, at the measured one
    if expected is not None and expected.tokens_per_s is not None and expected.goodput is not None:
        rate = expected.tokens_per_s.mid * expected.goodput.mid
    for boundary in BOUNDARIES:
        watts = planned[boundary]["value"]
        value["watts"]["planned"][boundary] = watts
        value["watts"]["planned_tokens_per_s_mw"][boundary] = rate / watts * 1e6 if rate and watts else None
    return _clean(value)


def _identity(
    folder: Path,
    seen: Mapping[str, Any],
    plan: Mapping[str, Any],
    record: Mapping[str, Any],
    summary: Mapping[str, Any],
    began_s: float | None,
) -> dict[str, Any]:
    """What the run is, and how it stands."""
    return {
        "folder": str(folder),
        "id": word(record.get("id")),
        "name": word(seen["name"]) or folder.name,
        "summary": word(plan.get("summary")) or "",
        "site": word(seen["site"]),
        "state": seen["state"],
        "why": word(seen["why"]),
        "failure": (seen["failure"] or seen["hang"] or "")[:SHOWN],
        "created": word(record.get("created")),
        "began": utc(began_s),
        "began_s": began_s,
        "plan_sha256": word(record.get("plan_sha256")),
        "identity": word(record.get("identity")),
        "corpus": word(record.get("corpus")),
        "weights_sha256": word(summary.get("weights_sha256")),
        "device": word(plan.get("device")),
        "ranks": finite(plan.get("ranks")),
        "step": finite(seen["step"]),
        "steps": finite(seen["steps"]),
    }


def _headline(
    seen: Mapping[str, Any], windows: Sequence[Mapping[str, Any]], goodput: Mapping[str, Any], mfu_per_token: float | None
) -> dict[str, Any]:
    """What a run is asked first; its watts are drawn.py's."""
    unreported, mean, last = "no window was reported yet", seen["tokens_per_s_mean"], windows[-1] if windows else {}
    return {
        "loss": known(last.get("loss"), "the last window's was not finite" if windows else unreported),
        "val_loss": known(seen["val_loss"], "no validation was run"),
        "tokens": known(last.get("tokens"), unreported),
        "tokens_per_s": known(mean, unreported, "in the mean of its steps"),
        "mfu": known(mean * mfu_per_token if mean and mfu_per_token else None, seen["mfu_why"] or unreported, "of dense bf16"),
        "goodput": known(goodput.get("share"), goodput.get("unknown", "")),
        "wall_s": known(goodput.get("wall_s"), goodput.get("unknown", "")),
    }


def _curves(windows: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By step, thinned."""
    return {
        "loss": thinned([(row["step"], finite(row.get("loss"))) for row in windows]),
        "val_loss": thinned([(row["step"], finite(row.get("val_loss"))) for row in validations]),
        "tokens_per_s": thinned([(row["step"], finite(row.get("tokens_per_s"))) for row in windows]),
        "grad_norm": thinned([(row["step"], finite(row.get("grad_norm"))) for row in windows]),
        **{name: thinned([(row["step"], finite(row[name])) for row in windows if name in row]) for name in JUDGED},
        **{
            f"val_{name}": thinned([(row["step"], finite(row[f"val_{name}"])) for row in validations if f"val_{name}" in row])
            for name in JUDGED
        },
    }


def _samples(folder: Path) -> list[dict[str, str]]:
    """Prompts of held-out conversations, what was held out and what the model wrote."""
    rows = Tail(folder / "samples.jsonl").rows()[0][:SAMPLES]
    names = ("prompt", "held_out", "written")
    return [{name: row[name][-SHOWN:] for name in names} for row in rows if all(isinstance(row.get(name), str) for name in names)]


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
            found.append({"name": word(name), "step": finite(validations[-1]["step"]), **figures, "curve": thinned(rows)})
    return found


def _evals(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What `gigatrain eval` found of this run: the newest of each task and of each text."""
    tasks = [
        {
            "task": word(task),
            "metric": word(name),
            "value": finite(one.get("value")),
            "stderr": finite(one.get("stderr")),
            **{key: finite(row.get(key)) for key in ("few_shot", "samples", "limit", "step")},
        }
        for task, row in evals.latest(folder).items()
        for name, one in row["metrics"].items()
    ]
    texts = [
        {"text": word(row["text"])} | {key: finite(row.get(key)) for key in ("bits_per_byte", "loss", "bytes", "tokens", "context", "step")}
        for row in evals.texts(folder)
    ]
    return {"tasks": tasks[:ROWS], "texts": texts[:ROWS]}


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


def _legs(legs: Sequence[Mapping[str, Any]], energy: Mapping[str, Any], lacking: str) -> list[dict[str, Any]]:
    """Each stretch under one plan, with figures; joules are by its own site, and tokens/s/MW are its own tokens over them."""
    told, found = energy.get("legs"), []
    drawn = told if isinstance(told, list) and len(told) == len(legs) else [None] * len(legs)
    for leg, power in zip(legs, drawn, strict=True):
        whole = _goodput(leg["goodput"])
        name = power.get("boundary") if isinstance(power, Mapping) else None
        name, unknown = (
            name if name in BOUNDARIES else None,
            at_boundary(power or {}, "unknown", "node") or at_boundary(power or {}, "unknown", "device"),
        )
        why = f"not measured: {lacking or word(unknown) or 'no boundary of it is known'}"
        joules = finite(at_boundary(power or {}, "joules", name)) if name is not None else None
        tokens = finite(leg["tokens"])
        found.append(
            {key: word(leg[key]) for key in ("site", "device", "engine", "precision", "states", "began")}
            | {"number": leg["number"], "ranks": finite(leg["ranks"]), "mesh": leg["mesh"], "place": word(place_words(leg))}
            | {"changed": [word(text) for text in leg["changed"]], "processes": leg["processes"], "stood_s": finite(leg["stood_s"])}
            | {"step": finite(leg["step"]), "until": finite(leg["until"]), "tokens": known(tokens, "no report of it")}
            | {
                "tokens_per_s": known(finite(leg["tokens_per_s"]), "no window of it was reported"),
                "goodput": known(whole.get("share"), whole.get("unknown", "")),
                "wall_s": known(whole.get("wall_s"), whole.get("unknown", "")),
                "watts": known(finite(at_boundary(power or {}, "watts", name)) if name is not None else None, why),
                "kwh": known(None if joules is None else joules / 3.6e6, why),
                "tokens_per_s_mw": known(tokens / joules * 1e6 if tokens is not None and joules else None, why),
                "eur": known(finite(power.get("eur")) if isinstance(power, Mapping) else None, "no price, or no joules at its facility"),
                "kg_co2e": known(
                    finite(power.get("kg_co2e")) if isinstance(power, Mapping) else None, "no carbon, or no joules at its facility"
                ),
                "boundary": name,
                "provenance": shares(power.get("provenance")) if isinstance(power, Mapping) else {},
            }
        )
    return found


# ---- What was asked of its watts, and what keeping to it took ----


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
        mean = known(at_boundary(energy, "watts", name), why_not(energy, name) or headline["mwh"].get("unknown", "") or "unknown")
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
            found[name] = say.format(f"{number:,}" if isinstance(number, int) else f"{number:g}" if number is not None else word(at))

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
        found["kernels"] = ", ".join(f"{word(one.get('op'))} {word(one.get('kernel'))}" for one in chosen) or "all reference"
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
            found["power follows"] = f"{word(power['follow'])}: above {said[0]} down to {said[1]}"
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

"""The page: what collect.py found, as one HTML file that needs nothing beside it and runs no script.

Every curve has a table of its numbers behind it, no two differ by colour alone, and colours come in a light and a dark set (PALETTE), whose contrast tests
hold. Every text that a file gave is escaped (words.py), and the page's own policy forbids scripts and the network even if one were not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gigatrain.observe.report import words
from gigatrain.observe.report.collect import NONE, names
from gigatrain.observe.report.comparison import comparison
from gigatrain.observe.report.curves import Axes, Curve, histogram, lines
from gigatrain.observe.report.drawn_cards import metered, powered
from gigatrain.observe.report.figures import DRIFT, SLACK, finite
from gigatrain.observe.report.palette import style
from gigatrain.observe.report.parts import (
    Shown,
    bars,
    card,
    cell,
    column,
    figure,
    head,
    lacking,
    pairs,
    scrolled,
    sentence,
    table,
    unknown,
)
from gigatrain.observe.report.words import WITHIN, escaped, exact, number, per_cent, provenance, quoted, signed, span

Value = Mapping[str, Any]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CLASSES = {
    "training": "steps that were kept",
    "redone": "steps that a restart did again",
    "data": "waited for a batch",
    "compile": "kernels made and judged, and the first step",
    "validation": "evaluation",
    "checkpoint": "saving",
    "restore": "a checkpoint read",
    "paced": "waited, to keep to a power budget",
    "starting": "from a process's begin to its first step",
    "stopped": "nobody had the run",
    "other": "what nothing else explains",
}
RANKS = 8  # whose step times are shown
LATEST = 20  # restarts, and legs, that are shown
SHOWN = 6  # changes of a leg


def page(values: Sequence[Value]) -> str:
    """The whole file, of one run or of several side by side."""
    called = names(values)
    if len(values) == 1:
        title = str(values[0]["run"]["name"])
        parts = [f"<header>{_head(values[0], 'h1', title)}</header><main>{_body(values[0], 'h2')}"]
    else:
        title = f"{len(values)} runs side by side"
        links = "".join(f"<li><a href='#run-{at}'>{escaped(name, 80)}</a></li>" for at, name in enumerate(called))
        parts = [f"<header><h1>{title}</h1><nav aria-label=Runs><ul>{links}</ul></nav></header><main>{comparison(values, called)}"]
        for at, value in enumerate(values):
            top = f"<div class=title id='run-{at}'>{_head(value, 'h2', called[at])}</div>"
            parts.append(f"<section aria-label={quoted(called[at])}>{top}{_body(value, 'h3')}</section>")
    made = f"Made by gigatrain report at {values[0]['collected']}, from the runs' own files. Unknown is said to be unknown. "
    made += "Of a curve with more points than fit, each stretch's lowest and highest are drawn."
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped(title, 120)} | gigatrain report</title>\n<style>\n{style()}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n</main>\n<footer><p>{escaped(made)}</p></footer>\n</body>\n</html>\n"
    )


# The head: what it is, what to know before anything else, and ten figures.


def _head(value: Value, tag: str, title: str) -> str:
    run = value["run"]
    tone = {"finished": "good", "running": "good", "silent": "bad", "ended": "warn"}.get(run["state"], "quiet")
    state = f"ended: {run['why']}" if run["state"] == "ended" and run["why"] else run["state"]
    ranks = f"{run['ranks']:,} rank{'s' * (run['ranks'] != 1)}" if run["ranks"] else ""
    begun = f"begun {run['began'].replace('T', ' ').replace('+00:00', ' UTC')}" if run["began"] else ""
    where = ", ".join(text for text in (f"on {run['site']}" if run["site"] else "", ranks, begun) if text)
    what = f"<p>{escaped(run['summary'])}</p>" if run["summary"] else ""
    said = f"<p class=quiet><span class='state {tone}'>{escaped(state, 200)}</span>{escaped(where)}</p>"
    alarm = ""
    if run["failure"]:
        alarm = f"<div class=alarm role=note><strong class=bad>Why it failed</strong><pre>{escaped(run['failure'], 4000)}</pre></div>"
    return f"<{tag}>{escaped(title, 200)}</{tag}>{what}{said}{alarm}<ul class=short>{''.join(f'<li>{text}</li>' for text in _short(value))}</ul>"


def _short(value: Value) -> list[str]:
    """Sentences as HTML."""
    said, run, goodput, energy = [], value["run"], value["goodput"], value["energy"]
    if run["step"] is not None and run["steps"]:
        said.append(f"{number(run['step'], 9)} of {number(run['steps'], 9)} steps ({per_cent(run['step'] / run['steps'])}).")
    if "share" in goodput:
        lost = {name: spent for name, spent in goodput["seconds"].items() if name != "training"}
        most = max(lost, key=lambda name: lost[name])
        text = f"{per_cent(goodput['share'])} of {span(goodput['wall_s'])} of wall-clock went into steps that were kept"
        rest = f"; most of the rest was {most}, {span(lost[most])} ({per_cent(lost[most] / goodput['wall_s'])})" if lost[most] else ""
        said.append(f"{text}{rest}.")
    if value["restarts"]:
        count, redone = len(value["restarts"]), goodput.get("seconds", {}).get("redone")
        again = f"; {span(redone)} of steps were done again" if redone else ""
        said.append(f"{count:,} restart{'s' * (count > 1)}{again}. Before the last: {escaped(value['restarts'][-1]['why'], 200)}.")
    for name, what in (("capped_share", "the power limit"), ("thermal_share", "heat"), ("brake_share", "a hardware brake")):
        if (share := finite(energy.get(name))) is not None and share >= 0.01:
            said.append(f"Clocks were held down by {what} {per_cent(share)} of the time.")
    said += [f"<span class=mark>drift</span> {escaped(one['words'])}." for one in value["plan"]["drifts"]]
    drifted = [row for row in value["plan"]["rows"] if row["drifted"] and not row.get("caused")]
    draws = [row for row in drifted if row["what"].startswith("mean draw")]
    for row in drifted:
        if row not in draws[:-1]:  # of nested draws the widest stands for all
            beside = f"{_amount(row['actual']['value'], row['unit'])}, {row.get('noun', 'planned')} {_amount(row['planned']['value'], row['unit'])}"
            where = f" {row['note']}" if row.get("note") else ""
            said.append(f"{_drift(row)} {escaped(row['what'] + where)}: {escaped(beside)}.")
    if value["refused_steps"]:
        said.append(f"{number(value['refused_steps'])} updates were refused: they were not finite.")
    if value["summary_differs"]:
        said.append(f"{escaped(value['summary_differs'])}.")
    return said + [f"Missing: {escaped(text)}." for text in value["missing"]]


def _tile(name: str, found: Value, shown: Callable[[float], tuple[str, str]], note: str = "", *, hero: bool = False) -> str:
    kind = " class=hero" if hero else ""
    if found["value"] is None:
        return f"<div{kind}><dt>{name}</dt><dd class='v un'>unknown</dd><dd class=n>{escaped(found['unknown'], 160)}</dd></div>"
    text, unit = shown(found["value"])
    after = f"<span class=unit>{escaped(unit)}</span>" if unit else ""
    note = note or found.get("note", "")
    below = f"<dd class=n>{escaped(note, 400)}</dd>" if note else ""
    return f"<div{kind}><dt>{name}</dt><dd class=v>{escaped(text)}{after}</dd>{below}</div>"


def _errs(speed: Value) -> str:
    """What bounds are made of, by POWER.md's table."""
    widths = {"measured": "± 5 %", "estimated": "± 50 %", "nameplate": "− 33 %", "declared": "± 20 %"}
    shares = speed.get("provenance")
    kinds = [kind for kind in widths if isinstance(shares, Mapping) and shares.get(kind)]
    said = ", ".join(f"{kind} {widths[kind]}" for kind in kinds)
    return f", if all of it errs one way: {said}, by POWER.md" if said else ""


def _tiles(value: Value) -> str:
    said = value["headline"]
    speed, spent, checked = said["tokens_per_s_mw"], said["mwh"], said["val_loss"]
    low, high = speed.get("low"), speed.get("high")
    between = f"Bounds {number(low)} to {number(high)}{_errs(speed)}" if low is not None and high is not None else "Bounds unknown"
    rests = speed.get("why") or provenance(speed.get("provenance"))
    of = f"{WITHIN.get(spent.get('boundary'), 'boundary unknown')}: {provenance(spent.get('provenance'))}"
    loss = f"validation {checked['value']:.4f}" if checked["value"] is not None else f"validation unknown: {checked['unknown']}"
    wall = said["wall_s"]["value"]
    tiles = [
        _tile(
            f"Tokens/s per MW, {WITHIN[speed['boundary']]}" if speed.get("boundary") else "Tokens/s per MW",
            speed, lambda it: (number(it), ""), f"{between}; {rests}", hero=True,
        ),
        _tile("Loss", said["loss"], lambda it: (f"{it:.4f}", ""), loss),
        _tile("Tokens, retained", said["tokens"], lambda it: (number(it, 6 if it < 1e6 else 4), "")),
        _tile("Tokens/s", said["tokens_per_s"], lambda it: (number(it), "")),
        _tile("MFU", said["mfu"], lambda it: (f"{it * 100:.1f}", "%")),
        _tile("Goodput", said["goodput"], lambda it: (f"{it * 100:.1f}", "%"), f"of {span(wall)} of wall-clock" if wall is not None else ""),
        _tile("Energy", spent, lambda it: words.scaled(it * 1e6, "Wh"), of),
        _tile("Cost of energy", said["eur"], lambda it: (number(it, 3), "€"), of),
        _tile("Carbon", said["kg_co2e"], lambda it: (number(it, 3), "kg CO2e"), of),
    ]  # fmt: skip
    return f"<dl class=tiles>{''.join(tiles)}</dl>"


# The body: cards.


def _body(value: Value, tag: str) -> str:
    marks = [one["step"] for one in value["restarts"] if one["step"] is not None]
    note = " ↻ marks a restart." if value["restarts"] else ""
    mfu = value["headline"]["mfu"]
    flops, each = f"MFU unknown: {mfu.get('unknown')}.", value["mfu_per_token_per_s"]
    if mfu["value"] is not None:
        flops = f"MFU {per_cent(mfu['value'])} {mfu['note']} in the mean; it is this same curve, {per_cent(each * 1e5)} for every 100,000 tokens/s."
    curves = value["curves"]
    cards = [
        lines(
            tag, "Loss", f"Mean of each window, and of each validation.{note}",
            [Curve("training", curves["loss"]), Curve("validation", curves["val_loss"], 1, dots=True)],
            Axes("step", shown=lambda it: f"{it:.4g}", marks=marks), "no window with a loss yet",
        ),
        lines(
            tag, "Tokens/s", f"While it trained. {flops}{note}", [Curve("tokens/s", curves["tokens_per_s"], label="")],
            Axes("step", zero=True, marks=marks), "no window with a speed yet",
        ),
        *_judged(tag, value, marks),
        *_legs(tag, value),
        *_quality(tag, value),
        *powered(tag, value),
        _waterfall(tag, value),
        column(_phases(tag, value), _restarts(tag, value)),
        column(_step_times(tag, value)),
        _plan(tag, value),
        *metered(tag, value),
        _memory(tag, value),
        *_samples(tag, value),
        _settings(tag, value),
        _identity(tag, value),
    ]  # fmt: skip
    return f"{_tiles(value)}<div class=cards>{''.join(cards)}</div>"


def _judged(tag: str, value: Value, marks: Any) -> list[str]:
    """Of a run whose objective is of pairs: how many are in the right order, and what either answer is worth to the model."""
    curves = value["curves"]
    if not curves["accuracy"]:
        return []
    return [
        lines(
            tag, "Pairs in the right order", "Share of a window's pairs, and of the held-out ones, whose preferred answer has the higher reward.",
            [Curve("training", curves["accuracy"]), Curve("validation", curves["val_accuracy"], 1, dots=True)],
            Axes("step", zero=True, marks=marks), "no window yet",
        ),
        lines(
            tag, "Rewards", "Mean of each window: beta times the log-probability of an answer over the reference's (orpo, simpo: times its mean).",
            [Curve("preferred", curves["reward_chosen"]), Curve("refused", curves["reward_rejected"], 1)],
            Axes("step", shown=lambda it: f"{it:.4g}", marks=marks), "no window yet",
        ),
    ]  # fmt: skip


def _legs(tag: str, value: Value) -> list[str]:
    """Where a run that moved has been, and what each stretch was; nothing of one that stayed."""
    if len(value["legs"]) < 2:
        return []

    def told(found: Value, shown: Shown, note: str = "") -> str:
        return unknown(found["unknown"]) if found["value"] is None else cell(shown(found["value"]), note)

    rows = []
    for one in value["legs"][-LATEST:]:
        stood = "" if not one["stood_s"] else f"nobody had the run for {span(one['stood_s'])} before it"
        until = "unknown" if one["until"] is None else number(one["until"], 9)
        at = f"{WITHIN[one['boundary']]}: {provenance(one['provenance'])}" if one["boundary"] else ""
        rows.append(
            head(f"{one['number']}. {one['place']}", stood)
            + cell(f"{number(one['step'] or 0, 9)} to {until}")
            + told(one["tokens_per_s"], number)
            + told(one["goodput"], per_cent, "" if one["wall_s"]["value"] is None else f"of {span(one['wall_s']['value'])}")
            + told(one["watts"], words.watts, at)
            + told(one["kwh"], lambda it: words.energy(it * 3.6e6))
            + told(one["tokens_per_s_mw"], number)
            + sentence("; ".join(one["changed"][:SHOWN]) + f"; and {len(one['changed']) - SHOWN} more" * (len(one["changed"]) > SHOWN))
        )
    named = ("leg", "steps", "tokens/s", "goodput", "draw", "energy", "tokens/s/MW", "what changed")
    more = f" The last {LATEST} of {len(value['legs']):,}." if len(value["legs"]) > LATEST else ""
    text = f"Each stretch of the run under one plan. Joules are by the leg's own site; time between legs is no leg's.{more}"
    return [card(tag, "Legs", text, scrolled("Legs", table(named, rows, kind="plain", right=range(1, 7))), wide=True)]


def _quality(tag: str, value: Value) -> list[str]:
    """Validation sets and evaluations; nothing of a run that has neither."""
    found = []
    sets, tasks, texts = value["sets"], value["evals"]["tasks"], value["evals"]["texts"]

    def shown(one: float | None, digits: int = 4) -> str:
        return unknown("") if one is None else cell(f"{one:.{digits}f}" if abs(one) < 1e6 else number(one))

    if sets:
        rows = [
            head(one["name"])
            + shown(one["loss"])
            + shown(one["perplexity"], 2)
            + shown(one["bits_per_byte"], 3)
            + cell(exact(one["targets"] or 0))
            for one in sets
        ]
        names = ("set", "loss", "perplexity", "bits per byte", "tokens")
        text = f"On documents that were not trained on, at step {number(sets[0]['step'] or 0, 9)}; loss and perplexity are of a token."
        behind = scrolled("Validation sets", table(names, rows, right=(1, 2, 3, 4)))
        found.append(card(tag, "Validation sets", text, behind, wide=True))
    if tasks:
        rows = [
            head(f"{one['task']}", one["metric"].removesuffix(",none")) + shown(one["value"]) + shown(one["stderr"])
            + "".join(cell(exact(one[key] or 0)) for key in ("few_shot", "samples", "step"))
            for one in tasks
        ]  # fmt: skip
        names = ("task", "value", "standard error", "few-shot", "samples", "step")
        limited = " Of some tasks only the first documents were asked." if any(one["limit"] for one in tasks) else ""
        text = f"By lm-evaluation-harness; the newest of each task.{limited}"
        found.append(card(tag, "Evaluations", text, scrolled("Evaluations", table(names, rows, right=(1, 2, 3, 4, 5))), wide=True))
    if texts:
        rows = [
            head(one["text"])
            + shown(one["bits_per_byte"])
            + shown(one["loss"])
            + "".join(cell(exact(one[key] or 0)) for key in ("bytes", "tokens", "context", "step"))
            for one in texts
        ]
        names = ("text", "bits per byte", "loss of a token", "bytes", "tokens", "context", "step")
        text = "Bits per byte compare models whatever their tokenizers."
        found.append(card(tag, "Texts", text, scrolled("Texts", table(names, rows, right=(1, 2, 3, 4, 5, 6))), wide=True))
    return found


def _waterfall(tag: str, value: Value) -> str:
    """From all of wall-clock down to what was kept, class by class."""
    found = value["goodput"]
    if "seconds" not in found:
        return lacking(tag, "Goodput", found["unknown"])
    wall, spent = found["wall_s"] or 1.0, found["seconds"]
    rows = [("wall-clock", "since the first process had the run", 0.0, 1.0, 4, span(found["wall_s"]), per_cent(1.0))]
    left = 1.0
    for name in sorted((name for name in spent if name != "training"), key=lambda name: -spent[name]):
        left -= spent[name] / wall
        rows.append(
            (f"−\u00a0{name}", CLASSES[name], max(0.0, left), spent[name] / wall, 1, span(spent[name]), per_cent(spent[name] / wall))
        )
    rows.append(("=\u00a0training", CLASSES["training"], 0.0, found["share"], 2, span(spent["training"]), per_cent(found["share"])))
    text = "Every second of wall-clock is in one class; they add up to it."
    return card(tag, "Goodput", text, bars(("class", "of wall-clock", "time", "share"), rows), wide=True)


def _samples(tag: str, value: Value) -> list[str]:
    """Answers to held-out conversations, beside what was held out; nothing where the run wrote none."""
    if not value["samples"]:
        return []
    text = "What the model wrote when the run ended, in the template's format, and what stood there."
    rows = [
        "".join(
            f"<td><pre>{'<br>'.join(escaped(line, 2000) for line in one[name].split(chr(10)))}</pre></td>"
            for name in ("prompt", "written", "held_out")
        )
        for one in value["samples"]
    ]
    return [
        card(
            tag,
            "Held-out conversations",
            text,
            scrolled("Held-out conversations", table(("prompt", "written", "held out"), rows)),
            wide=True,
        )
    ]


def _phases(tag: str, value: Value) -> str:
    found = value["phases"]
    if "shares" not in found:
        return lacking(tag, "Phases", found["unknown"])
    waited = found["exposed_communication"]
    said = f"{per_cent(waited['value'])} {waited['note']}" if waited["value"] is not None else f"unknown: {waited['unknown']}"
    text = f"Where rank 0's time went, by its trace. Exposed communication: {said}; what the backward hides, or waits for within itself, is not in it."
    rows = [(name, "", 0.0, share, 0, span(found["seconds"][name]), per_cent(share)) for name, share in found["shares"].items()]
    return card(tag, "Phases", text, bars(("phase", "of its time", "time", "share"), rows))


def _step_times(tag: str, value: Value) -> str:
    """A histogram, its percentiles as lines, and each rank's in a table."""
    found = value["step_s"]
    if "p50" not in found:
        return lacking(tag, "Step times", found["unknown"])
    bins, marks = found["histogram"], ("p50", "p90", "p99")
    scale, unit = (1e3, "milliseconds") if bins["high"] < 2 else (1.0, "seconds")
    said = ", ".join(f"{name} {words.seconds(found[name])}" for name in marks)
    longest = f"longest {words.seconds(found['longest'])}"
    label = f"Histogram of {found['steps']:,} step times: {said}, {longest}"
    places = [(name, found[name] * scale) for name in marks]
    picture = histogram(label, bins["low"] * scale, bins["high"] * scale, bins["counts"], places, f"{unit}; height: steps")
    rows = [
        head(f"rank {one['rank']}") + cell(number(one["steps"], 9)) + "".join(cell(words.seconds(one[name])) for name in marks)
        for one in found["ranks"][:RANKS]
    ]
    more = f" {len(found['ranks']) - RANKS:,} more ranks are in --json." if len(found["ranks"]) > RANKS else ""
    longer = f" {bins['longer']:,} longer than drawn." if bins["longer"] else ""
    text = f"{said}; {longest}; {found['steps']:,} steps that rank {found['ranks'][0]['rank']} traced, without saves and validations.{longer}{more}"
    return figure(tag, "Step times", text, picture, table(("rank", "steps", *marks), rows, right=(1, 2, 3, 4)))


def _restarts(tag: str, value: Value) -> str:
    if "seconds" not in value["goodput"]:
        return lacking(tag, "Restarts", value["goodput"]["unknown"])
    if not value["restarts"]:
        return card(tag, "Restarts", "None: one process has had the run all the time.")
    rows = []
    for one in value["restarts"][-LATEST:]:
        when = (one["time"] or "unknown").replace("T", " ").replace("+00:00", "")
        rows.append(
            sentence(when) + (cell("before its first") if one["step"] is None else cell(number(one["step"], 9))) + sentence(one["why"])
        )
    more = f" The last {LATEST} of {len(value['restarts']):,}." if len(value["restarts"]) > LATEST else ""
    return card(
        tag,
        "Restarts",
        f"Each process after the first.{more}",
        table(("when, UTC", "from step", "why the one before ended"), rows, kind="plain", right=(1,)),
    )


def _memory(tag: str, value: Value) -> str:
    found = value["memory"]
    planned, peak = found["planned_bytes"]["value"], found["peak_bytes"]
    if planned is None:
        return lacking(tag, "Memory of a rank", found["planned_bytes"]["unknown"])
    whole = max(planned, peak["value"] or 0.0) or 1.0
    rows = [(name, "", 0.0, part / whole, 0, words.size(part), per_cent(part / whole)) for name, part in found["parts_bytes"].items()]
    rows.append(("planned", "all of these", 0.0, planned / whole, 4, words.size(planned), per_cent(planned / whole)))
    text = "The plan's parts; activations and workspace are estimates."
    if peak["value"] is None:
        text += f" Measured peak: {peak['unknown']}."
    else:
        rows.append(("peak", "measured", 0.0, peak["value"] / whole, 2, words.size(peak["value"]), per_cent(peak["value"] / whole)))
    return card(tag, "Memory of a rank", text, bars(("part", "of the larger", "bytes", "share"), rows), wide=True)


def _amount(value: float, unit: str) -> str:
    known: dict[str, Shown] = {"bytes": words.size, "W": words.watts, "s": words.seconds, "share": per_cent}
    shown = (known | {"MWh": lambda it: words.energy(it * 3.6e9), "€": lambda it: f"{number(it, 3)} €"}).get(unit)
    return shown(value) if shown else number(value, 6 if value == int(value) and value < 1e6 else 4)


def _drift(row: Value) -> str:
    mark = "drift" if not row["most"] else "above the limit" if row.get("noun") == "allowed" else "above the most"
    return f"<span class=mark>{mark} {signed(row['drift'])}</span>"


def _plan(tag: str, value: Value) -> str:
    rows = []
    for row in value["plan"]["rows"]:
        both = (row["planned"], row["actual"])
        between = f"{_amount(row['low'], row['unit'])} to {_amount(row['high'], row['unit'])}" if "low" in row else ""
        cells = "".join(
            unknown(one["unknown"]) if one["value"] is None else cell(_amount(one["value"], row["unit"]), between * (one is row["planned"]))
            for one in both
        )
        if row["planned"]["value"] == 0 and row["actual"]["value"] is not None:
            cells += sentence("planned none")
        elif row["drift"] is None:
            cells += "<td class=un>not comparable</td>"
        elif row["drifted"]:
            cells += f"<td>{_drift(row)}</td>"
        else:
            more = f", {row.get('noun', 'planned')} at most" if row["most"] else ""
            if "low" in row:
                more = ", within" if row["low"] <= row["actual"]["value"] <= row["high"] else ", in the mean"
            cells += sentence(signed(row["drift"]) + (", not at its end" if row["open"] and row["drift"] < 0 else more))
        rows.append(head(row["what"], row.get("note", "")) + cells)
    text = f"What is more than {DRIFT * 100:.0f} % from the plan, or {SLACK * 100:.1f} % above a most, is marked. Draws are means over all of wall-clock."
    causes = ""
    if value["plan"]["expects"]:
        text += " Where the plan has a range, small below its middle, windows are judged: three in a row beyond it, without the first two of each process."
        causes = "".join(f"<p>{escaped(one['words'])}.</p>" for one in value["plan"]["drifts"])
        judged = value["plan"]["judged"]
        none = (
            f"{judged:,} windows, the last ones, were held against the plan's ranges; none drifted"
            if judged
            else "no window was there to be judged"
        )
        causes = causes or f"<p>{none}.</p>"
    whole = table(("what", "planned", "actual", "difference"), rows, kind="plain", right=(1, 2))
    return card(tag, "Plan and actual", text, whole + causes, wide=True)


def _settings(tag: str, value: Value) -> str:
    if not value["settings"]:
        return lacking(tag, "Recipe", "plan.json is not there, or is none", wide=True)
    return card(
        tag,
        "Recipe",
        "Main settings, as the plan has them.",
        pairs([(name, said) for name, said in value["settings"].items() if said != NONE], "kv2"),
        wide=True,
    )


def _identity(tag: str, value: Value) -> str:
    run = value["run"]
    keys = ("folder", "id", "created", "plan_sha256", "identity", "corpus", "weights_sha256")
    said = [(key.replace("_", " "), run[key] if run[key] is not None else "unknown: not recorded") for key in keys]
    versions = list(value["versions"].items()) or [("versions", "unknown: they are written when a run finishes")]
    text = "What this run is, and what it stood on."
    return card(tag, "Identity and versions", text, pairs(said) + f"<div class=gapped>{pairs(versions, 'kv2')}</div>", wide=True)


# Several runs.

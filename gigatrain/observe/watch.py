"""`gigatrain watch`: what reader.py sees of a run, as lines in a terminal. Free of torch."""

import contextlib
import datetime
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigatrain.observe import logs
from gigatrain.observe.goodput import number
from gigatrain.observe.legs import NAMED, leg_words, si, span
from gigatrain.observe.reader import Reader
from gigatrain.power.reading import BOUNDARIES

if TYPE_CHECKING:
    from rich.console import Group

SPARKS = "▁▂▃▄▅▆▇█"
SHOWN = 12  # lines of a failure
SUSPICIONS = {  # of metrics.jsonl, from observe/numerics.py
    "spikes": "refused updates of a finite loss and norm",
    "transient": "steps that gave other numbers when they were made again: faults that passed",
    "persistent": "steps of which ranks compute different numbers: a fault that stays",
    "rollbacks": "times back to a checkpoint, and past the samples that followed",
    "diverged": "times copies of the state were not equal",
}


def _utc(time_s: float) -> str:
    with contextlib.suppress(OverflowError, ValueError, OSError):  # a damaged one
        return datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat(timespec="seconds")
    return "at an unknown time"


def spark(values: list[Any], width: int = 48) -> str:
    """The last `width` numbers as blocks; what is no number is a blank."""
    shown = values[-width:]
    numbers = [value for value in shown if isinstance(value, (int, float))]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] if isinstance(value, (int, float)) else " " for value in shown)


def lines(seen: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What there is to say, each as a title, a text and a style."""
    state = {"silent": f"no news for {span(seen['news_s'])}", "ended": f"ended: {seen['why']}", "finished": "finished"}.get(
        seen["state"], seen["state"]
    )
    style = {"running": "green", "finished": "green", "silent": "bold red", "ended": "bold yellow"}.get(seen["state"], "yellow")
    ranks = f", {seen['ranks']:,} rank{'s' * (seen['ranks'] > 1)}" if seen["ranks"] else ""
    found = [(seen["name"] or "run", f"{state}{ranks}; {seen['run']}", style)]

    def add(title: str, text: str, style: str = "") -> None:
        found.append((title, text, style))

    if seen["hang"]:
        add("HANG", seen["hang"], "bold red")
    if seen["failure"]:
        told = seen["failure"].splitlines()  # a long traceback is in the log, whose name is its last line
        add("FAILED", "\n".join(told if len(told) <= SHOWN else [told[0], "  ...", *told[2 - SHOWN :]]), "bold red")
    if seen["job"]:
        add("job", f"{seen['job']['event']} {seen['job']['time']}")
    if seen["scheduler"]:
        asked = seen["scheduler"]
        add("scheduler", f"{asked['job'] or 'job'} {asked['state']}" + (f": {asked['reason']}" if asked["reason"] else ""))
    if seen["step"] is not None:
        share = f" ({seen['step'] / seen['steps']:.1%})" if seen["steps"] else ""
        eta = f", {span(seen['eta_s'])} to go" if seen["eta_s"] is not None else ""
        add("step", f"{seen['step']:,} of {seen['steps'] or 0:,}{share}, {seen['tokens'] or 0:,} tokens{eta}")
        loss = "not finite" if seen["loss"] is None else f"{seen['loss']:.4f}"
        right = "" if seen["accuracy"] is None else f", {seen['accuracy']:.1%} of pairs in the right order"
        add("loss", f"{loss}  {spark(seen['losses'])}{right}")
    if seen["val_loss"] is not None:
        add("validation", f"{seen['val_loss']:.4f} at step {seen['val_step']:,}")
    if seen["bad_steps"]:
        spikes = f", {seen['spikes']:,} of them spikes" if seen["spikes"] else ""
        add("refused", f"{seen['bad_steps']:,} updates whose numbers cannot be right{spikes}", "yellow")
    for what, words in SUSPICIONS.items():
        if seen[what] and what != "spikes":
            add(what, f"{seen[what]:,} {words}", "yellow")
    for one in seen["stragglers"]:
        rank, host, times, section = (logs.printable(str(one.get(key, "?"))) for key in ("rank", "host", "times", "section"))
        add("SLOW", f"rank {rank} on {host}: {times} times the median for {section}", "yellow")
    if seen["tokens_per_s"] is not None:
        mean = f", {seen['tokens_per_s_mean']:,.0f} in the mean" if seen["tokens_per_s_mean"] else ""
        add("tokens/s", f"{seen['tokens_per_s']:,.0f} now{mean}")
        add("MFU", f"{seen['mfu']:.1%} of dense bf16" if seen["mfu"] is not None else f"unknown: {seen['mfu_why']}")
    for one in seen["drift"] or ():
        add("DRIFT", one["words"], "bold yellow")
    if seen["drift"] == []:
        add("plan", "no judged window lies beyond what it expects")
    found += _clock_lines(seen)
    for title, text in _power_lines(seen):
        add(title, text)
    if seen["failed_ranks"] and not seen["failure"]:
        add("errors", f"{seen['failed_ranks']} ranks left one in {seen['run']}/logs", "yellow")
    return [(logs.printable(title), logs.printable(text), style) for title, text, style in found]


def _clock_lines(seen: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Where the time went, by whom, and what is safe of it."""
    if seen["goodput"]:
        parts = ", ".join(
            f"{what} {span(spent)}" for what, spent in seen["goodput"]["seconds"].items() if spent >= 0.5 or what == "training"
        )
        share = seen["goodput"]["share"]
        yield "goodput", f"{'unknown' if share is None else f'{share:.1%}'} of {span(seen['goodput']['wall_s'])}: {parts}", ""
        for one in seen["restarts"][-4:]:
            when = _utc(one["time_s"])
            begun = "before its first step" if one["step"] is None else f"at step {one['step']:,}"
            yield "restart", f"{when} attempt {one['attempt']}, {begun}; before it: {one['why']}", ""
        if len(seen["restarts"]) > 4:
            yield "restarts", f"{len(seen['restarts'])} in all", ""
        some = f"; {seen['slowest_why']}" if seen["slowest_why"] else ""
        shown = ", ".join(f"rank {row['rank']} {row['own_s'] * 1e3:.1f} ms" for row in seen["slowest_ranks"])
        if (seen["ranks"] or 2) > 1:
            yield "slowest", f"{shown} of data and forward{some}" if shown else seen["slowest_why"], ""
    for one in seen["legs"][-4:] if len(seen["legs"]) > 1 else ():
        yield f"leg {one['number']}", leg_words(one), ""
    if newest := seen["checkpoint"]:
        stall_s, share = newest["stall_s"], newest["stall_share"]
        cost = "" if stall_s is None or share is None else f"; training stood {stall_s:.3g} s for the last, {share:.2%}"
        where = "none yet" if newest["step"] is None else f"step {newest['step']:,}, {span(newest['age_s'])} ago"
        yield "checkpoint", where + cost, ""
        if newest["not_saved"]:
            yield "NOT SAVED", newest["not_saved"], "bold yellow"
    if seen["saving"]:
        yield "saves", seen["saving"]["words"], ""


def _power_lines(seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Watts at each boundary that is known, what is got for them at the widest, and why it is not more."""
    watts, name = seen["power_watts"], seen["power_boundary"]
    if watts is None:
        yield "power", seen["power_why"]
    else:
        known = ", ".join(f"{NAMED.get(one, one)} {si(watts[one])}W" for one in BOUNDARIES if watts[one] is not None)
        capped = (
            f"; accelerators at their limit {seen['power_capped_share']:.0%} of the time".replace("%", " %")
            if seen["power_capped_share"]
            else ""
        )
        yield "power", known + capped + (f"; wider: {seen['power_why']}" if seen["power_why"] else "")
        yield "provenance", seen["power_provenance"]
        if seen["power_ramp_watts"] is not None:
            yield "ramp", f"{si(seen['power_ramp_watts'])}W in ten seconds, the most in the last hour"
    if name is not None and seen["tokens_per_s_mw"][name] is not None:
        cost = seen["joules_per_token"][name]
        each = f", {si(cost)}J a token" if cost is not None else ""
        yield "efficiency", f"{seen['tokens_per_s_mw'][name]:,.0f} tokens/s/MW at the {NAMED.get(name, name)}{each}, over the last window"
    if seen["power_orders"]:  # most of all where the draw is not known: then a budget cannot be kept
        yield "orders", seen["power_orders"]
    one = seen["energy"]
    if one and number(one, "tokens_per_s_mw") is not None:
        name, joules = str(one.get("boundary")), number(one, "joules") or 0.0
        yield "energy", f"{one['tokens_per_s_mw']:,.0f} tokens/s/MW at the {NAMED.get(name, name)} over the whole run, {si(joules)}J"


def drawn(seen: Mapping[str, Any]) -> "Group":
    """`lines` for a terminal."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text.assemble((led(title), "bold"), (text, style)) for title, text, style in lines(seen)))


def led(title: str) -> str:
    """What stands before a line's text: the title, and at least one space, since a run's name may be of any length."""
    return f"{title:<10} "


def watch(run: Path, *, once: bool = False, as_json: bool = False, every_s: float = 1.0) -> None:
    """Shows the run in the terminal until Ctrl-C or its end; `once`, and where there is no terminal, shows it once."""
    from rich.console import Console
    from rich.live import Live

    reader, console = Reader(run), Console(highlight=False)
    seen = reader.seen()
    if as_json:
        print(json.dumps(seen, indent=1))
        return
    if once or not console.is_terminal:
        for title, text, _ in lines(seen):
            print(led(title) + text)
        return
    with Live(drawn(seen), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while seen["state"] not in ("finished",):
            time.sleep(every_s)
            seen = reader.seen()
            live.update(drawn(seen), refresh=True)

r"""Tokens per joule beside the peers: the same work as in step.py (architecture, initial weights, rows, batch), and a meter around every round.

    python benchmarks/power.py                                   one GPU of 80 GB or more: 0.7 to 1B parameters, 4,096 tokens a row; under nine minutes
    python benchmarks/power.py --providers gigatrain,trainer --rounds 5
    python benchmarks/power.py --set train.batch=4 --set model.architecture.layers=8
    sudo -E python benchmarks/power.py --recipe quickstart       a processor with RAPL

Providers and workers are step.py's. All stay on the device; one works at a time, the others' processes sleep. First every one is checked: its first losses
must be ours but for rounding. Then come alternating rounds, whose order rotates: `--settle` steps, 2 s at least, that bring clocks and meter along, and as many
steps, the same for all, as the fastest needs for a window of at least 10 s and 100 updates of the slowest meter. The parent reads one meter for the whole
machine before and after those steps. tokens per joule = tokens/s, by the worker's own clock from synchronised device to synchronised device, over watts, the
counter's joules over the time that they belong to. Idle watts are measured before the workers start and after they are gone: weights that only lie there
draw nothing extra that a counter sees, but the contexts of five processes may, and every provider bears them alike.

Columns: tokens/s and tokens/J are medians of rounds, `low` and `high` their extremes; `x trainer` is the median of the rounds' own ratios of tokens/J;
`agrees` is the integral of instantaneous power over the energy counter, over all of a provider's rounds; `capped` the share of time in which the power limit
held clocks down. Without a meter there is no figure: exit code 10. Packages that are not there: exit code 7, and how to bring them.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEEDED = {"pydantic": "pydantic", "pynvml": "nvidia-ml-py", "transformers": "transformers", "accelerate": "accelerate", "rich": "rich"}


def lacking() -> str | None:
    """Which packages are not here, and how they come onto a machine without a network; None: none."""
    if importlib.util.find_spec("gigatrain") is None:
        return "gigatrain is not installed here: from its checkout, PYTHONPATH=. python benchmarks/power.py (its workers take it over)"
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    if "pydantic" in missing:
        missing[missing.index("pydantic") : missing.index("pydantic") + 1] = [
            "pydantic",
            "pydantic-core",
            "annotated-types",
            "typing-inspection",
        ]
    return (
        f"not installed: {', '.join(missing)} (and, for its provider, liger-kernel). Where pip reaches an index: pip install {' '.join(missing)}. For one "
        f"where it does not: pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 "
        f"-d .whl {' '.join(missing)} liger-kernel; carry .whl, and there: python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl, "
        "PYTHONPATH=/tmp/site. pydantic names the one pydantic-core that it works with: give that version"
    )


if __name__ == "__main__" and (said := lacking()):
    print(said, file=sys.stderr)
    sys.exit(7)

import step  # noqa: E402 - this folder's, which need what was just looked for
from providers import PROVIDERS, VARIANTS, handicap, precision, unavailable  # noqa: E402
from rounds import Peer, noted, revision, start  # noqa: E402

from gigatrain import load  # noqa: E402
from gigatrain.bench import report, steady  # noqa: E402
from gigatrain.bench.board import WATTS, Board, processor  # noqa: E402
from gigatrain.bench.trials import rotated  # noqa: E402
from gigatrain.errors import GigatrainError, RunError  # noqa: E402
from gigatrain.planning.plan import Plan  # noqa: E402
from gigatrain.power.reading import BOUNDARIES, FIELDS, Taken  # noqa: E402

DEFAULT = ("gigatrain", "gigatrain+plain", "trainer", "trainer+compile", "trainer+liger")
# On a GPU: Llama-3.2-1B's layers with a smaller vocabulary (head and loss would else be half of the work), as many of the 16 as fit for all at once.
GPU = (
    "model.architecture=llama-3.2-1b", "model.architecture.vocab=32768", "train.sequence=4096", "train.batch=2", "train.microbatch=2", "optim.lr=1e-4",
    "train.recompute=none",
)  # fmt: skip
LAYERS = 16
EMBEDDED, PER_LAYER = 67.1e6, 60.8e6  # parameters of that architecture
OURS_BYTES, THEIRS_BYTES = 18, 12  # of a parameter, for as long as a provider waits: ours keeps its fp32 sums of gradients
CONTEXT_BYTES, LAYER_BYTES = 0.7e9, 2.0e9  # of a process; activations of a layer at 8,192 tokens in bf16, of the one that works
PILOT_STEPS = (3, 30)  # at most, of which the second look is the better one: the first ones after a warm-up are slow
PILOT_S = 1.0
SETTLE_S = 2.0  # at least, before a window: a meter whose looks are dear looks once a second, and its window begins with the look before
ROW_TOKENS = 1 << 24  # that are prepared at most: 16 B each in every worker
COLUMNS = (
    "commit", "date", "device", "threads", "versions", "load", "provider", "precision", "architecture", "parameters", "batch", "microbatch", "sequence",
    "lr", "steps", "rounds", "window_s", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high",
    *(f"watts_{name}" for name in BOUNDARIES), *(f"tokens_per_joule_{name}" for name in BOUNDARIES), "boundary", "tokens_per_joule_low",
    "tokens_per_joule_high", "joules_per_token", "ratio_to_trainer", "ratio_to_best_trainer", "counter_joules", "integral_over_counter", "gaps",
    "idle_watts_before", "idle_watts_after", *WATTS, "sm_mhz", "mem_mhz", "celsius", "capped_share", "thermal_share",
    "loss_first", "loss_last", "first_loss_difference", "max_loss_difference", "peak_mib", "warmup_s", "provenance", "unknown", "meters", "note",
)  # fmt: skip
NUMBERS = tuple(
    name
    for name in COLUMNS
    if name
    not in {
        "commit", "date", "device", "threads", "versions", "provider", "precision", "architecture", "boundary", "provenance", "unknown", "meters", "note",
    }
)  # fmt: skip
SAME_WORK = (
    2.0**-6
)  # of a loss: four roundings of bf16; fp32 and bf16 agree better than this at equal weights, another row or mask does not
Row = dict[str, Any]


@dataclass
class Round:
    """One provider's turn: its own clock's speed, and what the meter saw meanwhile."""

    tokens_per_s: float
    window_s: float
    taken: Taken
    state: dict[str, float]
    peak_bytes: int

    @property
    def metered_s(self) -> float:
        return self.taken.ms / 1e3


@dataclass
class Turns:
    """A provider and its rounds."""

    peer: Peer
    step_s: float = 0.0
    rounds: list[Round] = field(default_factory=list)


def fitting(memory_bytes: int, providers: Sequence[str]) -> int:
    """Layers with which the states of all these providers, and the activations of one, fit into the device."""
    each = (
        sum(OURS_BYTES if name.startswith("gigatrain") else THEIRS_BYTES for name in providers) + 4
    )  # and the gradients of the one that works
    room = 0.94 * memory_bytes - CONTEXT_BYTES * (len(providers) + 1) - each * EMBEDDED - 2.5e9  # logits and the loss
    return max(2, min(LAYERS, int(room / (each * PER_LAYER + LAYER_BYTES))))


def idle(meter: Any, seconds: float) -> Taken:
    """What is drawn while nothing of ours works."""
    meter.take()
    time.sleep(seconds)
    return meter.take()


def turn(meter: Any, board: Board, one: Turns, settle: int, steps: int, tokens: int, timeout_s: float) -> Round:
    """One provider's round."""
    one.peer.ask(0, settle, timeout_s)
    with board.watched() as state:
        meter.take()
        answer = one.peer.ask(0, steps, timeout_s)
        taken = meter.take()
    return Round(steps * tokens / answer["seconds"], answer["seconds"], taken, state, answer["peak_bytes"])


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every provider: {"rows", "failed": why by name}. Raises PowerError without a meter, RunError for what cannot be compared."""
    began = time.monotonic()
    names = list(dict.fromkeys(options.providers.split(",")))
    for name in names:
        base, *extra = name.split("+")
        if base not in {*PROVIDERS} - {"matmul"} or not set(extra) <= {"compile", "liger", *VARIANTS}:
            raise RunError(f"there is no provider {name!r}{load.nearest(name, DEFAULT)} Known: {', '.join(DEFAULT)}, and step.py's.")
    from gigatrain.power import meter as meters

    with Board(most=1) as board, tempfile.TemporaryDirectory(prefix="gigatrain-power-") as temporary:
        folder = Path(temporary)
        tried = step.plan(load.recipe(options.recipe, options.set), options.site)
        least_s, how = steady.looked(tried.power, tried.watts, board.uuids)
        say(f"meters: {steady.pairs(how)}; a window is {least_s:.1f} s or more")
        need_s = max(least_s, options.seconds or 0.0)
        most = min(20_000, ROW_TOKENS // tried.tokens_per_step) if options.most_steps is None else options.most_steps
        options.set = [*options.set, f"train.steps={most}"]
        planned, job = step.prepare(options, folder, most)
        shape = f"{planned.decoder.family} of {planned.decoder.layers} layers, {planned.parameters:,} parameters"
        say(f"{shape}, {planned.batch} x {planned.sequence} tokens a step; {options.why}")
        if slow := handicap(planned):
            say(slow)
        failed = {name: reason for name in names if (reason := unavailable(name, planned))}
        with meters.opened(planned.power, planned.watts, board.uuids, whole=True) as meter:
            before = idle(meter, options.idle)
            everyone: list[Turns] = []
            try:
                everyone += [Turns(start(step.__file__, name, planned.device, job, folder / name)) for name in names if name not in failed]
                checked(everyone, options, say)
                working = [one for one in everyone if one.peer.error is None]
                if not working:
                    raise RunError(f"no provider works: {'; '.join(f'{one.peer.name}: {one.peer.error}' for one in everyone)}")
                room = (most - options.warmup - sum(PILOT_STEPS)) // (options.rounds + 1)  # one round may have to be made again
                rounds(meter, board, working, need_s, room, planned, options, began, say)
            finally:
                for one in everyone:
                    one.peer.close()
            time.sleep(min(3.0, options.idle))  # clocks fall
            after = idle(meter, options.idle)
        limits = board.limits()
        failed |= {one.peer.name: one.peer.error for one in everyone if one.peer.error}
        whole = [one for one in everyone if one.peer.error is None and one.rounds]
        rows = table(planned, whole, least_s, board, limits, how, (before, after))
    say(f"all in {time.monotonic() - began:.0f} s")
    failed = {name: failed[name] for name in names if name in failed}
    return {"rows": rows, "failed": failed, "absent": absent(planned, failed, rows, board.name or processor())}


def absent(planned: Plan, failed: Mapping[str, str | None], rows: Sequence[Row], device: str) -> list[Row]:
    """Rows of those that gave no figure, with why: who reads the file later is to see that they were tried."""
    alike = ("device", "threads", "versions", "architecture", "parameters", "batch", "microbatch", "sequence", "lr")
    known = {name: rows[0][name] for name in alike} if rows else described(planned) | {"device": device}
    now = {"commit": revision(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load": round(os.getloadavg()[0], 2)}
    return [dict.fromkeys(COLUMNS) | known | now | {"provider": name, "note": f"no figure: {why}"} for name, why in failed.items()]


def described(planned: Plan) -> Row:
    """What everybody does."""
    arch = planned.decoder
    return {
        "architecture": f"{arch.family} {arch.layers}x{arch.hidden} vocab {arch.vocab}",
        "parameters": planned.parameters,
        "batch": planned.batch,
        "microbatch": planned.microbatch,
        "sequence": planned.sequence,
        "lr": planned.optim.lr,
    }


def checked(everyone: Sequence[Turns], options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Set-up side by side, warm-up one by one with compilation, a first look at the speed; then whether everybody's first loss is ours."""
    for one in everyone:
        with noted(one.peer, say):
            one.peer.ready = one.peer.answer(options.timeout)
    for one in everyone:
        if one.peer.error is None:
            with noted(one.peer, say):
                one.peer.warmup_s = one.peer.ask(0, options.warmup, options.timeout)["seconds"]
                for most in PILOT_STEPS:
                    steps = max(1, min(most, math.ceil(PILOT_S / one.step_s))) if one.step_s else most
                    one.step_s = one.peer.ask(0, steps, options.timeout)["seconds"] / steps
                say(
                    f"{one.peer.name}: warm-up {one.peer.warmup_s:.1f} s, a step {1e3 * one.step_s:,.1f} ms, first loss {one.peer.losses[0]:.5f}"
                )
    first = next((one.peer.losses[0] for one in everyone if one.peer.error is None), None)
    for one in everyone:
        if one.peer.error is None and first is not None and not abs(one.peer.losses[0] - first) <= SAME_WORK * abs(first):
            one.peer.error = f"its first loss is {one.peer.losses[0]:.5f} and not {first:.5f}: it does other work"
            say(f"{one.peer.name} FAILED: {one.peer.error}")


def rounds(
    meter: Any,
    board: Board,
    everyone: Sequence[Turns],
    need_s: float,
    room: int,
    planned: Plan,
    options: argparse.Namespace,
    began: float,
    say: Callable[[str], None],
) -> None:
    """All rounds, or as many as the time allows, and one at least; the first is made again, longer, where its shortest window was too short.

    Raises RunError where a window takes more than `room` steps.
    """
    fastest_s = min(one.step_s for one in everyone)
    steps, settle, number, again = math.ceil(1.1 * need_s / fastest_s), max(options.settle, math.ceil(SETTLE_S / fastest_s)), 0, False
    while number < options.rounds:
        if steps + settle > room:
            raise RunError(
                f"a window of {need_s:.1f} s takes {steps:,} steps, and {room:,} a round are prepared; fewer --rounds, or more --most-steps"
            )
        at = time.monotonic()
        for one in rotated(list(everyone), number):
            if one.peer.error is None:
                with noted(one.peer, say):
                    one.rounds.append(turn(meter, board, one, settle, steps, planned.tokens_per_step, options.timeout))
        working = [one for one in everyone if one.peer.error is None]
        speeds = ", ".join(f"{one.peer.name} {one.rounds[-1].tokens_per_s:,.0f}" for one in working)
        say(f"round {number + 1} of {options.rounds}, {steps} steps each, tokens/s: {speeds}")
        shortest_s = min((one.rounds[-1].window_s for one in working), default=need_s)
        if shortest_s < need_s and not number and not again:
            say(f"its shortest window was of {shortest_s:.1f} s, and {need_s:.1f} s are needed: once more, with more steps")
            steps, again = math.ceil(1.2 * steps * need_s / shortest_s), True
            for one in working:
                one.rounds.clear()
            continue
        number += 1
        took, left = time.monotonic() - at, options.limit_s - (time.monotonic() - began) - 2 * options.idle - 5
        if number < options.rounds and took > left:
            say(f"no time for another round of {took:.0f} s within --limit-s {options.limit_s:.0f}: {number} were made")
            return


def summed(taken: Sequence[Taken]) -> Taken:
    return steady.added([dict(zip(FIELDS, one.ints(), strict=True)) for one in taken])


def table(
    planned: Plan, whole: Sequence[Turns], least_s: float, board: Board, limits: dict[str, float], how: dict[str, str], rests: tuple[Taken, Taken]
) -> list[Row]:  # fmt: skip
    """A row per provider, as the CSV file and the table show it."""
    from gigatrain.power import account

    def drawn(taken: Taken) -> dict[str, float]:
        found = account.boundaries(taken, planned.watts, taken.ms / 1e3) if taken.ms else {}
        return {name: one.watts for name, one in found.items() if one is not None and one.watts}

    each = {one.peer.name: [drawn(turn.taken) for turn in one.rounds] for one in whole}
    known = [name for name in BOUNDARIES if each and all(name in watts for rounds in each.values() for watts in rounds)]
    at = known[-1] if known else None
    idles = [drawn(taken).get(at) if at else None for taken in rests]
    # Of the narrowest boundary, which is the provider's own; what is around it is the same for all.
    near = known[0] if known else None

    def per_joule(one: Turns, boundary: str) -> list[float]:
        return [turn.tokens_per_s / watts[boundary] for turn, watts in zip(one.rounds, each[one.peer.name], strict=True)]

    trainers = [one for one in whole if one.peer.name.startswith("trainer")] if near else []
    best = max(trainers, key=lambda one: statistics.median(per_joule(one, near or "")), default=None)
    plain = next((one for one in trainers if one.peer.name == "trainer"), None)

    def ratio(one: Turns, other: Turns | None) -> float | None:
        if near is None or other is None:
            return None
        return statistics.median(a / b for a, b in zip(per_joule(one, near), per_joule(other, near), strict=False))

    ours = next((one for one in whole if one.peer.name == "gigatrain"), whole[0] if whole else None)
    rows = []
    for one in whole:
        assert ours is not None
        peer, rounds = one.peer, one.rounds
        taken = summed([turn.taken for turn in rounds])
        speeds = [turn.tokens_per_s for turn in rounds]
        differences = [abs(a - b) for a, b in zip(peer.losses, ours.peer.losses, strict=False)]
        versions = dict(peer.ready["versions"])
        row: Row = dict.fromkeys(COLUMNS) | {
            "commit": revision(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": peer.ready["device"],
            "threads": versions.pop("threads", None),
            "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
            "load": round(os.getloadavg()[0], 2),
            "provider": peer.name,
            "precision": precision(peer.name, planned),
            **described(planned),
            "steps": len(peer.losses),
            "rounds": len(rounds),
            "window_s": min(turn.window_s for turn in rounds),
            "tokens_per_s": statistics.median(speeds),
            "tokens_per_s_low": min(speeds),
            "tokens_per_s_high": max(speeds),
            "boundary": near,
            "counter_joules": taken.counter_mj / 1e3 if taken.counter_mj else None,
            "integral_over_counter": taken.integral_mj / taken.counter_mj if taken.counter_mj else None,
            "gaps": taken.gaps,
            "idle_watts_before": idles[0],
            "idle_watts_after": idles[1],
            "capped_share": taken.held_down(taken.power_capped_ms),
            "thermal_share": taken.held_down(taken.thermal_ms),
            "loss_first": peer.losses[0],
            "loss_last": peer.losses[-1],
            "first_loss_difference": differences[0],
            "max_loss_difference": None if any(map(math.isnan, differences)) else max(differences),
            "peak_mib": max(turn.peak_bytes for turn in rounds) / 2**20,
            "warmup_s": peer.warmup_s,
            "meters": steady.pairs(how),
            "unknown": steady.pairs(account.unknown(taken, planned.watts, taken.ms / 1e3)),
        }
        row |= limits
        for name in ("sm_mhz", "mem_mhz", "celsius"):
            values = [turn.state[name] for turn in rounds if name in turn.state]
            row[name] = (max if name == "celsius" else statistics.median)(values) if values else None
        if row["window_s"] < least_s:
            row["note"] = f"its shortest window of {row['window_s']:.1f} s is below the {least_s:.1f} s that the meters need: no figure"
        elif near is not None:
            for name in known:
                row[f"watts_{name}"] = statistics.median(watts[name] for watts in each[peer.name])
                row[f"tokens_per_joule_{name}"] = statistics.median(per_joule(one, name))
            figures = per_joule(one, near)
            row |= {"tokens_per_joule_low": min(figures), "tokens_per_joule_high": max(figures)}
            row |= {
                "joules_per_token": 1 / statistics.median(figures),
                "ratio_to_trainer": ratio(one, plain),
                "ratio_to_best_trainer": ratio(one, best),
            }
            found = account.boundaries(taken, planned.watts, taken.ms / 1e3)
            row["provenance"] = "; ".join(f"{name}: {one.words}" for name, one in found.items() if one is not None)
        rows.append(row)
    return rows


def show(found: dict[str, Any]) -> None:
    """The table, and below it who did not run and why."""
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(width=200, highlight=False), found["rows"]
    if rows:
        one = rows[0]
        limit = (
            f"limit {one['limit_watts']:,.0f} W of {one['limit_default_watts'] or math.nan:,.0f}"
            if one["limit_watts"]
            else "no limit is told"
        )
        rest = ", ".join("-" if one[name] is None else f"{one[name]:,.1f} W" for name in ("idle_watts_before", "idle_watts_after"))
        console.print(
            f"{one['device']}; {one['architecture']}, {one['parameters']:,} parameters; batch {one['batch']} x {one['sequence']}; {one['rounds']} rounds of "
            f"{one['window_s']:.1f} s or more; {limit}; idle before and after: {rest}",
            markup=False,
        )
    boundaries = [name for name in BOUNDARIES if any(row[f"watts_{name}"] for row in rows)]
    shown: dict[str, tuple[str, str]] = {"provider": ("provider", ""), "precision": ("precision", ""), "tokens/s": ("tokens_per_s", ",.0f")}
    shown |= {f"W\n{name}": (f"watts_{name}", ",.1f") for name in boundaries}
    shown |= {f"tokens/J\n{name}": (f"tokens_per_joule_{name}", ",.4g") for name in boundaries}
    shown |= {
        "low": ("tokens_per_joule_low", ",.4g"),
        "high": ("tokens_per_joule_high", ",.4g"),
        "x trainer": ("ratio_to_trainer", ".3f"),
        "x best": ("ratio_to_best_trainer", ".3f"),
        "agrees": ("integral_over_counter", ".4f"),
        "capped": ("capped_share", ".2f"),
        "MHz": ("sm_mhz", ",.0f"),
        "C": ("celsius", ".0f"),
        "d loss 1": ("first_loss_difference", ".1e"),
        "max dloss": ("max_loss_difference", ".1e"),
        "peak MiB": ("peak_mib", ",.0f"),
    }
    table = Table(box=None)
    for heading, (_, form) in shown.items():
        table.add_column(heading, justify="right" if form else "left", no_wrap=True)
    for row in sorted(rows, key=lambda row: -(1 / row["joules_per_token"] if row["joules_per_token"] else 0)):
        table.add_row(*("-" if row[column] is None else format(row[column], form) for column, form in shown.values()))
    console.print(table)
    for row in rows:
        if row["note"]:
            console.print(f"{row['provider']}: {row['note']}", markup=False)
    if rows and rows[0]["unknown"]:
        console.print(f"unknown: {rows[0]['unknown']}", markup=False)
    for name, reason in found["failed"].items():
        console.print(f"{name}: {reason}", markup=False)


def defaults(options: argparse.Namespace, gpu: bool) -> None:
    """What was not said: on a GPU the work is chosen so that all of it ends within nine minutes."""
    names = (options.providers or ",".join(DEFAULT)).split(",")
    options.providers = ",".join(names)
    ours = []
    if gpu and options.recipe == "quickstart":
        memory = options.site.memory_bytes
        if memory is None:
            raise RunError(
                "the driver does not tell the device's memory, so how many layers fit for all is unknown; --set model.architecture.layers=N"
            )
        ours = [*GPU, f"model.architecture.layers={fitting(memory, names)}"]
    sysfs = [f"power.sysfs={options.sysfs}"] if options.sysfs else []
    options.set = [*ours, *sysfs, *options.set]
    for name, size in {"rounds": 3, "settle": 5, "warmup": 5, "idle": 10.0}.items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    options.steps, options.data = 1, "random"  # step.prepare's: a report a round, and rows that no tokenizer is needed for
    if min(options.rounds, options.warmup, options.settle + 1) < 1 or options.idle <= 0:
        raise RunError("--rounds and --warmup must be at least 1, --settle at least 0, --idle above 0")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], epilog="Read the head of this file for what is measured."
    )
    parser.add_argument(
        "--recipe", default="quickstart", help="name or file; on a GPU quickstart stands for a Llama of about 1B (default: %(default)s)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe; may be repeated")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the recipe's")
    parser.add_argument("--providers", help=f"comma-separated; default: {','.join(DEFAULT)}")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--seconds", type=float, help="of a window; default: 10, or 100 updates of the slowest meter")
    parser.add_argument("--settle", type=int, help="steps before it that are not counted, and 2 s of the fastest at least; default: 5")
    parser.add_argument("--warmup", type=int, help="steps before the first round; default: 5")
    parser.add_argument("--idle", type=float, help="seconds of the idle draw before and after; default: 10")
    parser.add_argument("--most-steps", type=int, help=f"for which rows are prepared; default: {ROW_TOKENS:,} tokens, 20,000 at most")
    parser.add_argument(
        "--limit-s", type=float, default=520, help="seconds of everything; fewer rounds are made to keep to it (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a worker may take for an answer (default: %(default)s)")
    parser.add_argument(
        "--sysfs", metavar="DIR", help="where the kernel's files are: /host/sys in a container (default: the recipe's, /sys)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "power.csv", help="rows are appended (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args(arguments)
    try:
        options.site, options.why = load.local_site()
        defaults(options, options.site.device == "cuda")
        report.load(options.out, COLUMNS, NUMBERS)  # other columns are refused now rather than after nine minutes
        found = measure(options, lambda text: print(text, file=sys.stderr, flush=True))
        print(json.dumps(found)) if options.json else show(found)
        report.append(options.out, [*found["rows"], *found["absent"]], COLUMNS)
    except GigatrainError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and files go too
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

"""What a joule buys: a recipe's variants trained for real in alternating rounds; tokens per joule, loss and memory of each, and the best site for a megawatt.

A variant (bench/sweep.py) is a `gigatrain train` of its own; rounds are A B C, B C A. What is counted is a run's steady stretch: its windows after `settle_s`
of steps, until its last report. Start, settling, validation and saves are left out of the figures, and recorded. A stretch shorter than the meters allow
gives no figure. tokens per joule at a boundary = tokens of the stretch over joules at that boundary (POWER.md), and is Mtok/s/MW.

The yardstick of a loss is the baseline's own: it runs in every round, and beside it a `control`, the baseline under other seeds. `loss_tolerance` is the spread
of the losses of both, LOSSES of them at least; a variant whose losses differ from the baseline's by no more is loss-neutral. One whose losses differ by
more is shown, but no site is planned with it. The control's tokens per joule are an A/A test: what
they differ by from the baseline's is noise.
"""

import ctypes
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gigatrain import load
from gigatrain.bench import report, sweep
from gigatrain.bench.board import WATTS, Board
from gigatrain.bench.report import Row
from gigatrain.bench.sweep import BASELINE, CONTROL, Variant
from gigatrain.config import Power
from gigatrain.errors import PowerError, RunError, SiteError
from gigatrain.launching.size import shown
from gigatrain.planning.plan import Plan
from gigatrain.planning.watts import Watts
from gigatrain.power.reading import BOUNDARIES, FIELDS, Taken
from gigatrain.power.spans import taken_of
from gigatrain.site import Site

LEAST_S = 10.0  # a window is at least so long,
LOSSES = 3  # of the baseline and its control that a spread is of: two numbers say nothing of how far a third one lies
LEAST_UPDATES = 100  # and so many of the slowest meter's updates: a counter is news every 20 to 100 ms, and an edge may be off by one
SETTLE_S = 5.0  # clocks and caches; the board's heat takes a minute and is met by alternating
WINDOW_S = 1.0  # about so often a run reports: what is left out at both ends is no more than this
NEAR_S = 0.1  # between a run's two words of one report
PILOT_STEPS = 6
LOOK_S = 1.5  # long enough for the slowest counter of a device to move
EXTENSIONS = 3
END_S = 60.0  # what a run gets to save and leave when we are interrupted
OK = "ok"
PER = tuple(f"tokens_per_joule_{name}" for name in BOUNDARIES)
COLUMNS = (
    "commit", "date", "device", "threads", "versions", "settings", "load",
    "recipe", "site", "variant", "sets", "round", "rounds", "status",
    "parameters", "tokens_per_step", "steps", "microbatch", "accumulation", "precision", "kernels", "mesh", "ranks", "accelerators",
    "window_s", "settle_s", "startup_s", "steps_s", "tokens_per_s", *(f"watts_{name}" for name in BOUNDARIES), *PER,
    *(f"joules_per_token_{name}" for name in BOUNDARIES), "boundary", "spread_pct",
    "loss", "val_loss", "loss_difference", "val_loss_difference", "loss_tolerance", "val_loss_tolerance", "loss_neutral",
    "peak_mib", "peak_by", *WATTS, "cap_watts", "sm_mhz", "mem_mhz", "celsius",
    "capped_share", "thermal_share", "disagreement", "gaps", "provenance", "unknown",
    "megawatts", "site_accelerators", "site_tokens_per_s", "note",
)  # fmt: skip
NUMBERS = (
    "load", "parameters", "tokens_per_step", "steps", "microbatch", "accumulation", "ranks", "accelerators", "window_s", "settle_s", "startup_s",
    "steps_s", "tokens_per_s", *(name for name in COLUMNS if name.startswith(("watts_", "tokens_per_joule_", "joules_per_token_", "limit_"))), "spread_pct",
    "loss", "val_loss", "loss_difference", "val_loss_difference", "loss_tolerance", "val_loss_tolerance", "peak_mib", "cap_watts", "sm_mhz",
    "mem_mhz", "celsius", "capped_share", "thermal_share", "disagreement", "gaps", "megawatts", "site_accelerators", "site_tokens_per_s",
)  # fmt: skip
# What a row of several rounds has the median of.
MIDDLE = (
    "load", "window_s", "settle_s", "startup_s", "steps_s", "tokens_per_s", *(f"watts_{name}" for name in BOUNDARIES), *PER,
    *(f"joules_per_token_{name}" for name in BOUNDARIES), "loss", "val_loss", "sm_mhz", "mem_mhz", "celsius", "capped_share", "thermal_share",
    "disagreement",
)  # fmt: skip

Say = Callable[[str], None]


# ---- A run's folder, read ----


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


# ---- Rows of several rounds ----


def summarised(runs: Sequence[Row]) -> Row:
    """One row of a variant's rounds: medians, and the spread of its tokens per joule, (most - least) / median, where there are two rounds or more."""
    good = [row for row in runs if row["status"] == OK]
    if not good:
        return runs[-1] | {"round": "all", "rounds": 0}
    row = good[-1] | {"round": "all", "rounds": len(good)}
    for name in MIDDLE:
        values = [one[name] for one in good if one[name] is not None]
        row[name] = statistics.median(values) if values else None
    row["peak_mib"] = max((one["peak_mib"] for one in good if one["peak_mib"] is not None), default=None)
    row["gaps"] = sum(one["gaps"] or 0 for one in good)
    return row


def boundary(rows: Iterable[Row]) -> str | None:
    """The widest boundary whose watts are known for every one of these: what they are compared at."""
    there = list(rows)
    return next((name for name in reversed(BOUNDARIES) if there and all(row[f"watts_{name}"] for row in there)), None)


def spread(values: Sequence[float]) -> float | None:
    """Most less least over the median, in per cent; None of fewer than two."""
    return 100 * (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None


def judge(rows: Sequence[Row], runs: Mapping[str, Sequence[Row]]) -> None:
    """Fill in the differences of losses from the baseline's and whether they are within its own spread: null where that spread is of fewer than LOSSES runs."""
    tolerances: dict[str, float | None] = {}
    for name in ("loss", "val_loss"):
        yard = [row[name] for who in (BASELINE, CONTROL) for row in runs.get(who, ()) if row.get(name) is not None]
        tolerances[name] = max(yard) - min(yard) if len(yard) >= LOSSES else None
    first = next((row for row in rows if row["variant"] == BASELINE), None)
    judged = [
        name for name in tolerances if first is not None and first[name] is not None
    ]  # without held-out documents there is no val_loss
    for row in rows:
        verdicts: list[bool | None] = []
        for name in judged:
            assert first is not None
            tolerance = row[f"{name}_tolerance"] = tolerances[name]
            if row[name] is not None:
                row[f"{name}_difference"] = row[name] - first[name]
            verdicts.append(None if row[name] is None or tolerance is None else abs(row[name] - first[name]) <= tolerance)
        row["loss_neutral"] = False if False in verdicts else None if None in verdicts or not verdicts else True


def pareto(rows: Sequence[Row], at: str) -> set[str]:
    """The variants that nobody beats in both tokens/s for each accelerator and tokens per joule at this boundary."""
    points = {row["variant"]: (row["tokens_per_s"] / row["accelerators"], row[f"tokens_per_joule_{at}"]) for row in rows}
    return {
        name
        for name, mine in points.items()
        if not any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in points.values())
    }


# ---- A site under a limit ----


def damaging(rows: Iterable[Row]) -> dict[str, str]:
    """The variants whose loss is known to be another than the baseline's, and by how much: no site is planned with these."""
    found = {}
    for row in rows:
        if row["loss_neutral"] is False:
            over = [
                f"{what} {row[f'{name}_difference']:+.2g}, and {row[f'{name}_tolerance']:.2g} is the baseline's own spread"
                for name, what in (("loss", "loss"), ("val_loss", "validation loss"))
                if None not in (row[f"{name}_difference"], row[f"{name}_tolerance"])
                and not abs(row[f"{name}_difference"]) <= row[f"{name}_tolerance"]
            ]
            found[row["variant"]] = "not loss-neutral: " + "; ".join(over)
    return found


def fleet(rows: Sequence[Row], watts: Watts, site: Site, megawatts: float, at: str) -> dict[str, Any]:
    """How fast a whole site would be with each variant under `megawatts`: {"best", "rows", "why", "assumes"}; fills in the rows' columns.

    Accelerators that the megawatts feed at boundary `at`, in whole nodes where the site says what a node holds, and no more than it has; each as fast as
    measured. Raises SiteError where they feed none.
    """
    has, each = site.accelerators.value, watts.per_node or int(site.node.accelerators.value or 0)
    found: list[dict[str, Any]] = []
    for row in rows:
        apiece, speed = row[f"watts_{at}"] / row["accelerators"], row["tokens_per_s"] / row["accelerators"]
        fed = math.floor(megawatts * 1e6 / apiece)
        count = min(fed, int(has)) if has else fed
        if each:
            count -= count % each
        row |= {"megawatts": megawatts, "site_accelerators": count, "site_tokens_per_s": count * speed}
        found.append(
            {
                "variant": row["variant"],
                "accelerators": count,
                "watts_each": apiece,
                "tokens_per_s_each": speed,
                "tokens_per_s": count * speed,
            }
            | {"watts": count * apiece, "all": bool(has) and fed >= (has or 0)}
        )
    if not any(one["accelerators"] for one in found):
        least = min(one["watts_each"] for one in found) * max(1, each)
        raise SiteError(
            f"--megawatts {megawatts:g} feeds no {'node' if each else 'accelerator'}: {shown(least)} is the least that one takes; give more"
        )
    best = max(found, key=lambda one: (one["tokens_per_s"], -one["watts"]))
    fastest = max(found, key=lambda one: one["tokens_per_s_each"])
    if best["all"]:
        why = f"{megawatts:g} MW feed all {has:,.0f} accelerators of {site.name}, so the fastest of those wins: watts are not what is short"
    elif best is fastest:
        why = "the fastest accelerator is also the one that gives most for a watt"
    else:
        why = (
            f"more, slower accelerators: {best['accelerators']:,} at {best['watts_each']:,.0f} W beat {fastest['accelerators']:,} of {fastest['variant']} at "
            f"{fastest['watts_each']:,.0f} W, {best['tokens_per_s'] / max(1.0, fastest['tokens_per_s']):.3f} times the tokens/s"
        )
    assumes = ["each accelerator is as fast among many as it was measured (perfect weak scaling): an assumption, not a measurement"]
    if at != "facility":
        assumes.append(f"{megawatts:g} MW at the boundary {at!r}: what lies beyond it (cooling, PUE) is unknown here and comes on top")
    if not each:
        assumes.append("single accelerators: the site does not say what a node holds (node.accelerators)")
    if not has:
        assumes.append("as many accelerators as the megawatts feed: how many the site has is unknown")
    if unjudged := [row["variant"] for row in rows if row["loss_neutral"] is None and row["variant"] != BASELINE]:
        assumes.append(
            f"that the loss of {', '.join(unjudged)} is the baseline's: unknown, its spread takes {LOSSES} runs or more (--rounds)"
        )
    return {"best": best, "rows": found, "why": why, "assumes": assumes, "boundary": at, "megawatts": megawatts}


# ---- Runs ----


@dataclass
class Entry:
    """A variant and what its runs said."""

    variant: Variant
    runs: list[Row] = field(default_factory=list)
    failed: str | None = None


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 3
    steps: int | None = None
    seconds: float | None = None  # of the steady window of the fastest variant
    settle_s: float = SETTLE_S

    @property
    def name(self) -> str:
        """As a row has it."""
        size = f"{self.steps} steps" if self.steps else f"{self.seconds:g} s" if self.seconds else "auto"
        return f"rounds {self.rounds}, settle {self.settle_s:g} s, {size}"


class Measurement:
    """Trains variants in turn, and adds a row for every run to the file as soon as it has ended."""

    def __init__(
        self, source: str, site: str | None, settings: Settings, board: Board, folder: Path, csv: Path, run: Row, least_s: float, say: Say
    ) -> None:
        self.source, self.site, self.settings, self.board, self.folder = source, site, settings, board, folder
        self.csv, self.run, self.least_s, self.say = csv, run, least_s, say
        self.trained, self.step_s, self.start_s = 0, 0.0, 0.0  # seconds of a step and of all else of a run, by the pilot

    def measure(self, variants: Sequence[Variant]) -> list[Entry]:
        """The baseline, its control and all others, in alternating rounds. RunError where the baseline fails."""
        first = variants[0]
        everyone = [first, Variant(CONTROL, (), first.recipe, first.plan), *variants[1:]]
        steps, every = self._size(first)
        for _ in range(EXTENSIONS + 1):
            entries = [Entry(one) for one in everyone]
            runs = len(entries) * self.settings.rounds
            self.say(
                f"{len(entries)} variants x {self.settings.rounds} rounds of {steps:,} steps, a report every {every}; the steady window of each must be "
                f"{self.least_s:.1f} s or more; about {runs * (self.start_s + steps * self.step_s) / 60:,.0f} minutes"
            )
            longer = self._rounds(entries, steps, every)
            if longer is None:
                return entries
            steps = -(-longer // every) * every
        return entries

    def _rounds(self, entries: Sequence[Entry], steps: int, every: int) -> int | None:
        """Every round; or, where the first one's windows were too short and no --steps were given, how many steps there should be."""
        for turn in range(self.settings.rounds):
            for entry in rotated(entries, turn):
                if entry.failed is None:
                    self._one(entry, turn, steps, every)
            short = [row["steps_s"] for entry in entries for row in entry.runs if entry.failed is None and row["status"] != OK]
            if short and self.settings.steps is None and not turn:
                need = 1.1 * self._wanted()
                self.say(f"too short: {min(short):.1f} s of steps, and {need:.1f} s are wanted; all begin again with more steps")
                return math.ceil(steps * max(1.2, need / max(1.0, min(short))))
        return None

    def _size(self, first: Variant) -> tuple[int, int]:
        """Steps of a run and of a window: by --steps, else by the speed of a short run of the baseline."""
        began = time.monotonic()
        row, folder = self._train(first, "pilot", sweep.sized(first.recipe, PILOT_STEPS, 1))
        if row["status"] != OK:
            raise RunError(f"the baseline does not train: {row['status']} (its log is {folder}.log)")
        step_s = self.step_s = summary(folder)["step_s_p50"]
        self.start_s = max(0.0, time.monotonic() - began - PILOT_STEPS * step_s)
        every = max(1, round(WINDOW_S / step_s))
        if self.settings.steps is not None:
            # Five windows at least, so that settling and the first do not take all.
            every = max(1, min(every, self.settings.steps // 5))
            return self.settings.steps, every
        return -(-math.ceil(1.2 * self._wanted() / step_s) // every) * every, every

    def _wanted(self) -> float:
        """Seconds of steps: until settled, until the loop's next energy window ends, which lasts as long as its meters need, and what is counted."""
        return self.settings.settle_s + self.least_s + max(self.settings.seconds or 0.0, self.least_s) + 3 * WINDOW_S

    def _one(self, entry: Entry, turn: int, steps: int, every: int) -> None:
        variant = entry.variant
        seed = variant.recipe.train.seed + 1 + turn if variant.name == CONTROL else None
        row, folder = self._train(variant, str(turn + 1), sweep.sized(variant.recipe, steps, every, seed))
        row |= {"steps": steps}
        if row["status"] == OK:
            row |= losses(folder)
            try:
                row |= figures(folder, variant.plan, settle_s=self.settings.settle_s, least_s=self.least_s)
            except RunError as failure:  # too short: more steps help
                row["status"] = str(failure)
            except PowerError as failure:
                row["status"] = entry.failed = str(failure)
        else:
            entry.failed = row["status"]
        entry.runs.append(row)
        report.append(self.csv, [row], COLUMNS)
        speed = f"{row['tokens_per_s']:,.0f} tokens/s" if row["tokens_per_s"] else row["status"]
        best = next((name for name in reversed(BOUNDARIES) if row[f"watts_{name}"]), None)
        drawn = f", {row[f'watts_{best}']:,.0f} W at {best}, {row[f'tokens_per_joule_{best}']:,.4g} tokens/J" if best else ""
        self.say(f"round {turn + 1} of {self.settings.rounds}, {variant.name}: {speed}{drawn}")
        if variant.name == BASELINE and entry.failed is not None:
            raise RunError(f"the baseline has no figure: {entry.failed} (its log is {folder}.log)")

    def _train(self, variant: Variant, round_: str, recipe: Any) -> tuple[Row, Path]:
        """One `gigatrain train` of a recipe; (its row so far, its folder). Its checkpoints are deleted once it has ended."""
        self.trained += 1
        plain = re.sub(r"[^a-z0-9=.-]+", "-", variant.name.lower()).strip("-")
        folder = self.folder / f"{self.trained:03d}-{plain}-{round_}"
        path, log = folder.with_suffix(".json"), folder.with_suffix(".log")
        path.write_text(sweep.text(recipe), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "gigatrain",
            "train",
            str(path),
            "--run",
            str(folder),
            *(["--site", self.site] if self.site else []),
        ]
        limits = self.board.limits()  # as found; cap_watts is what it is for this run
        with capped(self.board, variant.cap_watts, self.say), self.board.watched(variant.plan.ranks) as seen:
            code, peak_bytes = ran(command, log)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        made = variant.plan
        row = dict.fromkeys(COLUMNS) | self.run | {"variant": variant.name, "sets": " ".join(variant.sets), "round": round_, "rounds": 1}
        row |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load": round(os.getloadavg()[0], 2)}
        row |= described(made) | limits | {"cap_watts": variant.cap_watts}
        row |= {name: seen[name] for name in ("sm_mhz", "mem_mhz", "celsius") if name in seen}
        if "used_mib" in seen:
            row |= {"peak_mib": seen["used_mib"], "peak_by": "NVML, all that is in use"}
        else:
            row |= {"peak_mib": peak_bytes / 2**20, "peak_by": "largest RSS of a process"}
        row["status"] = OK if code == 0 else why(log, code)
        return row, folder


def described(made: Plan) -> Row:
    """A plan's columns."""
    mesh = {name: size for name, size in made.mesh.model_dump().items() if isinstance(size, int) and size > 1 and name != "stages"}
    kernels = {choice.kernel for choice in made.kernels}
    return {
        "recipe": made.name,
        "site": made.site,
        "parameters": made.parameters,
        "tokens_per_step": made.tokens_per_step,
        "microbatch": made.microbatch,
        "accumulation": made.accumulation,
        "precision": made.precision,
        "kernels": "reference" if kernels == {"reference"} else "+".join(sorted(kernels)),
        "mesh": " ".join(f"{name}={size}" for name, size in mesh.items()) or "one rank",
        "ranks": made.ranks,
        # On a machine without accelerators the machine is the one.
        "accelerators": made.watts.accelerators or (made.ranks if made.device == "cuda" else 1),
    }


def rotated(items: Sequence[Any], turn: int) -> list[Any]:
    """The order of round `turn`: each in turn goes first."""
    turn %= max(1, len(items))
    return [*items[turn:], *items[:turn]]


def ran(command: Sequence[str], log: Path) -> tuple[int, int]:
    """Run a command to its end, its output in a file: (exit code, bytes of its largest process).

    It dies with us: a run that nobody waits for would draw on.
    """
    libc, parent = ctypes.CDLL(None) if sys.platform == "linux" else None, os.getpid()

    def tied() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:  # it died before that
                os._exit(128 + signal.SIGTERM)

    with log.open("wb") as file:
        # `tied` needs no lock of Python's that the thread which watches the board may hold while we fork.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, preexec_fn=tied)  # noqa: PLW1509
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    return process.returncode, usage.ru_maxrss << 10
                time.sleep(0.05)
        finally:
            if process.returncode is None:  # Ctrl-C: the run saves and leaves
                process.terminate()
                try:
                    process.wait(END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def why(log: Path, code: int) -> str:
    """Why a run failed, on one line: what `gigatrain` said, else its last words."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("gigatrain: ")), lines[-1] if lines else "it said nothing")
    ended = f"ended with code {code}" if code > 0 else f"was ended by signal {-code}"
    return f"{ended}: {said.removeprefix('gigatrain: ')[:300]}"


@contextmanager
def capped(board: Board, watts: float | None, say: Say) -> Iterator[None]:
    """Within it every accelerator of the board has this limit; afterwards, whatever dies, the one it had before."""
    if watts is None:
        yield
        return
    from gigatrain.power import guard

    with guard.Caps(board.uuids, run="gigatrain bench power", say=say) as caps:
        caps.apply(watts)
        yield


# ---- What there is to read ----


def looked(power: Power, watts: Watts, uuids: Sequence[str]) -> tuple[float, dict[str, str]]:
    """(the shortest window that the meters here allow, what they are): PowerError where none counts anything, with how that is mended."""
    from gigatrain.power import meter

    with meter.opened(power, watts, uuids, whole=True) as found:
        time.sleep(LOOK_S)
        taken = found.take()
        meters = dict(found.meters)
    if not measured(taken):
        raise PowerError(
            f"no meter counts here, so there is no energy to compare ({pairs(meters) or 'nothing to read'}). A GPU's counter needs the driver and "
            f"nvidia-ml-py; a processor's RAPL read rights on {power.sysfs}/class/powercap/intel-rapl:*/energy_uj (root); a node's own meter is looked for "
            'with power.node = "pm_counters", "redfish" or "dcmi"'
        )
    return max(LEAST_S, LEAST_UPDATES * max(found.slowest_s, power.every_s)), meters


def no_caps(allowed: bool, board: Board) -> str | None:
    """Why no limit may be set, or None."""
    if not board.uuids:
        return f"no accelerator here has a limit to set: {board.why or 'none is visible'}"
    if not allowed:
        return "limits are used as they are found; --allow-power-caps lets them be set, and puts them back"
    from gigatrain.power import guard

    try:
        with guard.Caps(board.uuids, run="gigatrain bench power"):  # sets what is there already, and so finds out who may
            return None
    except PowerError as failure:
        return str(failure)


def room(planned: Plan, folder: Path) -> None:
    """RunError where the disk has no room for one run: its first and last checkpoint, fp32 masters and moments."""
    need, free = 2 * 16 * planned.parameters + (64 << 20), shutil.disk_usage(folder).free
    if free < need:
        raise RunError(
            f"{folder} has {free / 2**30:.1f} GiB free, and a run keeps {need / 2**30:.1f} GiB (two checkpoints, deleted when it has ended); "
            "work in a folder with more room"
        )


# ---- The command ----


def run(
    source: str,
    *,
    site: str | None = None,
    sets: Sequence[str] = (),
    megawatts: float | None = None,
    words: str | None = None,
    allow_caps: bool = False,
    steps: int | None = None,
    seconds: float | None = None,
    rounds: int | None = None,
    path: str | None = None,
    plots: str | None = None,
    quick: bool = False,
    as_json: bool = False,
    measure: Callable[[Mapping[str, Any]], Any] | None = None,
) -> None:
    """The command: measure, write, show. Raises RunError, PowerError, SiteError and what a plan raises."""
    groups = sweep.words(words)
    if "WORLD_SIZE" in os.environ:
        raise RunError(
            "bench power starts its runs itself, and this is a rank of another job (WORLD_SIZE is set); start it once, without torchrun"
        )
    where, on = Path(path) if path else report.default_path("power-variants.csv"), load.site(site) if site else load.local_site()[0]
    writable(where)
    if plots is not None:
        _pictures()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with Board() as board:
        first = sweep.baseline(source, sets, on, measure)
        least_s, meters = looked(first.plan.power, first.plan.watts, board.uuids)
        limits = board.limits()
        chosen, refused = sweep.variants(
            source,
            sets,
            on,
            groups,
            first,
            visible=len(board.uuids) or 1,
            default_watts=limits.get("limit_default_watts"),
            least_watts=limits.get("limit_least_watts"),
            no_caps=no_caps(allow_caps, board) if any("cap" in group for group in groups) else None,
            measure=measure,
        )
        settings = Settings(rounds or (1 if quick else Settings.rounds), steps, seconds, min(SETTLE_S, 2.0) if quick else SETTLE_S)
        folder = Path("runs") / f"bench-power-{first.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder.mkdir(parents=True)
        room(first.plan, folder)
        device = board.name or processor()
        identity = report.identity(device, len(os.sched_getaffinity(0)), settings.name) | {"commit": report.commit("")}
        say(f"meters    {pairs(meters)}")
        if least_s > LEAST_S:
            say(
                f"a window is {least_s:,.0f} s or more, {LEAST_UPDATES} updates of the slowest meter; --set power.node=none goes without the node's"
            )
        if limits:
            say("limits    " + ", ".join(f"{name.removeprefix('limit_').replace('_', ' ')} {watts:,.0f}" for name, watts in limits.items()))
        work = Measurement(source, site, settings, board, folder, where, identity, least_s, say)
        entries = work.measure([first, *chosen])
    found = outcome(entries, refused, first.plan.watts, on, megawatts)
    report.append(where, found["rows"], COLUMNS)
    found |= {"csv": str(where), "runs": str(folder), "plots": []}
    if plots is not None and found["boundary"]:
        found["plots"] = [str(one) for one in draw(found, Path(plots))]
    if as_json:
        print(json.dumps(found))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 200, highlight=False))
    if found["boundary"] is None and not any(row["status"] == OK for row in found["rows"]):
        raise RunError(f"no variant has a figure; the baseline: {found['rows'][0]['status']}")


def writable(path: Path) -> None:
    """RunError for a file that takes no rows of ours: now, rather than after an hour of measuring."""
    if path.exists() and not path.is_file():
        raise RunError(f"{path} is no file; name another --csv")
    above = next((folder for folder in path.absolute().parents if folder.exists()), Path("/"))
    if not os.access(path if path.exists() else above, os.W_OK) or not above.is_dir():
        raise RunError(f"{path} cannot be written; name another --csv")
    report.load(path, COLUMNS, NUMBERS)


def outcome(entries: Sequence[Entry], refused: Mapping[str, str], watts: Watts, site: Site, megawatts: float | None) -> dict[str, Any]:
    """From runs to what is shown: a row for every variant, the boundary they are compared at, who is beaten by none, and the best site."""
    rows = [summarised(entry.runs) for entry in entries if entry.runs]
    good = [row for row in rows if row["status"] == OK]
    at = boundary(good)
    runs = {entry.variant.name: [row for row in entry.runs if row["loss"] is not None] for entry in entries}
    judge(rows, runs)
    for entry, row in zip((entry for entry in entries if entry.runs), rows, strict=True):
        row["boundary"] = at
        if at is not None and row["status"] == OK:
            row["spread_pct"] = spread([one[f"tokens_per_joule_{at}"] for one in entry.runs if one["status"] == OK])
    cap = megawatts if megawatts is not None else site.power.cap_watts.value / 1e6 if site.power.cap_watts.value else None
    best, no_site = None, None
    damaged = damaging(good)
    fit = [row for row in good if row["variant"] != CONTROL and row["variant"] not in damaged]
    if at is None:
        no_site = "no boundary's watts are known for every variant" if good else "nothing was measured"
    elif cap is None:
        no_site = "no limit is given: --megawatts M, or the site's power.cap_watts"
    else:
        try:
            best = fleet(fit, watts, site, cap, at)
            best["excluded"] = _excluded(good, damaged, best, at)
        except SiteError as failure:  # what was measured is worth more than this
            no_site = str(failure)
    return {
        "rows": rows,
        "refused": dict(refused),
        "boundary": at,
        "pareto": sorted(pareto(fit, at)) if at else [],
        "damaged": damaged,
        "site": best,
        "no_site": no_site,
    }


def _excluded(good: Sequence[Row], damaged: Mapping[str, str], best: Mapping[str, Any], at: str) -> list[str]:
    """Those that would have been chosen before the best one, were it not for their loss."""
    found = []
    for row in good:
        if why := damaged.get(row["variant"]):
            apiece = best["best"]
            faster = row["tokens_per_s"] / row["accelerators"] / apiece["tokens_per_s_each"]
            thriftier = row[f"tokens_per_joule_{at}"] / (apiece["tokens_per_s_each"] / apiece["watts_each"])
            if max(faster, thriftier) > 1:
                found.append(
                    f"{row['variant']}, {faster:.3f} times the tokens/s and {thriftier:.3f} times the tokens/J of {apiece['variant']}, is {why}"
                )
    return found


def processor() -> str:
    """Its name as the system has it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---- The terminal ----


def show(found: Mapping[str, Any], console: Console) -> None:
    """The table, losers and refusals included, then the site."""
    rows, at = found["rows"], found["boundary"]
    good = sorted(
        (row for row in rows if row["status"] == OK), key=lambda row: -(row[f"tokens_per_joule_{at}"] if at else row["tokens_per_s"])
    )
    if good:
        console.print(_table(good, found))
        one = good[0]
        console.print(f"  provenance  {one['provenance']}", markup=False)
        if one["unknown"]:
            console.print(f"  unknown     {one['unknown']}", markup=False)
        console.print(f"  limits      {_limits(one)}", markup=False)
        tolerance = one["val_loss_tolerance"]
        runs = "validation has no held-out documents" if one["val_loss"] is None and one["loss_tolerance"] is not None else ""
        said = (
            runs or f"unknown: the baseline and its control ran fewer than {LOSSES} times"
            if tolerance is None
            else f"{tolerance:.2g} nats of validation loss"
        )
        console.print(f"  neutral     within the spread of the baseline and its control under other seeds, {said}", markup=False)
        console.print("  *           nobody whose loss is not worse is better in both tokens/s and tokens/J", markup=False)
        console.print(
            "  counted     steady steps: a run's own figure (goodput) also has its start, saves, validation and restarts", markup=False
        )
    for row in rows:
        if row["status"] != OK:
            console.print(f"  {row['variant']}: {row['status']}", markup=False)
    for name, reason in found["refused"].items():
        console.print(f"  {name}: {reason}", markup=False)
    if found["site"] is None:
        console.print(f"  site        {found['no_site']}", markup=False)
        return
    site = found["site"]
    best = site["best"]
    many = f"{best['accelerators']:,} accelerators of {best['watts_each']:,.0f} W, {best['tokens_per_s']:,.0f} tokens/s"
    console.print(f"  site        {site['megawatts']:g} MW at {site['boundary']}: {best['variant']}, {many}; {site['why']}", markup=False)
    for text in site.get("excluded", ()):
        console.print(f"  excluded    {text}", markup=False)
    for text in site["assumes"]:
        console.print(f"  assumes     {text}", markup=False)


def _limits(row: Row) -> str:
    if row["limit_watts"] is None:
        return "none known: no accelerator tells one"
    return f"found {row['limit_watts']:,.0f} W, default {_number(row['limit_default_watts'], ',.0f')} W"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(rows: Sequence[Row], found: Mapping[str, Any]) -> Table:
    at, one = found["boundary"], rows[0]
    known = [name for name in BOUNDARIES if any(row[f"watts_{name}"] for row in rows)]
    table = Table(
        title=f"{one['recipe']} on {one['accelerators']} x {one['device']}: {one['steps']:,} steps a run, {one['rounds']} rounds, compared at {at}",
        box=None,
        title_justify="left",
    )
    for heading in ("", "variant"):
        table.add_column(heading, no_wrap=True)
    headings = [
        "tokens/s",
        *(f"W\n{name}" for name in known),
        *(f"tokens/J\n{name}" for name in known),
        "J/token" if at is None else f"J/token\n{at}",
        "± %",
        "d loss",
        "d val\nloss",
        "neutral",
        "peak\nMiB",
    ]
    for heading in [*headings, "capped\n%", "MHz"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        neutral = {True: "yes", False: "NO", None: "-"}[row["loss_neutral"]]
        capped_pct = None if row["capped_share"] is None else 100 * row["capped_share"]
        table.add_row(
            "*" if row["variant"] in found["pareto"] else "",
            row["variant"],
            _number(row["tokens_per_s"], ",.0f"),
            *(_number(row[f"watts_{name}"], ",.1f") for name in known),
            *(_number(row[f"tokens_per_joule_{name}"], ",.4g") for name in known),
            _number(row[f"joules_per_token_{at}"] if at else None, ".4g"),
            _number(row["spread_pct"], ".1f"),
            _number(row["loss_difference"], "+.1e"),
            _number(row["val_loss_difference"], "+.1e"),
            neutral,
            _number(row["peak_mib"], ",.0f"),
            _number(capped_pct, ".0f"),
            _number(row["sm_mhz"], ",.0f"),
        )
    return table


# ---- The picture ----


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """power.png: each variant's tokens/s against watts of an accelerator, with lines of equal tokens per joule; and the site under its megawatts."""
    pyplot = _pictures()
    at = found["boundary"]
    rows = [row for row in found["rows"] if row["status"] == OK]
    if at is None or not rows:
        raise RunError("there is nothing to draw: no boundary's watts are known for every variant")
    folder.mkdir(parents=True, exist_ok=True)
    site = found["site"]
    figure, axes = pyplot.subplots(1, 2 if site else 1, figsize=(13 if site else 7.5, 5.6), squeeze=False)
    axis = axes[0, 0]
    xs = [row[f"watts_{at}"] / row["accelerators"] for row in rows]
    ys = [row["tokens_per_s"] / row["accelerators"] for row in rows]
    right, top = 1.18 * max(xs), 1.18 * max(ys)
    best = max(y / x for x, y in zip(xs, ys, strict=True))
    for share in (0.25, 0.5, 0.75, 1.0):
        slope = share * best
        end = min(right, top / slope)
        axis.plot([0, end], [0, slope * end], color="#b8b8b8", linewidth=0.8, zorder=1)
        axis.annotate(f"{slope:.3g} tokens/J", (end, slope * end), fontsize=7, color="#6a6a6a", ha="right", va="bottom")
    for x, y, row in zip(xs, ys, rows, strict=True):
        better = row["variant"] in found["pareto"]
        axis.scatter(
            [x], [y], s=46, color="#1b7f4d" if better else "#8a8a8a", marker="x" if row["loss_neutral"] is False else "o", zorder=3
        )
        axis.annotate(row["variant"], (x, y), fontsize=7, xytext=(5, -3), textcoords="offset points")
    axis.set(xlim=(0, right), ylim=(0, top), xlabel=f"watts of an accelerator at {at}", ylabel="tokens/s of an accelerator")
    axis.set_title("green: nobody is better in both; cross: not loss-neutral", fontsize=9)
    if site:
        axis = axes[0, 1]
        order = sorted(site["rows"], key=lambda one: one["tokens_per_s"])
        colours = ["#1b7f4d" if one["variant"] == site["best"]["variant"] else "#9ab8d0" for one in order]
        axis.barh([one["variant"] for one in order], [one["tokens_per_s"] for one in order], color=colours)
        for place, one in enumerate(order):
            axis.annotate(f" {one['accelerators']:,} x {one['watts_each']:,.0f} W", (0, place), fontsize=7, va="center")
        axis.set_xlabel(f"tokens/s of a site with {site['megawatts']:g} MW at {site['boundary']} (perfect weak scaling assumed)")
        axis.tick_params(axis="y", labelsize=7)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    one = rows[0]
    figure.suptitle(f"{one['recipe']} on {one['accelerators']} x {one['device']}", fontsize=11)
    figure.text(0.01, 0.01, f"{one['commit']}, {one['date']}, {one['settings']}; {one['provenance']}"[:230], fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    made = folder / "power.png"
    figure.savefig(made, dpi=150)
    pyplot.close(figure)
    return [made]


def _pictures() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as missing:
        raise RunError("pictures need matplotlib: pip install 'gigatrain[bench]'") from missing
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot

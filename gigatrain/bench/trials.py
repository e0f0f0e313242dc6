"""A variant's runs: each a `gigatrain train` of its own, in alternating rounds, A B C and then B C A; a row for each, whatever became of it."""

import ctypes
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigatrain.bench import report, sweep
from gigatrain.bench.board import Board
from gigatrain.bench.report import OK, Row
from gigatrain.bench.steady import figures, losses, summary
from gigatrain.bench.sweep import BASELINE, CONTROL, Variant
from gigatrain.bench.verdict import COLUMNS
from gigatrain.errors import PowerError, RunError
from gigatrain.planning.plan import Plan
from gigatrain.power.reading import BOUNDARIES

SETTLE_S = 5.0  # clocks and caches; the board's heat takes a minute and is met by alternating
WINDOW_S = 1.0  # about so often a run reports: what is left out at both ends is no more than this
PILOT_STEPS = 6
EXTENSIONS = 3
END_S = 60.0  # what a run gets to save and leave when we are interrupted
Say = Callable[[str], None]


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

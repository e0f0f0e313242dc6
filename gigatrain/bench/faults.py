"""`gigatrain bench faults`: real runs, real faults, and whether each promise of RELIABILITY.md was kept. Free of torch.

A row is one fault, one engine, one seed. Whatever is drawn in it (moment, rank, bit) comes from the seed, nothing is tried twice, and what is compared was left
by a run that nothing was done to. A row that breaks its promise makes the command end with 9 and is printed with what runs it again alone.
"""

import csv
import dataclasses
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gigatrain import __version__, installed
from gigatrain.bench.inject import FAULTS, Case, Fault, Harm, Skipped
from gigatrain.bench.subject import ENGINES, Broken, Engine, Lab, Subject
from gigatrain.errors import HealthError, RecipeError

COLUMNS = (
    "commit", "date", "device", "versions", "fault", "promise", "engine", "seed", "kept", "outcome", "moment", "at_step", "rank", "detect_s", "recover_s",
    "lost_steps", "wall_s",
)  # fmt: skip
KEPT, BROKEN, SKIPPED = "kept", "BROKEN", "not here"
ROW_S = 30.0  # about what a row takes: one is not begun where less is left of the time


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one fault. `harms` has its injections, in order."""

    fault: str
    promise: str
    engine: str
    seed: int
    kept: str
    outcome: str
    harms: tuple[Harm, ...]
    wall_s: float


def drawn(seed: int) -> random.Random:
    """The draw of a row."""
    return random.Random(f"gigatrain faults {seed}")


def row(lab: Lab, fault: Fault, engine: Engine, seed: int, kills: int = 1) -> Row:
    """Runs one row; whatever happens, none of its processes and mounts are left."""
    began = time.monotonic()
    subject = Subject(lab, engine, lab.folder / f"{fault.name}-{engine.name}-{seed}")
    case = Case(lab, engine, subject, drawn(seed), kills)
    try:
        lab.undisturbed(engine)
        if engine.ranks < fault.least:
            raise Skipped(f"of {fault.least} ranks and more")
        with subject:
            kept, outcome = KEPT, fault.do(case)
    except Broken as failure:
        kept, outcome = BROKEN, str(failure)
    except Skipped as failure:
        kept, outcome = SKIPPED, str(failure)
    finally:
        subject.end()
    if kept != BROKEN:  # of a broken one everything stays, to be looked at
        shutil.rmtree(subject.folder, ignore_errors=True)
        shutil.rmtree(subject.orders, ignore_errors=True)
    return Row(fault.name, fault.promise, engine.name, seed, kept, outcome, tuple(case.harms), round(time.monotonic() - began, 2))


def listed(
    faults: Sequence[Fault], engines: Sequence[Engine], seed: int, end: float | None, copies: Engine | None = None
) -> Iterator[tuple[Fault, Engine, int]]:
    """Each fault once on each engine that has the ranks for it, `copies` once on the engine that has some; then, until `end`, by their weights."""
    first = [
        (fault, engine)
        for fault in faults
        for engine in ([copies] if copies is not None and fault.name == "copies" else engines)
        if engine.ranks >= fault.least
    ]
    for number, (fault, engine) in enumerate(first):
        if end is not None and time.monotonic() > end - ROW_S:
            return
        yield fault, engine, seed * 10_000 + number
    draw, number = random.Random(seed), len(first)
    while end is not None and first and time.monotonic() < end - ROW_S:
        fault, engine = draw.choices(first, weights=[one.weight for one, _ in first])[0]
        yield fault, engine, seed * 10_000 + number
        number += 1


def provenance() -> dict[str, str]:
    """Commit, date, machine and versions, as each row of the CSV has them."""
    root = Path(__file__).parents[2]
    commit = ""
    if (root / "pyproject.toml").is_file():
        found = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip()
    versions = {"gigatrain": __version__} | installed.versions("torch", "deepspeed")
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": f"{len(os.sched_getaffinity(0))} x {platform.processor() or platform.machine()}",
        "versions": json.dumps(versions),
    }


def write(path: Path, rows: Iterable[Row], beside: dict[str, str]) -> None:
    """A line an injection is appended; a row without any has one line."""
    fresh = not path.is_file() or path.stat().st_size == 0
    with path.open("a", encoding="utf-8", newline="") as file:
        out: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        if fresh:
            out.writeheader()
        for one in rows:
            flat = {key: value for key, value in dataclasses.asdict(one).items() if key in COLUMNS}
            for harm in one.harms or (None,):
                told = dataclasses.asdict(harm) if harm else {}
                out.writerow(beside | flat | {key: round(value, 3) if isinstance(value, float) else value for key, value in told.items()})


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Rows of one fault and engine together: how many were kept, what came of them, and median and worst of the three figures."""
    cells = []
    for fault, engine in dict.fromkeys((one.fault, one.engine) for one in rows):
        own = [one for one in rows if (one.fault, one.engine) == (fault, engine)]
        tried = [one for one in own if one.kept != SKIPPED]
        harms = [harm for one in tried for harm in one.harms]
        bad = next((one for one in own if one.kept == BROKEN), None)
        outcome = (bad or own[0]).outcome
        figures = [_spread([getattr(harm, name) for harm in harms]) for name in ("detect_s", "recover_s", "lost_steps")]
        kept = f"{sum(one.kept == KEPT for one in tried)}/{len(tried)}" if tried else SKIPPED
        cells.append([fault, own[0].promise, engine, kept, str(len(harms)), *figures, str((bad or own[0]).seed), outcome[:160]])
    return cells


HEAD = ("fault", "promise", "engine", "kept", "times", "detect s", "recover s", "lost steps", "seed", "outcome")


def _spread(numbers: Sequence[float | None]) -> str:
    """`0.06 (0.11)`: the median, and the largest where they differ."""
    found = [number for number in numbers if number is not None]
    if not found:
        return "-"
    middle, most = statistics.median(found), max(found)
    shown = [f"{number:.2f}" if isinstance(number, float) and number < 10 else f"{number:.0f}" for number in (middle, most)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} ({shown[1]})"


def markdown(rows: Sequence[Row], beside: dict[str, str]) -> str:
    """The table for a page."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in table(rows)]
    return "\n".join([*lines, "", f"Commit {beside['commit']}, {beside['date']}, {beside['device']}, {beside['versions']}.", ""])


def _chosen(known: dict[str, Any], said: str | None, what: str) -> list[Any]:
    if not said:
        return list(known.values())
    names = [name.strip() for name in said.split(",") if name.strip()]
    if wrong := [name for name in names if name not in known]:
        raise RecipeError(f"{wrong[0]!r} is no {what} of the matrix; known are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def run(
    *,
    hours: float | None = None,
    seed: int | None = None,
    only: str | None = None,
    engines: str | None = None,
    kills: int = 1,
    one: int | None = None,
    path: str | None = None,
    page: str | None = None,
    work: str | None = None,
    as_json: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """The command. `one`: only the row of that seed, which needs one fault and one engine. Raises HealthError where a promise was broken."""
    faults, machines = _chosen(FAULTS, only, "fault"), _chosen(ENGINES, engines or "native-1,native-2,zero2-2", "engine")
    if "deepspeed" not in installed.versions("deepspeed"):
        machines = [engine for engine in machines if not engine.name.startswith("zero")]
    copies = ENGINES["ddp-2"] if engines is None else None  # for the one fault that needs copies of weights
    if one is not None and (len(faults) != 1 or len(machines) != 1):
        raise RecipeError(
            "--row SEED runs one row again: name its fault and its engine too, with --only and --engines, as the table shows them"
        )
    console = Console(stderr=True)
    tell = say or (lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
    seed = random.SystemRandom().randrange(1 << 20) if seed is None else seed
    folder, rows, beside = Path(work or tempfile.mkdtemp(prefix="gigatrain-faults-")), [], provenance()
    lab = Lab(folder, say=tell)
    tell(f"seed {seed}; work in {folder}")
    end = None if hours is None else time.monotonic() + 3600 * hours
    try:
        for fault, engine, number in [(faults[0], machines[0], one)] if one is not None else listed(faults, machines, seed, end, copies):
            found = row(lab, fault, engine, number, kills)
            rows.append(found)
            tell(f"{found.kept:8} {found.fault:10} {found.engine:9} seed {found.seed:<10} {found.wall_s:6.1f} s  {found.outcome}")
            if path:
                write(Path(path), [found], beside)
    finally:
        broken = [found for found in rows if found.kept == BROKEN]
        if work is None and not broken:
            shutil.rmtree(folder, ignore_errors=True)
        if as_json:
            print(json.dumps([dataclasses.asdict(found) for found in rows], indent=1))
        else:
            show(rows)
        if page:
            Path(page).write_text(markdown(rows, beside), encoding="utf-8")
    if broken:
        again = "\n".join(
            f"  gigatrain bench faults --only {found.fault} --engines {found.engine} --row {found.seed}"
            + (f" --kills {kills}" if kills > 1 else "")
            for found in broken[:12]
        )
        raise HealthError(
            f"{len(broken)} of {len(rows)} rows broke their promise; what they left is in {folder}. Each again, alone:\n{again}"
        )
    return rows


def goodput(*, minutes: float, mtbf_s: float, seed: int | None, engines: str | None, work: str | None, as_json: bool) -> None:
    """The command's --goodput. Raises HealthError where measured and simulated goodput are more than two points apart."""
    from gigatrain.bench import compressed

    engine = _chosen(ENGINES, engines or "native-2", "engine")[0]
    seed = random.SystemRandom().randrange(1 << 20) if seed is None else seed
    folder = Path(work or tempfile.mkdtemp(prefix="gigatrain-goodput-"))
    console = Console(stderr=True)
    console.print(f"{engine.name} for {minutes:g} minutes, seed {seed}; work in {folder}", highlight=False)
    try:
        found = compressed.run(Lab(folder), engine, mtbf_s=mtbf_s, minutes=minutes, seed=seed)
    except Broken as failure:
        raise HealthError(f"the run did not live through its failures: {failure}; what it left is in {folder}") from None
    print(compressed.text(found) if as_json else "\n".join(found.lines()))
    if abs(found.replayed - found.measured) > compressed.AGREES:
        raise HealthError(
            f"measured goodput is {100 * found.measured:.1f} % and the simulator says {100 * found.replayed:.1f} %: more than "
            f"{100 * compressed.AGREES:.0f} points apart; what the run left is in {folder}"
        )


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """The table: drawn in a terminal, tab-separated lines where it is piped."""
    console = console or Console()
    cells = table(rows)
    if not console.is_terminal:
        for line in (list(HEAD), *cells):
            sys.stdout.write("\t".join(line) + "\n")
        return
    drawn_table = Table(box=None, header_style="bold", pad_edge=False)
    for name in HEAD:
        drawn_table.add_column(name, justify="right" if name in HEAD[3:9] else "left", no_wrap=name != "outcome")
    for line in cells:
        style = "red" if line[3] != SKIPPED and line[3].split("/")[0] != line[3].split("/")[-1] else None
        drawn_table.add_row(*line, style=style)
    console.print(drawn_table)

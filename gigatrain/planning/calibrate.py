"""Three scalars by which a cluster differs from the calibrated planner, refitted from runs on it: of compute, of communication, of the host's launches.

`gigatrain plan --calibrate RUNS...` writes them, `--calibration FILE` applies them. A scalar is of time: 1.1 is 10 % slower than the constants say. It moves
the constants that its name says (`scaled`), so that overlap, bubbles and floors follow. Least squares on log(step time), each scalar drawn toward 1 by how far
clusters are known to differ: what the runs cannot tell apart stays at 1. Free of torch.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from pydantic import Field

from gigatrain import load
from gigatrain.config import Section
from gigatrain.errors import GigatrainError, PlanError, RunError
from gigatrain.planning.estimate import estimate, operations
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.constants import TABLE, VALUES
from gigatrain.planning.estimate.work import Work
from gigatrain.planning.estimate.workload import Workload
from gigatrain.planning.plan import Plan
from gigatrain.site import Site

# How far each may lie from 1 for the price of one error of NOISE, in log(time). Prior: products of one chip differ by cooling and power by some percent,
# networks and hosts by tens.
SPREADS = {"compute": 0.15, "communication": 0.4, "launch": 0.4}
NOISE = 0.02  # of the median window of a run, in log(time)
WARM = 2  # windows that are left out: compilation, caches, the first collectives
FEWEST = 3  # windows beyond those
LONGEST_S = 1e6  # beyond it a window is damage
WIDEST = 3.0  # a scalar beyond this factor tells that something else is wrong


Scalar = Annotated[float, Field(gt=1 / WIDEST, lt=WIDEST)]


class Told(Section):
    """A run as the calibration saw it."""

    run: str
    windows: int
    measured_s: float  # median over windows of the seconds of a step
    before_s: float  # estimated, with all scalars at 1
    after_s: float


class Calibration(Section):
    """What `--calibration` reads."""

    format: Literal[1] = 1
    chip: str
    compute: Scalar
    communication: Scalar
    launch: Scalar
    runs: Annotated[tuple[Told, ...], Field(min_length=1)]

    @property
    def scalars(self) -> dict[str, float]:
        return {"compute": self.compute, "communication": self.communication, "launch": self.launch}

    def __str__(self) -> str:
        lines = [f"{name:14s} x {value:.3f}{'' if abs(value - 1) > 0.005 else '   as it was'}" for name, value in self.scalars.items()]
        lines.append(f"{'run':32s} {'measured':>10s} {'before':>18s} {'after':>18s}")
        for told in self.runs:
            errors = [f"{seconds:9.4g} s {seconds / told.measured_s - 1:+6.1%}" for seconds in (told.before_s, told.after_s)]
            lines.append(f"{Path(told.run).name[:32]:32s} {told.measured_s:8.4g} s {' '.join(errors)}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Observed:
    """A run's workload on its cluster, and what a step took."""

    run: str
    workload: Workload
    cluster: Cluster
    works: tuple[Work, ...]
    step_s: float
    windows: int

    def estimated_s(self, constants: Mapping[str, float]) -> float:
        return estimate.timed(self.works, self.workload, self.cluster, constants).step_s


def scaled(scalars: Mapping[str, float], constants: Mapping[str, float] = VALUES) -> dict[str, float]:
    """`constants` on a cluster that differs by `scalars`: rates are divided, seconds multiplied. Raises PlanError for a scalar that there is not."""
    if unknown := sorted(scalars.keys() - SPREADS.keys()):
        raise PlanError(f"a calibration scales {', '.join(SPREADS)}, not {unknown[0]!r}")
    found = dict(constants)
    for name, value in constants.items():
        factor = scalars.get(_scalar_of(name) or "", 1.0)
        if factor != 1.0:
            found[name] = value * factor if TABLE[name].unit == "s" else value / factor
    return found


def _scalar_of(name: str) -> str | None:
    """Which scalar moves a constant: rates of products, attention, passes and the optimizer; every rate and latency of links and networks; the host's seconds.

    Shares of another rate (`grouped.*.of_gemm`, `attention.backward_share`) and sizes (`half_bytes`) stay: what they are of moves.
    """
    first, *between, last = name.split(".")
    if (
        (first == "gemm" and last == "peak_share")
        or (first == "attention" and between)  # attention.sm_90.flash2: an implementation's rate on an architecture
        or (first in ("memory", "optimizer") and last == "share")
        or name == "kernel.latency_s"
    ):
        return "compute"
    if first in ("link", "net") and (TABLE[name].unit == "s" or last.endswith("share")):
        return "communication"
    return "launch" if first == "stack" and last in ("launch_s", "step_s") else None


def calibrate(runs: Sequence[Path], constants: Mapping[str, float] = VALUES, site: Site | None = None) -> Calibration:
    """Scalars from run folders. `site`: where they ran; None: the site that each folder keeps or names.

    Raises RunError for a folder without enough windows, PlanError for an accelerator that the planner does not know and for runs on different ones.
    """
    if not runs:
        raise RunError("no run to calibrate by: name folders of runs, gigatrain plan --calibrate runs/a runs/b")
    return fit([observed(run, site) for run in runs], constants)


def fit(seen: Sequence[Observed], constants: Mapping[str, float] = VALUES) -> Calibration:
    """Gauss-Newton on the scalars' logarithms, with a numeric Jacobian."""
    chips = sorted({one.cluster.chip for one in seen})
    if len(chips) > 1:
        raise PlanError(f"runs on {' and '.join(chips)} cannot be calibrated as one: calibrate those of each accelerator by themselves")
    names = list(SPREADS)

    def errors(at: Sequence[float]) -> list[float]:
        moved = scaled({name: math.exp(x) for name, x in zip(names, at, strict=True)}, constants)
        return [math.log(one.estimated_s(moved) / one.step_s) for one in seen]

    def loss(found: Sequence[float], at: Sequence[float]) -> float:
        return sum((e / NOISE) ** 2 for e in found) + sum((x / SPREADS[name]) ** 2 for name, x in zip(names, at, strict=True))

    at = [0.0] * len(names)
    now = errors(at)
    for _ in range(8):
        slopes = [
            [(e - e0) / 0.02 for e, e0 in zip(errors([x + 0.02 * (i == j) for i, x in enumerate(at)]), now, strict=True)]
            for j in range(len(names))
        ]
        matrix = [
            [
                sum(a * b for a, b in zip(slopes[i], slopes[j], strict=True)) / NOISE**2 + (i == j) / SPREADS[names[i]] ** 2
                for j in range(len(names))
            ]
            for i in range(len(names))
        ]
        pull = [
            -sum(a * e for a, e in zip(slopes[i], now, strict=True)) / NOISE**2 - at[i] / SPREADS[names[i]] ** 2 for i in range(len(names))
        ]
        move = solved(matrix, pull)
        share, before = 1.0, loss(now, at)
        while share > 0.01:
            tried = [x + share * m for x, m in zip(at, move, strict=True)]
            found = errors(tried)
            if loss(found, tried) < before:
                at, now = tried, found
                break
            share /= 2
        if share <= 0.01 or max(map(abs, move)) < 1e-3:
            break
    scalars = {name: math.exp(x) for name, x in zip(names, at, strict=True)}
    for name, value in scalars.items():
        if not 1 / WIDEST < value < WIDEST:
            raise PlanError(
                f"the runs ask for {name} at {value:.2f} times what the planner expects, beyond {WIDEST:g}: that is no calibration but a fault, of the "
                "machines or of what the site says of them; compare the site's network and accelerators with gigatrain doctor"
            )
    moved = scaled(scalars, constants)
    told = tuple(
        Told(run=one.run, windows=one.windows, measured_s=one.step_s, before_s=one.estimated_s(constants), after_s=one.estimated_s(moved))
        for one in seen
    )
    compute, communication, launch = (float(f"{scalars[name]:.5g}") for name in SPREADS)
    return Calibration(chip=chips[0], compute=compute, communication=communication, launch=launch, runs=told)


def solved(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """x of matrix x = right, by elimination; the matrix is symmetric and positive."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    found = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        found[i] = (rows[i][-1] - sum(rows[i][j] * found[j] for j in range(i + 1, len(rows)))) / rows[i][i]
    return found


def observed(run: Path, site: Site | None = None) -> Observed:
    """A run folder's workload, cluster and seconds of a step: the median of its windows behind the first ones."""
    from gigatrain.planning import expect

    if not (run / "plan.json").is_file():
        raise RunError(f"{run} is no run: it has no plan.json")
    plan: Plan = load.read_json(Plan, (run / "plan.json").read_text(encoding="utf-8"), str(run / "plan.json"), RunError)
    windows = windows_of(run / "metrics.jsonl")
    if len(windows) < FEWEST:
        raise RunError(
            f"{run}/metrics.jsonl has {len(windows)} windows behind the first {WARM}, in which a run warms up; {FEWEST} are needed: let it run on, or report "
            "more often with --set report.every"
        )
    where = site or _site(run, plan)
    try:
        workload, cluster = expect.workload_of(plan), expect.cluster_of(where, plan.ranks)
    except GigatrainError as refusal:
        raise PlanError(f"{run} cannot calibrate: {refusal}") from None
    return Observed(str(run), workload, cluster, operations.works(workload), median(windows), len(windows))


def windows_of(path: Path) -> list[float]:
    """Seconds of a step by window (observe/metrics.py), without the first ones; of a step that is there twice, the later one; a torn line is left out."""
    found: dict[int, float] = {}
    with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if not isinstance(row, dict):
                    continue
                step, seconds = row.get("step"), row.get("step_s")
                if isinstance(step, int) and isinstance(seconds, (int, float)) and 0 < seconds < LONGEST_S:
                    found[step] = float(seconds)
    return [found[step] for step in sorted(found)][WARM:]


def _site(run: Path, plan: Plan) -> Site:
    """The site that a launched run keeps, else the shipped one that its plan names."""
    kept = run / "launch" / "site.json"
    return load.site(kept) if kept.is_file() else load.site(plan.site)


def read(path: Path) -> Calibration:
    """A calibration file. Raises PlanError for one that is not there or is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        why = getattr(failure, "strerror", None) or "it is not UTF-8 text"
        raise PlanError(f"{path}: {why}; gigatrain plan --calibrate RUNS... -o {path} writes it") from None
    return load.read_json(Calibration, text, str(path), PlanError)


def write(found: Calibration, path: Path) -> None:
    path.write_text(json.dumps(found.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


def constants_of(found: Calibration, chip: str, constants: Mapping[str, float] = VALUES) -> Mapping[str, float]:
    """The planner's constants on the calibrated cluster: what an estimate takes. Raises PlanError for an accelerator other than the runs' own."""
    if chip != found.chip:
        raise PlanError(f"the calibration is of runs on {found.chip}, and this plan is for {chip}: calibrate by runs on {chip}")
    return scaled(found.scalars, constants)


def applied(path: Path | None, site: Site) -> Mapping[str, float]:
    """The planner's constants for a site: as they ship, or as the file `path` has them of its accelerators."""
    return VALUES if path is None else constants_of(read(path), site.accelerator or "cpu")

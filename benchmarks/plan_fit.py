"""Fits the planner's free constants to published measurements, and scores every set of them with constants that were fitted without it.

    python benchmarks/plan_fit.py --leave-one-out      the table, over data/measured.jsonl.gz and data/further.jsonl; minutes
    python benchmarks/plan_fit.py --write              refits gigatrain/planning/estimate/fitted.json

Least squares on log(step time), pulled toward each constant's prior by its spread, robust (Huber), a set weighing as the square root of its rows: so the few
constants that rows speak of move, and all others stay what physics said. Gauss-Newton with a numeric Jacobian; a constant is moved only for rows whose
estimate reads it. The score is on seconds, never on TFLOP/s, whose conventions differ.
"""

import argparse
import gzip
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from gigatrain.errors import GigatrainError
from gigatrain.planning.estimate import estimate, operations, rows
from gigatrain.planning.estimate.constants import FITTED, PRIORS, TABLE
from gigatrain.planning.estimate.work import Work

DATA = Path(__file__).parent / "data"
NOISE = 0.05  # of a published step time: releases of one stack differ by 5.9 %, vendors' equal nodes by 2.7 % (planning.md 1d)
HUBER = 1.5  # residuals beyond so many times the noise pull linearly
MOST = 48  # rows of one set that the fit sees: every so-manieth one
STEP = 0.05  # of the numeric Jacobian, in the transformed constant


@dataclass(slots=True)
class Row:
    """One measurement with its operations, which depend on no constant."""

    id: str
    set: str
    case: Any
    seconds: float
    works: tuple[Work, ...]
    reads: tuple[str, ...] = ()  # free constants that its estimate reads
    weight: float = 1.0
    moe: bool = False


class Watched(Mapping[str, float]):
    """Constants that remember which of them were read."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values_, self.read = values, set[str]()

    def __getitem__(self, name: str) -> float:
        self.read.add(name)
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def read(paths: Iterable[Path]) -> tuple[list[Row], dict[str, int]]:
    """Rows that can be expressed, with their works, and how many were refused for each reason."""
    found: list[Row] = []
    refused: dict[str, int] = defaultdict(int)
    for path in paths:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                case = rows.parse(json.loads(line))
                row = json.loads(line)
                seconds = case.measured.get("step_time_s") or _by_flops(row, case)
                if not seconds:
                    refused["no seconds"] += 1
                    continue
                works = operations.works(case.workload)
                watched = Watched(PRIORS)
                estimate.timed(works, case.workload, case.cluster, watched)
            except (rows.Refused, GigatrainError) as error:
                refused[f"{json.loads(line).get('set')}: {str(error)[:90]}"] += 1
                continue
            found.append(
                Row(
                    case.id,
                    case.set,
                    case,
                    float(seconds),
                    works,
                    tuple(name for name in watched.read if TABLE[name].spread > 0),
                    moe=case.workload.shape.experts > 0,
                )
            )
    return found, dict(refused)


def _by_flops(row: dict[str, Any], case: rows.Case) -> float | None:
    """Seconds of a row that has TFLOP/s alone, where its page says that it counts what model_flops counts: causal attention, and nothing made again."""
    said = str(row.get("flops_convention") or "")
    if not row.get("model_tflops_per_gpu") or not said.startswith("causal attention"):
        return None
    return operations.model_flops(case.workload) / (float(row["model_tflops_per_gpu"]) * 1e12 * case.workload.layout.ranks)


def thinned(found: list[Row], most: int = MOST) -> list[Row]:
    """At most so many rows of each set, evenly taken; each set weighs as the square root of how many those are."""
    sets: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        sets[row.set].append(row)
    kept: list[Row] = []
    for group in sets.values():
        every = max(1, math.ceil(len(group) / most))
        chosen = group[::every]
        for row in chosen:
            row.weight = 1.0 / math.sqrt(len(chosen))
        kept += chosen
    scale = len(kept) / sum(row.weight for row in kept)
    for row in kept:
        row.weight *= scale
    return kept


def forth(name: str, value: float) -> float:
    return math.log(value / (1 - value)) if TABLE[name].unit == "share" else math.log(value)


def back(name: str, value: float) -> float:
    return 1 / (1 + math.exp(-value)) if TABLE[name].unit == "share" else math.exp(value)


_KNOWN: dict[tuple[object, ...], float] = {}  # fits that leave one set out all begin at the priors, and share what they find there


def seconds(row: Row, values: Mapping[str, float]) -> float:
    key = (row.set, row.id, *(values[name] for name in row.reads))
    if key not in _KNOWN:
        _KNOWN[key] = estimate.timed(row.works, row.case.workload, row.case.cluster, values).step_s
    return _KNOWN[key]


def fit(
    kept: list[Row], iterations: int = 5, say: Callable[[str], None] = lambda _: None, start: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The free constants that fit `kept` best, all others at their priors."""
    import numpy as np

    read_by = set().union(*(row.reads for row in kept))
    free = [name for name, constant in TABLE.items() if constant.spread > 0 and name in read_by]
    prior = np.array([forth(name, TABLE[name].prior) for name in free])
    spread = np.array([TABLE[name].spread for name in free])
    theta = prior.copy() if start is None else np.array([forth(name, start[name]) for name in free])
    weight = np.array([row.weight for row in kept])

    def values(at: Any) -> dict[str, float]:
        return dict(PRIORS) | {name: back(name, float(x)) for name, x in zip(free, at, strict=True)}

    def residuals(at: Any) -> Any:
        constants = values(at)
        return np.array([math.log(seconds(row, constants) / row.seconds) for row in kept])

    def loss(r: Any, at: Any) -> float:
        z = np.abs(r) / NOISE
        robust = np.where(z <= HUBER, z * z / 2, HUBER * (z - HUBER / 2))
        return float((weight * robust).sum() + (((at - prior) / spread) ** 2).sum() / 2)

    r = residuals(theta)
    now = loss(r, theta)
    damping = 1e-2
    for round_ in range(iterations):
        jacobian = np.zeros((len(kept), len(free)))
        for j, name in enumerate(free):
            moved = theta.copy()
            moved[j] += STEP
            constants = values(moved)
            for i, row in enumerate(kept):
                if name in row.reads:
                    jacobian[i, j] = (math.log(seconds(row, constants) / row.seconds) - r[i]) / STEP
        pull = weight * np.minimum(1.0, HUBER * NOISE / np.maximum(np.abs(r), 1e-9)) / NOISE**2
        normal = jacobian.T @ (jacobian * pull[:, None]) + np.diag(1 / spread**2)
        slope = jacobian.T @ (pull * r) + (theta - prior) / spread**2
        before = now
        for _ in range(6):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope)
            tried = theta + np.clip(step, -1.0, 1.0)
            r_tried = residuals(tried)
            tried_loss = loss(r_tried, tried)
            if tried_loss < now:
                theta, r, now, damping = tried, r_tried, tried_loss, damping / 4
                break
            damping *= 6
        say(f"round {round_}: loss {before:.1f} -> {now:.1f}, median |log error| {np.median(np.abs(r)):.3f}")
        if before - now < 1e-3 * before:
            break
    return {name: value for name, value in values(theta).items() if name in free}


Scored = list[tuple[Row, float]]  # and what was predicted, in seconds


def score(found: list[Row], fitted: Mapping[str, float]) -> Scored:
    constants = dict(PRIORS) | dict(fitted)
    return [(row, seconds(row, constants)) for row in found]


def errors(scored: Scored) -> list[float]:
    return [predicted / row.seconds - 1 for row, predicted in scored]


def line(name: str, scored: Scored) -> str:
    found = sorted(abs(e) for e in errors(scored))
    if not found:
        return f"{name:24s} {0:5d}"
    ninety = found[min(len(found) - 1, math.ceil(0.9 * len(found)) - 1)]
    return (
        f"{name:24s} {len(found):5d} {median(found):8.1%} {mean(found):8.1%} {ninety:8.1%} {max(found):8.1%} {mean(errors(scored)):+8.1%}"
    )


def table(scored: Scored) -> str:
    """By set, by kind of model and by accelerator; each row counts once."""
    lines = [f"{'':24s} {'n':>5s} {'median':>8s} {'mean':>8s} {'P90':>8s} {'max':>8s} {'bias':>8s}"]
    groups: dict[str, Scored] = defaultdict(list)
    for row, predicted in scored:
        for key in (f"set {row.set}", "MoE" if row.moe else "dense", f"chip {row.case.cluster.chip}"):
            groups[key].append((row, predicted))
    lines += [line(name, groups[name]) for name in sorted(groups)]
    lines.append(line("all rows", scored))
    even = [pair for name in groups if name.startswith("set ") for pair in groups[name][:: max(1, math.ceil(len(groups[name]) / MOST))]]
    lines.append(line(f"at most {MOST} of a set", even))
    return "\n".join(lines)


def leave_one_out(found: list[Row], iterations: int, say: Callable[[str], None]) -> Scored:
    """Every set predicted by constants that were fitted on all others."""
    scored: Scored = []
    for name in sorted({row.set for row in found}):
        kept = thinned([row for row in found if row.set != name])
        scored += score([row for row in found if row.set == name], fit(kept, iterations))
        say(line(name, [pair for pair in scored if pair[0].set == name]))
    return scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[DATA / "measured.jsonl.gz", DATA / "further.jsonl"],
        help="measurements, one JSON object a line",
    )
    parser.add_argument("--leave-one-out", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"refit {FITTED.name}")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--priors", action="store_true", help="score the priors alone")
    parser.add_argument("--residuals", type=Path, help="where each row's error is written")
    asked = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found, refused = read(asked.data)
    for reason, count in sorted(refused.items()):
        say(f"refused {count}: {reason}")
    if asked.leave_one_out:
        scored = leave_one_out(found, asked.iterations, say)
    elif asked.priors:
        scored = score(found, {})
    else:
        fitted = fit(thinned(found), asked.iterations, say)
        for name, value in sorted(fitted.items()):
            moved = (forth(name, value) - forth(name, TABLE[name].prior)) / TABLE[name].spread
            say(f"{name:44s} {TABLE[name].prior:10.4g} -> {value:10.4g}  ({moved:+.1f} spreads)")
        if asked.write:
            FITTED.write_text(
                json.dumps({name: float(f"{value:.5g}") for name, value in sorted(fitted.items())}, indent=1) + "\n", encoding="utf-8"
            )
        scored = score(found, fitted)
    print(table(scored))
    if asked.residuals:
        asked.residuals.write_text(
            "".join(
                json.dumps({"id": row.id, "set": row.set, "measured_s": row.seconds, "predicted_s": p, "error": p / row.seconds - 1}) + "\n"
                for row, p in scored
            ),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

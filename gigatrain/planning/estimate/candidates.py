"""The layouts that a search found: their records, their reasons in words, and as a table, as JSON and as a recipe's overrides."""

from dataclasses import dataclass, replace
from typing import Any

from gigatrain.errors import PlanError
from gigatrain.planning.estimate import layouts
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.estimate.workload import PRODUCTS_BITS, Layout, Precision, Recompute, Workload


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with what it comes to. `why`: what limits it, what is next, and how it stands to the first."""

    workload: Workload
    estimate: Estimate
    why: str = ""
    changed: bool = False  # whether its precision is another than the recipe's

    @property
    def layout(self) -> Layout:
        return self.workload.layout

    @property
    def microbatch(self) -> int:
        return self.workload.microbatch

    @property
    def accumulation(self) -> int:
        return self.workload.accumulation

    @property
    def recompute(self) -> Recompute:
        return self.workload.recompute

    @property
    def precision(self) -> Precision:
        return self.workload.precision


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to: `considered` configurations in all; of them `pruned`, by reason, never had a price; `played` went through the events."""

    candidates: tuple[Candidate, ...]
    considered: int
    pruned: dict[str, int]
    played: int = 0
    complete: bool = True  # False: `limit_s` or EVENTS ended it before every group that could win was played


def explained(candidates: list[Candidate], base: Workload) -> tuple[Candidate, ...]:
    """Each with its `why`: what the step waits for, what is next, and how it stands to the first."""
    found = []
    for index, candidate in enumerate(candidates):
        said = _limits(candidate.estimate)
        if index:
            said = f"{_against(candidate, candidates[0])}; {said}"
        found.append(replace(candidate, why=said))
    return tuple(found)


# Phases in which the device does the model's own work: nothing is to be won there by another layout.
_WORK = ("gemm", "grouped", "attention")
_NAMES = {
    "memory": "passes over memory", "optimizer": "the optimizer", "launch": "launches", "bubble": "the bubble", "wait": "slow nodes", "host": "the host",
    "gemm": "products", "grouped": "experts' products", "attention": "attention", "exposed_tensor": "tensor transfers", "exposed_context": "context transfers",
    "exposed_expert": "expert transfers", "exposed_shard": "shard transfers", "exposed_replicate": "replica transfers", "exposed_pipeline": "stage transfers",
}  # fmt: skip


def _limits(estimate: Estimate) -> str:
    whole_s = estimate.step_s
    work = sum(estimate.phases.get(name, 0.0) for name in _WORK)
    rest = sorted(((seconds, name) for name, seconds in estimate.phases.items() if name not in _WORK), reverse=True)[:2]
    lost = ", then ".join(f"{_NAMES.get(name, name)} {seconds / whole_s:.0%}" for seconds, name in rest if seconds > 0.005 * whole_s)
    full = ""
    return f"{work / whole_s:.0%} products and attention{f'; {lost}' if lost else ''}{full}"


def _against(candidate: Candidate, first: Candidate) -> str:
    mine, theirs = candidate.estimate, first.estimate
    changes = {name: mine.phases.get(name, 0.0) - theirs.phases.get(name, 0.0) for name in mine.phases.keys() | theirs.phases.keys()}
    name = max(sorted(changes), key=lambda one: changes[one])
    slower = mine.step_s / theirs.step_s - 1
    said = f"{slower:+.1%} step"
    if changes[name] > 0:
        said += f": {_NAMES.get(name, name)} {seconds(changes[name])} more"
    room = theirs.memory_bytes - mine.memory_bytes
    return said + (f", {room / 2**30:.0f} GiB less memory" if room > 0.05 * theirs.memory_bytes else "")


def seconds(value: float) -> str:
    """For a reader: `1.24 s`, `35 ms`."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} us"


# How a precision is written in a recipe: train.precision, fp8.scaling, fp8.amax.
LANES: dict[Precision, tuple[str, ...]] = {
    "fp8_rowwise": ("rowwise",), "fp8_blockwise": ("blockwise",), "fp8_tensorwise": ("tensorwise", "current"), "fp8_delayed": ("tensorwise", "delayed"),
    "mxfp8": ("mxfp8",), "nvfp4": ("nvfp4",),
}  # fmt: skip


def overrides(candidate: Candidate) -> list[str]:
    """The candidate as `--set` of a recipe for gigatrain's own stacks: `["mesh.tensor=4", "train.microbatch=1", ...]`.

    Raises PlanError for another stack's layout, which no recipe of ours can say.
    """
    workload, mine = candidate.workload, candidate.workload.layout
    if workload.stack not in layouts.OWN:
        raise PlanError(
            f'a layout of the stack "{workload.stack}" cannot be written as a recipe; search with "gigatrain_native" or "gigatrain_deepspeed"'
        )
    found = [f"mesh.{axis}={getattr(mine, axis)}" for axis in ("replicate", "shard", "context", "tensor", "pipeline", "expert")]
    found += [
        f"mesh.schedule={mine.schedule}",
        f"mesh.stages={mine.stages}",
        f"mesh.exchange={mine.exchange}",
        f"mesh.dispatch={mine.dispatch}",
    ]
    if workload.stack == "gigatrain_deepspeed":
        found.append(f"engine.zero={mine.zero}")
    elif mine.zero == 3 and mine.pipeline == 1:
        found.append(f"engine.reshard={str(mine.reshard).lower()}")
    found += [f"train.microbatch={workload.microbatch}", f"train.recompute={workload.recompute}"]
    if candidate.changed:
        lane = LANES.get(workload.precision)
        found.append(f"train.precision={'fp8' if lane else workload.precision}")
        if lane:
            found += [f"fp8.{name}={value}" for name, value in zip(("scaling", "amax"), lane, strict=False)]
        elif PRODUCTS_BITS[workload.precision] >= 16:
            found.append("fp8={}")
    return found


def table(found: Found) -> list[str]:
    """Lines for a terminal: one a candidate with its reason below, then how many there were and why the others are not here."""
    head = (
        "",
        "tensor",
        "context",
        "pipeline",
        "expert",
        "shard",
        "replicate",
        "micro x acc",
        "recompute",
        "precision",
        "step",
        "tokens/s/rank",
        "memory",
    )
    rows: list[tuple[str, ...]] = [head]
    for index, candidate in enumerate(found.candidates, 1):
        mine, estimate = candidate.layout, candidate.estimate
        pipeline = str(mine.pipeline)
        if mine.pipeline > 1:
            pipeline += f" {mine.schedule}" + (f" x{mine.stages}" if mine.schedule == "interleaved" else "")
        context = f"{mine.context} {mine.exchange}" if mine.context > 1 else "1"
        kept = "" if mine.reshard or mine.zero < 3 else " kept"
        rows.append(
            (
                str(index), str(mine.tensor), context, pipeline, str(mine.expert), f"{mine.shard} z{mine.zero}{kept}", str(mine.replicate),
                f"{candidate.microbatch} x {candidate.accumulation}", candidate.recompute, candidate.precision,
                f"{seconds(estimate.step_s)} ({estimate.low_s / estimate.step_s - 1:+.0%} {estimate.high_s / estimate.step_s - 1:+.0%})",
                f"{estimate.tokens_per_s_per_rank:,.0f}", f"{estimate.memory_bytes / 2**30:.1f} GiB",
            )
        )  # fmt: skip
    used = [column for column in range(len(head)) if column not in (4, 6) or any(row[column] != "1" for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in used}
    lines = []
    for index, row in enumerate(rows):
        lines.append("  ".join(row[column].ljust(widths[column]) for column in used).rstrip())
        if index:
            lines.append(f"   {found.candidates[index - 1].why}")
    lines.append(f"{found.considered:,} layouts considered, {found.played} played by events; not shown:")
    lines += [f"   {count:>12,}  {reason}" for reason, count in sorted(found.pruned.items(), key=lambda one: (-one[1], one[0]))]
    if not found.complete:
        lines.append("   the search ended early: what is shown is the best of what was seen")
    return lines


def tree(found: Found) -> dict[str, Any]:
    """The same for a machine, in JSON's types."""
    return {
        "considered": found.considered,
        "played": found.played,
        "complete": found.complete,
        "pruned": found.pruned,
        "candidates": [
            {
                "layout": {name: getattr(one.layout, name) for name in Layout.__slots__},
                "microbatch": one.microbatch,
                "accumulation": one.accumulation,
                "recompute": one.recompute,
                "precision": one.precision,
                "step_s": one.estimate.step_s,
                "low_s": one.estimate.low_s,
                "high_s": one.estimate.high_s,
                "tokens_per_s_per_rank": one.estimate.tokens_per_s_per_rank,
                "memory_bytes": one.estimate.memory_bytes,
                "phases": one.estimate.phases,
                "limits": one.estimate.limits,
                "why": one.why,
                "overrides": overrides(one) if one.workload.stack in layouts.OWN else None,
            }
            for one in found.candidates
        ],
    }

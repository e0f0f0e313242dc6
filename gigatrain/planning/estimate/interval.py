"""How sure an estimate is: 90 % intervals from errors on sources that the constants were not fitted on, and in what a case is outside of them.

Split conformal prediction (Vovk 2005; Lei 2018) on |log(measured / estimated)|, with every source estimated by constants that were fitted without it. Rows of
one source err alike, so that a source weighs as the square root of its rows (of TELLING at most), and the finite-sample correction counts what is left by
Kish's effective number. A group (family of accelerators, stack, dense or MoE) with few sources leans on the wider group that it belongs to. `learn` makes
interval.json from such residuals (benchmarks/plan.py --write); `interval` reads it.

Peaks of memory have their own, by stack (`learn_memory`, `memory_interval`): no constant is refitted for them, so residuals are of all rows.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gigatrain.planning import hardware
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.workload import PRODUCTS_BITS, Workload

LEARNT = Path(__file__).with_name("interval.json")
COVERED = 0.90  # share of rows that an interval is to hold
PARENT = 2.0  # so many sources of a group's own weigh as much as the wider group; prior: one source tells little of the next
FEWEST = 6  # rows of a group, below which it is no group
TELLING = 100  # rows of one source, beyond which more of them tell nothing new of other sources; prior
NARROWEST = 0.03  # half a width in log(seconds); vendors' equal nodes differ by 2.7 % (MLPerf v5.1, planning.md 1d)
BEYOND = 1.25  # what each thing outside of the calibrated domain widens by; prior: nobody has measured it
WIDEST = 1.1  # half a width in log(seconds), a factor of 3: what is less sure is no estimate
OWN = frozenset(
    {"gigatrain_native", "gigatrain_deepspeed"}
)  # stacks whose weights, gradients and optimizer states planning/cost.py counts exactly
STATES = ("weights", "gradients", "optimizer")
ROOM = 2.0  # a size may be beyond the largest measured one by so much before it is outside: an octave
FAMILIES = {
    "sm_80": "Ampere",
    "sm_90": "Hopper",
    "sm_100": "Blackwell",
    "sm_103": "Blackwell",
    "gfx90a": "CDNA",
    "gfx942": "CDNA",
    "gfx950": "CDNA",
}


@dataclass(frozen=True, slots=True)
class Residual:
    """One row of a source: log(measured / estimated) by constants that were fitted without that source."""

    source: str
    group: tuple[str, ...]  # family, stack, dense or MoE
    log_ratio: float


@dataclass(frozen=True, slots=True)
class Peak:
    """One row that tells a peak of memory."""

    source: str
    stack: str
    log_ratio: float  # log(measured / what that row's meter would show of the estimate)
    rest: (
        float | None
    )  # the same of what is not STATES; None: less was measured than the states alone, so that they are not what the row's stack holds
    torch: bool  # metered by torch's allocator, as our own runs are; else by a monitor of the device, or nobody says


def family(chip: str) -> str:
    """The generation of accelerators that a chip belongs to, whose errors are alike; its architecture's own name where it has no other."""
    architecture = hardware.CHIPS[chip].architecture if chip in hardware.CHIPS else None
    return FAMILIES.get(architecture or "", architecture or "unknown")


def group(workload: Workload, cluster: Cluster) -> tuple[str, str, str]:
    """(family, stack, dense or MoE)."""
    return family(cluster.chip), workload.stack, "MoE" if workload.shape.experts else "dense"


def interval(workload: Workload, cluster: Cluster, step_s: float) -> tuple[float, float]:
    """(low, high) seconds of a step, which hold the measured one in nine of ten cases of a source that nothing was fitted on."""
    wide = math.exp(width(group(workload, cluster), len(outside(workload, cluster))))
    return step_s / wide, step_s * wide


def width(named: Sequence[str], beyond: int = 0, learnt: Mapping[str, Any] | None = None) -> float:
    """Half the interval in log(seconds): that of the narrowest group that was learnt, wider by each of `beyond` things outside of the domain."""
    widths: Mapping[str, float] = (_learnt() if learnt is None else learnt)["widths"]
    found = next(widths[key] for key in _wider(named) if key in widths)
    return min(WIDEST, max(NARROWEST, found) * BEYOND**beyond)


def _wider(named: Sequence[str]) -> tuple[str, ...]:
    """Keys from the group itself to all rows: its family and kind without the stack, then its kind alone."""
    chips, stack, kind = named
    return f"{chips} {stack} {kind}", f"{chips} {kind}", kind, "all"


def learn(residuals: Iterable[Residual]) -> dict[str, float]:
    """Half widths in log(seconds) by group: each its own quantile, drawn toward the wider group's by how few sources it has."""
    members: dict[str, list[Residual]] = {}
    for residual in residuals:
        for key in _wider(residual.group):
            members.setdefault(key, []).append(residual)
    widths: dict[str, float] = {}
    for key in sorted(members, key=lambda name: (name != "all", name.count(" "))):
        found = members[key]
        if key != "all" and len(found) < FEWEST:
            continue
        own = quantile(found)
        if key == "all":
            widths[key] = own
            continue
        parent = next(widths[wider] for wider in _wider(found[0].group)[_wider(found[0].group).index(key) + 1 :] if wider in widths)
        widths[key] = _leaning(own, len({residual.source for residual in found}), parent)
    return widths


def memory_interval(workload: Workload, held: Mapping[str, float], learnt: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """(low, high) bytes that a rank of `held` (residency.memory) peaks at, in nine of ten cases.

    Of our own stacks the states are exact, and only the rest is uncertain: as the rest of rows that torch's allocator metered, as it does ours. No run of our
    own on a GPU has told its peak yet. Other stacks have the width of their rows; those without, that of all rows, widened.
    """
    widths: Mapping[str, float] = (_learnt() if learnt is None else learnt)["memory"]
    total = sum(held.values())
    exact = sum(held[name] for name in STATES) if workload.stack in OWN else 0.0
    wide = widths["rest by torch"] if workload.stack in OWN else memory_width(workload.stack, widths)
    low, high = (exact + (total - exact) * math.exp(sign * wide) for sign in (-1, 1))
    return min(low, total * math.exp(-NARROWEST)), max(high, total * math.exp(NARROWEST))


def memory_width(stack: str, widths: Mapping[str, float]) -> float:
    """Half the interval of a whole peak in log(bytes): that of the stack, or where nobody measured it that of all rows, widened."""
    return widths.get(stack, min(WIDEST, widths["all"] * BEYOND))


def learn_memory(peaks: Iterable[Peak]) -> dict[str, float]:
    """Half widths in log(bytes), each source counting alike: of all rows, of each stack with enough of them, and of what is not states (`rest`)."""
    found = list(peaks)

    def wide(some: Sequence[Peak], rest: bool, parent: float | None = None) -> float:
        told = [Residual(one.source, (), value) for one in some if (value := one.rest if rest else one.log_ratio) is not None]
        return _leaning(quantile(told, alike=True), len({one.source for one in told}), parent)

    widths = {"all": wide(found, False), "rest": wide(found, True)}
    widths["rest by torch"] = (
        wide([one for one in found if one.torch], True, widths["rest"]) if any(one.torch for one in found) else widths["rest"]
    )
    for stack in sorted({one.stack for one in found} - {"generic"}):  # what nobody knows is no stack: the next one is another
        some = [one for one in found if one.stack == stack]
        if len(some) >= FEWEST:
            widths[stack] = wide(some, False, widths["all"])
    return widths


def _leaning(own: float, sources: int, parent: float | None) -> float:
    """A group's width, drawn toward the wider group's by how few sources it has."""
    return own if parent is None else math.exp((sources * math.log(own) + PARENT * math.log(parent)) / (sources + PARENT))


def quantile(residuals: Sequence[Residual], covered: float = COVERED, alike: bool = False) -> float:
    """The conformal quantile of |log ratio|: with the correction for a finite number, the largest where that asks for more than there is.

    `alike`: a source weighs as any other, however many rows it has.
    """
    counts: dict[str, int] = {}
    for residual in residuals:
        counts[residual.source] = counts.get(residual.source, 0) + 1
    weights = {source: (1.0 if alike else math.sqrt(min(count, TELLING))) / count for source, count in counts.items()}
    weighed = sorted((abs(residual.log_ratio), weights[residual.source]) for residual in residuals)
    total = sum(weight for _, weight in weighed)
    effective = total**2 / sum(weight**2 for _, weight in weighed)
    asked = min(1.0, covered * (1 + 1 / effective)) * total
    summed = 0.0
    for found, weight in weighed:
        summed += weight
        if summed >= asked - 1e-9 * total:
            return max(found, NARROWEST)
    return max(weighed[-1][0], NARROWEST)


@cache
def _learnt() -> dict[str, Any]:
    return json.loads(LEARNT.read_text(encoding="utf-8"))


# ---- the domain ----


def outside(workload: Workload, cluster: Cluster) -> tuple[str, ...]:
    """In what a case is beyond the measurements that constants were fitted on, in words; empty: in nothing."""
    return beyond(workload, cluster, _learnt()["domain"])


def beyond(workload: Workload, cluster: Cluster, domain: Mapping[str, Any]) -> tuple[str, ...]:
    """As `outside`, of a given domain (what `domain` made)."""
    said: list[str] = []
    chips, stack, kind = group(workload, cluster)
    of_chip, of_stack = domain["chips"].get(cluster.chip), domain["stacks"].get(stack)
    if of_chip is None:
        said.append(f"no run on {cluster.chip} was measured" + ("" if chips in domain["families"] else f", nor on any {chips}"))
    elif _bits(workload) not in of_chip["bits"]:
        said.append(f"no run in {_bits(workload)} bits on {cluster.chip} was measured")
    if of_stack is None:
        said.append(f"no run of the stack {stack} was measured")
    if kind == "MoE" and kind not in domain["families"].get(chips, ()) and chips in domain["families"]:
        said.append(f"no MoE on {chips} was measured")
    for name, found in _sizes(workload).items():
        low, high = domain["sizes"][name]
        if found > high * ROOM:
            said.append(f"{name} {found:,.6g} (measured: up to {high:,.6g})")
        elif name in _BOTH and found < low / ROOM:
            said.append(f"{name} {found:,.6g} (measured: from {low:,.6g})")
    if cluster.cap_watts is not None:
        sold = hardware.CHIPS[cluster.chip].watts.value if cluster.chip in hardware.CHIPS else None
        if sold is not None and cluster.cap_watts < 0.99 * sold:
            said.append(f"a power cap of {cluster.cap_watts:,.0f} W (measured: none below {sold:,.0f} W)")
    if cluster.clock_share < 0.99:
        said.append(f"clocks at {cluster.clock_share:.0%} (measured: none that were set)")
    for word, holds in _features(workload).items():
        if holds and word not in domain["features"]:
            said.append(f"no run with {word} was measured")
    return tuple(said)


def domain(cases: Iterable[tuple[Workload, Cluster]]) -> dict[str, Any]:
    """What the cases hold, as interval.json keeps it: chips with their precisions, families with their kinds, stacks, ranges of sizes, and features."""
    chips: dict[str, set[int]] = {}
    families: dict[str, set[str]] = {}
    stacks: dict[str, int] = {}
    sizes: dict[str, list[float]] = {}
    features: set[str] = set()
    for workload, cluster in cases:
        of_family, stack, kind = group(workload, cluster)
        chips.setdefault(cluster.chip, set()).add(_bits(workload))
        families.setdefault(of_family, set()).add(kind)
        stacks[stack] = stacks.get(stack, 0) + 1
        for name, value in _sizes(workload).items():
            low, high = sizes.setdefault(name, [value, value])
            sizes[name] = [min(low, value), max(high, value)]
        features |= {word for word, holds in _features(workload).items() if holds}
    return {
        "chips": {chip: {"bits": sorted(bits)} for chip, bits in sorted(chips.items())},
        "families": {name: sorted(kinds) for name, kinds in sorted(families.items())},
        "stacks": dict(sorted(stacks.items())),
        "sizes": dict(sorted(sizes.items())),
        "features": sorted(features),
    }


_BOTH = ("hidden size",)  # also too small


def _bits(workload: Workload) -> int:
    return PRODUCTS_BITS[workload.precision]


def _sizes(workload: Workload) -> dict[str, float]:
    shape, layout = workload.shape, workload.layout
    return {
        "ranks": layout.ranks,
        "sequence": workload.sequence,
        "hidden size": shape.hidden,
        "layers": shape.layers,
        "tensor parallelism": layout.tensor,
        "pipeline parallelism": layout.pipeline,
        "context parallelism": layout.context,
        "expert parallelism": layout.expert,
        "experts": shape.experts,
    }


def _features(workload: Workload) -> dict[str, bool]:
    """What changes a step's work by more than its sizes do."""
    shape, layout = workload.shape, workload.layout
    return {
        "latent attention": shape.kv_rank is not None,
        "windowed attention": any(window is not None for window in shape.windows),
        "multi-token prediction": shape.predicted > 0,
        "frozen weights (LoRA)": workload.frozen,
        "offloaded optimizer states": workload.offload,
        "the Muon optimizer": workload.optimizer == "muon",
        "a zero-bubble schedule": layout.schedule == "zbv",
        "Ulysses": layout.context > 1 and layout.exchange == "ulysses",
        "packed documents": workload.documents > 0,
        "CUDA graphs": workload.graphed,
    }

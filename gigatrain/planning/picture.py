"""What a picture of a plan is made of: one record, and the functions that find its rooflines, roles and scaling curve. Free of torch.

observe/report/planned.py draws it. Whoever fills it leaves out what is unknown; nothing here is guessed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gigatrain.errors import PlanError
from gigatrain.planning import hardware
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.pieces import WHOLE_EXPERTS
from gigatrain.planning.estimate.work import Block, Estimate, Item, Op, Transfer
from gigatrain.planning.estimate.workload import Layout, Workload
from gigatrain.planning.expected import Expected, Range

COMPUTE = ("gemm", "grouped", "attention", "memory", "optimizer")
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 288000)  # accelerators of a scaling curve
LARGEST_SHARD = 512  # ranks that share one copy, as a curve grows: beyond it replicas are added, as HSDP does


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout of a search. `why`: what it has over the others, or they over it."""

    name: str
    step_s: float
    low_s: float
    high_s: float
    phases: Mapping[str, float]
    memory_bytes: float
    fits: bool | None
    tokens_per_s: float
    limits: str = ""
    why: str = ""
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Role:
    """One pipeline rank: seconds of a step by kind of work, with `wait`, which is what is left of it; bytes by kind; mean watts of its device."""

    name: str
    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    communication_s: float = 0.0  # of its transfers, hidden behind work or not
    watts: float | None = None


@dataclass(frozen=True, slots=True)
class Roof:
    """What one rank's device can do at most: FLOP/s by name of the operands as sold, and bytes/s of its memory."""

    chip: str
    peaks: Mapping[str, float]
    bytes_s: float


@dataclass(frozen=True, slots=True)
class Point:
    """Operations of one name in a step of one rank, all passes together. `flops_s` and `bytes_s` are what the estimate has them reach."""

    name: str
    kind: str
    flops: float
    bytes: float
    seconds: float
    bits: int = 16

    @property
    def intensity(self) -> float | None:
        return self.flops / self.bytes if self.bytes else None


@dataclass(frozen=True, slots=True)
class Scale:
    """The workload at one number of accelerators; `unknown` says why it has no figures."""

    accelerators: int
    layout: str = ""
    batch: int = 0  # samples of a step
    step_s: float | None = None
    tokens_per_s: float | None = None
    goodput: float | None = None  # a share
    facility_watts: float | None = None
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Boundary:
    """Watts of the whole run at one boundary of POWER.md."""

    name: str  # device | node | it | facility
    mean: Range
    peak: float | None = None  # every device at its limit
    nameplate: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one change of an assumption does."""

    what: str
    changed: str  # in words: "failures twice as often"
    goodput: float | None = None
    days: float | None = None
    eur: float | None = None


@dataclass(frozen=True, slots=True)
class Cap:
    """A power limit of one accelerator: the share of the uncapped speed that it leaves, and what the device then draws in the mean."""

    watts: float
    speed: float
    device_watts: float


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Where sliders begin; None leaves out the slider and what hangs on it. Between `PlanPicture.scaling` rows and `caps` is interpolated."""

    accelerators: int
    tokens: float  # of the whole run
    failures_per_day: float | None = None  # of a thousand accelerators
    save_s: float | None = None  # that a checkpoint stops training for
    recovery_s: float | None = None  # detection, restart and load
    it_watts: float | None = None  # of one accelerator with its share of everything at IT
    pue: float | None = None
    eur_mwh: float | None = None
    g_kwh: float | None = None  # CO2 of a kWh
    caps: tuple[Cap, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanPicture:
    """All that the page of a plan shows. Empty parts are not drawn, or their absence is said."""

    title: str
    summary: str = ""
    facts: tuple[tuple[str, str], ...] = ()  # the plan's main settings: name, text
    lines: tuple[str, ...] = ()  # as `gigatrain plan` prints them
    expected: Expected = field(default_factory=Expected)
    estimate: Estimate | None = None
    memory_limit: float | None = None  # bytes of the device
    roles: tuple[Role, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    roof: Roof | None = None
    points: tuple[Point, ...] = ()
    scaling: tuple[Scale, ...] = ()
    scaled: str = ""  # how the curve grows, in a sentence
    boundaries: tuple[Boundary, ...] = ()
    states: Mapping[str, float] = field(default_factory=dict)  # watts of one device while it does each kind of work
    sensitivity: tuple[Sensitivity, ...] = ()
    what_if: WhatIf | None = None
    sources: tuple[str, ...] = ()  # of the figures


# ---- Where the numbers come from ----


def layout_words(layout: Layout) -> str:
    """`replicate 4 x shard 64 x tensor 8`, with what else tells layouts apart."""
    axes = ("replicate", "shard", "context", "tensor", "pipeline")
    found = [f"{axis} {getattr(layout, axis)}" for axis in axes if getattr(layout, axis) > 1]
    if layout.expert > 1:
        found.append(f"expert {layout.expert}")
    more = [layout.schedule + (f" of {layout.stages}" if layout.stages > 1 else "")] if layout.pipeline > 1 else []
    return ", ".join([" x ".join(found) or "one rank", *more, f"ZeRO-{layout.zero}"])


def roofline(workload: Workload, cluster: Cluster, constants: Mapping[str, float] | None = None) -> tuple[Roof, tuple[Point, ...]]:
    """The device's roof, and what the operations of its busiest pipeline rank reach of it by the estimate; raises PlanError for an unknown chip."""
    from gigatrain.planning.estimate import estimate, operations, rates
    from gigatrain.planning.estimate.constants import VALUES

    constants = VALUES if constants is None else constants
    found = rates.device(cluster.chip)
    names = {32: "fp32", 16: "bf16", 8: "fp8", 4: "fp4"}
    peaks = {names[bits]: rate for bits, rate in sorted(found.peak.items(), reverse=True) if bits in (16, min(16, _bits(workload)))}
    habits = estimate.habits_of(workload, cluster, constants)
    of = estimate.timer(workload, cluster, habits, constants)
    best: dict[tuple[str, str], Point] = {}
    for work in operations.works(workload):
        mine: dict[tuple[str, str], Point] = {}
        for item, times in _items(work.stages, work.step, workload.accumulation):
            if isinstance(item, Op):
                key, seconds = (item.name, item.kind), of(item).seconds * times
                moved = item.bytes * rates.remains(item, habits)[0]  # of what the stack's fused passes leave
                old = mine.get(key, Point(item.name, item.kind, 0.0, 0.0, 0.0, item.bits))
                mine[key] = replace(
                    old, flops=old.flops + item.flops * times, bytes=old.bytes + moved * times, seconds=old.seconds + seconds
                )
        if sum(one.seconds for one in mine.values()) > sum(one.seconds for one in best.values()):
            best = mine
    return Roof(hardware.chip(cluster.chip).name, peaks, found.bandwidth), tuple(sorted(best.values(), key=lambda one: -one.seconds))


def _bits(workload: Workload) -> int:
    from gigatrain.planning.estimate.workload import PRODUCTS_BITS

    return PRODUCTS_BITS[workload.precision]


def _items(stages: Sequence[Sequence[Block]], step: Iterable[Item], times: int) -> Iterable[tuple[Item, int]]:
    """Every item of a rank's step, with how often it comes."""
    for stage in stages:
        for block in stage:
            for item in (*block.forward, *block.recompute, *block.backward):
                yield item, times
    for item in step:
        yield item, 1


def roles(
    workload: Workload,
    cluster: Cluster,
    estimate: Estimate,
    states: Mapping[str, float] | None = None,
    constants: Mapping[str, float] | None = None,
) -> tuple[Role, ...]:
    """Each pipeline rank's seconds, bytes and, where `states` has the watts of a device by kind of work (energy.Draw.states), its mean watts."""
    from gigatrain.planning.estimate import estimate as estimating
    from gigatrain.planning.estimate import operations
    from gigatrain.planning.estimate.constants import VALUES

    constants = VALUES if constants is None else constants
    of = estimating.timer(workload, cluster, estimating.habits_of(workload, cluster, constants), constants)
    found = []
    works = operations.works(workload)
    for rank, work in enumerate(works):
        seconds, transfers = dict.fromkeys(COMPUTE, 0.0), 0.0
        for item, times in _items(work.stages, work.step, workload.accumulation):
            spent = of(item).seconds * times
            if isinstance(item, Transfer):
                transfers += spent
            else:
                seconds[item.kind] += spent
        wait = max(0.0, estimate.step_s - sum(seconds.values()))
        watts = None
        if states and all(kind in states for kind in ("communication", "idle")):
            moved = min(wait, transfers)
            joules = sum(spent * states.get(kind, states["communication"]) for kind, spent in seconds.items())
            whole = max(estimate.step_s, sum(seconds.values()))
            watts = (joules + moved * states["communication"] + (wait - moved) * states["idle"]) / whole
        name = "every rank" if len(works) == 1 else f"pipeline rank {rank}"
        held = estimate.memory_by_rank[rank] if rank < len(estimate.memory_by_rank) else {}
        found.append(Role(name, {kind: spent for kind, spent in (seconds | {"wait": wait}).items() if spent}, held, transfers, watts))
    return tuple(found)


def grown(workload: Workload, ranks: int) -> Workload:
    """The workload on `ranks`: what holds one copy stays as it is, copies are added, and with them samples of a step.

    Raises PlanError where `ranks` hold no whole number of copies.
    """
    layout = workload.layout
    model = layout.context * layout.tensor * layout.pipeline
    if ranks % model:
        raise PlanError(f"{ranks:,} ranks are no multiple of {model:,}, which one copy of this layout takes (context x tensor x pipeline)")
    data = ranks // model
    most = layout.shard if layout.replicate > 1 else max(layout.shard, LARGEST_SHARD)
    shard = max(size for size in range(1, min(data, most) + 1) if data % size == 0)
    inner = shard  # of our own engines; Megatron's experts are shared by context and tensor ranks too
    if workload.stack not in WHOLE_EXPERTS:
        inner *= layout.context * (layout.tensor if layout.expert_tensor == 1 else 1)
    if layout.expert > 1 and inner % layout.expert:
        raise PlanError(f"expert {layout.expert} does not divide the {inner:,} ranks that share experts at {ranks:,} ranks")
    return replace(workload, layout=replace(layout, shard=shard, replicate=data // shard))


def scaling(
    workload: Workload,
    cluster_of: Callable[[int], Cluster],
    counts: Sequence[int] = COUNTS,
    *,
    workload_of: Callable[[int], Workload] | None = None,
    estimate_of: Callable[[Workload, Cluster], Estimate] | None = None,
    goodput_of: Callable[[int, Estimate], float | None] = lambda count, estimate: None,
    watts_of: Callable[[int, Estimate], float | None] = lambda count, estimate: None,
) -> tuple[Scale, ...]:
    """A row for each number of accelerators: of the layout `grown`, or of what `workload_of` has for so many ranks. What cannot be says why.

    `cluster_of` is given accelerators, `workload_of` ranks; `goodput_of` and `watts_of` (facility) accelerators and the estimate.
    """
    if estimate_of is None:
        from gigatrain.planning.estimate.estimate import estimate as estimate_of
    rows = []
    for count in counts:
        try:
            cluster = cluster_of(count)
            ranks = count * hardware.chip(cluster.chip).devices
            chosen = grown(workload, ranks) if workload_of is None else workload_of(ranks)
            found = estimate_of(chosen, cluster)
        except PlanError as failure:
            rows.append(Scale(count, unknown=str(failure)))
            continue
        if found.fits is False:
            held = f"it needs {found.memory_bytes / 2**30:,.0f} GiB of a rank"
            rows.append(Scale(count, layout_words(chosen.layout), chosen.batch, unknown=f"does not fit: {held}"))
            continue
        rows.append(
            Scale(
                count, layout_words(chosen.layout), chosen.batch, found.step_s, found.tokens_per_s, goodput_of(count, found),
                watts_of(count, found),
            )
        )  # fmt: skip
    return tuple(rows)


def caps(
    workload: Workload,
    cluster: Cluster,
    limits: Sequence[float],
    watts_of: Callable[[Cluster, Estimate], float | None],
    estimate_of: Callable[[Workload, Cluster], Estimate] | None = None,
) -> tuple[Cap, ...]:
    """Power limits of an accelerator, and what each leaves of the speed at the highest; `watts_of` is a device's mean draw. What cannot be is left out."""
    if estimate_of is None:
        from gigatrain.planning.estimate.estimate import estimate as estimate_of
    found: list[tuple[float, float, float]] = []
    for limit in sorted(limits):
        capped = replace(cluster, cap_watts=limit)
        try:
            step = estimate_of(workload, capped)
        except PlanError:
            continue
        if (watts := watts_of(capped, step)) is not None:
            found.append((limit, step.tokens_per_s, watts))
    return tuple(Cap(limit, speed / found[-1][1], watts) for limit, speed, watts in found)

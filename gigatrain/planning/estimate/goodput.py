"""What share of a run's wall-clock is retained work: failures, saves at two tiers, restarts, spares, maintenance; in closed form.

A run is stopped at exponential times by hazards, each with a hold (detection, restart, load), which the next hazard may interrupt, and a place where
it lands: where it was (`stay`: maintenance, a lost replica), at the last `near` save or at the last `far` one. With the total rate L,
A = sum p_k (1 - exp(-L hold_k)) is the chance that a hold is interrupted, and every second of running costs 1 / (1 - A) of wall-clock; a chain of
holds lands at its worst. One tier is then Daly's exact

    share = L T (1 - A) / (exp(L (T + stall)) - 1)     T: work between saves; J. Daly, FGCS 22 (2006) 303, whose restart is exp(-L R) for one kind

and two tiers are the mean time to absorption of a chain over the near segments of a far one. A save that is written beside training for w seconds costs
exp(L w). What is approximated: replicas out, nodes in repair and corrupted stretches as stationary and independent of the rest; goodput_simulation.py
has none of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gigatrain.errors import PlanError
from gigatrain.planning.estimate.failures import DAY_S, Failures, elsewhere
from gigatrain.planning.estimate.recovery import WRITE_GBYTE_S, Pool, Restart, Saving, Spares

_Z = 1.6448536  # of a 90 % interval
DAYS = 30.0  # of a run that nobody said the length of
MANY = 32_768  # accelerators; published rates of single runs end here, but for one of a whole cluster of 98K


@dataclass(frozen=True, slots=True)
class Hazard:
    """One way of being stopped. `lands`: 0 stays where it was, 1 at the last near save, 2 at the last far one."""

    name: str
    rate_s: float  # 1/s
    detect_s: float
    restart_s: float  # loading included
    lands: int
    nodes: int = 0  # that go to repair
    lag_s: float = 0.0  # trained on in vain before it is noticed
    rebuild_s: float = 0.0  # one replica is out, beyond the hold


@dataclass(frozen=True, slots=True)
class Case:
    """A run of `replicas` that each hold the whole model; with `tolerance` the others go on when one is lost (torchft, HSDP)."""

    accelerators: int
    per_node: int
    step_s: float
    failures: Failures
    saving: Saving
    restart: Restart = Restart()  # noqa: RUF009 - frozen
    spares: Spares = Spares()  # noqa: RUF009 - frozen
    replicas: int = 1
    tolerance: bool = False
    days: float = DAYS

    def tolerates(self) -> bool:
        return self.tolerance and self.replicas > 1


@dataclass(frozen=True, slots=True)
class Goodput:
    """Shares of the wall-clock; `low` and `high` are the ends of a 90 % interval of a run of `days`. `lost` adds up to 1 - share."""

    share: float
    low: float
    high: float
    lost: dict[str, float]  # checkpoint, redone, detection, restart, corruption, maintenance, wait, reduced
    interval_s: float  # of training between two saves on the shared file system
    every_steps: int
    near_every_steps: int | None  # in node memory
    spares: int  # nodes
    mtbf_s: float
    recovery_s: float  # detection, restart and load, mean
    per_accelerator: float  # share times those that run over all, spares counted by their idle share
    assumed: tuple[str, ...] = ()
    table: tuple[str, ...] = field(default=(), compare=False)  # lines for --explain


def hazards(case: Case) -> tuple[Hazard, ...]:
    """Every way in which this run is stopped, with its rate and what it takes until the next step."""
    failures, saving, restart = case.failures, case.saving, case.restart
    total = failures.per_s(case.accelerators, case.days, case.per_node)
    again = restart.seconds(case.accelerators)
    load = tuple(saving.load_s(case.accelerators, near) for near in (False, True))
    found = []
    for kind in failures.kinds:
        alone = kind.node_share * (1 - failures.correlated_share)
        for share, nodes in ((1 - kind.node_share, 0), (alone, 1), (kind.node_share - alone, failures.correlated_nodes)):
            rate = total * kind.share * share
            if rate <= 0:
                continue
            if case.tolerates() and not kind.everywhere:
                hold = restart.stall_s + restart.rejoin_s
                rebuild = max(0.0, again + load[True] - hold)
                found.append(Hazard(kind.name, rate, 0.0, hold, 0, nodes, rebuild_s=rebuild))
            elif kind.corrupts:
                found.append(Hazard(kind.name, rate, 0.0, again + load[False], 2, nodes, lag_s=kind.detect_s))
            else:
                near = saving.near and nodes < 2  # a node's copy is at its peer, which goes with it when several go
                found.append(Hazard(kind.name, rate, kind.detect_s, again + load[near], 1 if near else 2, nodes))
    if failures.planned_per_day > 0:
        rate = failures.planned_per_day / DAY_S
        found.append(Hazard("maintenance", rate, 0.0, failures.planned_s + again + load[saving.near], 0))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Chain:
    """The sums over hazards that every interval shares."""

    rate: float = 0.0
    inverse: float = 1.0  # wall-clock of a second of running
    parts: dict[str, float] = field(default_factory=dict)  # of the time in holds, adding up to 1
    ruin: float = 0.0  # rate of what loses work
    near: float = 0.0  # chance that it lands at the near save
    near_rate: float = 0.0
    far_rate: float = 0.0
    hold_s: float = 0.0  # mean
    hold_square: float = 0.0
    corrupted: float = 0.0  # share of the running time that trains on what is wrong already


def _chain(found: tuple[Hazard, ...]) -> _Chain:
    """The sums, with corruptions at the rate at which they happen: only to what runs, and is not corrupted yet."""
    chain = _sums(found)
    if any(one.lag_s > 0 for one in found):
        for _ in range(8):
            on = 1 / chain.inverse
            beyond = (1 - on) ** 2 / chain.rate  # it began while it ran, and so runs a little longer than at any moment (exponential holds)
            load = sum(one.rate_s * (on * one.lag_s + min(beyond, (1 - on) * one.lag_s)) for one in found if one.lag_s > 0)
            corrupted = load / (1 + load)
            chain = _sums(tuple(replace(one, rate_s=one.rate_s * on * (1 - corrupted)) if one.lag_s > 0 else one for one in found))
            chain = replace(chain, corrupted=corrupted)
    return chain


def _sums(found: tuple[Hazard, ...]) -> _Chain:
    rate = sum(one.rate_s for one in found)
    if rate <= 0:
        return _Chain()
    mean = square = 0.0
    whole, kept = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]  # by where they land: chance of a hold that is interrupted, and of one that is not
    parts = {"restart": 0.0, "detection": 0.0, "maintenance": 0.0}
    for one in found:
        share, hold = one.rate_s / rate, one.detect_s + one.restart_s
        cut = -math.expm1(-rate * hold)
        whole[one.lands] += share * cut
        kept[one.lands] += share * (1 - cut)
        mean += share * (hold + one.lag_s)
        square += share * (hold + one.lag_s) ** 2
        seen = -math.expm1(-rate * one.detect_s)
        parts["detection"] += share * seen
        parts["maintenance" if one.name == "maintenance" else "restart"] += share * (cut - seen)
    broken = sum(whole)
    parts = {name: value / broken for name, value in parts.items() if value > 0}
    if 1 - broken < 1e-12:
        return _Chain(rate, math.inf, parts, rate, 0.0, 0.0, rate, mean, square)
    stay = kept[0] / (1 - whole[0])
    near = (kept[0] + kept[1]) / (1 - whole[0] - whole[1])  # at the near save or where it was
    back = (near - stay) / (1 - stay) if stay < 1 else 0.0
    return _Chain(rate, 1 / (1 - broken), parts, rate * (1 - stay), back, rate * (near - stay), rate * (1 - near), mean, square)


def running(
    chain: _Chain, near_s: float, near_stall_s: float, near_lag_s: float, far_s: float, far_stall_s: float, far_lag_s: float
) -> float:
    """Useful work over time spent running, for near saves every `near_s` and far ones every `far_s` of work. `near_s` 0: one tier."""
    work = near_s or far_s
    count = max(1.0, far_s / work)
    stall = near_stall_s if near_s else 0.0
    if chain.ruin <= 0:
        return count * work / (count * (work + stall) + far_stall_s)
    if chain.ruin * (count * (work + stall) + far_stall_s) > 500:
        return 0.0
    rate, back = chain.ruin, chain.near if near_s else 0.0

    def segment(length: float) -> tuple[float, float]:
        """Mean time in a segment and the chance that it is left forwards, not for the far save."""
        fail = -math.expm1(-rate * length)
        return fail / rate / (1 - fail * back), math.exp(-rate * length) / (1 - fail * back)

    mean, on = segment(work + stall)
    last_mean, last_on = segment(work + stall + far_stall_s)
    before = on ** (count - 1)
    steps = (1 - before) / (1 - on) if on < 1 else count - 1
    if before * last_on <= 0:
        return 0.0
    spent = (mean * steps + before * last_mean) / (before * last_on)
    lag = chain.far_rate * far_lag_s + (chain.near_rate * near_lag_s if near_s else 0.0)
    if not near_s:
        lag = chain.ruin * far_lag_s
    return count * work / (spent * math.exp(lag))


def expected(case: Case) -> Goodput:
    """Goodput of a case, at the best intervals and number of spares where it leaves them open, with its 90 % interval.

    The interval has the rate's own (Failures.range) and the chance of a run of `days` (Poisson); intervals and spares stay as they were planned.
    """
    _check(case)
    far_s, near_s = _intervals(case)
    spares = _spares(case) if case.spares.nodes is None else case.spares.nodes
    share, lost, chain = _at(case, far_s, near_s, spares)
    ends = []
    for factor in case.failures.range():
        other = replace(case, failures=replace(case.failures, per_accelerator_s=case.failures.per_accelerator_s * factor))
        ends.append(_at(other, far_s, near_s, spares)[0])
    chance = _Z * _deviation(case, chain, near_s or far_s)
    high = min(1.0, share + math.hypot(ends[0] - share, chance))
    low = max(0.0, share - math.hypot(share - ends[1], chance))
    rate = case.failures.per_s(case.accelerators, case.days, case.per_node)
    return Goodput(
        share, low, high, lost, far_s, max(1, round(far_s / case.step_s)), max(1, round(near_s / case.step_s)) if near_s else None, spares,
        1 / rate if rate > 0 else math.inf, chain.hold_s, share / (1 + spares * case.per_node * case.spares.idle_share / case.accelerators),
    )  # fmt: skip


def _check(case: Case) -> None:
    if case.accelerators < 1 or case.per_node < 1 or case.replicas < 1 or not case.step_s > 0 or not case.days > 0:
        raise PlanError(
            f"goodput of {case.accelerators} accelerators, {case.per_node} a node, in {case.replicas} replicas, with steps of {case.step_s:g} s over "
            f"{case.days:g} days cannot be; each must be above 0"
        )
    if not case.saving.checkpoint_bytes >= 0 or not case.saving.write_gbyte_s > 0:
        raise PlanError(
            f"a checkpoint of {case.saving.checkpoint_bytes:g} bytes written at {case.saving.write_gbyte_s:g} GB/s is never done; "
            "give the site's storage.write_gbyte_s above 0"
        )
    if case.spares.nodes is not None and case.spares.nodes < 0:
        raise PlanError(f"{case.spares.nodes} spare nodes; give 0 or more, or none to have the best number")


def _at(case: Case, far_s: float, near_s: float, spares: int) -> tuple[float, dict[str, float], _Chain]:
    """Share, what is lost to what, and the sums over hazards, of one choice."""
    found = hazards(case)
    single = sum(one.rate_s for one in found if one.nodes == 1)
    together = sum(one.rate_s for one in found if one.nodes > 1)
    reduced = 0.0
    if case.tolerates():
        load = sum(one.rate_s * one.rebuild_s for one in found) / case.replicas
        reduced = load / (1 + load)  # a replica that is out is not lost again
        found = tuple(replace(one, rate_s=one.rate_s / (1 + load)) if one.rebuild_s > 0 else one for one in found)
    chain = _chain(found)
    pool = _pool(case, single, together, spares)
    missing = pool.missing(case.accelerators / case.per_node / case.replicas, case.replicas) if _shrinks(case) else 0.0
    accelerators, saving = case.accelerators, case.saving
    stall, far_stall = saving.near_stall_s(accelerators), saving.far_stall_s(accelerators)
    useful = running(chain, near_s, stall, saving.near_lag_s(accelerators), far_s, far_stall, saving.far_lag_s())
    up, on = 1 - pool.wait, 1 / chain.inverse
    stalled = useful * ((stall / near_s if near_s else 0.0) + far_stall / far_s)
    lost = {name: up * (1 - on) * part for name, part in chain.parts.items()}
    lost |= {"wait": pool.wait, "corruption": up * on * chain.corrupted}
    on *= 1 - chain.corrupted
    lost |= {"checkpoint": up * on * stalled, "redone": up * on * max(0.0, 1 - useful - stalled)}
    whole = up * on * useful
    share = whole * (1 - reduced) * (1 - missing)
    lost["reduced"] = whole - share
    return share, {name: value for name, value in lost.items() if value > 0}, chain


def _shrinks(case: Case) -> bool:
    return case.replicas > 1 and (case.spares.shrink or case.tolerance)


def _pool(case: Case, single: float, together: float, spares: int) -> Pool:
    return replace(case.spares, shrink=_shrinks(case)).held(single, together, case.failures.correlated_nodes, spares)


def _spares(case: Case) -> int:
    """The number of spare nodes at which goodput for each accelerator, spares included, is most."""
    found = hazards(case)
    single = sum(one.rate_s for one in found if one.nodes == 1)
    together = sum(one.rate_s for one in found if one.nodes > 1)
    load = (single + together * case.failures.correlated_nodes) * case.spares.repair_s
    last = min(case.accelerators // case.per_node, math.ceil(load + 6 * math.sqrt(load * case.failures.correlated_nodes)))
    shrinks = _shrinks(case)
    law = _pool(case, single, together, last)  # of a run that shrinks it is the same for any number of spares
    best, most = 0, -1.0
    for nodes in range(last + 1):
        pool = replace(law, nodes=nodes) if shrinks else _pool(case, single, together, nodes)
        missing = pool.missing(case.accelerators / case.per_node / case.replicas, case.replicas) if shrinks else 0.0
        value = (1 - pool.wait) * (1 - missing) / (1 + nodes * case.per_node * case.spares.idle_share / case.accelerators)
        if value > most:
            best, most = nodes, value
        elif not shrinks and pool.wait < 0.01:
            break
    return best


def _intervals(case: Case) -> tuple[float, float]:
    """Seconds of work between far saves and between near ones (0: no such tier): as given, else best; whole steps, and no save before the last is written."""
    saving, accelerators, step = case.saving, case.accelerators, case.step_s
    chain = _chain(hazards(case))
    stall, lag = saving.near_stall_s(accelerators), saving.near_lag_s(accelerators)
    far_stall, far_lag = saving.far_stall_s(accelerators), saving.far_lag_s()
    long = case.days * DAY_S

    def whole(seconds: float, least: float) -> float:
        return max(round(seconds / step), math.ceil(least / step - 1e-9), 1) * step

    def far_of(near: float) -> float:
        if saving.far_interval_s:
            return max(saving.far_interval_s, near)
        least = max(far_lag, near, step)
        return _best(lambda far: running(chain, near, stall, lag, far, far_stall, far_lag), least, max(long, 2 * least))

    if not saving.near:
        return whole(far_of(0.0), far_lag), 0.0
    near = saving.near_interval_s
    if not near:
        least = max(lag, step)
        near = _best(lambda near: running(chain, near, stall, lag, far_of(near), far_stall, far_lag), least, max(long / 10, 2 * least))
    near = whole(near, lag)
    return max(1, math.ceil(far_lag / near), round(far_of(near) / near)) * near, near


def _best(value: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one peak is most, to 2 % (golden section in the logarithm)."""
    ratio = (math.sqrt(5) - 1) / 2
    a, d = math.log(low), math.log(high)
    b, c = d - ratio * (d - a), a + ratio * (d - a)
    at_b, at_c = value(math.exp(b)), value(math.exp(c))
    while d - a > 0.02:
        if at_b >= at_c:  # equal where both are 0, which is where intervals are too long
            d, c, at_c = c, b, at_b
            b = d - ratio * (d - a)
            at_b = value(math.exp(b))
        else:
            a, b, at_b = b, c, at_c
            c = a + ratio * (d - a)
            at_c = value(math.exp(c))
    middle = math.exp((a + d) / 2)
    return low if value(low) >= value(middle) else middle


def _deviation(case: Case, chain: _Chain, segment_s: float) -> float:
    """Of the share of a run of `days`, by the chance of how many failures it meets: each costs its hold and what has to be done again."""
    square = chain.rate * chain.hold_square + chain.ruin * (chain.hold_s * segment_s + segment_s**2 / 3)
    return math.sqrt(square / (case.days * DAY_S)) / chain.inverse


@dataclass(frozen=True, slots=True)
class Effect:
    """What half and double of one input do to goodput. Points (hundredths of the wall-clock)."""

    name: str
    halved: float
    doubled: float


def sensitivity(case: Case) -> tuple[Effect, ...]:
    """Each input at half and at double, most first; intervals and spares that the case leaves open are chosen anew."""

    def scaled(record: str, *keys: str) -> Callable[[float], Case]:
        def change(factor: float) -> Case:
            old = getattr(case, record)
            return replace(case, **{record: replace(old, **{key: getattr(old, key) * factor for key in keys})})

        return change

    def detection(factor: float) -> Case:
        kinds = tuple(replace(kind, detect_s=kind.detect_s * factor) for kind in case.failures.kinds)
        return replace(case, failures=replace(case.failures, kinds=kinds))

    inputs: dict[str, Callable[[float], Case]] = {
        "failure rate": scaled("failures", "per_accelerator_s"),
        "detection": detection,
        "restart": scaled("restart", "allocation_s", "start_s", "rendezvous_s", "first_s"),
        "storage bandwidth": scaled("saving", "write_gbyte_s", "read_gbyte_s"),
        "checkpoint bytes": scaled("saving", "checkpoint_bytes"),
        "repair": scaled("spares", "repair_s"),
        "correlated losses": scaled("failures", "correlated_share"),
        "maintenance": scaled("failures", "planned_per_day"),
    }
    if case.tolerates():
        inputs["stall of all replicas"] = scaled("restart", "stall_s", "rejoin_s")
    if case.saving.far_interval_s:
        inputs["save interval"] = scaled("saving", "far_interval_s")
    if case.spares.nodes:
        inputs["spares"] = lambda factor: replace(case, spares=replace(case.spares, nodes=round((case.spares.nodes or 0) * factor)))
    middle = expected(case)

    def share(name: str, factor: float) -> float:
        other = inputs[name](factor)
        if name not in ("failure rate", "repair", "correlated losses", "spares"):  # what the best number of spares does not depend on
            other = replace(other, spares=replace(other.spares, nodes=middle.spares))
        return expected(other).share

    rows = [Effect(name, *(100 * (share(name, factor) - middle.share) for factor in (0.5, 2.0))) for name in inputs]
    return tuple(sorted(rows, key=lambda row: -max(abs(row.halved), abs(row.doubled))))


def lines(case: Case, found: Goodput) -> tuple[str, ...]:
    """What `--explain` prints: what is lost to what, and what half and double of each input would do."""
    lost = ", ".join(f"{name} {100 * value:.1f}" for name, value in sorted(found.lost.items(), key=lambda item: -item[1]) if value >= 5e-4)
    near = f", every {_steps(found.near_every_steps)} in node memory" if found.near_every_steps else ""
    table = [
        f"goodput {100 * found.share:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f}): a failure every {_span(found.mtbf_s)}, "
        f"{_span(found.recovery_s)} until the next step; saves every {_steps(found.every_steps)} ({_span(found.interval_s)}){near}; "
        f"{found.spares} spare nodes",
        f"lost, % of the wall-clock: {lost or 'nothing'}",
        f"failures: {case.failures.source}",
        "points of goodput if an input is  halved  doubled",
    ]
    return (*table, *(f"{row.name:>32} {row.halved:+7.1f} {row.doubled:+8.1f}" for row in sensitivity(case)))


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def _span(seconds: float) -> str:
    for size, unit in ((DAY_S, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if math.isfinite(seconds) else "never"
    return f"{seconds:.0f} s"


def forecast(accelerators: int, per_node: int, step_s: float, checkpoint_bytes: float, *, explain: bool = False, **known: Any) -> Goodput:
    """Goodput of a run from what a plan and its site know (`case_of`); what nobody said is in `assumed`. `explain`: with the sensitivity table."""
    case, assumed = case_of(accelerators, per_node, step_s, checkpoint_bytes, **known)
    return of_case(case, assumed, explain=explain)


def of_case(case: Case, assumed: tuple[str, ...] = (), *, explain: bool = False) -> Goodput:
    """`expected`, with what was assumed for it."""
    found = replace(expected(case), assumed=assumed)
    if case.spares.nodes is None:
        note = f"{found.spares} spare nodes, the best number where a repair takes {case.spares.repair_s / DAY_S:g} days"
        found = replace(found, assumed=(*assumed, note))
    return replace(found, table=lines(case, found)) if explain else found


def case_of(
    accelerators: int,
    per_node: int,
    step_s: float,
    checkpoint_bytes: float,
    *,
    write_gbyte_s: float | None = None,
    failures: Failures | None = None,
    restart: Restart | None = None,
    spares: int | Spares | None = None,
    replicas: int = 1,
    tolerance: bool = False,
    every_steps: int | None = None,
    days: float | None = None,
    saving: Saving | None = None,
) -> tuple[Case, tuple[str, ...]]:
    """A run as a case, and what nobody said of it. `every_steps`: saves as the recipe has them, else best.

    `saving` is for a tier in node memory or saves beside training; its bytes, bandwidth and interval are taken from the plain arguments where they are
    given. `spares`: nodes that stand by, or a record with their repair; None: as many as are best. Where a scheduler has others, they are
    Spares(idle nodes, idle_share=0).
    """
    assumed = []
    if write_gbyte_s is None:
        write_gbyte_s = saving.write_gbyte_s if saving is not None else WRITE_GBYTE_S * accelerators
        if saving is None:
            assumed.append(
                f"storage.write_gbyte_s is unknown: {write_gbyte_s:.3g} GB/s, {WRITE_GBYTE_S:.3f} for each accelerator as Llama 3's had"
            )
    if failures is None:
        failures = elsewhere()
        assumed.append(f"failures of this site are unknown: {failures.source}")
    if restart is None:
        restart = Restart()
        assumed.append(
            f"a restart takes {restart.seconds(accelerators):.0f} s and the load of a checkpoint (Meta's cold ones, arXiv 2602.00277)"
        )
    if days is None:
        days = DAYS
        assumed.append(f"the range of goodput is of a run of {days:.0f} days")
    interval = every_steps * step_s if every_steps else 0.0
    saving = saving or Saving(checkpoint_bytes, write_gbyte_s)
    saving = replace(
        saving, checkpoint_bytes=checkpoint_bytes, write_gbyte_s=write_gbyte_s, far_interval_s=interval or saving.far_interval_s
    )
    pool = spares if isinstance(spares, Spares) else Spares(spares)
    case = Case(accelerators, per_node, step_s, failures, saving, restart, pool, replicas, tolerance, days)
    if accelerators > MANY and failures.wear == 1:
        assumed.append(f"failures go with accelerators; Meta saw 2.8 times as many a node at 98K as at {MANY:,} (arXiv 2602.00277)")
    return case, tuple(assumed)

"""A run, failure by failure: what goodput.py says in closed form, counted event by event; and a measured fault run told again.

`replay` takes a list of faults with their measured durations and says what goodput they leave: what the compressed-time fault run is held against.
`simulate` draws the list from a Case. Both walk from fault to fault; the saves between two of them are arithmetic, so that a year of 288,000
accelerators takes seconds.

Position is the running time that led to the present state: work, and the stalls of its saves. A failure takes it back to a mark.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gigatrain.errors import PlanError
from gigatrain.planning.estimate.failures import DAY_S
from gigatrain.planning.estimate.goodput import Case, Goodput, hazards

_EDGE = 1e-9  # of a save's interval: a position on a mark is on it


@dataclass(frozen=True, slots=True)
class Fault:
    """What happened at `at_s` of the run's wall-clock. `lands`: 0 where it was, 1 at the last near save, 2 at the last far one."""

    at_s: float
    detect_s: float
    restart_s: float  # to the next step, loading included
    lands: int = 2
    name: str = "fault"
    nodes: int = 0  # that go to repair
    lag_s: float = 0.0  # a silent corruption: nothing stops, and it is found so much later
    rebuild_s: float = 0.0  # one replica is out after the hold
    replica: int = -1


@dataclass(frozen=True, slots=True)
class Saves:
    """Measured or planned: seconds of work between two saves, what one stalls, and how much later it can be loaded. `near_s` 0: one tier."""

    far_s: float
    far_stall_s: float
    far_lag_s: float = 0.0
    near_s: float = 0.0
    near_stall_s: float = 0.0
    near_lag_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """`lost` are shares of the wall-clock and add up to 1 - share."""

    share: float
    lost: dict[str, float]
    useful_s: float
    wall_s: float
    stops: int


class _Track:
    """Where marks lie on the line of positions: near saves every `pitch`, after `count` of them a far save, which ends a `cycle`."""

    def __init__(self, saves: Saves):
        self.work = saves.near_s or saves.far_s
        self.count = max(1, round(saves.far_s / self.work))
        self.pitch = self.work + (saves.near_stall_s if saves.near_s else 0.0)
        self.cycle = self.count * self.pitch + saves.far_stall_s

    def at(self, position: float) -> tuple[int, int, float]:
        """Cycle, near segment and the rest."""
        cycle = math.floor(position / self.cycle + _EDGE)
        rest = max(0.0, position - cycle * self.cycle)
        segment = min(self.count, math.floor(rest / self.pitch + _EDGE))
        return cycle, segment, max(0.0, rest - segment * self.pitch)

    def useful(self, position: float) -> float:
        cycle, segment, rest = self.at(position)
        return (cycle * self.count + segment) * self.work + (min(rest, self.work) if segment < self.count else 0.0)

    def near(self, position: float) -> float:
        cycle, segment, _ = self.at(position)
        return cycle * self.cycle + segment * self.pitch

    def before(self, mark: float) -> float:
        """The near mark before a near mark."""
        cycle, segment, _ = self.at(mark)
        return (
            cycle * self.cycle + (segment - 1) * self.pitch if segment else max(0, cycle - 1) * self.cycle + (self.count - 1) * self.pitch
        )

    def far(self, position: float) -> float:
        return self.at(position)[0] * self.cycle


class _Run:
    """The state of a run between two faults."""

    def __init__(
        self, saves: Saves, spares: int | None, repair: Callable[[], float], replicas: int, nodes_per_replica: float, shrink: bool
    ):
        self.saves, self.track = saves, _Track(saves)
        self.spares, self.repair, self.replicas, self.nodes_per_replica, self.shrink = spares, repair, replicas, nodes_per_replica, shrink
        self.position = 0.0
        self.near = (0.0, 0.0)  # newest near mark, and when it can be loaded
        self.far = (0.0, 0.0)
        self.hold = (0.0, 0.0, 0.0, "restart")  # begins, detected, restart begins, of which name
        self.resumes = 0.0
        self.repairs: list[float] = []  # when each node in repair is back
        self.out: dict[int, float] = {}  # replicas that rebuild, and until when
        self.corrupt: tuple[float, float, Fault] | None = None  # good far mark, when it is found, what then
        self.spent: dict[str, float] = dict.fromkeys(("detection", "restart", "maintenance", "wait", "redone", "corruption"), 0.0)
        self.reduced = self.ran = 0.0
        self.stops = 0

    def until(self, now: float) -> None:
        """Lets the run hold or train up to `now`."""
        if now < self.resumes:
            return self._held(now)
        self._held(self.resumes)
        length = now - self.resumes
        if length <= 0:
            return None
        start, self.position = self.position, self.position + length
        mark = self.track.near(self.position)
        if mark > start:
            self.near = (mark, self.resumes + mark - start + self.saves.near_lag_s)
        mark = self.track.far(self.position)
        if mark > start:
            self.far = (mark, self.resumes + mark - start + self.saves.far_lag_s)
        self.reduced += self._absent(self.resumes, now)
        self.ran += length
        self.resumes = now
        self.hold = (now, now, now, "restart")
        return None

    def _held(self, now: float) -> None:
        begins, detected, starts, name = self.hold
        self.spent["detection"] += max(0.0, min(now, detected) - begins)
        self.spent["wait"] += max(0.0, min(now, starts) - max(begins, detected))
        self.spent[name] += max(0.0, now - max(begins, starts))
        self.hold = (max(begins, now), max(detected, now), max(starts, now), name)

    def _absent(self, begin: float, end: float) -> float:
        """Integral of the share of replicas that do not train."""
        lost = 0.0
        for replica, back in list(self.out.items()):
            lost += max(0.0, min(back, end) - begin) / self.replicas
            if back <= end:
                del self.out[replica]
        if self.shrink and self.spares is not None:
            at = begin
            while True:
                short = max(0, len(self.repairs) - self.spares)
                until = min(self.repairs[0], end) if self.repairs else end
                lost += (until - at) * min(self.replicas, -(-short // max(self.nodes_per_replica, 1))) / self.replicas
                at = max(at, until)
                if not self.repairs or self.repairs[0] > end:
                    break
                heapq.heappop(self.repairs)
        return lost

    def back_to(self, mark: float, reason: str) -> None:
        self.spent[reason] += self.position - mark
        self.position = mark
        self.near = (mark, 0.0)
        if self.far[0] > mark:
            self.far = (self.track.far(mark), 0.0)
        if self.corrupt is not None and mark <= self.corrupt[0]:
            self.corrupt = None

    def meets(self, fault: Fault) -> None:
        """One fault, at its time."""
        now = fault.at_s
        if self.hold[1] <= now < self.hold[2]:
            return  # it waits for a node: nothing runs that could fail
        training = now >= self.resumes
        if fault.replica >= 0 and self.out.get(fault.replica, 0.0) > now:
            return  # that replica is out already
        self.until(now)
        if fault.lag_s > 0:
            if self.corrupt is None and training:
                mark = self.track.far(self.position)
                self.corrupt = (mark, now + fault.lag_s, replace(fault, at_s=now + fault.lag_s, lag_s=0.0))
            return
        self.stops += 1
        if fault.lands == 2 or (fault.lands == 1 and not self.saves.near_s):
            mark, ready = self.far
            self.back_to(mark if now >= ready else max(0.0, mark - self.track.cycle), "redone")
        elif fault.lands == 1:
            mark, ready = self.near
            self.back_to(mark if now >= ready else max(0.0, self.track.before(mark)), "redone")
        self._stop(fault)

    def found(self) -> None:
        """The corruption is noticed: back to what was saved before it."""
        assert self.corrupt is not None
        mark, now, fault = self.corrupt
        self.corrupt = None
        self.until(now)
        self.stops += 1
        self.back_to(min(mark, self.position), "corruption")
        self.far = (self.track.far(self.position), 0.0)
        self._stop(fault)

    def _stop(self, fault: Fault) -> None:
        now = fault.at_s
        for _ in range(fault.nodes):
            heapq.heappush(self.repairs, now + self.repair())
        detected = now + fault.detect_s
        starts = detected
        if self.spares is not None and not self.shrink:
            while self.repairs and self.repairs[0] <= now:
                heapq.heappop(self.repairs)
            short = len(self.repairs) - self.spares
            if short > 0:
                starts = max(starts, sorted(self.repairs)[short - 1])
        if fault.rebuild_s > 0:
            self.out[fault.replica] = starts + fault.restart_s + fault.rebuild_s
        self.hold = (now, detected, starts, "maintenance" if fault.name == "maintenance" else "restart")
        self.resumes = starts + fault.restart_s

    def outcome(self, wall_s: float) -> Outcome:
        self.until(wall_s)
        useful = self.track.useful(self.position)
        lost = {name: value / wall_s for name, value in self.spent.items()}
        lost["checkpoint"] = (self.position - useful) / wall_s
        lost["reduced"] = useful / wall_s * (self.reduced / self.ran if self.ran else 0.0)
        return Outcome(
            useful / wall_s - lost["reduced"], {name: value for name, value in lost.items() if value > 0}, useful, wall_s, self.stops
        )


def replay(
    faults: Iterable[Fault],
    wall_s: float,
    saves: Saves,
    *,
    spares: int | None = None,
    repair: Callable[[], float] = lambda: DAY_S,
    replicas: int = 1,
    nodes_per_replica: float = 1.0,
    shrink: bool = False,
) -> Outcome:
    """Goodput of `wall_s` seconds with these faults, in the order of their times. `spares` None: there is always another node.

    A fault during a hold starts a hold of its own; one while the run waits for a node is none. For a measured run give each fault what was measured of it, and
    `saves` as it was configured and timed: replay([Fault(31.0, 1.2, 6.5)], 1800, Saves(far_s=20, far_stall_s=0.4)).
    """
    if not wall_s > 0 or not saves.far_s > 0:
        raise PlanError(f"a run of {wall_s:g} s with a save every {saves.far_s:g} s of work cannot be told again; give both above 0")
    run = _Run(saves, spares, repair, replicas, nodes_per_replica, shrink)
    last = 0.0
    for fault in faults:
        if fault.at_s < last:
            raise PlanError(f"the faults are not in order: one at {fault.at_s:g} s comes after one at {last:g} s; sort them by `at_s`")
        last = fault.at_s
        while run.corrupt is not None and run.corrupt[1] <= min(fault.at_s, wall_s):
            run.found()
        if fault.at_s >= wall_s:
            break
        run.meets(fault)
    while run.corrupt is not None and run.corrupt[1] < wall_s:
        run.found()
    return run.outcome(wall_s)


def poisson(mtbf_s: float, wall_s: float, detect_s: Sequence[float], restart_s: Sequence[float], seed: int, lands: int = 2) -> list[Fault]:
    """Faults at exponential times, each with one of the measured durations: what a fault run of that rate should meet."""
    draw, at, found = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(1 / mtbf_s)) < wall_s:
        found.append(Fault(at, draw.choice(detect_s), draw.choice(restart_s), lands))
    return found


def simulate(case: Case, plan: Goodput, seed: int, stops: int = 10_000) -> Outcome:
    """A run of `case` at the intervals and spares of `plan` that is as long as it takes to meet about `stops` hazards.

    Their number, kinds and gaps are drawn so that they add up to their means, which leaves less to chance than a run of that length has.
    """
    draw = random.Random(seed)
    every = replace(case, failures=replace(case.failures, strikes=0))
    found = hazards(every)
    rate = sum(one.rate_s for one in found)
    wall = stops / rate if rate > 0 else case.days * DAY_S
    saving, accelerators = case.saving, case.accelerators
    near = plan.near_every_steps * case.step_s if plan.near_every_steps else 0.0
    saves = Saves(
        plan.every_steps * case.step_s, saving.far_stall_s(accelerators), saving.far_lag_s(),
        near, saving.near_stall_s(accelerators), saving.near_lag_s(accelerators),
    )  # fmt: skip
    faults = _drawn(found, stops, wall, case, draw) if rate > 0 else iter(())
    repairs = _exponential(case.spares.repair_s, draw)
    return replay(
        faults, wall, saves, spares=plan.spares, repair=lambda: next(repairs), replicas=case.replicas,
        nodes_per_replica=case.accelerators / case.per_node / case.replicas, shrink=case.replicas > 1 and (case.spares.shrink or case.tolerance),
    )  # fmt: skip


def _drawn(found: tuple, stops: int, wall_s: float, case: Case, draw: random.Random) -> Iterator[Fault]:
    rate = sum(one.rate_s for one in found)
    kinds = []
    for one in found:
        exact = stops * one.rate_s / rate
        kinds += [one] * (int(exact) + (draw.random() < exact % 1))
    draw.shuffle(kinds)
    gaps = [draw.expovariate(1.0) for _ in range(len(kinds) + 1)]
    unit = wall_s / sum(gaps)
    lemons = _Lemons(case, draw)
    at = 0.0
    for one, gap in zip(kinds, gaps, strict=False):
        at += gap * unit
        if lemons.fails(at, planned=one.name == "maintenance"):
            yield Fault(
                at, one.detect_s, one.restart_s, one.lands, one.name, one.nodes, one.lag_s, one.rebuild_s,
                draw.randrange(case.replicas) if one.rebuild_s > 0 else -1,
            )  # fmt: skip


def _exponential(mean: float, draw: random.Random, block: int = 1024) -> Iterator[float]:
    """Exponential times, of which every `block` in a row add up to what they should (one from each of as many equal chances)."""
    while True:
        chances = [(index + draw.random()) / block for index in range(block)]
        draw.shuffle(chances)
        yield from (-mean * math.log1p(-chance) for chance in chances)


class _Lemons:
    """Which failures still happen where nodes are put out after some of their own: the run begins anew with its lemons every `days`."""

    def __init__(self, case: Case, draw: random.Random):
        failures = case.failures
        self.draw, self.strikes, self.factor = draw, failures.strikes, failures.lemon_factor
        self.many = max(1, round(failures.lemon_share * case.accelerators / case.per_node))
        self.share = failures.lemon_share * self.factor / (1 - failures.lemon_share + failures.lemon_share * self.factor)
        self.days, self.struck, self.began = case.days, [0] * self.many, 0.0

    def fails(self, at_s: float, planned: bool) -> bool:
        if planned or self.strikes < 1 or self.factor <= 1 or self.draw.random() >= self.share:
            return True
        if at_s - self.began > self.days * DAY_S:
            self.struck, self.began = [0] * self.many, at_s
        lemon = self.draw.randrange(self.many)
        if self.struck[lemon] >= self.strikes:
            return self.draw.random() < 1 / self.factor  # the node in its place is like the others
        self.struck[lemon] += 1
        return True

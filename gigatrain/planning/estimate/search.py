"""Layouts ranked: every legal one counted, pruned by memory and by formula, the best of them played event by event, and a few that differ shown.

Three rounds, all deterministic, on one core:

    1  every legal layout x microbatch x schedule x recomputation x precision (layouts.py) by formula (closed.py); of recomputation the least that fits, since
       each policy does all that the one before it does and more
    2  of each (tensor, pipeline, context, expert) the best by formula, best group first, by events (estimate.py), until no group can come under the fifth
       best: its best by formula is beyond that by more than the formula errs (MARGIN). Then more of the groups that are best (DEEPER)
    3  the winners' neighbours: half and twice a microbatch, the next shards, schedules and policies, by events, while that helps
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gigatrain.errors import PlanError
from gigatrain.planning.estimate import collectives, layouts
from gigatrain.planning.estimate import estimate as whole
from gigatrain.planning.estimate.candidates import Candidate, Found, explained
from gigatrain.planning.estimate.closed import Prices, Share, Shared, Turn, Turned
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.layouts import Split
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.estimate.workload import Layout, Precision, Recompute, Workload

# From the least that is made again to the most: each does the work of every one before it in its row, and more.
POLICIES: tuple[Recompute, ...] = ("none", "lean", "attention", "selective", "full")
MARGIN = 0.25  # by which the formula may be wrong about the events: tests/planning/test_search.py measures it
SLACK = 0.80  # bytes by formula that are refused: those whose SLACK-th part does not fit; residency.py judges the rest
EVENTS = 12_000_000  # items that the second and third round may play in all, which is what bounds their time
DEEPER = ((6, 6), (3, 24))  # of so many times as many groups as are shown, so many each, after one of every group
KEPT = 40  # of a group, by formula
SLOWER = "slower than what is shown, by formula and its margin"


@dataclass(order=True, slots=True)
class _Member:
    """One configuration by formula; the order is of a group's best first, then by what it is, so that ties fall alike everywhere."""

    step_s: float
    tie: tuple[Any, ...]
    memory_bytes: float = field(compare=False)
    split: Split = field(compare=False)
    expert: int = field(compare=False)
    share: Share = field(compare=False)
    turn: Turn = field(compare=False)
    recompute: Recompute = field(compare=False)
    precision: Precision = field(compare=False)

    def workload(self, base: Workload) -> Workload:
        return layouts.arranged(base, self.split, self.expert, self.share, self.turn, self.recompute, self.precision)


Group = tuple[int, int, int, int]  # tensor, pipeline, context, expert


def step_time(workload: Workload, estimate: Estimate) -> float:
    """The default of what is least for the best: seconds of a step. A step's tokens are the same for all."""
    return estimate.step_s


def search(
    workload: Workload,
    cluster: Cluster,
    *,
    precisions: tuple[Precision, ...] | None = None,
    recomputes: tuple[Recompute, ...] | None = None,
    limit_s: float | None = None,
    top: int = 5,
    constants: Mapping[str, float] = VALUES,
    key: Callable[[Workload, Estimate], float] = step_time,
    refusal: Callable[[Workload], str] | None = None,
    clock: Callable[[], float] | None = None,
) -> Found:
    """The `top` best layouts of `workload.layout.ranks` ranks for `workload.batch` samples a step, at most one of a (tensor, pipeline, context, expert).

    `precisions` and `recomputes`: what may be chosen (default: the workload's precision, and every policy that its stack has). `key` ranks: less is better.
    `refusal` may refuse a candidate for what a Workload does not know, in words (a recipe's own rules). `limit_s` ends it early, by `clock`.

    Raises PlanError where no layout divides, or none fits the memory, with what would.
    """
    precisions = precisions or (workload.precision,)
    recomputes = recomputes or policies(workload)
    pruned: Counter[str] = Counter()
    prices = Prices(workload, cluster, constants)
    began = clock() if clock else 0.0
    groups, considered = _by_formula(workload, cluster, prices, precisions, recomputes, pruned, top)
    if not considered:
        raise PlanError(indivisible(workload, cluster, pruned, workload.batch))
    if not groups:
        raise PlanError(_too_large(workload, cluster, considered))
    late = (lambda: clock() - began > limit_s) if clock and limit_s is not None else (lambda: False)
    play = _Play(workload, cluster, constants, key, refusal, pruned)
    complete = _by_events(groups, play, top, late)
    _refined(play, groups, recomputes, top, late)
    if not play.found:
        raise PlanError(_too_large(workload, cluster, considered))
    chosen = _different(play.ranked(), top)
    return Found(explained(chosen, workload), considered, dict(sorted(pruned.items())), play.count, complete)


def policies(workload: Workload) -> tuple[Recompute, ...]:
    """Those that a stack has."""
    match workload.stack:
        case "gigatrain_native" | "gigatrain_deepspeed":
            return ("none", "selective", "full") if workload.compiled else ("none", "lean", "selective", "full")
        case "torchtitan":
            return ("none", "selective", "full")
        case "llm_foundry" | "deepspeed":
            return ("none", "full")
        case _:
            return ("none", "attention", "full")


def _by_formula(
    workload: Workload,
    cluster: Cluster,
    prices: Prices,
    precisions: tuple[Precision, ...],
    recomputes: tuple[Recompute, ...],
    pruned: Counter[str],
    top: int,
) -> tuple[dict[Group, list[_Member]], int]:
    """The first round: of each group the KEPT best by formula."""
    groups: dict[Group, list[_Member]] = {}
    room, considered = float(cluster.memory_bytes or math.inf), 0
    wanted: tuple[Recompute, ...] = tuple(one for one in POLICIES if one in recomputes)
    best: dict[Group, float] = {}
    limit = math.inf

    for split in layouts.splits(workload, cluster, pruned):
        for precision in precisions:
            turns = list(layouts.turns(workload, split, precision))
            if not turns:
                pruned["pipeline does not fit layers or microbatches"] += 1
                continue
            for expert in layouts.experts(workload, split):
                shares = list(layouts.shards(workload, split, expert))
                considered += len(turns) * len(shares) * len(wanted)
                members = groups.setdefault((split.tensor, split.pipeline, split.context, expert), [])
                fits: dict[bool, list[Share]] = {}  # by whether weights are shared too, of which a microbatch's own seconds depend
                for share in shares:
                    if prices.state_bytes(split, expert, share, precision) > room:
                        pruned["memory: weights, gradients and optimizer"] += len(turns) * len(wanted)
                    else:
                        fits.setdefault(share[1] == 3, []).append(share)
                known: dict[tuple[Share, bool], Shared] = {}
                for turn, those in itertools.product(turns, fits.values()):
                    bound = min(limit, members[-1].step_s if len(members) >= KEPT else math.inf)
                    joined = split.pipeline == 1 or turn[2] == "zbv"
                    whole: dict[int, Turned] = {}
                    least = whole[0] = prices.turned(split, expert, turn, wanted[0], precision, those[0][1])
                    if least.step_s * prices.waits > bound:  # before weights are shared and updated, and with the least made again
                        pruned[SLOWER] += len(those) * len(wanted)
                        continue
                    for share in those:
                        shared = known.get((share, joined))
                        if shared is None:
                            shared = known[share, joined] = prices.shared(split, expert, share, joined, precision)
                        for index, recompute in enumerate(wanted):
                            turned = whole.get(index)
                            if turned is None:
                                turned = whole[index] = prices.turned(split, expert, turn, recompute, precision, share[1])
                            step, needs = prices.together(turned, shared)
                            if step > bound:
                                pruned[SLOWER] += len(wanted) - index
                                break
                            if needs * SLACK > room:
                                pruned["memory: activations, by formula"] += 1
                                continue
                            tie = (split.exchange, share, turn, index, precision)
                            members.append(_Member(step, tie, needs, split, expert, share, turn, recompute, precision))
                            if needs <= room * SLACK:
                                pruned["more is made again than memory asks for"] += len(wanted) - index - 1
                                break  # the rest does more work for memory that is not needed
                    if len(members) > 2 * KEPT:
                        members[:] = heapq.nsmallest(KEPT, members)
                members[:] = heapq.nsmallest(KEPT, members)
                if members:
                    best[(split.tensor, split.pipeline, split.context, expert)] = members[0].step_s
                    if (
                        len(best) >= top
                    ):  # what nothing that could be shown takes: the `top`-th group's best, and what the formula may err by
                        limit = heapq.nsmallest(top, best.values())[-1] * (1 + MARGIN)
    return {group: heapq.nsmallest(KEPT, members) for group, members in groups.items() if members}, considered


class _Play:
    """Candidates by events, each once."""

    def __init__(
        self,
        base: Workload,
        cluster: Cluster,
        constants: Mapping[str, float],
        key: Callable[[Workload, Estimate], float],
        refusal: Callable[[Workload], str] | None,
        pruned: Counter[str],
    ) -> None:
        self.base, self.cluster, self.constants, self.key, self.refusal, self.pruned = base, cluster, constants, key, refusal, pruned
        self.known: dict[Workload, Candidate | None] = {}
        self.found: list[tuple[float, int, Candidate]] = []
        self.count, self.events = 0, 0

    def __call__(self, workload: Workload) -> Candidate | None:
        """None: it does not fit, or is refused."""
        if workload in self.known:
            return self.known[workload]
        self.known[workload] = found = self._fresh(workload)
        return found

    def _fresh(self, workload: Workload) -> Candidate | None:
        if self.refusal is not None and (why := self.refusal(workload)):
            self.pruned[f"refused: {why}"] += 1
            return None
        self.count += 1
        mine = workload.layout
        self.events += 40 * (workload.shape.layers + 2) + 4 * mine.pipeline * mine.stages * workload.accumulation
        estimate = whole.estimate(workload, self.cluster, self.constants)
        if estimate.fits is False:
            self.pruned["memory: by liveness"] += 1
            return None
        candidate = Candidate(workload, estimate, changed=workload.precision != self.base.precision)
        self.found.append((self.key(workload, estimate), len(self.found), candidate))
        return candidate

    @property
    def spent(self) -> bool:
        return self.events >= EVENTS

    def ranked(self) -> list[Candidate]:
        return [candidate for _, _, candidate in sorted(self.found, key=lambda one: one[:2])]


def group_of(workload: Workload) -> Group:
    """What two shown candidates may not have in common."""
    mine = workload.layout
    return mine.tensor, mine.pipeline, mine.context, mine.expert


def _by_events(groups: dict[Group, list[_Member]], play: _Play, top: int, late: Callable[[], bool]) -> bool:
    """The second round; whether it came to its end."""
    best: dict[Group, float] = {}
    for group in sorted(groups, key=lambda one: groups[one][0]):
        if len(best) >= top and groups[group][0].step_s > heapq.nsmallest(top, best.values())[-1] * (1 + MARGIN):
            break
        if late() or play.spent:
            return False
        _group(groups[group], play, 1, group, best)
    for many, each in DEEPER:
        for group in heapq.nsmallest(many * top, best, key=lambda one: (best[one], one)):
            if late() or play.spent:
                return False
            _group(groups[group], play, each, group, best)
    return True


def _group(members: list[_Member], play: _Play, each: int, group: Group, best: dict[Group, float]) -> None:
    """So many of a group that fit, by events; its best is kept in `best`."""
    fits = 0
    for member in members:
        if fits >= each or (fits and member.step_s > members[0].step_s * (1 + MARGIN)):
            break
        candidate = play(member.workload(play.base))
        if candidate is not None:
            fits += 1
            best[group] = min(best.get(group, math.inf), candidate.estimate.step_s)


def _refined(
    play: _Play, groups: dict[Group, list[_Member]], recomputes: tuple[Recompute, ...], top: int, late: Callable[[], bool]
) -> None:
    """The third round: each of the shown, improved one choice at a time."""
    for _ in range(3):
        before = [candidate.workload for candidate in _different(play.ranked(), top)]
        for workload in before:
            for near in _near(workload, play.base, play.cluster, recomputes):
                if late() or play.spent:
                    return
                play(near)
        if [candidate.workload for candidate in _different(play.ranked(), top)] == before:
            return


def _near(workload: Workload, base: Workload, cluster: Cluster, recomputes: tuple[Recompute, ...]) -> list[Workload]:
    """Legal neighbours of the same group: another microbatch, share, schedule, policy or dispatch, one at a time."""
    mine = workload.layout
    split = Split(mine.tensor, mine.context, mine.pipeline, mine.exchange, mine.data, base.batch // mine.data)
    share: Share = (mine.shard, mine.zero, mine.reshard)
    turn: Turn = (workload.microbatch, workload.accumulation, mine.schedule, mine.stages)
    turns = list(layouts.turns(base, split, workload.precision))
    shares = list(layouts.shards(base, split, mine.expert))

    def made(share: Share, turn: Turn, recompute: Recompute) -> Workload:
        return layouts.arranged(base, split, mine.expert, share, turn, recompute, workload.precision)

    sizes = sorted({one[0] for one in turns})
    at = sizes.index(workload.microbatch)
    found = [made(share, one, workload.recompute) for one in turns if one[0] in sizes[max(0, at - 1) : at + 2] and one[2:] == turn[2:]]
    same = [one for one in turns if one[0] == turn[0] and one != turn]
    found += [made(share, one, workload.recompute) for one in same if one[2] != mine.schedule or abs(one[3] - mine.stages) <= 1]
    spans = sorted({one[0] for one in shares})
    here = spans.index(mine.shard)
    close = spans[max(0, here - 1) : here + 2]
    found += [made(one, turn, workload.recompute) for one in shares if one[0] in close and one != share]
    order: list[Recompute] = [one for one in POLICIES if one in recomputes]
    step = order.index(workload.recompute)
    found += [made(share, turn, one) for one in order[max(0, step - 1) : step + 2]]
    if collectives.expert_span(mine, base.stack) > layouts.domain(cluster) and mine.dispatch == "alltoall" and base.stack in layouts.OWN:
        found.append(replace(workload, layout=replace(mine, dispatch="hierarchical")))
    return [one for one in dict.fromkeys(found) if one != workload]


def _different(ranked: list[Candidate], top: int) -> list[Candidate]:
    """The best of each group, then, where there are too few groups, the next best of any."""
    first: dict[Group, Candidate] = {}
    for candidate in ranked:
        first.setdefault(group_of(candidate.workload), candidate)
    chosen = list(first.values())[:top]
    rest = [candidate for candidate in ranked if candidate not in chosen]
    found = chosen + rest[: top - len(chosen)]
    return [candidate for candidate in ranked if candidate in found]  # in the order of their rank


def indivisible(workload: Workload, cluster: Cluster, pruned: Mapping[str, int], batch: int) -> str:
    """Why no layout of the workload's ranks shares `batch` samples, in words, with a batch that one does."""
    ranks = workload.layout.ranks
    why = max(sorted(pruned), key=lambda one: pruned[one]) if pruned else "nothing divides"
    said = f"no layout of {ranks:,} ranks can share train.batch {batch:,} samples of {workload.sequence:,} tokens (mostly: {why})"
    one = replace(workload, layout=Layout(replicate=ranks, zero=0), microbatch=1, accumulation=1)
    most, readers = max(1, workload.shape.layers) * layouts.domain(cluster), layouts.divisors(ranks)
    near = sorted({max(1, round(batch / data)) * data for data in readers if ranks // data <= most}, key=lambda size: abs(size - batch))
    found = next((size for size in near[:40] if legal(one, cluster, size)), None)
    return said + (
        f"; train.batch = {found:,} can be, or another number of ranks" if found else "; change the number of ranks or train.batch"
    )


def legal(workload: Workload, cluster: Cluster, batch: int) -> bool:
    """Whether any layout shares `batch` samples."""
    ignored: Counter[str] = Counter()
    for split in layouts.splits(workload, cluster, ignored, batch=batch):
        if next(iter(layouts.turns(workload, split, workload.precision)), None) is not None:
            return True
    return False


def _too_large(workload: Workload, cluster: Cluster, considered: int) -> str:
    gib = (cluster.memory_bytes or 0) / 2**30
    return (
        f"none of {considered:,} layouts of {workload.layout.ranks:,} ranks fits into {gib:.1f} GiB; start more ranks, choose accelerators with more memory, "
        "or narrower optimizer states (optim.master, optim.moments)"
    )

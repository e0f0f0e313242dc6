"""Which forward and backward a pipeline rank runs when, and when each of them then ends: 1F1B, interleaved (Megatron's order) and ZBV.

The orders are those of Megatron-LM's schedules (arXiv 2104.04473 for interleaved) and of the V-shaped zero-bubble schedule (arXiv 2401.10241 section 6, and
torch's `ScheduleZBVZeroBubble`). Free of torch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from gigatrain.planning.estimate.workload import Schedule

FORWARD, BACKWARD, WEIGHTS = 0, 1, 2
Action = tuple[int, int, int]  # FORWARD | BACKWARD | WEIGHTS, the rank's virtual stage, microbatch


def number_of(schedule: Schedule, ranks: int, rank: int, stage: int) -> int:
    """Global number of a rank's virtual stage: dealt round, or down and up again in a V."""
    if schedule == "zbv":
        return rank if stage == 0 else 2 * ranks - 1 - rank
    return stage * ranks + rank


def order(schedule: Schedule, ranks: int, stages: int, microbatches: int, rank: int) -> list[Action]:
    """What `rank` runs, in order; BACKWARD is the whole of it but in zbv, where it is the inputs' gradients and WEIGHTS the rest."""
    if schedule == "zbv":
        return _zbv(ranks, microbatches, rank)
    total = microbatches * stages
    # Microbatches of a turn: `ranks` where that divides them, else, as torch's Interleaved1F1B, equal turns of as few more as there are.
    turn = ranks if microbatches % ranks == 0 else microbatches // max(1, microbatches // ranks)
    virtual = [
        (stage, microbatch)
        for first in range(0, microbatches, turn)
        for stage in range(stages)
        for microbatch in range(first, min(first + turn, microbatches))
    ]
    if stages == 1:
        warm = min(total, ranks - 1 - rank)
        back = virtual
    else:
        warm = min(total, (ranks - 1 - rank) * 2 + (stages - 1) * turn)
        back = [(stages - 1 - stage, microbatch) for stage, microbatch in virtual]
    found: list[Action] = [(FORWARD, *virtual[index]) for index in range(warm)]
    for index in range(total - warm):
        found.append((FORWARD, *virtual[warm + index]))
        found.append((BACKWARD, *back[index]))
    found += [(BACKWARD, *back[index]) for index in range(total - warm, total)]
    return found


def _zbv(ranks: int, microbatches: int, rank: int) -> list[Action]:
    """Five stretches; a count short of 2 ranks - 1 takes the order of that many and leaves out what is not there, as torch does."""
    count = max(2 * ranks - 1, microbatches)
    found: list[Action] = []
    done = {(kind, stage): 0 for kind in (FORWARD, BACKWARD, WEIGHTS) for stage in (0, 1)}

    def run(*actions: tuple[int, int]) -> None:
        for action in actions:
            if done[action] < microbatches:
                found.append((*action, done[action]))
            done[action] += 1

    for _ in range(2 * (ranks - rank) - 1):
        run((FORWARD, 0))
    for _ in range(rank):
        run((FORWARD, 1), (FORWARD, 0))
    for _ in range(ranks - rank):
        run((FORWARD, 1), (BACKWARD, 1), (WEIGHTS, 1))
    while done[FORWARD, 1] < done[FORWARD, 0] or done[FORWARD, 0] < count:
        if done[FORWARD, 0] < count:
            run((FORWARD, 0))
        run((BACKWARD, 0), (WEIGHTS, 0), (FORWARD, 1), (BACKWARD, 1), (WEIGHTS, 1))
    for _ in range(rank):
        run((BACKWARD, 0), (BACKWARD, 1))
    for _ in range(ranks - rank):
        run((BACKWARD, 0), (WEIGHTS, 0))
    for stage in (1, 0):
        while done[WEIGHTS, stage] < done[BACKWARD, stage]:
            run((WEIGHTS, stage))
    return found


# rank; key, (rank x stages + stage) x 3 + kind, that says which duration it has; index of the event whose data it needs, -1 for none; whether over a link
Event = tuple[int, int, int, bool]


@lru_cache(maxsize=256)
def events(schedule: Schedule, ranks: int, stages: int, microbatches: int) -> tuple[Event, ...]:
    """Every rank's order merged so that each event comes after what it needs; an order that cannot run is our own mistake."""
    count = ranks * stages
    numbers = [[number_of(schedule, ranks, rank, stage) for stage in range(stages)] for rank in range(ranks)]
    owner = {number: rank for rank, mine in enumerate(numbers) for number in mine}
    orders = []
    for rank in range(ranks):
        # of each kind and stage: its key, where its own index is kept and the one that it needs (from there on by microbatch), and whether that is sent
        slots: dict[tuple[int, int], tuple[int, int, int, bool]] = {}
        for stage, number in enumerate(numbers[rank]):
            for kind, other in ((FORWARD, number - 1), (BACKWARD, number + 1), (WEIGHTS, -1)):
                own, key = (kind * count + number) * microbatches, (rank * stages + stage) * 3 + kind
                needs = (kind * count + other) * microbatches if 0 <= other < count else -1
                slots[kind, stage] = key, own, needs, owner.get(other, rank) != rank
        mine = []
        for kind, stage, microbatch in order(schedule, ranks, stages, microbatches, rank):
            key, own, needs, sent = slots[kind, stage]
            mine.append((key, own + microbatch, needs + microbatch if needs >= 0 else -1, sent))
        orders.append(mine)
    position = [-1] * (3 * count * microbatches)
    found: list[Event] = []
    pointers = [0] * ranks
    total = sum(map(len, orders))
    while len(found) < total:
        before = len(found)
        for rank, mine in enumerate(orders):
            index, end = pointers[rank], len(mine)
            while index < end:
                key, own, needs, sent = mine[index]
                after = -1
                if needs >= 0:
                    after = position[needs]
                    if after < 0:
                        break
                position[own] = len(found)
                found.append((rank, key, after, sent))
                index += 1
            pointers[rank] = index
        assert len(found) > before, (schedule, ranks, stages, microbatches)
    return tuple(found)


class Ran(NamedTuple):
    """Of each rank: when its last event ended, and how long its device waited for its host."""

    ends: list[float]
    launch: list[float]
    last: dict[int, float]  # by event key, the end of its last event
    times: list[tuple[float, float]]  # of each event, where asked for


def run(
    todo: Sequence[Event],
    ranks: int,
    seconds: Sequence[float],
    held: Sequence[float],
    send_s: float,
    hosts: Sequence[float] | None = None,
    floors: Sequence[float] | None = None,
    *,
    times: bool = False,
) -> Ran:
    """Times of `todo`. By event key: `seconds` of the device, `held` seconds that its send keeps the rank after it; `hosts` seconds to launch it and `floors`
    from the first launch to its end if the device is idle. A receiver has its data `send_s` after the sender's end."""
    free, launch = [0.0] * ranks, [0.0] * ranks
    host = [0.0] * ranks
    done: list[float] = []
    add = done.append
    last: dict[int, float] = {}
    kept: list[tuple[float, float]] = []
    if hosts is None or floors is None:
        for rank, key, after, sent in todo:
            begin = free[rank]
            if after >= 0:
                ready = done[after] + send_s if sent else done[after]
                if ready > begin:  # noqa: PLR1730 (max() is half of the loop's time)
                    begin = ready
            end = begin + seconds[key]
            add(end)
            last[key] = end
            free[rank] = end + held[key]
            if times:
                kept.append((begin, end))
        return Ran(free, launch, last, kept)
    for rank, key, after, sent in todo:
        begin = free[rank]
        if after >= 0:
            ready = done[after] + send_s if sent else done[after]
            if ready > begin:  # noqa: PLR1730 (max() is half of the loop's time)
                begin = ready
        end = begin + seconds[key]
        floor = host[rank] + floors[key]
        host[rank] += hosts[key]
        if floor > end:
            launch[rank] += floor - end
            end = floor
        add(end)
        last[key] = end
        free[rank] = end + held[key]
        if times:
            kept.append((begin, end))
    return Ran(free, launch, last, kept)

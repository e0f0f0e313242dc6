"""One step simulated on streams: the blocks' passes (passes.py), the order of the pipeline (pipeline_order.py), and what a step ends with.

A long accumulation is simulated up to a few rounds of the pipeline; from there each further round takes as long as the last one did. Free of torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gigatrain.planning.estimate.habits import Habits, Timeline
from gigatrain.planning.estimate.passes import Passes, Run, TimeOf, run, share
from gigatrain.planning.estimate.pipeline_order import BACKWARD, FORWARD, WEIGHTS, Event, Ran, events
from gigatrain.planning.estimate.pipeline_order import run as run_events
from gigatrain.planning.estimate.work import Item, Transfer, Work
from gigatrain.planning.estimate.workload import Workload

COMPUTE: tuple[str, ...] = ("gemm", "grouped", "attention", "memory", "optimizer")
_SCATTERED = (
    "megatron",
)  # tensor ranks that hold the same activations send a part each, which is gathered where it arrives (arXiv 2104.04473, 4.1)
_NAMES = ("forward", "backward", "weights")
_Span = tuple[int, str, str, float, float]


def simulate(works: Sequence[Work], workload: Workload, time_of: TimeOf, habits: Habits, *, spans: bool = False) -> Timeline:
    """The timeline of one step of `workload`, whose pipeline ranks do `works`; `time_of` says what an item costs by itself.

    `phases` are of the pipeline rank that works longest, and add up to `step_s`; what it waits for others is `bubble`, for its host `launch`. Spans are of the
    microbatches that are simulated.
    """
    schedule = workload.layout.schedule if len(works) > 1 else "1f1b"
    passes = Passes(time_of, habits, split=schedule == "zbv")
    table = [[tuple(passes.row(stage, name) for name in _NAMES) for stage in work.stages] for work in works]
    body = _alone(table[0], workload.accumulation) if len(works) == 1 else _pipeline(works, workload, table, time_of, habits)
    ends = [_End.of(work, time_of, habits) for work in works]
    behind = [end.gradients_behind(passes, habits) for end, passes in zip(ends, body.last, strict=True)]
    met = max(time + sum(late.values()) for time, late in zip(body.ends, behind, strict=True))  # the gradient's norm waits for every rank
    update = max(end.update.floor_s for end in ends)
    first = table[0][0][FORWARD].device_s
    ahead = [end.weights_ahead(first, len(table[0])) for end in ends]
    step_s = met + update + max(sum(late.values()) for late in ahead) + habits.step_s
    shown = max(range(len(works)), key=lambda rank: _worked(body.parts[rank]) + _worked(behind[rank]) + ends[rank].update.floor_s)
    phases: dict[str, float] = dict.fromkeys(COMPUTE, 0.0)
    phases["launch"] = habits.step_s + body.launch[shown] + ends[shown].update.floor_s - ends[shown].update.device_s
    for parts in (body.parts[shown], ends[shown].update.parts, behind[shown], ahead[shown]):
        for name, seconds in parts.items():
            phases[name] = phases.get(name, 0.0) + seconds
    phases["bubble"] = step_s - sum(phases.values())
    if abs(phases["bubble"]) < 1e-9 * step_s:  # what is left of sums in another order
        phases["gemm"] += phases["bubble"]
        phases["bubble"] = 0.0
    busy = {name: phases[name] for name in COMPUTE}
    busy["communication"] = body.moved[shown] + ends[shown].moved_s
    busy["idle"] = max(0.0, phases["launch"] + phases["bubble"])
    return Timeline(step_s, phases, busy, _spans(works, workload, table, time_of, habits, met, step_s) if spans else ())


def _worked(parts: dict[str, float]) -> float:
    return sum(parts.values())


@dataclass(frozen=True, slots=True)
class _Body:
    """Of each pipeline rank, up to its last backward's end."""

    ends: list[float]
    parts: list[dict[str, float]]
    launch: list[float]
    moved: list[float]
    last: list[
        list[tuple[float, float]]
    ]  # each stage's last backward: seconds by which its end is ahead of the rank's, and seconds that it takes


def _alone(rows: Sequence[Sequence[Run]], accumulation: int) -> _Body:
    """No pipeline: each microbatch's forward through all stages and its backward. The host is even with the device when the step begins."""
    whole = Run()
    for row in rows:
        whole = whole.then(row[FORWARD])
    for row in reversed(rows):
        whole = whole.then(row[BACKWARD])
    done = Run().then(whole, accumulation)
    took = max(done.device_s, done.floor_s)
    last, ahead = [], 0.0
    for row in rows:
        last.insert(0, (ahead, row[BACKWARD].device_s))
        ahead += row[BACKWARD].device_s
    return _Body([took], [done.parts], [took - done.device_s], [done.moved_s], [last])


def _pipeline(works: Sequence[Work], workload: Workload, table: list[list[tuple[Run, ...]]], time_of: TimeOf, habits: Habits) -> _Body:
    layout, count, ranks = workload.layout, workload.accumulation, len(works)
    stages = len(works[0].stages)
    wires = _Wires.of(works, workload, table, time_of, habits)

    def simulated(microbatches: int) -> Ran:
        return wires.run(events(layout.schedule, ranks, stages, microbatches))

    exact = count <= 5 * ranks
    near = count if exact else 2 * ranks + count % ranks
    ran = simulated(near)
    ends, launch = ran.ends, ran.launch
    last = []
    for rank, rows in enumerate(table):
        keys = [(rank * stages + stage) * 3 for stage in range(stages)]
        done_at = [max(ran.last[key + BACKWARD], ran.last.get(key + WEIGHTS, 0.0)) for key in keys]
        took = [row[BACKWARD].device_s + row[WEIGHTS].device_s for row in rows]
        last.append(sorted(((ends[rank] - at, seconds) for at, seconds in zip(done_at, took, strict=True)), reverse=True))
    if not exact:
        further = simulated(near + ranks)
        rounds = (count - near) // ranks
        # the first that ends late pulls the others along: every rank's round is as long as the slowest one's
        ends = [end + rounds * (later - end) for end, later in zip(ends, further.ends, strict=True)]
        launch = [one + rounds * (later - one) for one, later in zip(launch, further.launch, strict=True)]
    parts, moved = [], []
    for rank, rows in enumerate(table):
        once = Run()
        for row in rows:
            for one in row:
                once = once.then(one)
        done = Run().then(once, count)
        sends = sum(wires.held[rank * stages * 3 : (rank + 1) * stages * 3])
        if sends:
            done.parts["exposed_pipeline"] = done.parts.get("exposed_pipeline", 0.0) + count * sends
        if habits.synced_sends:
            launch[rank] = sum(one.floor_s - one.device_s for row in rows for one in row) * count
        parts.append(done.parts)
        moved.append(done.moved_s + count * wires.sends[rank] * wires.send_s)
    return _Body(ends, parts, launch, moved, last)


@dataclass(frozen=True, slots=True)
class _Wires:
    """What pipeline_order.run needs, by event key."""

    ranks: int
    seconds: list[float]
    held: list[float]
    sends: list[int]  # of a rank, a microbatch
    send_s: float
    hosts: list[float] | None
    floors: list[float] | None

    @classmethod
    def of(cls, works: Sequence[Work], workload: Workload, table: list[list[tuple[Run, ...]]], time_of: TimeOf, habits: Habits) -> "_Wires":
        whole = max(work.boundary_bytes for work in works)
        sent = Transfer("boundary", "pipeline", "send", whole, "forward")
        layout, joined = workload.layout, 0.0
        if layout.tensor > 1 and not layout.sequence_parallel and workload.stack in _SCATTERED:
            sent = replace(sent, bytes=whole / layout.tensor)
            joined = time_of(Transfer("boundary", "tensor", "all_gather", whole, "forward")).seconds
        send_s = time_of(sent).seconds + joined
        kept = (1 - share(habits, sent)) * (send_s - joined) + joined
        owner = {number: rank for rank, work in enumerate(works) for number in work.numbers}
        last = len(owner) - 1
        runs = [one for rows in table for row in rows for one in row]
        held, sends = [], []
        for rank, work in enumerate(works):
            mine = [(number < last and owner[number + 1] != rank, number > 0 and owner[number - 1] != rank) for number in work.numbers]
            held += [kept * out for forward, backward in mine for out in (forward, backward, False)]
            sends.append(sum(map(sum, mine)))
        if habits.synced_sends:  # each pass begins with an idle device and a host that has launched nothing of it
            return cls(len(works), [one.floor_s for one in runs], held, sends, send_s, None, None)
        launched = any(one.host_s for one in runs)
        return cls(
            len(works), [one.device_s for one in runs], held, sends, send_s,
            [one.host_s for one in runs] if launched else None, [one.floor_s for one in runs] if launched else None,
        )  # fmt: skip

    def run(self, todo: Sequence[Event], *, times: bool = False) -> Ran:
        return run_events(todo, self.ranks, self.seconds, self.held, self.send_s, self.hosts, self.floors, times=times)


@dataclass(frozen=True, slots=True)
class _End:
    """What a rank does once a step: gradients' transfers that may run behind the last backward, the update, weights' gathers that may run ahead of the next
    forward, in buckets each."""

    gradients: tuple[tuple[str, float, float, int], ...]  # axis, seconds of one bucket, share that may hide, buckets
    weights: tuple[tuple[str, float, float, int], ...]
    update: Run
    moved_s: float

    @classmethod
    def of(cls, work: Work, time_of: TimeOf, habits: Habits) -> "_End":
        gradients, weights, rest = [], [], []
        for item in work.step:
            if isinstance(item, Transfer) and item.axis in ("shard", "replicate"):
                count = max(1, math.ceil(item.bytes / habits.bucket_bytes)) if habits.bucket_bytes > 0 else 1
                bucket = time_of(item if count == 1 else replace(item, bytes=item.bytes / count)).seconds
                (weights if item.collective == "all_gather" else gradients).append((item.axis, bucket, share(habits, item), count))
            else:
                rest.append(item)
        update = _exposed_update(rest, time_of, habits)
        moved = update.moved_s + sum(seconds * count for _, seconds, _, count in gradients + weights)
        return cls(tuple(gradients), tuple(weights), update, moved)

    def gradients_behind(self, last: Sequence[tuple[float, float]], habits: Habits) -> dict[str, float]:
        """Phase -> seconds after the last backward's end, of `last` (_Body): a bucket is full when its part of its stage's last backward is done; they go one
        after the other, a replica's behind its shard's."""
        if not self.gradients:
            return {}
        hidden = sum(seconds * may * count for _, seconds, may, count in self.gradients)
        late = {f"exposed_{axis}": 0.0 for axis, *_ in self.gradients}
        for axis, seconds, may, count in self.gradients:
            late[f"exposed_{axis}"] += count * (1 - may) * seconds
        if not hidden:
            return late
        begin = -max(ahead + seconds for ahead, seconds in last)  # of a clock that is 0 at the rank's last end
        stream = begin
        buckets = max(1, round(max(count for *_, count in self.gradients) / len(last)))
        each = hidden / len(last) / buckets
        for ahead, seconds in last:
            for index in range(buckets):
                stream = max(stream, -ahead - seconds * (1 - (index + 1) / buckets)) + each
        shown = max(0.0, stream)
        for axis, seconds, may, count in self.gradients:
            part = seconds * may * count / hidden
            late[f"exposed_{axis}"] += part * (
                shown + habits.slowdown.get(axis, 0.0) * min(hidden - min(shown, hidden), sum(s for _, s in last))
            )
        return late

    def weights_ahead(self, forward_s: float, stages: int) -> dict[str, float]:
        """Phase -> seconds by which the first stage's first forward is later: it needs its part of the weights, bucket by bucket."""
        late: dict[str, float] = {}
        for axis, seconds, may, count in self.weights:
            first = max(1, round(count / stages))
            now = stream = 0.0
            for _ in range(first):
                stream += may * seconds * count / stages / first
                now = max(now, stream) + forward_s / first
            late[f"exposed_{axis}"] = (
                late.get(f"exposed_{axis}", 0.0) + count * (1 - may) * seconds + (max(0.0, now - forward_s) if may else 0.0)
            )
        return late


def _exposed_update(items: Sequence[Item], time_of: TimeOf, habits: Habits) -> Run:
    """The norm and the optimizer, with nothing beside them."""
    return run(items, time_of, replace(habits, overlaps={}))


def _spans(
    works: Sequence[Work],
    workload: Workload,
    table: list[list[tuple[Run, ...]]],
    time_of: TimeOf,
    habits: Habits,
    met: float,
    step_s: float,
) -> tuple[_Span, ...]:
    """(pipeline rank, stream, name, begin, end) of the passes of at most five rounds, and of the step's end."""
    found: list[_Span] = []
    ranks, stages = len(works), len(works[0].stages)
    count = min(workload.accumulation, 5 * ranks)
    if ranks == 1:
        now = 0.0
        for microbatch in range(count):
            for kind in (FORWARD, BACKWARD):
                for stage, row in enumerate(table[0] if kind == FORWARD else table[0][::-1]):
                    found.append((0, "compute", f"{_NAMES[kind]} {microbatch}.{stage}", now, now + row[kind].device_s))
                    now += row[kind].device_s
    else:
        todo = events(workload.layout.schedule, ranks, stages, count)
        ran = _Wires.of(works, workload, table, time_of, habits).run(todo, times=True)
        seen: dict[int, int] = {}
        for (rank, key, *_), (begin, end) in zip(todo, ran.times, strict=True):
            microbatch = seen[key] = seen.get(key, -1) + 1
            stage, kind = key // 3 % stages, key % 3
            found.append((rank, "compute", f"{_NAMES[kind]} {microbatch}.{stage}", begin, end))
    found += [(rank, "compute", "update", met, step_s) for rank in range(ranks)]
    return tuple(found)

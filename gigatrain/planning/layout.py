"""Which layers form each stage of a pipeline, and which rank holds which stages.

A pipeline is as fast as its slowest stage, so the layers are cut into runs whose largest cost is least. Costs are FLOPs per token, forward and backward:

    layer      6 * weights + 6 * heads * (head_dim + value_dim) * keys       weights: those that a token meets; keys: the tokens it sees on average
    embedding  2 * hidden                                        a look-up: scaled once, added once; what it costs is bandwidth
    head       6 * vocab * hidden                                at 128k tokens and 4,096 channels 2.4 layers of Llama 3.1 8B

Their sum is `Architecture.flops_per_token` and the look-up. Stages follow each other as they are numbered; with p ranks, v stages each:

    1f1b         rank r holds r                                  v = 1 (arXiv:2006.09503)
    interleaved  rank r holds r, r + p, r + 2p, ...              v >= 2 (arXiv:2104.04473)
    zbv          rank r holds r and 2p - 1 - r                   v = 2, a V: rank 0 has the first stage and the last (arXiv:2401.10241, section 6)
"""

from functools import lru_cache
from typing import Literal

from gigatrain.architectures import Architecture
from gigatrain.errors import PlanError

Schedule = Literal["1f1b", "interleaved", "zbv"]


def costs(architecture: Architecture, sequence: int) -> tuple[float, ...]:
    """FLOPs per token of each layer, forward and backward; the embedding counts with the first, the head with the last."""

    def keys(window: int | None) -> float:
        w = min(window or sequence, sequence)
        return (w * (w + 1) / 2 + (sequence - w) * w) / sequence

    width = architecture.heads * (architecture.head_dim + architecture.value_dim)
    found = []
    for layer in range(architecture.layers):
        weights = architecture.attention_parameters() + architecture.feed_forward_parameters(layer, routed=False)
        if architecture.sparse_of(layer):
            weights += architecture.hidden * (architecture.experts + 3 * architecture.expert_width * (architecture.experts_per_token or 0))
        found.append(6.0 * weights + 6.0 * width * keys(architecture.window_of(layer)))
    found[0] += 2.0 * architecture.hidden
    found[-1] += 6.0 * architecture.vocab * architecture.hidden
    return tuple(found)


def stages(architecture: Architecture, sequence: int, count: int) -> tuple[range, ...]:
    """The layers of each of `count` stages, at least one each, so that the costliest stage costs least; of such cuts the evenest one.

    Raises PlanError where there are fewer layers than stages.
    """
    if count > architecture.layers:
        raise PlanError(
            f"a pipeline of {count} stages needs as many layers, and the model has {architecture.layers}; lower mesh.pipeline or mesh.stages"
        )
    return cut(costs(architecture, sequence), count)


@lru_cache(maxsize=64)
def cut(costs: tuple[float, ...], count: int) -> tuple[range, ...]:
    """`costs` in `count` runs: least maximum, and of such cuts the least sum of squares; exact, by dynamic programming.

    126 layers in 126 runs take 0.1 s: a run is only lengthened while it is below the best maximum found.
    """
    assert 1 <= count <= len(costs)
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def best(limit: float, squares: bool) -> tuple[float, list[list[int]]]:
        """Over runs of at most `limit`: the value of the whole, and where the last of k runs over the first `end` costs begins."""
        size, never = len(costs), float("inf")
        values, starts = [[never] * (size + 1) for _ in range(count + 1)], [[0] * (size + 1) for _ in range(count + 1)]
        values[0][0] = 0.0
        for k in range(1, count + 1):
            for end in range(k, size - (count - k) + 1):
                for start in range(end - 1, k - 2, -1):
                    run = before[end] - before[start]
                    if run > limit or (not squares and run >= values[k][end]):
                        break  # longer runs cost more still
                    value = values[k - 1][start] + run * run if squares else max(values[k - 1][start], run)
                    if value < values[k][end]:
                        values[k][end], starts[k][end] = value, start
        return values[count][size], starts

    least, _ = best(float("inf"), squares=False)
    _, starts = best(least, squares=True)
    found, end = [], len(costs)
    for k in range(count, 0, -1):
        found.append(range(starts[k][end], end))
        end = starts[k][end]
    return tuple(reversed(found))


def held(schedule: Schedule, rank: int, ranks: int, each: int) -> tuple[int, ...]:
    """The stages of one pipeline rank, in order; `each` is how many a rank has."""
    return (rank, 2 * ranks - 1 - rank) if schedule == "zbv" else tuple(range(rank, ranks * each, ranks))


def live(schedule: Schedule, rank: int, ranks: int, each: int, microbatches: int) -> int:
    """Most stage activations that a rank keeps at once: one for each stage of it and microbatch between forward and backward."""
    match schedule:
        case "1f1b":
            return min(microbatches, ranks - rank)
        case "zbv":
            return min(2 * microbatches, microbatches + 1 + rank, 2 * ranks)
    turn = microbatches // max(1, microbatches // ranks)
    return min(each * microbatches, (each - 1) * turn + 2 * (ranks - 1 - rank) + 1)


def check(layers: int, schedule: Schedule, ranks: int, each: int, microbatches: int, *, compiled: bool) -> None:
    """Raise PlanError where a pipeline cannot run: `each` stages on each of `ranks`, `microbatches` per step and data rank."""
    if ranks == 1:
        if each > 1:
            raise PlanError(f"mesh.stages {each} needs a pipeline, and mesh.pipeline is 1; leave mesh.stages out, or raise mesh.pipeline")
        return
    wrong = {"1f1b": each != 1, "interleaved": each < 2, "zbv": each != 2}[schedule]
    if wrong:
        needs = {"1f1b": "exactly 1 stage", "interleaved": "2 stages or more", "zbv": "exactly 2 stages"}[schedule]
        raise PlanError(f'mesh.schedule "{schedule}" has {needs} on each rank, and mesh.stages is {each}; change either')
    if ranks * each > layers:
        raise PlanError(
            f"mesh.pipeline {ranks} with {each} stage{'s' if each > 1 else ''} each needs {ranks * each} layers, and the model has {layers}; "
            "lower mesh.pipeline or mesh.stages"
        )
    way_out = "lower train.microbatch, or raise train.batch"
    if schedule == "1f1b" and microbatches < ranks:
        raise PlanError(
            f'mesh.schedule "1f1b" needs as many microbatches as mesh.pipeline, {ranks}, and a data rank has {microbatches} a step; {way_out}'
        )
    turns = max(1, microbatches // ranks)
    if schedule == "interleaved" and microbatches % turns:
        down, up = (
            next(n for n in numbers if n % max(1, n // ranks) == 0)
            for numbers in (range(microbatches, 0, -1), range(microbatches, 1 << 60))
        )
        raise PlanError(
            f'mesh.schedule "interleaved" goes through the microbatches in {turns} equal turns of {ranks} or more (mesh.pipeline), and a data rank has '
            f"{microbatches} a step; make them {down} or {up} by train.microbatch or train.batch"
        )
    if schedule == "zbv" and compiled:
        raise PlanError(
            'mesh.schedule "zbv" computes weight gradients apart from the others, and train.compile fuses them; '
            'set mesh.schedule = "interleaved" or train.compile = false'
        )

"""Every way in which a stack can share a workload among its ranks, and what each stack refuses.

A workload's shape, sequence, samples of a step and number of ranks are fixed; sizes of the axes, order of the pipeline, what is sharded, samples of a
microbatch, what is recomputed and the precision are chosen. gigatrain's own stacks take what planning/axes.py, planning/layout.py and the engines take
(a test holds the two equal); others take what Megatron-LM, torchtitan, DeepSpeed and nanotron have in common, which is looser.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.workload import PRODUCTS_BITS, Layout, Precision, Recompute, Schedule, Shape, Stack, States, Workload

OWN: tuple[Stack, ...] = ("gigatrain_native", "gigatrain_deepspeed")
# What each stack can share among the ranks of `shard`, and whether it drops gathered weights again: (zero, reshard).
SHARED: dict[Stack, tuple[tuple[int, bool], ...]] = {
    "gigatrain_native": ((3, True), (3, False), (0, True)),
    "gigatrain_deepspeed": ((1, True), (2, True), (3, True)),
    "megatron": ((0, True), (1, True)),
    "torchtitan": ((0, True), (3, True), (3, False)),
    "llm_foundry": ((0, True), (3, True)),
    "nanotron": ((0, True), (1, True)),
    "deepspeed": ((0, True), (1, True), (2, True), (3, True)),
    "generic": ((0, True), (1, True), (3, True)),
}
# Axes that a stack has at all, beside replicate and shard.
AXES: dict[Stack, frozenset[str]] = {
    "gigatrain_native": frozenset({"tensor", "context", "pipeline", "expert"}),
    "gigatrain_deepspeed": frozenset({"context"}),
    "llm_foundry": frozenset(),
    "nanotron": frozenset({"tensor", "context", "pipeline", "expert"}),
    "deepspeed": frozenset({"tensor", "pipeline", "expert"}),  # Megatron-DeepSpeed
    "megatron": frozenset({"tensor", "context", "pipeline", "expert"}),
    "torchtitan": frozenset({"tensor", "context", "pipeline", "expert"}),
    "generic": frozenset({"tensor", "context", "pipeline", "expert"}),
}
SCHEDULES: dict[Stack, tuple[Schedule, ...]] = {
    "megatron": ("1f1b", "interleaved"),
    "nanotron": ("1f1b",),
    "deepspeed": ("1f1b",),
}
_ALL: tuple[Schedule, ...] = ("1f1b", "interleaved", "zbv")
MOST_STAGES = 64  # of a rank: config.Mesh.stages


@dataclass(frozen=True, slots=True)
class Split:
    """What fixes the matrices of a rank: the axes that cut tokens and layers. `samples` of a step are left for each of `data` ranks that read."""

    tensor: int
    context: int
    pipeline: int
    exchange: str
    data: int
    samples: int


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """All of them, in order."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return tuple(sorted({*small, *(number // one for one in small)}))


def domain(cluster: Cluster) -> int:
    """Ranks that the fastest links join: as far as `tensor` reaches."""
    inner = [level.accelerators for level in cluster.levels if level.name in ("scale_up", "node")]
    return max(inner, default=cluster.levels[0].accelerators if cluster.levels else 1)


def tensor_refused(shape: Shape, stack: Stack, tensor: int) -> bool:
    """Whether matrices cannot be cut so: heads, dense blocks, and of our own engine the vocabulary, whose rows are not padded."""
    if tensor == 1:
        return False
    dense = shape.sparse_layers < shape.layers
    if shape.heads % tensor or (dense and shape.intermediate % tensor) or (stack in OWN and shape.vocab % tensor):
        return True
    return bool(shape.kv_heads % tensor and tensor % shape.kv_heads)


def context_refused(shape: Shape, sequence: int, tensor: int, context: int, exchange: str) -> bool:
    """Whether samples cannot be cut so: two pieces a rank in a ring, whole heads and tokens by ulysses."""
    if context == 1:
        return False
    if sequence % (2 * context if exchange == "ring" else context):
        return True
    heads, keys = shape.heads // tensor, max(1, shape.kv_heads // tensor)
    return exchange == "ulysses" and heads % math.lcm(keys, context) != 0


def sequence_refused(sequence: int, context: int, tensor: int) -> bool:
    """Whether ranks of `tensor` cannot share the tokens between the matrices."""
    return tensor > 1 and (sequence // context) % tensor != 0


def pipeline_refused(layers: int, stack: Stack, schedule: Schedule, ranks: int, each: int, microbatches: int, *, unfused: bool) -> bool:
    """Whether a pipeline cannot run; `unfused`: weight gradients can be computed apart, which zbv needs (no compiler, no narrow products)."""
    if ranks == 1:
        return each > 1
    if {"1f1b": each != 1, "interleaved": each < 2, "zbv": each != 2}[schedule] or ranks * each > layers:
        return True
    if schedule == "zbv":
        return not unfused
    if schedule == "interleaved":  # ours goes in equal turns of `ranks` or more, Megatron's in turns of `ranks`
        return microbatches % max(1, microbatches // ranks) != 0 if stack in OWN else microbatches % ranks != 0
    return stack in OWN and microbatches < ranks


def refused(workload: Workload, cluster: Cluster | None = None) -> str:
    """Why a stack cannot run this layout, in a word or two; empty where it can. Without a cluster `tensor` may reach anywhere."""
    shape, mine, stack = workload.shape, workload.layout, workload.stack
    for axis in ("tensor", "context", "pipeline", "expert"):
        if getattr(mine, axis) > 1 and axis not in AXES[stack]:
            return f"{stack} has no {axis}"
    if cluster is not None and mine.tensor > domain(cluster):
        return "tensor beyond the scale-up domain"
    if tensor_refused(shape, stack, mine.tensor):
        return "tensor does not divide the matrices"
    if context_refused(shape, workload.sequence, mine.tensor, mine.context, mine.exchange):
        return "context does not divide sequence or heads"
    if sequence_refused(workload.sequence, mine.context, mine.tensor) and (stack in OWN or mine.sequence_parallel):
        return "tensor does not divide the tokens"
    if mine.expert > 1 and (not shape.experts or shape.experts % mine.expert):
        return "expert does not divide the experts"
    if _sharing(mine, stack) % mine.expert:
        return "expert does not divide the ranks that share"
    if stack == "gigatrain_deepspeed" and mine.replicate > 1:
        return f"{stack} has no replicate"
    shares = mine.shard * mine.context > 1
    if stack == "gigatrain_native" and ((mine.zero == 3) != shares or (mine.pipeline > 1 and mine.reshard and shares)):
        return "zero is not what the engine does"
    if stack == "gigatrain_native" and workload.offload and not shares:
        return "offload needs shards"
    if pipeline_refused(
        shape.layers,
        stack,
        mine.schedule,
        mine.pipeline,
        mine.stages,
        workload.accumulation,
        unfused=_unfused(workload, workload.precision),
    ):
        return "pipeline does not fit layers or microbatches"
    narrow = (workload.states.master < 4 and workload.states.weights < 4) or workload.states.moments < 8
    if stack in OWN and mine.pipeline > 1 and shape.tied and narrow:
        return "a tied head and narrow optimizer states in a pipeline"
    if workload.recompute == "lean" and workload.compiled and stack in OWN:
        return "lean excludes the compiler"
    return ""


def _unfused(workload: Workload, precision: Precision) -> bool:
    return not (workload.stack in OWN and (workload.compiled or PRODUCTS_BITS[precision] < 16))


def _sharing(mine: Layout, stack: Stack) -> int:
    """Ranks of which `expert` takes some."""
    if stack in OWN:
        return mine.shard
    return mine.shard * mine.context * (mine.tensor if mine.expert_tensor == 1 else 1)


def splits(workload: Workload, cluster: Cluster, pruned: Counter[str], *, batch: int | None = None) -> Iterator[Split]:
    """Every split of the ranks whose matrices, samples (the workload's, or `batch`) and tokens divide; what does not is counted by its reason in `pruned`."""
    shape, stack, sequence, ranks = workload.shape, workload.stack, workload.sequence, workload.layout.ranks
    batch = batch or workload.batch
    has, far = AXES[stack], domain(cluster)
    for tensor in divisors(ranks) if "tensor" in has else (1,):
        if tensor > far:
            pruned["tensor beyond the scale-up domain"] += 1
            continue
        if tensor_refused(shape, stack, tensor):
            pruned["tensor does not divide the matrices"] += 1
            continue
        for context in divisors(ranks // tensor) if "context" in has else (1,):
            if context > sequence // 2:
                break
            ways = [way for way in ("ring", "ulysses")[: 1 + (context > 1)] if not context_refused(shape, sequence, tensor, context, way)]
            if not ways:
                pruned["context does not divide sequence or heads"] += 1
                continue
            if stack in OWN and sequence_refused(sequence, context, tensor):
                pruned["tensor does not divide the tokens"] += 1
                continue
            for pipeline in divisors(ranks // tensor // context) if "pipeline" in has else (1,):
                if pipeline > shape.layers:
                    pruned["pipeline longer than the layers"] += 1
                    continue
                data = ranks // tensor // context // pipeline
                if batch % data:
                    pruned["samples do not divide by the ranks that read"] += 1
                    continue
                for way in ways:
                    yield Split(tensor, context, pipeline, way, data, batch // data)


def experts(workload: Workload, split: Split) -> tuple[int, ...]:
    """Sizes of `expert` that some size of `shard` allows."""
    if not workload.shape.experts or "expert" not in AXES[workload.stack]:
        return (1,)
    most = split.data if workload.stack in OWN else split.data * split.context * split.tensor
    return tuple(one for one in divisors(workload.shape.experts) if most % one == 0)


def shards(workload: Workload, split: Split, expert: int) -> Iterator[tuple[int, int, bool]]:
    """`(shard, zero, reshard)` of a split: every size for a stack with replicas of shards, all that read else."""
    stack = workload.stack
    sizes = {
        "gigatrain_native": divisors(split.data),
        "torchtitan": divisors(split.data),
        "llm_foundry": divisors(split.data),
        "generic": divisors(split.data),
    }.get(stack, (split.data,))
    for size in sizes:
        if _sharing(Layout(shard=size, context=split.context, tensor=split.tensor), stack) % expert:
            continue
        for zero, reshard in SHARED[stack]:
            if stack == "gigatrain_native":
                if (zero == 3) != (size * split.context > 1) or (zero == 3 and split.pipeline > 1 and reshard):
                    continue
                if workload.offload and zero != 3:
                    continue
            elif zero == 0 and size != split.data:
                continue  # nothing is shared: one form of it
            elif zero == 3 and size * split.context == 1 and stack not in OWN:
                continue  # nothing to share it with
            elif zero not in (0, 3) and size != split.data:
                continue  # states over fewer ranks: more memory and no less to send
            yield size, zero, reshard


def turns(workload: Workload, split: Split, precision: Precision) -> Iterator[tuple[int, int, Schedule, int]]:
    """`(microbatch, accumulation, schedule, stages)`: microbatches that divide a rank's samples, and the schedules that take so many."""
    layers, stack = workload.shape.layers, workload.stack
    unfused = _unfused(workload, precision)
    for microbatch in divisors(split.samples):
        accumulation = split.samples // microbatch
        if split.pipeline == 1:
            yield microbatch, accumulation, "1f1b", 1
            continue
        for schedule in SCHEDULES.get(stack, _ALL):
            most = min(MOST_STAGES, layers // split.pipeline)
            for each in {"1f1b": (1,), "zbv": (2,), "interleaved": range(2, most + 1)}[schedule]:
                if not pipeline_refused(layers, stack, schedule, split.pipeline, each, accumulation, unfused=unfused):
                    yield microbatch, accumulation, schedule, each


def arranged(
    workload: Workload,
    split: Split,
    expert: int,
    share: tuple[int, int, bool],
    turn: tuple[int, int, Schedule, int],
    recompute: Recompute,
    precision: Precision,
) -> Workload:
    """The workload in that layout, with what follows from it: the form of its states, and which of our fusions can be on (planning/fusions.py)."""
    (shard, zero, reshard), (microbatch, accumulation, schedule, stages) = share, turn
    assert zero in (0, 1, 2, 3)
    mine = Layout(
        replicate=split.data // shard,
        shard=shard,
        context=split.context,
        tensor=split.tensor,
        pipeline=split.pipeline,
        expert=expert,
        expert_tensor=1,
        schedule=schedule,
        stages=stages,
        exchange="ulysses" if split.exchange == "ulysses" else "ring",
        # Between the matrices the same bytes are sent, and less is kept and passed over (arXiv:2205.05198): never the worse where it can be.
        sequence_parallel=not sequence_refused(workload.sequence, split.context, split.tensor),
        zero=zero,
        reshard=reshard and not (workload.stack == "gigatrain_native" and split.pipeline > 1),
        dispatch=workload.layout.dispatch,
    )
    found = replace(workload, layout=mine, microbatch=microbatch, accumulation=accumulation, recompute=recompute, precision=precision)
    return _own(found) if workload.stack == "gigatrain_native" else found


FUSED = frozenset({"fuse", "main_grads", "graph", "release"})


def states_of(workload: Workload, precision: Precision, zero: int) -> States:
    """Bytes per parameter in that form: FSDP2's shards are the fp32 masters themselves, whole weights are bf16 beside them (planning/cost.py)."""
    states = workload.states
    if (
        workload.stack != "gigatrain_native"
        or PRODUCTS_BITS[precision] == 32
        or (states.weights, states.master) not in ((2.0, 4.0), (4.0, 0.0))
    ):
        return states
    return replace(states, weights=4.0, master=0.0, gathered=2.0) if zero == 3 else replace(states, weights=2.0, master=4.0, gathered=2.0)


def _own(workload: Workload) -> Workload:
    """Of gigatrain's native engine: the form of its states, and which fusions there can be."""
    mine = workload.layout
    states = states_of(workload, workload.precision, mine.zero)
    whole = mine.zero == 0 and not workload.compiled and mine.schedule != "zbv" and PRODUCTS_BITS[workload.precision] >= 16
    fused = {"fuse", "main_grads"} if whole else set()
    graphed = workload.graphed and mine.zero == 0 and mine.pipeline == 1
    lean = (set(workload.lean) - FUSED) | fused | ({"graph"} if graphed else set())
    return replace(workload, states=states, graphed=graphed, lean=tuple(sorted(lean)))


def size(workload: Workload, cluster: Cluster, *, precisions: int, recomputes: int) -> int:
    """How many legal configurations there are, counted without pricing one."""
    count = 0
    for split in splits(workload, cluster, Counter()):
        each = sum(1 for _ in turns(workload, split, workload.precision))
        if each:
            count += each * sum(sum(1 for _ in shards(workload, split, expert)) for expert in experts(workload, split))
    return count * precisions * recomputes

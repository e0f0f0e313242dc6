"""The estimate of one step: the operations of each pipeline rank, timed one by one, played as events, with what the ranks hold and how sure all that is."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from gigatrain.planning import hardware
from gigatrain.planning.estimate import collectives, interval, operations, rates, residency, stacks, step
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.habits import Cost, Habits, Timeline
from gigatrain.planning.estimate.work import Estimate, Item, Op, Transfer, Work
from gigatrain.planning.estimate.workload import Workload


def estimate(workload: Workload, cluster: Cluster, constants: Mapping[str, float] = VALUES) -> Estimate:
    """One step of `workload` on `cluster`. Raises PlanError for a chip whose rates nobody knows and a cap that no chip can keep."""
    works = operations.works(workload)
    timeline = timed(works, workload, cluster, constants)
    by_rank = residency.memory(workload, works, constants)
    fullest = max(by_rank, key=lambda held: sum(held.values()))
    held = sum(fullest.values())
    low_s, high_s = interval.interval(workload, cluster, timeline.step_s)
    memory_low, memory_high = interval.memory_interval(workload, fullest)
    return Estimate(
        step_s=timeline.step_s,
        low_s=low_s,
        high_s=high_s,
        phases=timeline.phases,
        busy=timeline.busy,
        tokens=workload.tokens,
        ranks=workload.layout.ranks,
        model_flops=operations.model_flops(workload),
        memory=fullest,
        memory_low=memory_low,
        memory_high=memory_high,
        memory_by_rank=by_rank,
        fits=None if cluster.memory_bytes is None else held <= cluster.memory_bytes,
        limits=limits(timeline),
        outside=interval.outside(workload, cluster),
        assumed=(*cluster.assumed, *rates.device(cluster.chip).assumed),
    )


def timed(works: tuple[Work, ...], workload: Workload, cluster: Cluster, constants: Mapping[str, float] = VALUES) -> Timeline:
    """The step alone, without its memory: what search and fits call many thousand times. `works` are operations.works(workload)."""
    habits = habits_of(workload, cluster, constants)
    timeline = step.simulate(works, workload, timer(workload, cluster, habits, constants), habits)
    waits = timeline.step_s * wait_share(workload, cluster, constants)
    return replace(timeline, step_s=timeline.step_s + waits, phases=timeline.phases | {"wait": waits})


def habits_of(workload: Workload, cluster: Cluster, constants: Mapping[str, float]) -> Habits:
    """The stack's habits here, with what the workload itself says of its overlap, compilation and graphs."""
    found = stacks.habits(workload.stack, workload.version + (" unfused" if workload.attention == "unfused" else ""), constants)
    overlaps = dict(found.overlaps)
    if cluster.levels and collectives.expert_span(workload.layout, workload.stack) > cluster.levels[0].accelerators:
        # Tokens that leave the domain are worth the memory that hiding them takes.
        overlaps["expert"] = max(overlaps["expert"], constants[f"stack.{found.stack}.overlap.expert_across"])
    if workload.stack == "gigatrain_deepspeed" and workload.layout.zero == 1:
        overlaps["shard"] = 0.0  # engines/deepspeed.py asks for overlap_comm from ZeRO 2 on
    for axis, hidden in workload.overlap:
        for name in stacks.AXES if axis == "all" else (axis,):
            overlaps[name] = max(overlaps[name], constants["overlap.told_share"]) if hidden else 0.0
    return replace(
        found,
        overlaps=overlaps,
        bucket_bytes=max(found.bucket_bytes, stacks.BUCKET_BYTES_A_RANK * workload.layout.shard)
        if workload.stack == "megatron"
        else found.bucket_bytes,
        graphed=found.graphed or workload.graphed,
        launch_s=found.launch_s * (constants["compiled.launch_share"] if workload.compiled else 1.0),
        fused=found.fused | stacks.COMPILED if workload.compiled else found.fused,
    )


def timer(workload: Workload, cluster: Cluster, habits: Habits, constants: Mapping[str, float]) -> Callable[[Item], Cost]:
    """What one item costs in this workload on this cluster; equal items are timed once."""
    clock = rates.clock_of(cluster.chip, cluster.cap_watts, cluster.clock_share, constants)
    products = products_share(workload, constants)
    groups: dict[tuple[str, bool], tuple[int, int]] = {}
    distinct = across_share(workload, cluster)
    known: dict[int, tuple[Item, Cost]] = {}  # by identity; the item is kept, so that its identity stays its own

    def of(item: Item) -> Cost:
        found = known.get(id(item))
        if found is None:
            found = known[id(item)] = (item, fresh(item))
        return found[1]

    def fresh(item: Item) -> Cost:
        if isinstance(item, Transfer):
            key = item.axis, item.name.endswith("_experts")
            if key not in groups:
                groups[key] = collectives.group(workload.layout, item.axis, experts=key[1], stack=workload.stack)
            share = distinct if item.axis == "expert" and workload.layout.dispatch == "hierarchical" else 1.0
            seconds = collectives.seconds(
                item if share == 1.0 else replace(item, bytes=item.bytes * share), cluster, *groups[key], constants
            )
            return Cost(seconds, 0.0 if habits.graphed else min(habits.launch_s, constants["collective.launch_s"]))
        if item.name in ("adamw_host", "host_copy"):
            return offloaded(item, constants)
        found = rates.cost(item, cluster.chip, constants, habits, clock=clock, products=products)
        if item.name == "permute" and item.passes == "forward" and not habits.graphed:
            return replace(found, seconds=found.seconds + constants["moe.sync_s"])
        if item.passes == "forward" and item.name in ("embedding", "cross_entropy") and not habits.graphed:
            return replace(found, launch_s=found.launch_s + habits.microbatch_s / 2)
        return found

    return of


def across_share(workload: Workload, cluster: Cluster) -> float:
    """Of the copies that a hierarchical dispatch (DeepEP, HybridEP) sends to ranks, those that leave the scale-up domain: a token goes once to each domain that
    has experts of it, and on within. Where its group stays in one domain, 1."""
    shape, layout, domain = workload.shape, workload.layout, cluster.levels[0].accelerators if cluster.levels else 1
    span = collectives.expert_span(layout, workload.stack)
    if span <= domain or not shape.experts:
        return 1.0
    k, ranks, domains = shape.experts_per_token, layout.expert, min(span / domain, layout.expert)
    return domains * (1 - (1 - 1 / domains) ** k) / (ranks * (1 - (1 - 1 / ranks) ** k))


def offloaded(op: Op, constants: Mapping[str, float]) -> Cost:
    """What an optimizer on the host costs: its states through a rank's share of the host's memory, gradients and weights through PCIe."""
    return Cost(op.bytes / (constants["offload.link_gbyte_s" if op.name == "host_copy" else "offload.host_gbyte_s"] * 1e9))


def products_share(workload: Workload, constants: Mapping[str, float]) -> float:
    """Share of a low precision's rate that its recipe keeps: scaling by blocks costs sums and scale factors."""
    if workload.precision == "fp8_blockwise":
        return constants["gemm.blockwise_share"]
    return constants["gemm.mx_share"] if workload.precision in ("mxfp8", "nvfp4") else 1.0


def wait_share(workload: Workload, cluster: Cluster, constants: Mapping[str, float]) -> float:
    """What the slowest of many nodes costs, of a step: one share for each doubling of them."""
    devices = hardware.CHIPS[cluster.chip].devices
    nodes = max(1.0, workload.layout.ranks / max(cluster.per_node * devices, 1))
    return constants["scale.wait_share"] * max(0, (int(nodes) - 1).bit_length())


_WORDS = {
    "gemm": "products of matrices", "grouped": "products of experts", "attention": "attention", "memory": "passes over memory",
    "optimizer": "the optimizer", "launch": "launches of kernels by the host", "bubble": "the pipeline's bubble",
    "tensor": "tensor-parallel transfers", "context": "context-parallel transfers", "expert": "transfers of tokens to experts",
    "shard": "transfers of weights and gradients", "replicate": "transfers of gradients between replicas",
    "pipeline": "transfers between pipeline stages", "wait": "waiting for the slowest node", "host": "the host's work of each step",
}  # fmt: skip


def limits(timeline: Timeline) -> str:
    """What the step waits for most, in words, with its share."""
    name, seconds = max(timeline.phases.items(), key=lambda phase: phase[1])
    name = name.removeprefix("exposed_")
    return f"{_WORDS.get(name, name)} ({seconds / timeline.step_s:.0%} of the step)"

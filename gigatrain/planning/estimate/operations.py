"""A workload as work: the blocks of each pipeline rank and what happens once a step; and the FLOPs that a model is said to need.

    work(workload, rank)   of one pipeline rank
    works(workload)        of each; blocks that are alike are the same object, so what is computed of one may be kept by its identity
    model_flops(workload)  of a step, all ranks: 6 per weight that a token meets and 6 per visible pair and channel, no recomputation

`layers.py` has the blocks and the names of their items. Names of `Work.step`:

    gradients, gradients_experts   (shard) zero 0: all_reduce; zero 1: reduce_scatter, of DeepSpeed all_reduce; zero 2 and 3 have theirs in the
                                   blocks, but a pipeline's without reshard
    replicate                      (replicate) the same over replicas: all_reduce of what a rank has left of them
    weights, weights_experts       (shard) zero 1 and 2: all_gather of updated weights; zero 3 without reshard in a pipeline: before the step's first microbatch
    experts_sum                    (tensor) our own engine: every tensor rank has its experts whole and sees its own tokens (places.Place.partial): fp32 sums
    tied                           (pipeline) the embedding's gradient between first and last stage, where the head is tied to it
    grad_norm                      (optimizer) gradients read for their norm; read and written again to be clipped, and in fp16 to be unscaled
    grad_zero                      (optimizer) sums cleared
    adamw                          (optimizer) gradients read, master weights and moments read and written, weights written; `adamw_host` where it is offloaded
    host_copy                      (optimizer) offloaded: gradients to the host and weights from it; `bytes` cross PCIe
    muon                           (gemm) its Newton-Schulz products
    quantise                       (memory) weights, once a step, where a stack keeps them quantised between microbatches (Megatron)

A transfer along "shard" is among `shard x context` ranks, that of experts among `expert` times fewer (`expert / tensor` where experts are not cut by tensor).
Boundary activations are sent by whoever runs the schedule: `Work.boundary_bytes` each.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from gigatrain.planning import layout as pipelines
from gigatrain.planning.estimate import layers
from gigatrain.planning.estimate.pieces import FUSED_SUM, QUANTISED, WHOLE_EXPERTS, Local
from gigatrain.planning.estimate.work import Block, Item, Op, Transfer, Work
from gigatrain.planning.estimate.workload import Shape, Workload

_WEIGHED = frozenset({"gigatrain_native", "gigatrain_deepspeed"})  # cut their stages by what layers and head cost
_ROUNDING = 1e-9  # a third of three layers is one
_ROUNDS = 5  # of Newton-Schulz (optim/muon.py)


def model_flops(workload: Workload) -> float:
    """Of a step, all ranks: forward and backward products (frozen: no weight gradients) of the model, each visible pair of tokens once."""
    shape = workload.shape
    local = Local(workload)
    each = 4.0 if workload.frozen else 6.0
    weights = float(shape.layers * _attention_weights(shape) + shape.hidden * shape.vocab * (1 + shape.predicted))
    weights += sum(_block_weights(shape, shape.sparse_of(i)) for i in range(shape.layers))
    weights += shape.predicted * (_attention_weights(shape) + _block_weights(shape, shape.sparse_layers > 0) + 2 * shape.hidden**2)
    keys = sum(local.keys(shape.window_of(i)) for i in range(shape.layers)) + shape.predicted * local.keys(None)
    return workload.tokens * (each * weights + 6.0 * shape.heads * (shape.head_dim + shape.value_dim) * keys)


def _attention_weights(shape: Shape) -> int:
    if shape.kv_rank is None:
        return shape.hidden * (shape.heads * (shape.head_dim + shape.value_dim) + 2 * shape.kv_heads * shape.head_dim)
    latents = (
        shape.hidden * ((shape.q_rank or 0) + shape.kv_rank + shape.rotary_dim)
        + (shape.q_rank or shape.hidden) * shape.heads * shape.head_dim
    )
    return latents + shape.heads * (shape.kv_rank * (shape.head_dim - shape.rotary_dim + shape.value_dim) + shape.hidden * shape.value_dim)


def _block_weights(shape: Shape, sparse: bool) -> int:
    """Those that a token meets."""
    wide = 3 if shape.gated else 2
    if not sparse:
        return wide * shape.hidden * shape.intermediate
    return shape.hidden * (shape.experts + wide * (shape.experts_per_token * shape.expert_width + shape.shared_width))


def cut(workload: Workload) -> tuple[range, ...]:
    """The layers of each stage: ours by cost; Megatron's alike, embedding and head counting as a layer each where only that divides, else by cost too."""
    shape, layout = workload.shape, workload.layout
    count = layout.pipeline * layout.stages
    if workload.stack not in _WEIGHED:
        if shape.layers % count == 0:
            each = shape.layers // count
            return tuple(range(i * each, (i + 1) * each) for i in range(count))
        if (shape.layers + 2) % count == 0:
            ends = [0, *((shape.layers + 2) // count * (i + 1) - 1 for i in range(count - 1)), shape.layers]
            return tuple(range(a, b) for a, b in pairwise(ends))
    return _weighed(shape, workload.sequence, count)


@lru_cache(maxsize=64)
def _weighed(shape: Shape, sequence: int, count: int) -> tuple[range, ...]:
    """As planning/layout.py weighs them; more stages than layers leave the last ones empty."""

    def keys(window: int | None) -> float:
        w = min(window or sequence, sequence)
        return (w * (w + 1) / 2 + (sequence - w) * w) / sequence

    pairs, attention = shape.heads * (shape.head_dim + shape.value_dim), _attention_weights(shape)
    costs = [6.0 * (attention + _block_weights(shape, shape.sparse_of(i)) + pairs * keys(shape.window_of(i))) for i in range(shape.layers)]
    costs[0] += 2.0 * shape.hidden  # the look-up
    costs[-1] += 6.0 * shape.vocab * shape.hidden * (1 + shape.predicted) + shape.predicted * costs[-1]
    if count > shape.layers:
        return tuple(range(min(i, shape.layers), min(i + 1, shape.layers)) for i in range(count))
    return pipelines.cut(tuple(costs), count)


def works(workload: Workload) -> tuple[Work, ...]:
    """Of each pipeline rank, in order."""
    local, blocks, steps = Local(workload), {}, {}
    return tuple(_work(local, rank, cut(workload), blocks, steps) for rank in range(workload.layout.pipeline))


def work(workload: Workload, rank_of_pipeline: int = 0) -> Work:
    """Of one pipeline rank."""
    return _work(Local(workload), rank_of_pipeline, cut(workload), {}, {})


def _work(local: Local, rank: int, cuts: tuple[range, ...], blocks: dict[object, Block], steps: dict[object, tuple[Item, ...]]) -> Work:
    shape, layout, share = local.workload.shape, local.workload.layout, local.workload.recomputed
    plain = (
        local
        if share == 1.0
        else Local(replace(local.workload, recompute="none", lean=tuple(name for name in local.workload.lean if name != "recompute_moe")))
    )
    count = layout.pipeline * layout.stages
    numbers = pipelines.held(layout.schedule, rank, layout.pipeline, layout.stages) if count > 1 else (0,)
    ends = {0, count - 1} & set(numbers)
    both = shape.tied and (len(ends) == 2 or count == 1)

    def block(key: object, build: object) -> Block:
        if key not in blocks:
            blocks[key] = build()  # type: ignore[operator]
        return blocks[key]

    stages = []
    for number in numbers:
        stage: list[Block] = []
        if number == 0:
            stage.append(block("embedding", lambda: layers.embedding(local)))
        for i in cuts[number]:
            sparse, window = shape.sparse_of(i) and shape.experts > 0, shape.window_of(i)
            again = int((i + 1) * share + _ROUNDING) > int(i * share + _ROUNDING)
            made = local if again else plain
            stage.append(block((sparse, window, again), lambda made=made, sparse=sparse, window=window: layers.layer(made, sparse, window)))
        if number == count - 1:
            stage += [block("predicted", lambda: layers.predicted(local))] * shape.predicted
            stage.append(block(("head", both), lambda: layers.head(local, tied_here=both)))
        stages.append(tuple(stage))
    dense = sum(b.parameters - b.expert_parameters for stage in stages for b in stage)
    experts = sum(b.expert_parameters for stage in stages for b in stage)
    tied = shape.tied and not both and len(ends) == 1
    key = (dense, experts, tied)
    if key not in steps:
        steps[key] = _step(local, dense, experts, tied)
    return Work(tuple(stages), numbers, steps[key], float(local.rows * shape.hidden * local.size))


def trained(workload: Workload, dense: float, experts: float) -> tuple[float, float]:
    """Of a rank's parameters those that are: all, or LoRA's, of attention's products (NeMo's default), of rank r: r (inputs + outputs) each."""
    if not workload.frozen:
        return dense, experts
    shape = workload.shape
    if not workload.adapter_rank:
        return 0.0, 0.0
    if workload.adapter_parameters:
        return workload.adapter_parameters / workload.layout.pipeline / workload.layout.tensor, 0.0
    inputs_outputs = 2 * shape.hidden + (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    total = shape.layers * workload.adapter_rank * inputs_outputs
    return total / workload.layout.pipeline / workload.layout.tensor, 0.0


def _step(local: Local, dense: float, experts: float, tied: bool) -> tuple[Item, ...]:
    """What follows the last microbatch, in order."""
    w, shape, layout, states = local.workload, local.workload.shape, local.workload.layout, local.workload.states
    mine, of_experts = trained(w, dense, experts)
    items: list[Item] = []
    once = layout.zero == 3 and layout.pipeline > 1 and not layout.reshard
    groups = (("", mine, local.shards, dense), ("_experts", of_experts, local.expert_shards, experts))
    for suffix, count, ranks, _ in groups:
        if count and ranks > 1 and (layout.zero < 2 or once):
            items.append(Transfer("gradients" + suffix, "shard", local.reduces, count * states.reduced, "update"))
        if count and layout.replicate > 1 and (layout.zero < 2 or once):
            items.append(Transfer("replicate", "replicate", "all_reduce", count * states.reduced / (ranks if layout.zero else 1), "update"))
    if of_experts and w.stack in WHOLE_EXPERTS and layout.tensor > 1:
        held = of_experts / (local.expert_shards if layout.zero >= 2 else 1)
        items.append(Transfer("experts_sum", "tensor", "all_reduce", 4.0 * held, "update"))
    if tied:
        items.append(Transfer("tied", "pipeline", "send", 2.0 * shape.vocab * shape.hidden / local.t * states.reduced, "update"))
    shard = mine / local.shards + of_experts / local.expert_shards if layout.zero else mine + of_experts
    sums = shard if layout.zero in (2, 3) else mine + of_experts
    passes = 5 if w.precision == "fp16" else 3
    items.append(Op("grad_norm", "optimizer", "update", 0.0, passes * states.gradients * shard, kernels=passes))
    host = "_host" if w.offload else ""
    if w.offload:
        items.append(Op("host_copy", "optimizer", "update", 0.0, (states.gradients + states.weights) * shard))
    moved = (
        states.gradients + 2 * (states.master + states.moments) + states.weights * (1 if states.master else 2)
    )  # weights may be their own masters
    items.append(Op("adamw" + host, "optimizer", "update", 2.0 * shard, moved * shard, kernels=8))
    if w.optimizer == "muon":
        items.append(_muon(local, shard))
    items.append(Op("grad_zero", "optimizer", "update", 0.0, states.gradients * sums))
    if w.stack in FUSED_SUM and local.bits < 16 and not w.frozen:
        items.append(Op("quantise", "memory", "update", 0.0, QUANTISED[w.precision] * (dense + experts), kernels=2 * shape.layers))
    for suffix, _, ranks, whole in groups:
        updated = whole if once else (mine if not suffix else of_experts)
        if updated and ranks > 1 and (layout.zero in (1, 2) or once):
            items.append(Transfer("weights" + suffix, "shard", "all_gather", updated * states.gathered, "update"))
    return tuple(items)


def _muon(local: Local, shard: float) -> Op:
    """Newton-Schulz of this rank's share of the matrices: five times 4 r^2 c + 2 r^3 of an r x c one (r <= c), as of square ones of the stream's width."""
    h = local.workload.shape.hidden
    matrices = max(1, round(shard / h**2))
    return Op(
        "muon",
        "gemm",
        "update",
        _ROUNDS * 6.0 * h**3 * matrices,
        _ROUNDS * 3 * 6.0 * h**2 * matrices,
        h,
        h,
        h,
        matrices,
        kernels=3 * _ROUNDS,
    )

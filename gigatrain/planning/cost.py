"""Bytes that a plan needs on one rank, from its numbers alone."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal

from gigatrain.architectures import Architecture
from gigatrain.config import Adapter, Engine, Mesh, Optim, Section
from gigatrain.foreign import Foreign
from gigatrain.planning import adapting, layout

Recompute = Literal["none", "lean", "selective", "full"]


class Memory(Section):
    """Bytes of one rank. `weights`, `gradients` and `optimizer` are exact; `activations` and `workspace` are estimates."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def saved_bytes(architecture: Architecture, size: int, recompute: Recompute, kernels: Mapping[str, str]) -> int:
    """Bytes that one layer keeps for its backward, per token, in tensors of `size` bytes an element; without attention's scores and masks.

    With lean or fused operations: the residual stream after each sum 2 h; norm outputs 2 h, and inputs of norms behind a block 2 h; queries, keys,
    values and attention's output (2 heads + 2 kv_heads) d_head, and queries and keys before their norm; gate, up and the activation 3 i, or 2 i without
    a gate; in fp32 each norm's rstd and attention's logsumexp. Latent attention keeps its latents before and after their norms, and of every head keys and
    queries, what the latent became (which the values are a part of) and the output. `lean` keeps no norm output, no normed query or key, no key made of a
    latent and no activation. `full` keeps h, `selective` the matrix products. References keep more: of a gated activation i, of xIELU 3 i and a mask, of
    norms and rotation about 4 h and the heads.
    A layer with experts keeps, of each of k visits, row and result 2 h and gate, up, silu and activation 4 i (clamped 7 i), in fp32 scores and weights, and
    two int64, of a softmax over chosen logits these too, and of sigmoids h in fp32; fused or glued, gate and up 2 i alone, and three int64, and a fused
    router its logits. Shared experts keep what a dense block of their width does.
    Where some layers have experts, it is the mean layer.
    """
    h, i, d = architecture.hidden, architecture.intermediate, architecture.head_dim
    heads, kv = architecture.heads, architecture.kv_heads
    experts, visits = architecture.experts, architecture.experts_per_token or 0
    pre, post = architecture.placement != "post", architecture.placement != "pre"
    width, wide, shared = (2 * heads + 2 * kv) * d, 2 if architecture.gated else 1, architecture.shared_width
    latents = (architecture.q_rank or 0) + (architecture.kv_rank or 0)
    if architecture.kv_rank:
        expanded = heads * (d - architecture.rotary_dim + architecture.value_dim)
        width = 2 * latents + architecture.rotary_dim + heads * (2 * d + architecture.value_dim) + expanded
    if recompute == "full":
        return size * h
    if recompute == "selective":
        block, mixture = size * wide * i, size * (experts + visits * (2 * architecture.expert_width + h) + wide * shared)
        return size * (3 * h + width) + _mean(architecture, block, mixture)
    normed = {"none": 0, "head": heads + kv, "full": 2}[architecture.qk_norm]
    normed += (architecture.q_rank is not None) + (architecture.kv_rank is not None)
    kept, block = 2 * h + (2 * h if post else 0) + width, wide * i
    if recompute == "none":
        kept += (2 * h if pre else 0) + ((heads + kv) * d if normed and not latents else 0)
        block += i
    elif latents:
        kept -= latents + heads * d  # normed latents, and keys
    if kernels.get("rms_norm") == "reference":
        kept += 4 * h + width
    mask = 0
    if kernels.get(architecture.activation) == "reference":
        block += {"swiglu": 1, "geglu": 1, "relu2": 0, "xielu": 3, "clamped_swiglu": 0}[architecture.activation] * i
        mask = i if architecture.activation == "xielu" else 0
    clamped = architecture.activation == "clamped_swiglu"
    mixture = size * visits * (2 * h + (7 if clamped else 4) * architecture.expert_width) + 20 * visits
    if kernels.get("moe") in ("glued", "fused"):  # gate and up alone; and where each slot's row is
        mixture = size * visits * 2 * architecture.expert_width + 28 * visits
    if kernels.get("router") == "fused":
        mixture += (4 if architecture.scoring == "sigmoid" else size) * experts  # logits, of a product in fp32 for sigmoids
    else:
        mixture += 4 * experts + (4 * (visits + 1) if architecture.renormalise else 0)
        mixture += 4 * (experts + visits) if architecture.scoring == "chosen" else 0
        mixture += 4 * h if architecture.scoring == "sigmoid" and size < 4 else 0  # its product is in fp32
    mixture += size * shared * block // i  # which is as a dense block
    return size * kept + _mean(architecture, size * block + mask, mixture) + 4 * (2 * pre + 2 * post + normed + heads)


def _mean(architecture: Architecture, dense: int, sparse: int) -> int:
    """Over the layers, of which some have experts; rounded up."""
    count = architecture.sparse_layers
    return -(-((architecture.layers - count) * dense + count * sparse) // architecture.layers)


def optimizer_bytes(architecture: Architecture, precision: Literal["bf16", "fp32"], optim: Optim) -> int:
    """Bytes of master weights beside bf16 weights, and of moments; without the few counters.

    Master weights 4 B per parameter in fp32, corrections of 2 B or 1 B in bf16+16 and bf16+8. AdamW's moments 8 B in fp32, 4 B in bf16, 2 B in int8
    with 8 B of scales per begun block of 128 of each of its groups, decayed or not. Muon, for the layers' matrices, routers and experts
    apart: fp32 master weights and 4 B.
    """
    matrices, embeddings = architecture.matrix_parameters(), architecture.vocab * architecture.hidden * (1 if architecture.tied else 2)
    muon = architecture.matrix_parameters(routed=False) if optim.name == "muon" else 0
    decayed = matrices - muon + (embeddings if optim.decay_embeddings else 0)
    groups = (decayed, architecture.parameters() - muon - decayed)
    return _adamw_bytes(groups, precision, optim) + (8 if precision == "bf16" else 4) * muon


def _adamw_bytes(groups: tuple[int, int], precision: Literal["bf16", "fp32"], optim: Optim) -> int:
    master = {"fp32": 4, "bf16+16": 2, "bf16+8": 1}[optim.master] if precision == "bf16" else 0
    moments = {"fp32": 8, "bf16": 4, "int8": 2}[optim.moments]
    scales = sum(8 * -(-count // 128) for count in groups) if optim.moments == "int8" else 0
    return (master + moments) * sum(groups) + scales


def checkpoint_bytes(
    architecture: Architecture | Foreign, precision: Literal["bf16", "fp32"], optim: Optim, *, masters: bool, adapter: Adapter | None = None
) -> int:
    """Bytes of a checkpoint: every parameter's weights, master weights and moments once, however many ranks hold a copy of it.

    `masters`: the weights that are kept are the fp32 masters themselves (FSDP2), so that there are no others. With an adapter: of what is trained, in fp32.
    """
    if adapter is not None and isinstance(architecture, Architecture):
        return 12 * adapting.trained(architecture, adapter)
    size = 2 if precision == "bf16" else 4
    twice = 2 if masters and size == 2 and optim.master == "fp32" else 0  # bf16 weights beside their masters
    if isinstance(architecture, Foreign):
        master = {"fp32": 4, "bf16+16": 2, "bf16+8": 1}[optim.master] if size == 2 else 0
        return (size - twice + master + {"fp32": 8, "bf16": 4, "int8": 2}[optim.moments]) * architecture.total
    return (size - twice) * architecture.parameters() + optimizer_bytes(architecture, precision, optim)


def muon_workspace(architecture: Architecture) -> int:
    """Bytes of the largest batch of equal matrices that Muon orthogonalises at once: at most 2 GiB, but one matrix at least (optim/muon.py)."""
    h, i, layers = architecture.hidden, architecture.intermediate, architecture.layers
    q, kv, wide = architecture.heads * architecture.head_dim, architecture.kv_heads * architecture.head_dim, 2 if architecture.gated else 1
    counts: Counter[tuple[int, int]] = Counter()
    dense, shared = layers - architecture.sparse_layers, architecture.shared_width
    shapes = [((i, h), wide * dense), ((h, i), dense), ((shared, h), wide * (layers - dense)), ((h, shared), layers - dense)]
    if (rank := architecture.kv_rank) is None:
        shapes += [((q, h), layers), ((kv, h), 2 * layers), ((h, q), layers)]
    else:
        turned, values, queries = architecture.rotary_dim, architecture.heads * architecture.value_dim, architecture.q_rank
        shapes += [((rank + turned, h), layers), ((q - architecture.heads * turned + values, rank), layers), ((h, values), layers)]
        shapes += [((q, h), layers)] if queries is None else [((queries, h), layers), ((q, queries), layers)]
    for shape, count in shapes:
        if count and 0 not in shape:
            counts[shape] += count
    one = {(r, c): 2 * (3 * r * c + 5 * min(r, c) ** 2) for r, c in counts}
    return max(one[shape] * min(count, max(1, (1 << 31) // one[shape])) for shape, count in counts.items())


def memory(
    architecture: Architecture | Foreign,
    *,
    device: Literal["cpu", "cuda"],
    precision: Literal["bf16", "fp32"],
    microbatch: int,
    sequence: int,
    recompute: Recompute,
    accumulation: int,
    optim: Optim,
    kernels: Mapping[str, str],
    documents: bool,
    mesh: Mesh,
    engine: Engine,
    fused: Collection[str] = (),
    adapter: Adapter | None = None,
) -> Memory:
    """Memory of the fullest rank.

    Per parameter: fp32 keeps 4 B of weights; bf16 keeps 2 B, and the optimizer what `optimizer_bytes` says. Gradients are summed in fp32, or, where
    master weights are narrow and a step has one microbatch, moved in bf16; one microbatch's own gradients exist beside the sum, but with `main_grads`
    (of `fused`, the plan's options) those of the layers' matrices do not. With `release` no more of both is there than one layer's, with a tied head's
    own until the embedding's joins it, or the embedding's. `fuse` and `graph` cost nothing that is counted here.

    Activations: `saved_bytes` per token and layer, and one whole layer's where layers are recomputed. `blocked` attention also keeps its softmax
    weights, half a square of tokens per head, and `reference` the scores and weights of the whole square. Only these and `sdpa` have masks of documents
    or windows as a square of tokens per sample.

    Sharded (FSDP2), weights are fp32 shards or, with narrow masters, bf16 ones; gradients are shards too, and `workspace` has the layers that are gathered
    at once, the embedding and the head, and the gradient on its way. With a pipeline all of a rank's layers are gathered, their gradients are summed whole
    until its last backward reduces them, and the activations of as many microbatches as are in flight are kept. Tensor parallelism cuts what a layer keeps,
    context parallelism the tokens. DeepSpeed's are by ZeRO stage (`_zero_states`).

    Workspace: the loss holds one chunk of logits (2^21 on a CPU, 2^29 on a GPU), 2 B each where the kernel is fused and else 14, and the head's gradient
    in fp32 and rounded; Muon's update holds what `muon_workspace` says.

    With an adapter weights are the frozen ones, in what computes or in 4 bits, and what is trained; the head has no gradient (planning/adapting.py).
    """
    if isinstance(architecture, Foreign):
        return _foreign_memory(architecture, device, precision, microbatch, sequence, recompute, optim, kernels, mesh, engine)
    size, muon = 2 if precision == "bf16" else 4, optim.name == "muon"
    hidden, tokens = architecture.hidden, microbatch * sequence // mesh.context
    if mesh.expert > 1:  # rows that have travelled are kept beside what the experts keep
        kernels = {**kernels, "moe": "grouped"}
    square = tokens * architecture.heads * sequence // mesh.tensor
    ring = mesh.context > 1 and mesh.exchange == "ring"  # which has attention of its own, by blocks
    scores = 0 if ring else {"blocked": square * size // 2, "reference": square * (size + 4)}.get(kernels["attention"], 0)
    whole = tokens * saved_bytes(architecture, size, "none", kernels) // mesh.tensor + scores
    kept = tokens * saved_bytes(architecture, size, recompute, kernels) // mesh.tensor + (scores if recompute in ("none", "lean") else 0)
    # Of each window: a square as bool and as bias while it is made; the other versions keep two bounds a token, or fewer numbers.
    squares = 0 if ring else {"reference": 1, "sdpa": 1 + size, "blocked": 1 + size}.get(kernels["attention"], 0)
    masks = tokens * (sequence * squares or 8) if documents or architecture.window else 0
    vocab = -(-architecture.vocab // mesh.tensor)
    chunk = min(1 << 29 if device == "cuda" else 1 << 21, tokens * vocab)
    per_logit = 2 if kernels["linear_cross_entropy"] == "fused" else 14
    each = mesh.stages or 1
    live = layout.live(mesh.schedule, 0, mesh.pipeline, each, accumulation) if mesh.pipeline > 1 else 1
    held = -(-architecture.layers // (mesh.pipeline * each)) * live  # layers times microbatches whose activations are there at once
    head = (4 + size) * vocab * hidden
    if adapter is None:
        states = _states(architecture, precision, optim, accumulation, mesh, engine, sequence, fused)
    else:
        states = _adapted_states(architecture, precision, optim, accumulation, mesh, engine, adapter)
        beside = tokens * adapting.kept_bytes(architecture, adapter, size)
        kept, whole = kept + (beside if recompute in ("none", "lean") else 0), whole + beside
        head = (head if adapting.learns_head(architecture, adapter) else 0) + adapting.restoring_bytes(architecture, adapter, size)
    return Memory(
        weights=states[0],
        gradients=states[1],
        optimizer=states[2],
        activations=held * kept + (whole if recompute in ("selective", "full") else 0) + masks + 4 * tokens * hidden * size // mesh.tensor,
        workspace=per_logit * chunk + head + states[3] + (muon_workspace(architecture) if muon else 0),
    )


def _foreign_memory(
    model: Foreign,
    device: Literal["cpu", "cuda"],
    precision: Literal["bf16", "fp32"],
    microbatch: int,
    sequence: int,
    recompute: Recompute,
    optim: Optim,
    kernels: Mapping[str, str],
    mesh: Mesh,
    engine: Engine,
) -> Memory:
    """Of a model that runs by transformers' code: what its layers keep was counted on its modules (`Foreign.saved`)."""
    size, tokens, shards = 2 if precision == "bf16" else 4, microbatch * sequence, mesh.shard or 1
    mine = -(-model.total // shards)
    master = {"fp32": 4, "bf16+16": 2, "bf16+8": 1}[optim.master] if precision == "bf16" else 0
    moments = {"fp32": 8, "bf16": 4, "int8": 2}[optim.moments]
    constant, growing = model.saved
    whole = math.ceil(tokens * size * (constant + growing * sequence))
    kept = whole if recompute == "none" else tokens * size * model.hidden * (1 if recompute == "full" else 4)
    chunk = min(1 << 29 if device == "cuda" else 1 << 21, tokens * model.vocab) if model.head.separate else 2 * tokens * model.vocab
    ends = model.vocab * model.hidden
    gathered = size * ((2 + engine.prefetch) * model.largest_layer + 2 * ends) + 4 * max(model.largest_layer, ends) if shards > 1 else 0
    stored = size if shards == 1 or optim.master != "fp32" else 4
    beside = (master if stored == size else 0) + moments
    states = stored * mine, (4 + stored) * mine, beside * mine, gathered
    if engine.name == "deepspeed":
        states = _zero_states(model.total, size, (master + moments) * model.total, mesh, engine, model.largest_layer, ends)
    return Memory(
        weights=states[0],
        gradients=states[1],
        optimizer=states[2],
        activations=model.layers * kept + (whole if recompute != "none" else 0) + 4 * tokens * model.hidden * size,
        workspace=(2 if kernels["linear_cross_entropy"] == "fused" else 14) * chunk + (4 + size) * ends + states[3],
    )


def held_parameters(architecture: Architecture, mesh: Mesh, sequence: int) -> tuple[int, int, int]:
    """`(dense, experts, of them in the largest layer)` of the pipeline rank that holds most, before they are sharded: tensor and expert parallelism cut
    matrices, embedding and head; norms, biases, products to latents and shared experts stay whole on every tensor rank."""
    experts = architecture.expert_parameters()
    shared = architecture.sparse_layers * 3 * architecture.hidden * architecture.shared_width
    matrices = architecture.matrix_parameters(routed=False) - architecture.layers * architecture.latent_parameters() - shared
    embedding = architecture.vocab * architecture.hidden
    rest = architecture.parameters() - matrices - experts - embedding * (1 if architecture.tied else 2)
    layer = -(-matrices // mesh.tensor) // architecture.layers + -(-rest // architecture.layers)
    sparse = -(-experts // max(1, architecture.sparse_layers) // mesh.expert) if experts else 0
    each = mesh.stages or 1
    count = mesh.pipeline * each
    cuts = layout.stages(architecture, sequence, count) if count > 1 else (range(architecture.layers),)
    most = (0, 0)
    for rank in range(mesh.pipeline):
        stages = layout.held(mesh.schedule, rank, mesh.pipeline, each) if count > 1 else (0,)
        layers = [i for stage in stages for i in cuts[stage]]
        ends = len({0, count - 1} & set(stages)) if count > 1 else (1 if architecture.tied else 2)
        if architecture.tied and len({0, count - 1} & set(stages)) == 2:
            ends = 1
        found = len(layers) * layer + ends * -(-embedding // mesh.tensor), sparse * sum(architecture.sparse_of(i) for i in layers)
        most = max(most, found, key=sum)
    return most[0], most[1], layer + sparse


def _states(
    architecture: Architecture,
    precision: Literal["bf16", "fp32"],
    optim: Optim,
    accumulation: int,
    mesh: Mesh,
    engine: Engine,
    sequence: int,
    fused: Collection[str],
) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimizer, and of weights and gradients that are gathered for a while."""
    size, total = 2 if precision == "bf16" else 4, architecture.parameters()
    if engine.name == "deepspeed":
        layer, ends = held_parameters(architecture, mesh, sequence)[2], architecture.vocab * architecture.hidden
        return _zero_states(total, size, optimizer_bytes(architecture, precision, optim), mesh, engine, layer, ends)
    muon = architecture.matrix_parameters(routed=False) if optim.name == "muon" else 0
    optimizer = optimizer_bytes(architecture, precision, optim)
    lean = optim.master != "fp32"
    narrow = total - muon if lean and accumulation == 1 else 0
    shards = (mesh.shard or 1) * mesh.context
    spared = size * architecture.matrix_parameters(routed=False) if "main_grads" in fused else 0
    gradients = (4 + size) * total - 2 * narrow - spared
    if "release" in fused:
        gradients = _released(architecture, size, narrow > 0, muon > 0, spared > 0)
    if shards * mesh.tensor * mesh.pipeline == 1:
        return size * total, gradients, optimizer, 0
    dense, experts, layer = held_parameters(architecture, mesh, sequence)
    if shards == 1:
        share = (dense + experts) / total
        return size * (dense + experts), math.ceil(gradients * share), math.ceil(optimizer * share), 0
    mine = -(-dense // shards) + -(-experts // (shards // mesh.expert))
    if experts and (uneven := _most_experts(architecture, mesh, shards // mesh.expert)):
        mine = -(-dense // shards) + math.ceil(experts * uneven)
    # Shards are fp32 master weights, and gathered in the dtype that computes; narrow masters are bf16 shards and corrections.
    stored = 2 if precision == "bf16" and lean else 4
    beside = optimizer - (4 * total if precision == "bf16" and not lean else 0)
    ends = -(-architecture.vocab * architecture.hidden // mesh.tensor)
    gathered = dense + experts if not engine.reshard or mesh.pipeline > 1 else (2 + engine.prefetch) * layer + 2 * ends
    # A pipeline's gradients stay whole until its last backward (torch's stages hold FSDP's reductions back), as wide as they are reduced.
    sums = dense + experts if mesh.pipeline > 1 else max(layer, ends)
    reduced = size * max(layer, ends) + {"fp32": 4, "bf16": 2}[engine.reduce] * sums
    return stored * mine, math.ceil((4 + stored - 2 * (narrow > 0)) * mine), math.ceil(beside * mine / total), size * gathered + reduced


def _adapted_states(
    architecture: Architecture,
    precision: Literal["bf16", "fp32"],
    optim: Optim,
    accumulation: int,
    mesh: Mesh,
    engine: Engine,
    adapter: Adapter,
) -> tuple[int, int, int, int]:
    """As `_states`, of frozen weights and the few that are trained, which alone have gradients, masters and moments."""
    size, count, shards = 2 if precision == "bf16" else 4, adapting.trained(architecture, adapter), (mesh.shard or 1) * mesh.context
    frozen, ends = adapting.frozen_bytes(architecture, adapter, size), architecture.vocab * architecture.hidden
    optimizer = _adamw_bytes(adapting.groups(architecture, adapter, decay_embeddings=optim.decay_embeddings), precision, optim)
    layer = adapting.layer_bytes(architecture, adapter, size)
    if engine.name == "deepspeed":
        weights, gradients, states, around = _zero_states(count, size, optimizer, mesh, engine, 0, 0)
        if engine.zero == 3:
            around += max(2 * layer + 2 * size * ends, min(size * LIVE_ELEMENTS, frozen))
            frozen = 0 if engine.offload else -(-frozen // shards)
        return weights + frozen, gradients, states, around
    lean = optim.master != "fp32" and precision == "bf16"
    narrow = lean and accumulation == 1
    if shards == 1:
        return frozen + size * count, (4 + size - 2 * narrow) * count, optimizer, 0
    mine, stored = -(-count // shards), 2 if lean else 4
    beside = optimizer - (4 * count if precision == "bf16" and not lean else 0)
    gathered = frozen + size * count if not engine.reshard else (2 + engine.prefetch) * layer + 2 * size * ends
    whole = adapting.trained(architecture, adapter) - adapting.low_rank(architecture, adapter)
    reduced = (size + {"fp32": 4, "bf16": 2}[engine.reduce]) * max(
        whole, -(-adapting.low_rank(architecture, adapter) // architecture.layers)
    )
    return -(-frozen // shards) + stored * mine, (4 + stored - 2 * narrow) * mine, math.ceil(beside * mine / count), gathered + reduced


# Elements of a bucket in which engines/deepspeed.py lets DeepSpeed reduce and prefetch; and DeepSpeed's default of gathered ones that ZeRO 3 keeps (its
# config-json page, stage3_max_live_parameters).
BUCKET_ELEMENTS, LIVE_ELEMENTS = 1 << 27, 1_000_000_000


def _zero_states(total: int, size: int, optimizer: int, mesh: Mesh, engine: Engine, layer: int, ends: int) -> tuple[int, int, int, int]:
    """The same of DeepSpeed 0.19.8, by ZeRO stage, with `optimizer` bytes of all ranks.

    Weights are whole but in stage 3. fp32 sums of gradients are whole in stage 1, in bf16 with a whole backward's own beside them (BF16_Optimizer without
    immediate_grad_update), and shards in 2 and 3. Master weights are a copy of fp32 weights too. Buckets: one fills while the other is reduced, in stage 1
    one. `offload` leaves on the device what stage 1 sums, and weights but in stage 3.
    """
    shards, stage = (mesh.shard or 1) * mesh.context, engine.zero
    mine = -(-total // shards)
    weights = size * (mine if stage == 3 else total)
    gradients = (4 + (size if size == 2 else 0)) * total if stage == 1 else 4 * mine
    states = -(-(optimizer + (4 * total if size == 4 else 0)) // shards)
    if engine.offload:
        weights, gradients, states = 0 if stage == 3 else weights, gradients if stage == 1 else 0, 0
    reduced = {"fp32": 4, "bf16": 2}[engine.reduce] if size == 2 else 4
    around = (1 if stage == 1 else 2) * reduced * min(BUCKET_ELEMENTS, total)
    if stage == 3:
        around += size * max(2 * layer + 2 * ends, min(LIVE_ELEMENTS, total))
    return weights, gradients, states, around


def _most_experts(architecture: Architecture, mesh: Mesh, ranks: int) -> float | None:
    """The share of a layer's experts that the fullest of `ranks` has, where neither experts nor their outputs divide (parallel/shard.py's `cut_along`)."""
    local = architecture.experts // mesh.expert
    if local % ranks == 0 or all(outputs % ranks == 0 for outputs in (2 * architecture.expert_width, architecture.hidden)):
        return None
    return -(-local // ranks) / local


def _released(architecture: Architecture, size: int, lean: bool, muon: bool, main_grads: bool) -> int:
    """Bytes of gradients at their most where each layer's are freed with its update: sums of 4 B, or 2 B where `lean` updates take them as they come."""
    embedding, layers = architecture.vocab * architecture.hidden, architecture.layers
    ends = embedding * (1 if architecture.tied else 2)
    matrices = architecture.matrix_parameters(routed=False) // layers
    layer = (architecture.parameters() - ends) // layers  # the last norm's few included
    sums = 2 if lean else 4
    each = sums * layer + (2 * matrices if lean and muon else 0) + size * (layer - (matrices if main_grads else 0))
    return max(each + (size * embedding if architecture.tied else 0), (sums + size) * embedding)

"""One layer, the embedding and the head as blocks of one rank: what runs forward and backward, what is made again, what is kept.

Counted from a `Shape`, per microbatch, as the steps that a plain implementation takes; no stack's fusions are taken off (stacks.py does that, by name).
`T` are a rank's tokens of a microbatch (context parallelism cuts them), `R` those it has between the matrices (sequence parallelism cuts them again by
`tensor`), e the bytes of an activation, N the outputs of a product. Names, and elements that cross HBM, unfused (and fused where a stack does):

    products    qkv, attention_output, latent_down, latent_up_q, latent_up_kv, gate_up, down, shared_gate_up, shared_down, router, head, predicted_join,
                experts_gate_up and experts_down (kind "grouped"), scores and weighted (attention unfused: batched products of kind "gemm"),
                NAME_lora_a and NAME_lora_b. Passes: forward, dgrad, wgrad, recompute. `kernels` of a grouped product are more than 1 where a stack launches
                one for each expert
    attention   kind "attention": forward, or backward with 2.5 times the products (scores are made again); flops of visible pairs alone
    norm        R h read and written: 2; backward 3 (input, its gradient in and out); transformers' own (`EAGER_NORM`) 18 and 24
    rope        9 of queries and keys in PyTorch's own operations: 2 fused
    activation  gated 5 i (silu 2, product 3; fused 3), else 2 i; backward 8 i (fused 5), else 3 i
    residual    3 h (two read, one written; fused with a norm 1 more than its 2); backward 3 h where the two gradients meet
    dropout     2 and a mask of 1 B: models with learned positions and unfused attention (Megatron's of 2019 to 2022); backward the same
    bias        backward only: gradients of biases, N read
    softmax     of T x keys x heads scores: scale, mask and softmax in one kernel 2; backward 3
    attention_dropout  of the same scores 2, and a mask of 1 B
    quantise    of a low-precision product's operands, by recipe: `QUANTISED`
    permute, unpermute  (1 + visits) R h; backward the same
    router      (kind memory) softmax and choice of `experts` logits, in fp32: 6
    embedding   2 T h; backward 3 T h and the embedding's gradient cleared
    cross_entropy      of T x vocabulary logits: forward 14 B (to fp32, log-softmax), backward 10 B
    grad_add    a microbatch's gradients added to the sum

Transfers: sequence_gather, sequence_scatter (tensor; with sequence parallelism), tensor_sum (without), regather (Megatron gathers the input again for the
weight gradient), kv and kv_backward (context ring; `bytes` all of the context - 1 sends together), heads and tokens (ulysses), dispatch and combine (expert;
`bytes` the whole buffer, own share included, as nccl-tests count), gather and scatter (shard: ZeRO 3 of this block), gather_experts and scatter_experts (of
its experts, over a group `expert` times smaller), replicate (HSDP: the scattered gradient over replicas).
"""

from collections.abc import Iterable
from dataclasses import replace

from gigatrain.planning.estimate import pieces
from gigatrain.planning.estimate.pieces import Local, Step, activation, enter, leave, memory, norm, product, residual
from gigatrain.planning.estimate.work import Block, Item, Op, Transfer


def _core(local: Local, window: int | None, kv_heads: int) -> list[Step]:
    """Attention proper and what context ranks exchange for it."""
    w, shape, layout, e = local.workload, local.workload.shape, local.workload.layout, local.size
    heads, d, v, context = shape.heads / local.t, shape.head_dim, shape.value_dim, layout.context
    tokens, keys, s = local.tokens, local.keys(window), min(w.documents or w.sequence, w.sequence)
    queries, values = tokens * heads * d, tokens * max(kv_heads / local.t, 1.0) * (d + v)
    forward: list[Item] = []
    backward: list[Item] = []
    after: list[Item] = []
    before: list[Item] = []
    if context > 1 and layout.exchange == "ring":
        forward.append(Transfer("kv", "context", "send", (context - 1) * values * e, "forward"))
        backward.append(Transfer("kv_backward", "context", "send", (context - 1) * 2 * values * e, "backward"))
    elif context > 1:
        forward.append(Transfer("heads", "context", "all_to_all", (queries + values) * e, "forward"))
        after.append(Transfer("tokens", "context", "all_to_all", tokens * heads * v * e, "forward"))
        before.append(Transfer("tokens", "context", "all_to_all", tokens * heads * v * e, "backward"))
        backward.append(Transfer("heads", "context", "all_to_all", (queries + values) * e, "backward"))
    length = w.sequence // context if layout.exchange == "ring" else w.sequence
    groups = max(1, round(w.microbatch * heads / (1 if layout.exchange == "ring" else context)))
    if not local.unfused:
        flops, moved = 2.0 * tokens * keys * (d + v) * heads, e * (queries + values + tokens * heads * v)
        core = Op("attention", "attention", "forward", flops, moved, length, s, d, groups)
        gradient = Op("attention", "attention", "backward", 2.5 * flops, 2.0 * moved, length, s, d, groups, kernels=3)
        gathered = values * e * (context > 1 and layout.exchange == "ring")
        spans = 2 * e * (queries + values) + gathered
        if w.stack == "torchtitan":  # whose keys and values are repeated for every query head before attention
            return [
                Step("rope", [], [], 2 * e * tokens * max(0.0, heads - kv_heads / local.t) * d),
                Step("core", [*forward, core, *after], [*before, gradient, *backward], 4.0 * tokens * heads, spans),
                Step("product", [], [], tokens * heads * v * e),
            ]
        return [
            Step("core", [*forward, core, *after], [*before, gradient, *backward], 4.0 * tokens * heads, spans),  # log-sum-exp
            Step("product", [], [], tokens * heads * v * e),  # the output, which the next product keeps
        ]
    square = float(tokens * s * heads)
    steps = [
        Step(
            "core",
            [Op("scores", "gemm", "forward", 2 * square * d, e * (queries + values / 2 + square), length, s, d, groups)],
            [
                Op("scores", "gemm", "dgrad", 2 * square * d, e * (queries + values / 2 + square), length, d, s, groups),
                Op("scores", "gemm", "dgrad", 2 * square * d, e * (queries + values / 2 + square), s, d, length, groups),
            ],
        ),
        Step(
            "core", [memory("softmax", "forward", 2 * e * square)], [memory("softmax", "backward", 3 * e * square)], e * square, e * square
        ),
    ]
    if local.dropout:
        drop = memory("attention_dropout", "forward", (2 * e + 1) * square)
        steps.append(Step("core", [drop], [replace(drop, passes="backward")], (e + 1) * square))
    weighted = Op("weighted", "gemm", "forward", 2 * square * v, e * (square + values / 2 + tokens * heads * v), length, v, s, groups)
    gradients: list[Item] = [
        Op("weighted", "gemm", "dgrad", weighted.flops, weighted.bytes, length, s, v, groups),
        Op("weighted", "gemm", "dgrad", weighted.flops, weighted.bytes, s, v, length, groups),
    ]
    steps.append(Step("core", [*forward, weighted, *after], [*before, *gradients, *backward]))
    steps.append(Step("product", [], [], float(tokens * heads * v * e)))  # the output, which the next product keeps
    return steps


def _attention(local: Local, window: int | None) -> list[Step]:
    """From the stream's norm to the sum: queries, keys, values (or latents and what becomes of them), positions, attention, output."""
    shape, t, e, tokens = local.workload.shape, local.t, local.size, local.tokens
    h, d, heads = shape.hidden, shape.head_dim, shape.heads
    steps = [norm(local, local.rows * h)]
    if shape.kv_rank is None:
        steps.append(Step("move", *enter(local)))
        outputs = (heads + max(2 * shape.kv_heads, 2 * (t if t > shape.kv_heads else 0))) * d // t
        forward, backward = product(local, "qkv", tokens, outputs, h)
        if shape.biases:
            backward.insert(0, memory("bias", "backward", e * tokens * outputs))
        turned = tokens * (heads + max(shape.kv_heads, t)) * d / t
        steps.append(Step("product", forward, backward, float(tokens * outputs * e), e * tokens * (outputs + h)))
        kv_heads = shape.kv_heads
    else:
        # Products to latents are whole on every tensor rank, of its own tokens; what is gathered are latents (and the stream, where queries have none).
        latents = (shape.q_rank or 0) + shape.kv_rank
        down, shared = latents + shape.rotary_dim, local.t > 1 and local.workload.layout.sequence_parallel
        if not shared or shape.q_rank is None:
            steps.append(Step("move", *enter(local)))
        forward, backward = product(local, "latent_down", local.rows, down, h)
        steps += [Step("product", forward, backward, float(local.rows * down * e)), norm(local, local.rows * latents)]
        if shared:
            whole = float(tokens * down * e)
            gather: list[Item] = [Transfer("sequence_gather", "tensor", "all_gather", whole, "forward")]
            steps.append(Step("move", gather, [Transfer("sequence_scatter", "tensor", "reduce_scatter", whole, "backward")]))
        up = heads * (d - shape.rotary_dim + shape.value_dim) // t
        forward, backward = product(local, "latent_up_q", tokens, heads * d // t, shape.q_rank or h)
        keys_forward, keys_backward = product(local, "latent_up_kv", tokens, up, shape.kv_rank)
        # Keys of every head are assembled from what is its own and the rotated part that all share; values are a view of the product.
        kept = tokens * (2 * heads * d + heads * shape.value_dim) / t * e
        steps.append(Step("product", [*forward, *keys_forward], [*keys_backward, *backward], kept, 2 * kept))
        turned = tokens * (heads + 1) * shape.rotary_dim / t + tokens * heads * d / t / 4.5
        kv_heads = heads
    if shape.qk_norm:
        step = norm(local, tokens * (heads + shape.kv_heads) * d / t, operand=False, gathered=False)
        steps.append(step)
    if not shape.learned_positions:
        steps.append(Step("rope", [memory("rope", "forward", 9.0 * e * turned, 8)], [memory("rope", "backward", 9.0 * e * turned, 8)]))
    steps += _core(local, window, kv_heads)
    forward, backward = product(local, "attention_output", tokens, h, heads * shape.value_dim // t)
    low = tokens * heads * shape.value_dim / t * local.bits / 8 if local.bits < 16 else 0.0
    steps += [Step("product", forward, backward, low), Step("move", *leave(local)), residual(local, kept=True)]
    return steps


def _dense(local: Local, width: int, names: tuple[str, str] = ("gate_up", "down"), *, whole: bool = False) -> list[Step]:
    """A feed-forward block behind its norm; `whole` on every tensor rank, of its own tokens, or cut."""
    shape, e = local.workload.shape, local.size
    t, tokens = (1, local.rows) if whole else (local.t, local.tokens)
    wide = (2 if shape.gated else 1) * width // t
    first, first_back = product(local, names[0], tokens, wide, shape.hidden)
    second, second_back = product(local, names[1], tokens, shape.hidden, width // t)
    if shape.biases:
        first_back.insert(0, memory("bias", "backward", e * tokens * wide))
    return [
        Step("move", *(([], []) if whole else enter(local))),
        Step("product", first, first_back, float(e * tokens * wide), e * tokens * (wide + shape.hidden)),
        activation(local, tokens * width / t),
        Step("product", second, second_back),
        Step("move", *(([], []) if whole else leave(local))),
    ]


def _mixture(local: Local) -> list[Step]:
    """Router, journey to the experts' ranks, experts, journey back; shared experts beside them."""
    w, shape, layout, e = local.workload, local.workload.shape, local.workload.layout, local.size
    h, rows, visits, ranks, cut = shape.hidden, local.rows, local.visits, layout.expert, layout.expert_tensor
    here = max(1, shape.experts // ranks)
    steps = []
    score, score_back = product(local, "router", rows, shape.experts, h, bits=16)
    choice = 6.0 * 4 * rows * shape.experts
    steps.append(
        Step(
            "routing",
            [*score, memory("router", "forward", choice, 10)],
            [memory("router", "backward", choice, 8), *score_back],
            8.0 * rows * shape.experts,
        )
    )
    k = shape.experts_per_token
    moved = e * rows * h * (1.0 + k)
    out: list[Item] = [memory("permute", "forward", moved, 3)]
    home: list[Item] = [memory("unpermute", "forward", moved, 2)]
    out_back: list[Item] = [memory("permute", "backward", moved, 2)]
    home_back: list[Item] = [memory("unpermute", "backward", moved, 2)]
    if ranks > 1:
        copies = k * (1.0 if w.balanced else pieces.IMBALANCE)
        if layout.dispatch == "hierarchical":  # a token travels once to each rank that has experts of it
            copies *= ranks * (1 - (1 - 1 / ranks) ** k) / k
        whole = rows * h * e * copies
        if layout.dispatch == "gather":
            every = float(rows * h * e * ranks)
            out.insert(0, Transfer("dispatch", "expert", "all_gather", every, "forward"))
            home.append(Transfer("combine", "expert", "reduce_scatter", every, "forward"))
            home_back.insert(0, Transfer("combine", "expert", "all_gather", every, "backward"))
            out_back.append(Transfer("dispatch", "expert", "reduce_scatter", every, "backward"))
        else:
            out.append(Transfer("dispatch", "expert", "all_to_all", whole, "forward"))
            home.insert(0, Transfer("combine", "expert", "all_to_all", whole, "forward"))
            home_back.append(Transfer("combine", "expert", "all_to_all", whole, "backward"))
            out_back.insert(0, Transfer("dispatch", "expert", "all_to_all", whole, "backward"))
    if cut > 1:
        whole = float(visits * h * e)
        out.append(Transfer("sequence_gather", "tensor", "all_gather", whole, "forward"))
        home.insert(0, Transfer("sequence_scatter", "tensor", "reduce_scatter", whole, "forward"))
        home_back.append(Transfer("sequence_gather", "tensor", "all_gather", whole, "backward"))
        out_back.insert(0, Transfer("sequence_scatter", "tensor", "reduce_scatter", whole, "backward"))
    width = shape.expert_width // cut
    wide, mean = (2 if shape.gated else 1) * width, max(1, round(visits / here))
    first, first_back = product(local, "experts_gate_up", mean, wide, h, groups=here, rows=visits, grouped=True)
    second, second_back = product(local, "experts_down", mean, h, width, groups=here, rows=visits, grouped=True)
    # Whose kernels do all of it at once keep gate and up alone; Megatron weighs the activation and not the result, which so is not kept.
    own = w.stack in pieces.WHOLE_EXPERTS
    glued = own and ranks == 1
    between = activation(local, visits * width)
    if own:
        between.word, between.keeps = "expert", 0.0 if glued else 2.0 * e * visits * width
    steps += [
        Step("routing", out, out_back, 0.0 if glued else visits * h * min(e, local.bits / 8), 2 * e * visits * h),
        Step("expert", first, first_back, e * visits * wide, e * visits * (wide + h)),
        between,
        Step("expert", second, second_back, 0.0 if glued or w.stack == "megatron" else e * visits * h),
        Step("routing", home, home_back, 12.0 * rows * k, 2 * e * visits * h),
    ]
    if shape.shared_width:
        steps += _dense(local, shape.shared_width, ("shared_gate_up", "shared_down"), whole=w.stack in pieces.WHOLE_EXPERTS)
    return steps


def parameters(local: Local, sparse: bool) -> tuple[float, float]:
    """`(dense, experts)` of one layer on this rank."""
    shape, t = local.workload.shape, local.t
    h, d, heads = shape.hidden, shape.head_dim, shape.heads
    wide = 2 if shape.gated else 1
    if shape.kv_rank is None:
        entering = (heads + 2 * shape.kv_heads) * d
        attention = h * entering / t + h * heads * shape.value_dim / t
        inner = (2 * d) if shape.qk_norm else 0
    else:
        q_rank = shape.q_rank or 0
        attention = h * (q_rank + shape.kv_rank + shape.rotary_dim) + (q_rank or h) * heads * d / t
        attention += shape.kv_rank * heads * (d - shape.rotary_dim + shape.value_dim) / t + h * heads * shape.value_dim / t
        entering, inner = q_rank + shape.kv_rank + shape.rotary_dim, q_rank + shape.kv_rank
    norms = 2 * h * (2 if shape.layer_norm and shape.biases else 1) + inner
    biases = (entering / t + h) if shape.biases else 0.0
    if not sparse:
        block = h * shape.intermediate * (wide + 1) / t + ((wide * shape.intermediate / t + h) if shape.biases else 0.0)
        return attention + norms + biases + block, 0.0
    each = h * shape.expert_width * (wide + 1) / local.workload.layout.expert_tensor
    block = h * shape.experts + h * shape.shared_width * (wide + 1) / (1 if local.workload.stack in pieces.WHOLE_EXPERTS else t)
    return attention + norms + biases + block, each * shape.experts / local.workload.layout.expert


def _sharded(
    local: Local, forward: list[Item], backward: list[Item], dense: float, experts: float, *, root: bool
) -> tuple[list[Item], list[Item]]:
    """With ZeRO 3: weights gathered before either direction, gradients scattered behind; with ZeRO 2 the gradients alone. FSDP keeps what its `root` has
    (embedding, head) gathered from forward to backward."""
    w, layout, states = local.workload, local.workload.layout, local.workload.states
    once = layout.zero == 3 and layout.pipeline > 1 and not layout.reshard  # a step's, not a microbatch's: operations.py
    trained = 0.0 if w.frozen else 1.0
    if w.restored and not root:
        forward, backward = (
            [memory("restore", way, w.restored * dense, 3), *items] for way, items in (("forward", forward), ("dgrad", backward))
        )
    if not w.frozen and not (local.fused_sum and layout.zero < 3):
        many = dense + experts
        if layout.zero == 3:
            backward = [*backward, memory("grad_add", "wgrad", many * (local.size + states.reduced) + 12.0 * many / local.shards, 2)]
        else:
            backward = [*backward, memory("grad_add", "wgrad", many * (local.size + 2 * states.gradients), 2)]
    if layout.zero < 2 or once:
        return forward, backward
    before: list[Item] = []
    after: list[Item] = []
    for suffix, count, ranks in (("", dense, local.shards), ("_experts", experts, local.expert_shards)):
        if count and ranks > 1:
            before.append(Transfer("gather" + suffix, "shard", "all_gather", count * states.gathered, "forward"))
            if trained:
                after.append(Transfer("scatter" + suffix, "shard", local.reduces, count * states.reduced, "backward"))
        if count and trained and layout.replicate > 1:
            after.append(Transfer("replicate", "replicate", "all_reduce", count * states.reduced / ranks, "backward"))
    if layout.zero == 2:
        return forward, [*backward, *after]
    again = [replace(item, passes="backward") for item in before] if layout.reshard and not (root and w.stack in pieces.FSDP) else []
    return [*before, *forward], [*again, *backward, *after]


def _made_again(local: Local, steps: Iterable[Step]) -> tuple[list[Item], float]:
    """`(recomputed items, bytes kept of them)` under the workload's policy."""
    w = local.workload
    words = pieces.AGAIN[w.recompute]
    by_product = w.recompute == "selective" and w.stack == "torchtitan"
    items: list[Item] = []
    kept = 0.0
    for step in steps:
        share = 1.0 if step.word in words or ("recompute_moe" in w.lean and step.word in ("routing", "expert")) else 0.0
        if by_product:
            share, more = _every_other(local, step, share)
            kept += more
        if share:
            items += [_part(item, share) for item in step.forward]
        kept += step.keeps * (1 - share)
    return items, kept


def _every_other(local: Local, step: Step, share: float) -> tuple[float, float]:
    """torchtitan's selective policy keeps every other product of those that a layer has as matrices of their own (query, key, value, output, gate, down, up:
    keys, output and one of gate and up are made again), and attention: `(share of the step made again, bytes kept beside its own)`."""
    shape = local.workload.shape
    names = {item.name for item in step.forward}
    if "qkv" in names:
        return shape.kv_heads / (shape.heads + 2 * shape.kv_heads), 0.0
    if names & {"gate_up", "shared_gate_up"}:
        return 0.5 if shape.gated else 0.0, 0.0
    if names & {"down", "shared_down"}:
        return 0.0, float(local.tokens * shape.hidden * local.size)
    return (1.0 if step.word == "residual" or "attention_output" in names else share), 0.0


def _part(item: Item, share: float) -> Item:
    """Of a product so much of its outputs, made again."""
    if share == 1.0 or isinstance(item, Transfer):
        return replace(item, passes="recompute")
    return replace(item, passes="recompute", flops=item.flops * share, bytes=item.bytes * share, n=max(1, round(item.n * share)))


def _block(local: Local, name: str, steps: list[Step], counts: tuple[float, float], *, stream: bool = True, root: bool = False) -> Block:
    forward = [item for step in steps for item in step.forward]
    backward = [item for step in reversed(steps) for item in step.backward]
    again, kept = _made_again(local, steps)
    if stream:  # the layer's input, which its first norm and the residual sum need
        kept += local.rows * local.workload.shape.hidden * local.size
    whole = sum(step.keeps for step in steps)
    made = whole - kept if again else 0.0
    spans = max((step.spans for step in steps), default=0.0)
    forward, backward = _sharded(local, forward, backward, *counts, root=root)
    return Block(name, tuple(forward), tuple(backward), tuple(again), kept, max(0.0, made) + spans, sum(counts), counts[1])


def layer(local: Local, sparse: bool, window: int | None) -> Block:
    """One transformer layer of this rank."""
    h = local.workload.shape.hidden
    steps = [*_attention(local, window), norm(local, local.rows * h, gathered=not sparse)]
    steps += _mixture(local) if sparse else _dense(local, local.workload.shape.intermediate)
    steps.append(residual(local, kept=False))
    return _block(local, "sparse_layer" if sparse else "layer", steps, parameters(local, sparse))


def embedding(local: Local) -> Block:
    """Look-up, of learned positions too, and its gradient."""
    w, shape, e = local.workload, local.workload.shape, local.size
    h, tokens, rows = shape.hidden, local.tokens, -(-shape.vocab // local.t)
    count = float(rows * h) + (w.sequence * h if shape.learned_positions else 0)
    forward: list[Item] = [memory("embedding", "forward", 2.0 * e * tokens * h, 2 if local.t == 1 else 6)]
    backward: list[Item] = [] if w.frozen else [memory("embedding", "backward", e * (3.0 * tokens * h + rows * h), 3)]
    after, after_back = leave(local)
    if shape.learned_positions:
        after.append(memory("residual", "forward", 3.0 * e * local.rows * h))
    if local.dropout:
        after.append(memory("dropout", "forward", (2.0 * e + 1) * local.rows * h))
    step = Step("embedding", [*forward, *after], [*after_back, *backward], 8.0 * tokens + (local.rows * h if local.dropout else 0))
    return _block(local, "embedding", [step], (count, 0.0), stream=False, root=True)


def head(local: Local, *, tied_here: bool) -> Block:
    """Last norm, product with the vocabulary, loss. `tied_here`: its weights are the embedding's on this same rank, and not counted again."""
    shape, e = local.workload.shape, local.size
    h, tokens, outputs = shape.hidden, local.tokens, -(-shape.vocab // local.t)
    logits = float(tokens * outputs)
    forward, backward = product(local, "head", tokens, outputs, h, bits=min(32, 8 * e))
    steps = [norm(local, local.rows * h, operand=False), Step("move", *enter(local)), Step("head", forward, backward)]
    loss: list[Item] = [memory("cross_entropy", "forward", 14.0 * logits, 5)]
    if local.t > 1:
        loss.append(Transfer("loss_sum", "tensor", "all_reduce", 12.0 * tokens, "forward"))
    steps.append(Step("loss", loss, [memory("cross_entropy", "backward", 10.0 * logits, 2)]))
    count = (0.0 if tied_here else float(outputs * h)) + h * (2 if shape.layer_norm and shape.biases else 1)
    return _block(local, "head", steps, (count, 0.0), root=True)


def predicted(local: Local) -> Block:
    """A layer of multi-token prediction with its own pass through the head (arXiv:2412.19437, section 2.2): embedding and head are the model's."""
    shape, tokens, h = local.workload.shape, local.tokens, local.workload.shape.hidden
    inner, loss = layer(local, shape.sparse_layers > 0, None), head(local, tied_here=True)
    join, join_back = product(local, "predicted_join", tokens, h // local.t, 2 * h)
    steps = [norm(local, 2.0 * local.rows * h), Step("move", *enter(local)), Step("product", join, join_back)]
    count = 2.0 * h * h / local.t + 3 * h
    first = _block(local, "predicted", steps, (count, 0.0))
    return Block(
        "predicted",
        (*first.forward, *inner.forward, *loss.forward),
        (*loss.backward, *inner.backward, *first.backward),
        (*first.recompute, *inner.recompute),
        first.saved_bytes + inner.saved_bytes + loss.saved_bytes,
        max(first.transient_bytes, inner.transient_bytes, loss.transient_bytes),
        first.parameters + inner.parameters,
        inner.expert_parameters,
    )

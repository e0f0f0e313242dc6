"""One layer, the embedding and the head as blocks of one rank: what runs forward and backward, what is made again, what is kept.

Counted from a `Shape`, per microbatch, as the steps that a plain implementation takes; no stack's fusions are taken off (stacks.py does that, by name).
`T` are a rank's tokens of a microbatch (context parallelism cuts them), `R` those it has between the matrices (sequence parallelism cuts them again by
`tensor`), e the bytes of an activation, N the outputs of a product. Names, and elements that cross HBM, unfused (and fused where a stack does):

    products    qkv, attention_output, latent_down, latent_up_q, latent_up_kv, gate_up, down, shared_gate_up, shared_down, router, head, predicted_join,
                experts_gate_up and experts_down (kind "grouped"), scores and weighted (attention unfused: batched products of kind "gemm"),
                NAME_lora_a and NAME_lora_b. Passes: forward, dgrad, wgrad, recompute
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
from dataclasses import dataclass, field, replace

from gigatrain.planning.estimate.work import Block, Item, Op, Transfer
from gigatrain.planning.estimate.workload import PRODUCTS_BITS, Recompute, Workload

# Bytes read and written per element of an operand: read in 16 bits, written along rows and along columns, and read once more where a scale must be found
# first (current scaling) or a rotation is applied (nvfp4). NVIDIA Transformer Engine's recipes; torchao's rowwise reads once for each direction.
QUANTISED: dict[str, float] = {
    "fp8_delayed": 4.0,
    "fp8_tensorwise": 6.0,
    "fp8_rowwise": 8.0,
    "fp8_blockwise": 4.2,
    "mxfp8": 4.1,
    "nvfp4": 7.1,
}
# Rows of the fullest rank over the mean where nothing forces balance: Qwen3-235B dropless against forced, planning.md section 3 (Megatron-MoE-ModelZoo): 8 to
# 20 % of a step of which experts are two thirds.
IMBALANCE = 1.2
FUSED_SUM = frozenset({"megatron"})  # weight gradients are added to fp32 sums by the product itself
REGATHERS = frozenset({"megatron", "generic", "nanotron"})  # keep a sequence-sharded input and gather it again in the backward
UNFUSED_GATE = frozenset(
    {"torchtitan", "llm_foundry", "nanotron", "deepspeed"}
)  # keep silu(gate) beside gate, up and their product, unless compiled
EAGER_NORM = frozenset({"deepspeed"})  # transformers' RMSNorm, in six operations of which fp32 copies are kept, unless compiled or Liger's
AGAIN: dict[Recompute, frozenset[str]] = {
    "none": frozenset(),
    "lean": frozenset({"norm", "activation"}),
    "selective": frozenset({"norm", "activation", "rope", "residual"}),
    "attention": frozenset({"core"}),
    "full": frozenset({"norm", "activation", "rope", "residual", "core", "product", "move", "routing"}),
}


@dataclass(slots=True)
class Local:
    """One rank's numbers of a workload: tokens, widths after every cut, and bytes of an element."""

    workload: Workload
    t: int = field(init=False)
    tokens: int = field(init=False)  # T
    rows: int = field(init=False)  # R
    size: int = field(init=False)  # e
    bits: int = field(init=False)  # of the layers' products
    shards: int = field(init=False)  # ranks that share a dense parameter
    expert_shards: int = field(init=False)
    visits: float = field(init=False)  # rows of the fullest rank's experts
    unfused: bool = field(init=False)
    dropout: bool = field(init=False)

    def __post_init__(self) -> None:
        w, layout = self.workload, self.workload.layout
        self.t = layout.tensor
        self.tokens = -(-w.microbatch * w.sequence // layout.context)
        self.rows = -(-self.tokens // self.t) if layout.sequence_parallel else self.tokens
        self.size = 4 if w.precision == "fp32" else 2
        self.bits = PRODUCTS_BITS[w.precision]
        self.shards = layout.shard * layout.context
        wide = self.t if layout.expert_tensor < self.t else 1
        self.expert_shards = max(1, self.shards * wide // layout.expert)
        self.visits = self.rows * w.shape.experts_per_token * layout.expert_tensor * (1.0 if w.balanced else IMBALANCE)
        self.unfused = w.attention == "unfused"
        self.dropout = self.unfused and w.shape.learned_positions

    def keys(self, window: int | None) -> float:
        """Tokens that a token sees in the mean, itself included."""
        s = min(self.workload.documents or self.workload.sequence, self.workload.sequence)
        w = min(window or s, s)
        return (w * (w + 1) / 2 + (s - w) * w) / s


@dataclass(slots=True)
class _Step:
    """A stretch of a layer: what it runs, what its output weighs while it waits for the backward, and by which word of `AGAIN` it is made again."""

    word: str
    forward: list[Item]
    backward: list[Item]
    keeps: float = 0.0  # bytes
    spans: float = 0.0  # bytes of its gradients at once


def _product(local: Local, name: str, m: int, n: int, k: int, *, groups: int = 1, rows: float = 0.0, bits: int | None = None,
             frozen: bool | None = None, grouped: bool = False) -> tuple[list[Item], list[Item]]:  # fmt: skip
    """Forward, and both gradients of it; `rows` are the exact ones of all groups. Low precision adds passes that quantise."""
    w, e = local.workload, local.size
    bits = local.bits if bits is None else bits
    frozen = w.frozen if frozen is None else frozen
    rows, operand = rows or m * groups, bits / 8
    flops, kind = 2.0 * rows * n * k, "grouped" if grouped else "gemm"
    weights = groups * n * k
    summed = (2 * w.states.gradients if w.stack in FUSED_SUM else e) * weights
    forward: list[Item] = [Op(name, kind, "forward", flops, operand * (rows * k + weights) + e * rows * n, m, n, k, groups, bits)]
    backward: list[Item] = [Op(name, kind, "dgrad", flops, operand * (rows * n + weights) + e * rows * k, m, k, n, groups, bits)]
    if not frozen:
        backward.append(Op(name, kind, "wgrad", flops, operand * rows * (n + k) + summed, n, k, m, groups, bits))
    if bits < 16:
        each = QUANTISED[w.precision]
        passes = [Op("quantise", "memory", "forward", 0.0, each * rows * k, kernels=1 if each < 5 else 2)]
        if w.stack != "megatron":  # which quantises weights once a step (operations.py)
            passes.append(Op("quantise", "memory", "forward", 0.0, each * weights, kernels=1 if each < 5 else 2))
        forward = [*passes, *forward]
        backward = [Op("quantise", "memory", "backward", 0.0, each * rows * n, kernels=1 if each < 5 else 2), *backward]
    if w.frozen and w.adapter_rank and frozen and not grouped:
        a, a_back = _product(local, name + "_lora_a", m, w.adapter_rank, k, bits=16, frozen=False)
        b, b_back = _product(local, name + "_lora_b", m, n, w.adapter_rank, bits=16, frozen=False)
        forward, backward = [*forward, *a, *b], [*b_back, *a_back, *backward]
    return forward, backward


def memory(name: str, passes: str, bytes: float, kernels: int = 1) -> Op:
    """A pass over memory."""
    return Op(name, "memory", passes, 0.0, bytes, kernels=kernels)


def _enter(local: Local) -> tuple[list[Item], list[Item]]:
    """Before a product that tensor ranks cut by its outputs: tokens of all of them; backward the sum of their input gradients."""
    if local.t == 1:
        return [], []
    whole = float(local.tokens * local.workload.shape.hidden * local.size)
    if not local.workload.layout.sequence_parallel:
        return [], [Transfer("tensor_sum", "tensor", "all_reduce", whole, "backward")]
    back: list[Item] = [Transfer("sequence_scatter", "tensor", "reduce_scatter", whole, "backward")]
    if local.workload.stack in REGATHERS and not local.workload.frozen:
        back = [Transfer("regather", "tensor", "all_gather", whole, "backward"), *back]
    return [Transfer("sequence_gather", "tensor", "all_gather", whole, "forward")], back


def _leave(local: Local) -> tuple[list[Item], list[Item]]:
    """Behind a product that tensor ranks cut by its inputs: their outputs' sum."""
    if local.t == 1:
        return [], []
    whole = float(local.tokens * local.workload.shape.hidden * local.size)
    if not local.workload.layout.sequence_parallel:
        return [Transfer("tensor_sum", "tensor", "all_reduce", whole, "forward")], []
    return (
        [Transfer("sequence_scatter", "tensor", "reduce_scatter", whole, "forward")],
        [Transfer("sequence_gather", "tensor", "all_gather", whole, "backward")],
    )


def _norm(local: Local, elements: float, *, operand: bool = True, gathered: bool = True) -> _Step:
    """RMSNorm or LayerNorm of `elements`; its output is an operand of a product, and kept as wide as that, gathered where a stack keeps it so."""
    e, w = local.size, local.workload
    eager = w.stack in EAGER_NORM and not (w.compiled or w.chunked_loss or w.shape.layer_norm)
    spread = local.t if gathered and w.layout.sequence_parallel and local.t > 1 and w.stack not in REGATHERS else 1
    kept = elements * spread * (min(e, local.bits / 8) if operand else e)
    read, written, kernels = (18.0, 24.0, 6) if eager else (2.0, 3.0, 1)
    forward, backward = memory("norm", "forward", read * e * elements, kernels), memory("norm", "backward", written * e * elements, kernels)
    return _Step("norm", [forward], [backward], kept + (4 + e) * elements * eager, 2 * e * elements)


def _residual(local: Local, *, kept: bool) -> _Step:
    """The block's output, dropped out where the model does, added to the stream; the next norm needs the sum."""
    e, elements = local.size, local.rows * local.workload.shape.hidden
    step = _Step("residual", [memory("residual", "forward", 3.0 * e * elements)], [memory("residual", "backward", 3.0 * e * elements)])
    step.keeps = float(e * elements) if kept else 0.0
    if local.dropout:
        step.forward.insert(0, memory("dropout", "forward", (2.0 * e + 1) * elements))
        step.backward.append(memory("dropout", "backward", (2.0 * e + 1) * elements))
        step.keeps += elements
    return step


def _core(local: Local, window: int | None, kv_heads: int) -> list[_Step]:
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
        return [
            _Step("core", [*forward, core, *after], [*before, gradient, *backward], 4.0 * tokens * heads, spans),  # log-sum-exp
            _Step("product", [], [], tokens * heads * v * e),  # the output, which the next product keeps
        ]
    square = float(tokens * s * heads)
    steps = [
        _Step(
            "core",
            [Op("scores", "gemm", "forward", 2 * square * d, e * (queries + values / 2 + square), length, s, d, groups)],
            [
                Op("scores", "gemm", "dgrad", 2 * square * d, e * (queries + values / 2 + square), length, d, s, groups),
                Op("scores", "gemm", "dgrad", 2 * square * d, e * (queries + values / 2 + square), s, d, length, groups),
            ],
        ),
        _Step(
            "core", [memory("softmax", "forward", 2 * e * square)], [memory("softmax", "backward", 3 * e * square)], e * square, e * square
        ),
    ]
    if local.dropout:
        drop = memory("attention_dropout", "forward", (2 * e + 1) * square)
        steps.append(_Step("core", [drop], [replace(drop, passes="backward")], (e + 1) * square))
    weighted = Op("weighted", "gemm", "forward", 2 * square * v, e * (square + values / 2 + tokens * heads * v), length, v, s, groups)
    gradients: list[Item] = [
        Op("weighted", "gemm", "dgrad", weighted.flops, weighted.bytes, length, s, v, groups),
        Op("weighted", "gemm", "dgrad", weighted.flops, weighted.bytes, s, v, length, groups),
    ]
    steps.append(_Step("core", [*forward, weighted, *after], [*before, *gradients, *backward]))
    steps.append(_Step("product", [], [], float(tokens * heads * v * e)))  # the output, which the next product keeps
    return steps


def _attention(local: Local, window: int | None) -> list[_Step]:
    """From the stream's norm to the sum: queries, keys, values (or latents and what becomes of them), positions, attention, output."""
    shape, t, e, tokens = local.workload.shape, local.t, local.size, local.tokens
    h, d, heads = shape.hidden, shape.head_dim, shape.heads
    steps = [_norm(local, local.rows * h), _Step("move", *_enter(local))]
    if shape.kv_rank is None:
        outputs = (heads + max(2 * shape.kv_heads, 2 * (t if t > shape.kv_heads else 0))) * d // t
        forward, backward = _product(local, "qkv", tokens, outputs, h)
        if shape.biases:
            backward.insert(0, memory("bias", "backward", e * tokens * outputs))
        turned = tokens * (heads + max(shape.kv_heads, t)) * d / t
        steps.append(_Step("product", forward, backward, float(tokens * outputs * e), e * tokens * (outputs + h)))
        kv_heads = shape.kv_heads
    else:
        down = (shape.q_rank or 0) + shape.kv_rank + shape.rotary_dim
        forward, backward = _product(local, "latent_down", tokens, down, h)
        steps.append(_Step("product", forward, backward, float(tokens * down * e)))
        norm = _norm(local, tokens * ((shape.q_rank or 0) + shape.kv_rank), gathered=False)
        steps.append(norm)
        up = heads * (d - shape.rotary_dim + shape.value_dim) // t
        forward, backward = _product(local, "latent_up_q", tokens, heads * d // t, shape.q_rank or h)
        keys_forward, keys_backward = _product(local, "latent_up_kv", tokens, up, shape.kv_rank)
        # Keys of every head are assembled from what is its own and the rotated part that all share; values are a view of the product.
        kept = tokens * (2 * heads * d + heads * shape.value_dim) / t * e
        steps.append(_Step("product", [*forward, *keys_forward], [*keys_backward, *backward], kept, 2 * kept))
        turned = tokens * (heads + 1) * shape.rotary_dim / t + tokens * heads * d / t / 4.5
        kv_heads = heads
    if shape.qk_norm:
        step = _norm(local, tokens * (heads + shape.kv_heads) * d / t, operand=False, gathered=False)
        steps.append(step)
    if not shape.learned_positions:
        steps.append(_Step("rope", [memory("rope", "forward", 9.0 * e * turned, 8)], [memory("rope", "backward", 9.0 * e * turned, 8)]))
    steps += _core(local, window, kv_heads)
    forward, backward = _product(local, "attention_output", tokens, h, heads * shape.value_dim // t)
    low = tokens * heads * shape.value_dim / t * local.bits / 8 if local.bits < 16 else 0.0
    leave = _leave(local)
    steps += [_Step("product", forward, backward, low), _Step("move", *leave), _residual(local, kept=True)]
    return steps


def _activation(local: Local, elements: float) -> _Step:
    """Of the first product's outputs; the result is the second's operand."""
    e, w = local.size, local.workload
    forward, backward, kernels = (5, 8, 2) if w.shape.gated else (2, 3, 1)
    kept = elements * min(e, local.bits / 8)
    liger = w.stack == "deepspeed" and w.chunked_loss  # whose gradients overwrite gate and up
    if w.shape.gated and w.stack in UNFUSED_GATE and not (w.compiled or liger):
        kept += elements * e
    return _Step(
        "activation",
        [memory("activation", "forward", forward * e * elements, kernels)],
        [memory("activation", "backward", backward * e * elements, kernels)],
        kept,
        (1 if liger else 3 if w.shape.gated else 2) * e * elements,
    )


def _dense(local: Local, width: int, names: tuple[str, str] = ("gate_up", "down")) -> list[_Step]:
    """A feed-forward block behind its norm."""
    shape, t, e, tokens = local.workload.shape, local.t, local.size, local.tokens
    wide = (2 if shape.gated else 1) * width // t
    first, first_back = _product(local, names[0], tokens, wide, shape.hidden)
    second, second_back = _product(local, names[1], tokens, shape.hidden, width // t)
    if shape.biases:
        first_back.insert(0, memory("bias", "backward", e * tokens * wide))
    enter, leave = _enter(local), _leave(local)
    return [
        _Step("move", *enter),
        _Step("product", first, first_back, float(e * tokens * wide), e * tokens * (wide + shape.hidden)),
        _activation(local, tokens * width / t),
        _Step("product", second, second_back),
        _Step("move", *leave),
    ]


def _mixture(local: Local) -> list[_Step]:
    """Router, journey to the experts' ranks, experts, journey back; shared experts beside them."""
    w, shape, layout, e = local.workload, local.workload.shape, local.workload.layout, local.size
    h, rows, visits, ranks, cut = shape.hidden, local.rows, local.visits, layout.expert, layout.expert_tensor
    here = max(1, shape.experts // ranks)
    steps = []
    score, score_back = _product(local, "router", rows, shape.experts, h, bits=16)
    choice = 6.0 * 4 * rows * shape.experts
    steps.append(
        _Step(
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
        copies = k * (1.0 if w.balanced else IMBALANCE)
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
    first, first_back = _product(local, "experts_gate_up", mean, wide, h, groups=here, rows=visits, grouped=True)
    second, second_back = _product(local, "experts_down", mean, h, width, groups=here, rows=visits, grouped=True)
    steps += [
        _Step("routing", out, out_back, visits * h * min(e, local.bits / 8), 2 * e * visits * h),
        _Step("product", first, first_back, e * visits * wide, e * visits * (wide + h)),
        _activation(local, visits * width),
        _Step(
            "product", second, second_back, 0.0 if w.stack == "megatron" else e * visits * h
        ),  # Megatron weighs the activation and not the result
        _Step("routing", home, home_back, 12.0 * rows * k, 2 * e * visits * h),
    ]
    if shape.shared_width:
        steps += _dense(local, shape.shared_width, ("shared_gate_up", "shared_down"))
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
    block = h * shape.experts + h * shape.shared_width * (wide + 1) / t
    return attention + norms + biases + block, each * shape.experts / local.workload.layout.expert


def _sharded(local: Local, forward: list[Item], backward: list[Item], dense: float, experts: float) -> tuple[list[Item], list[Item]]:
    """With ZeRO 3: weights gathered before either direction, gradients scattered behind; with ZeRO 2 the gradients alone."""
    w, layout, states = local.workload, local.workload.layout, local.workload.states
    once = layout.zero == 3 and layout.pipeline > 1 and not layout.reshard  # a step's, not a microbatch's: operations.py
    trained = 0.0 if w.frozen else 1.0
    if not w.frozen and not (w.stack in FUSED_SUM and layout.zero < 3):
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
                after.append(Transfer("scatter" + suffix, "shard", "reduce_scatter", count * states.reduced, "backward"))
        if count and trained and layout.replicate > 1:
            after.append(Transfer("replicate", "replicate", "all_reduce", count * states.reduced / ranks, "backward"))
    if layout.zero == 2:
        return forward, [*backward, *after]
    again = [replace(item, passes="backward") for item in before] if layout.reshard else []
    return [*before, *forward], [*again, *backward, *after]


def _made_again(local: Local, steps: Iterable[_Step]) -> tuple[list[Item], float]:
    """`(recomputed items, bytes kept of them)` under the workload's policy."""
    w = local.workload
    words = AGAIN[w.recompute]
    items: list[Item] = []
    kept, products = 0.0, 0
    for step in steps:
        again = step.word in words or ("moe" in w.lean and step.word == "routing")
        if step.word == "product" and w.recompute == "selective" and w.stack == "torchtitan" and step.forward:
            products += 1  # it keeps every other product, and attention
            again = products % 2 == 0
        if again:
            items += [replace(item, passes="recompute") for item in step.forward]
        else:
            kept += step.keeps
    return items, kept


def _block(local: Local, name: str, steps: list[_Step], counts: tuple[float, float], *, stream: bool = True) -> Block:
    forward = [item for step in steps for item in step.forward]
    backward = [item for step in reversed(steps) for item in step.backward]
    again, kept = _made_again(local, steps)
    if stream:  # the layer's input, which its first norm and the residual sum need
        kept += local.rows * local.workload.shape.hidden * local.size
    whole = sum(step.keeps for step in steps)
    made = whole - kept if again else 0.0
    spans = max((step.spans for step in steps), default=0.0)
    forward, backward = _sharded(local, forward, backward, *counts)
    return Block(name, tuple(forward), tuple(backward), tuple(again), kept, max(0.0, made) + spans, sum(counts), counts[1])


def layer(local: Local, sparse: bool, window: int | None) -> Block:
    """One transformer layer of this rank."""
    h = local.workload.shape.hidden
    steps = [*_attention(local, window), _norm(local, local.rows * h, gathered=not sparse)]
    steps += _mixture(local) if sparse else _dense(local, local.workload.shape.intermediate)
    steps.append(_residual(local, kept=False))
    return _block(local, "sparse_layer" if sparse else "layer", steps, parameters(local, sparse))


def embedding(local: Local) -> Block:
    """Look-up, of learned positions too, and its gradient."""
    w, shape, e = local.workload, local.workload.shape, local.size
    h, tokens, rows = shape.hidden, local.tokens, -(-shape.vocab // local.t)
    count = float(rows * h) + (w.sequence * h if shape.learned_positions else 0)
    forward: list[Item] = [memory("embedding", "forward", 2.0 * e * tokens * h, 2 if local.t == 1 else 6)]
    backward: list[Item] = [] if w.frozen else [memory("embedding", "backward", e * (3.0 * tokens * h + rows * h), 3)]
    leave, leave_back = _leave(local)
    if shape.learned_positions:
        leave.append(memory("residual", "forward", 3.0 * e * local.rows * h))
    if local.dropout:
        leave.append(memory("dropout", "forward", (2.0 * e + 1) * local.rows * h))
    step = _Step("embedding", [*forward, *leave], [*leave_back, *backward], 8.0 * tokens + (local.rows * h if local.dropout else 0))
    return _block(local, "embedding", [step], (count, 0.0), stream=False)


def head(local: Local, *, tied_here: bool) -> Block:
    """Last norm, product with the vocabulary, loss. `tied_here`: its weights are the embedding's on this same rank, and not counted again."""
    shape, e = local.workload.shape, local.size
    h, tokens, outputs = shape.hidden, local.tokens, -(-shape.vocab // local.t)
    logits = float(tokens * outputs)
    forward, backward = _product(local, "head", tokens, outputs, h, bits=min(32, 8 * e))
    steps = [_norm(local, local.rows * h, operand=False), _Step("move", *_enter(local)), _Step("head", forward, backward)]
    loss: list[Item] = [memory("cross_entropy", "forward", 14.0 * logits, 5)]
    if local.t > 1:
        loss.append(Transfer("loss_sum", "tensor", "all_reduce", 12.0 * tokens, "forward"))
    steps.append(_Step("loss", loss, [memory("cross_entropy", "backward", 10.0 * logits, 2)]))
    count = (0.0 if tied_here else float(outputs * h)) + h * (2 if shape.layer_norm and shape.biases else 1)
    return _block(local, "head", steps, (count, 0.0))


def predicted(local: Local) -> Block:
    """A layer of multi-token prediction with its own pass through the head (arXiv:2412.19437, section 2.2): embedding and head are the model's."""
    shape, tokens, h = local.workload.shape, local.tokens, local.workload.shape.hidden
    inner, loss = layer(local, shape.sparse_layers > 0, None), head(local, tied_here=True)
    join, join_back = _product(local, "predicted_join", tokens, h // local.t, 2 * h)
    steps = [_norm(local, 2.0 * local.rows * h), _Step("move", *_enter(local)), _Step("product", join, join_back)]
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

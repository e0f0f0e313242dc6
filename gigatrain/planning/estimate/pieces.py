"""The pieces that layers are made of: one rank's numbers, a stretch of a layer with what it keeps, and products, norms, activations and sums as such.

`layers.py` says what each name means and what it counts.
"""

from dataclasses import dataclass, field

from gigatrain.planning.estimate.work import Collective, Item, Op, Transfer
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
ADAPTED = frozenset({"qkv", "attention_output"})  # by LoRA: operations.trained counts the same
# Transformer Engine launches a product for each expert of a rank, from a loop in C++: a launch of its costs a share of one from Python. prior: 3 of 10 us
ONE_BY_ONE = 0.3
FUSED_SUM = frozenset({"megatron"})  # weight gradients are added to fp32 sums by the product itself
REGATHERS = frozenset({"megatron", "generic", "nanotron"})  # keep a sequence-sharded input and gather it again in the backward
UNFUSED_GATE = frozenset(
    {"torchtitan", "llm_foundry", "nanotron", "deepspeed"}
)  # keep silu(gate) beside gate, up and their product, unless compiled
EAGER_NORM = frozenset({"deepspeed"})  # transformers' RMSNorm, in six operations of which fp32 copies are kept, unless compiled or Liger's
FSDP = frozenset({"gigatrain_native", "torchtitan", "llm_foundry", "generic"})  # torch's, which leaves its root module gathered
WHOLE_EXPERTS = frozenset({"gigatrain_native", "gigatrain_deepspeed"})  # no tensor rank has a part of an expert, shared ones included
# What DeepSpeed's ZeRO 1 and 2 do to a bucket of gradients, whatever `reduce_scatter` says: use_multi_rank_bucket_allreduce is on by default
# (deepspeed/runtime/zero/config.py), and stage_1_and_2.py's allreduce_and_scatter then is an all_reduce of which a rank keeps its part.
SUMS_WHOLE = frozenset({"deepspeed", "gigatrain_deepspeed"})
AGAIN: dict[Recompute, frozenset[str]] = {
    "none": frozenset(),
    "lean": frozenset({"norm", "activation"}),
    "selective": frozenset({"norm", "activation", "rope"}),
    "attention": frozenset({"core"}),
    "full": frozenset({"norm", "activation", "rope", "residual", "core", "product", "move", "routing", "expert"}),
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
    fused_sum: bool = field(init=False)  # a product adds its weight gradient to the sum itself

    def __post_init__(self) -> None:
        w, layout = self.workload, self.workload.layout
        self.t = layout.tensor
        self.tokens = -(-w.microbatch * w.sequence // layout.context)
        self.rows = -(-self.tokens // self.t) if layout.sequence_parallel else self.tokens
        self.size = 4 if w.precision == "fp32" else 2
        self.bits = PRODUCTS_BITS[w.precision]
        self.shards = layout.shard * layout.context
        # Megatron's expert ranks may be tensor ranks too; on ours every tensor rank has its experts whole, for its own tokens (parallel/tensor.py).
        wide = max(1, self.t // layout.expert_tensor) if w.stack not in WHOLE_EXPERTS else 1
        self.expert_shards = max(1, self.shards * wide // layout.expert)
        self.visits = self.rows * w.shape.experts_per_token * layout.expert_tensor * (1.0 if w.balanced else IMBALANCE)
        self.unfused = w.attention == "unfused"
        self.fused_sum = w.stack in FUSED_SUM and "deepspeed" not in w.version  # Megatron's fork on DeepSpeed adds apart
        self.dropout = self.unfused and w.shape.learned_positions

    @property
    def reduces(self) -> Collective:
        """How gradients are summed over `shard` ranks."""
        zero = self.workload.layout.zero
        return "all_reduce" if zero == 0 or (zero < 3 and self.workload.stack in SUMS_WHOLE) else "reduce_scatter"

    def keys(self, window: int | None) -> float:
        """Tokens that a token sees in the mean, itself included."""
        s = min(self.workload.documents or self.workload.sequence, self.workload.sequence)
        w = min(window or s, s)
        return (w * (w + 1) / 2 + (s - w) * w) / s


@dataclass(slots=True)
class Step:
    """A stretch of a layer: what it runs, what its output weighs while it waits for the backward, and by which word of `AGAIN` it is made again."""

    word: str
    forward: list[Item]
    backward: list[Item]
    keeps: float = 0.0  # bytes
    spans: float = 0.0  # bytes of its gradients at once


def product(local: Local, name: str, m: int, n: int, k: int, *, groups: int = 1, rows: float = 0.0, bits: int | None = None,
             frozen: bool | None = None, grouped: bool = False) -> tuple[list[Item], list[Item]]:  # fmt: skip
    """Forward, and both gradients of it; `rows` are the exact ones of all groups. Low precision adds passes that quantise."""
    w, e = local.workload, local.size
    bits = local.bits if bits is None else bits
    frozen = w.frozen if frozen is None else frozen
    rows, operand = rows or m * groups, bits / 8
    flops, kind = 2.0 * rows * n * k, "grouped" if grouped else "gemm"
    weights = groups * n * k
    summed = (2 * w.states.gradients if local.fused_sum else e) * weights
    launched = max(1, round(groups * ONE_BY_ONE)) if grouped and w.stack in FUSED_SUM else 1
    forward: list[Item] = [Op(name, kind, "forward", flops, operand * (rows * k + weights) + e * rows * n, m, n, k, groups, bits, launched)]
    backward: list[Item] = [Op(name, kind, "dgrad", flops, operand * (rows * n + weights) + e * rows * k, m, k, n, groups, bits, launched)]
    if not frozen:
        backward.append(Op(name, kind, "wgrad", flops, operand * rows * (n + k) + summed, n, k, m, groups, bits, launched))
    if bits < 16:
        each = QUANTISED[w.precision] - (bits / 8 if w.frozen else 0.0)  # without a weight gradient nothing is needed along columns
        passes = [Op("quantise", "memory", "forward", 0.0, each * rows * k, kernels=launched * (1 if each < 5 else 2))]
        if w.stack != "megatron":  # which quantises weights once a step (operations.py)
            passes.append(Op("quantise", "memory", "forward", 0.0, each * weights, kernels=launched * (1 if each < 5 else 2)))
        forward = [*passes, *forward]
        backward = [Op("quantise", "memory", "backward", 0.0, each * rows * n, kernels=launched * (1 if each < 5 else 2)), *backward]
    if w.frozen and w.adapter_rank and frozen and name in ADAPTED:
        a, a_back = product(local, name + "_lora_a", m, w.adapter_rank, k, bits=16, frozen=False)
        b, b_back = product(local, name + "_lora_b", m, n, w.adapter_rank, bits=16, frozen=False)
        forward, backward = [*forward, *a, *b], [*b_back, *a_back, *backward]
    return forward, backward


def memory(name: str, passes: str, bytes: float, kernels: int = 1) -> Op:
    """A pass over memory."""
    return Op(name, "memory", passes, 0.0, bytes, kernels=kernels)


def enter(local: Local) -> tuple[list[Item], list[Item]]:
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


def leave(local: Local) -> tuple[list[Item], list[Item]]:
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


def norm(local: Local, elements: float, *, operand: bool = True, gathered: bool = True) -> Step:
    """RMSNorm or LayerNorm of `elements`; its output is an operand of a product, and kept as wide as that, gathered where a stack keeps it so."""
    e, w = local.size, local.workload
    eager = w.stack in EAGER_NORM and not (w.compiled or w.chunked_loss or w.shape.layer_norm)
    spread = local.t if gathered and w.layout.sequence_parallel and local.t > 1 and w.stack not in REGATHERS else 1
    kept = elements * spread * (min(e, local.bits / 8) if operand else e)
    read, written, kernels = (18.0, 24.0, 6) if eager else (2.0, 3.0, 1)
    forward, backward = memory("norm", "forward", read * e * elements, kernels), memory("norm", "backward", written * e * elements, kernels)
    return Step("norm", [forward], [backward], kept + (4 + e) * elements * eager, 2 * e * elements)


def residual(local: Local, *, kept: bool) -> Step:
    """The block's output, dropped out where the model does, added to the stream; the next norm needs the sum."""
    e, elements = local.size, local.rows * local.workload.shape.hidden
    step = Step("residual", [memory("residual", "forward", 3.0 * e * elements)], [memory("residual", "backward", 3.0 * e * elements)])
    step.keeps = float(e * elements) if kept else 0.0
    if local.dropout:
        step.forward.insert(0, memory("dropout", "forward", (2.0 * e + 1) * elements))
        step.backward.append(memory("dropout", "backward", (2.0 * e + 1) * elements))
        step.keeps += elements
    return step


def activation(local: Local, elements: float) -> Step:
    """Of the first product's outputs; the result is the second's operand."""
    e, w = local.size, local.workload
    forward, backward, kernels = (5, 8, 2) if w.shape.gated else (2, 3, 1)
    kept = elements * min(e, local.bits / 8)
    liger = w.stack == "deepspeed" and w.chunked_loss  # whose gradients overwrite gate and up
    if w.shape.gated and w.stack in UNFUSED_GATE and not (w.compiled or liger):
        kept += elements * e
    return Step(
        "activation",
        [memory("activation", "forward", forward * e * elements, kernels)],
        [memory("activation", "backward", backward * e * elements, kernels)],
        kept,
        (1 if liger else 3 if w.shape.gated else 2) * e * elements,
    )

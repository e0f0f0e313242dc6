"""What is trained and how, in numbers alone: the input of every estimate, whether it comes from a plan, a published measurement or a search."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16", "fp8_delayed", "fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "mxfp8", "nvfp4"]
Recompute = Literal[
    "none", "lean", "selective", "attention", "full"
]  # attention: Megatron's "selective", the core of attention alone is made again
Schedule = Literal["1f1b", "interleaved", "zbv"]
Stack = Literal["gigatrain_native", "gigatrain_deepspeed", "megatron", "torchtitan", "llm_foundry", "nanotron", "deepspeed", "generic"]
Attention = Literal["auto", "flash", "unfused"]  # auto: the fastest that the stack has on that accelerator
PRODUCTS_BITS: dict[str, int] = {
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "fp8_delayed": 8,
    "fp8_tensorwise": 8,
    "fp8_rowwise": 8,
    "fp8_blockwise": 8,
    "mxfp8": 8,
    "nvfp4": 4,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's numbers, of any family: what `Architecture` has, and what GPT and MPT have beside it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int
    intermediate: int  # of a dense block
    gated: bool
    vocab: int
    tied: bool
    learned_positions: bool = False
    biases: bool = False
    layer_norm: bool = False  # LayerNorm and not RMSNorm
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0  # of all shared experts together
    sparse_layers: int = 0  # the last ones; those before are dense
    q_rank: int | None = None  # latent attention (MLA)
    kv_rank: int | None = None
    rotary_dim: int = 0
    windows: tuple[int | None, ...] = ()  # of each layer, in tokens; empty: none has one
    predicted: int = 0  # layers of multi-token prediction behind the last, each with its own pass through the head

    def window_of(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def sparse_of(self, layer: int) -> bool:
        return layer >= self.layers - self.sparse_layers


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks share the work: `replicate x shard x context x tensor x pipeline` of them. `expert` divides `shard x context` (times `tensor` where
    `expert_tensor` is 1, as in Megatron)."""

    replicate: int = 1
    shard: int = 1  # ranks that share one copy of what `zero` says
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    schedule: Schedule = "1f1b"
    stages: int = 1  # of each pipeline rank: virtual stages
    exchange: Literal["ring", "ulysses"] = "ring"
    sequence_parallel: bool = True  # between the matrices `tensor` ranks share the tokens
    zero: Literal[0, 1, 2, 3] = 3  # what `shard` ranks share: nothing, optimizer, and gradients, and weights (FSDP)
    reshard: bool = True  # zero 3: weights are dropped after the forward and gathered again
    dispatch: Literal["alltoall", "hierarchical", "gather"] = "alltoall"

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Ranks that read samples of their own."""
        return self.replicate * self.shard


@dataclass(frozen=True, slots=True)
class States:
    """Bytes per parameter, before any is sharded."""

    weights: float = 2.0  # that products read
    gradients: float = 4.0  # as they are summed
    master: float = 4.0  # beside the weights
    moments: float = 8.0
    reduced: float = 4.0  # of a gradient on its way between ranks
    gathered: float = 2.0  # of a weight on its way


@dataclass(frozen=True, slots=True)
class Workload:
    """One training configuration. A step has `data x accumulation` microbatches of `microbatch` samples of `sequence` tokens."""

    shape: Shape
    layout: Layout
    sequence: int
    microbatch: int
    accumulation: int
    precision: Precision = "bf16"
    states: States = States()
    recompute: Recompute = "none"
    recomputed: float = 1.0  # share of the layers to which `recompute` applies, spread evenly
    attention: Attention = "auto"
    stack: Stack = "generic"
    version: str = ""  # of the stack
    compiled: bool = False
    graphed: bool = False  # CUDA graphs: launches cost nothing
    offload: bool = False  # optimizer states and its update are in host memory
    frozen: bool = False  # LoRA and its like: no weight gradient of the layers' matrices, no state of theirs
    adapter_rank: int = 0  # of LoRA
    adapter_parameters: int = 0  # trained ones, where they are counted: not only attention's
    documents: int = 0  # mean tokens of a packed document; 0: a sample is one
    balanced: bool = True  # tokens are spread evenly over experts: forced, or in the mean
    chunked_loss: bool = False  # logits never exist whole
    optimizer: Literal["adamw", "muon"] = "adamw"
    overlap: tuple[tuple[str, bool], ...] = ()  # axis -> whether its transfers are hidden, where that is said; else the stack's habit
    lean: tuple[str, ...] = ()  # gigatrain's choices that save memory or passes: fused operations by name

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.layout.data * self.accumulation * self.microbatch

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

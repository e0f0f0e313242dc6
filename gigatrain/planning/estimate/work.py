"""What a rank does: operations, transfers and kept bytes; written by operations.py, timed by step.py, drawn by energy.py, held by residency.py."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gemm", "grouped", "attention", "memory", "optimizer"]
Axis = Literal["tensor", "context", "expert", "shard", "replicate", "pipeline"]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True, slots=True)
class Op:
    """Work of one rank on its device. `flops` of the whole (2 m n k of a product); `bytes` that must cross HBM; `kernels` launched.

    A product is m x n x k, `groups` times over (grouped: one of each expert, `m` the mean rows of one); attention has its queries as m, keys as n, head_dim as
    k and batch x heads as groups. `passes` names what runs: forward, dgrad, wgrad, backward (attention's), recompute.
    """

    name: str
    kind: Kind
    passes: str
    flops: float = 0.0
    bytes: float = 0.0
    m: int = 0
    n: int = 0
    k: int = 0
    groups: int = 1
    bits: int = 16  # of the operands
    kernels: int = 1
    causal: bool = True


@dataclass(frozen=True, slots=True)
class Transfer:
    """A collective of one rank's group along `axis`. `bytes`: of the whole tensor, as nccl-tests count: all ranks' together of a gather, one rank's input of
    a reduce-scatter or all-reduce, all that one rank sends in an all-to-all or a send."""

    name: str
    axis: Axis
    collective: Collective
    bytes: float
    passes: str


Item = Op | Transfer


@dataclass(frozen=True, slots=True)
class Block:
    """One layer, or the embedding, or the head with its loss, of one microbatch on one rank: items in the order in which they run."""

    name: str
    forward: tuple[Item, ...]
    backward: tuple[Item, ...]  # input and weight gradients; ZBV takes `wgrad` items out
    recompute: tuple[Item, ...]  # before the backward
    saved_bytes: float  # kept from forward to backward
    transient_bytes: float  # beside that at most, within the block's own forward or backward
    parameters: float  # of this rank, before they are sharded
    expert_parameters: float = 0.0  # of them, those of routed experts (sharded over fewer ranks)


@dataclass(frozen=True, slots=True)
class Work:
    """Of one pipeline rank: its virtual stages' blocks, and what happens once a step."""

    stages: tuple[tuple[Block, ...], ...]  # by virtual stage, each its blocks in order
    numbers: tuple[int, ...]  # global number of each of those stages
    step: tuple[Item, ...]  # the optimizer's passes, the gradient norm's, and gradients' and weights' transfers of zero 0 to 2
    boundary_bytes: float  # a microbatch's activations between two stages


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one step. Seconds are wall-clock of the slowest rank; `busy` are device-seconds a rank spends in each kind of work, overlapped or not."""

    step_s: float
    low_s: float  # of 90 % intervals
    high_s: float
    phases: dict[
        str, float
    ]  # seconds that add up to step_s: gemm, grouped, attention, memory, optimizer, launch, bubble, and exposed tensor, context, ...
    busy: dict[str, float]  # gemm, grouped, attention, memory, optimizer, communication, idle
    tokens: int
    ranks: int
    model_flops: float  # of a step, all ranks, without recomputation; causal attention counted once
    memory: dict[str, float]  # bytes of the fullest rank: weights, gradients, optimizer, activations, workspace, buffers, slack
    memory_low: float
    memory_high: float
    memory_by_rank: tuple[dict[str, float], ...]  # by pipeline rank
    fits: bool | None  # None: the cluster's memory is unknown
    limits: str  # what the step waits for most, in words
    outside: tuple[str, ...] = ()  # in what the case is outside of what was calibrated
    assumed: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def tokens_per_s_per_rank(self) -> float:
        return self.tokens / self.step_s / self.ranks

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

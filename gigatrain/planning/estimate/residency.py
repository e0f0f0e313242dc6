"""Peak bytes of each pipeline rank, by what is alive at once.

    memory(workload, works, constants) -> a dict of bytes for each pipeline rank
    seen(memory, kind)                 -> of them, what a meter of that kind shows

Alive the whole step: weights, gradients and optimizer by `States` and ZeRO stage. Alive from a microbatch's forward to its backward: what blocks keep, times
the microbatches in flight (planning/layout.py's `live`; Korthikanti 2022, section 4). Alive for a moment, of which the largest counts: a block's gradients, and
what it makes again; logits and their gradient; weights gathered and gradients on their way (ZeRO 3). Beside torch's tensors: `slack` and `device`.

    weights      zero 3: a rank's shard, fp32 where that is the master copy
    gradients    the sums
    optimizer    master weights and moments; with Megatron's fp16 the fp32 copies of gradients too
    activations  kept by all microbatches in flight
    workspace    the largest moment
    buffers      torch's own that are not tensors of the model: workspaces of products, buckets, boundary activations in flight
    slack        what torch's allocator has reserved and does not use
    device       context and NCCL
"""

from collections.abc import Mapping, Sequence

from gigatrain.planning import cost
from gigatrain.planning import layout as pipelines
from gigatrain.planning.estimate.operations import trained
from gigatrain.planning.estimate.pieces import Local
from gigatrain.planning.estimate.work import Block, Work
from gigatrain.planning.estimate.workload import Stack, Workload

GIB = 2.0**30
LAYERS = frozenset({"layer", "sparse_layer"})
# Bytes of a logit at the loss. Megatron: bf16 and its gradient where the loss is one kernel; before that bf16, fp32 copy, exponentials
# (core/tensor_parallel/cross_entropy.py). llm-foundry has flash-attn's loss, one kernel too. Torch's own: bf16, log-softmax and gradient in fp32; transformers
# makes the fp32 copy outlive its use.
LOGIT_BYTES: dict[str, float] = {"megatron": 4.0, "llm_foundry": 4.0, "deepspeed": 14.0}
OLD_LOGIT_BYTES = 10.0
CHUNK = 1 << 29  # logits of one chunk (gigatrain's kernels/linear_cross_entropy.py)
WORKSPACE_BYTES = (
    0.15 * GIB
)  # of cuBLAS and Transformer Engine: 32 MiB on each stream that multiplies (TE's get_cublas_workspace_size_bytes)
# DeepSpeed's defaults (its config-json page): gradients are reduced from a buffer of 5e8 elements, beside the next one that fills; ZeRO 3 keeps up to 1e9
# gathered parameters.
BUCKET_ELEMENTS, LIVE_ELEMENTS = 5e8, 1e9
ZERO3_BYTES = 2.0 * GIB  # what DeepSpeed's ZeRO 3 holds beyond that: fetches in flight and the fragments they leave. fitted on stas_upgrade
CONTEXT_BYTES = 0.55 * GIB  # of CUDA with torch's kernels loaded. prior: nvidia-smi of an idle process on A100 and H100, 0.45 to 0.6 GiB
COMMUNICATOR_BYTES = 0.1 * GIB  # of NCCL for each group that a rank is in: channels x (send + receive) buffers of 4 MiB. prior
# Of what is not alive all step, reserved and not used. prior: with torch's expandable segments 1 to 3 %, without them 3 to 10 %, by whether a stack sets them
# (torchtitan's run script, DeepSpeed's ALST recipes and NVIDIA's of 2025 do).
UNUSED = 0.06
EXPANDABLE = 0.02
EXPANDS = frozenset({"torchtitan", "deepspeed"})


def memory(workload: Workload, works: Sequence[Work], constants: Mapping[str, float]) -> tuple[dict[str, float], ...]:
    """Of each pipeline rank; `constants` may replace `memory.unused`, `memory.context_bytes` and `memory.communicator_bytes`."""
    local = Local(workload)
    return tuple(_rank(local, rank, work, constants) for rank, work in enumerate(works))


def seen(memory: Mapping[str, float], kind: str) -> float:
    """Bytes by torch's `max_memory_allocated` or `max_memory_reserved` where `kind` names one, else by the device."""
    total = sum(memory.values())
    if "allocated" in kind:
        return total - memory["slack"] - memory["device"]
    return total - memory["device"] if "reserved" in kind else total


def _rank(local: Local, rank: int, work: Work, constants: Mapping[str, float]) -> dict[str, float]:
    workload, layout, states = local.workload, local.workload.layout, local.workload.states
    blocks = [block for stage in work.stages for block in stage]
    experts = sum(block.expert_parameters for block in blocks)
    dense = sum(block.parameters for block in blocks) - experts
    mine, of_experts = trained(workload, dense, experts)
    shared = mine / local.shards + of_experts / local.expert_shards
    held = dense / local.shards + experts / local.expert_shards
    master = states.master if states.weights else 0.0
    weights = (states.weights or states.master) * held if layout.zero == 3 else (states.weights or states.master) * (dense + experts)
    gradients = states.gradients * (shared if layout.zero >= 2 else mine + of_experts)
    if workload.stack == "gigatrain_native" and not workload.frozen:
        gradients = _own_gradients(local, blocks, gradients, shared if layout.zero == 3 else mine + of_experts)
    optimizer = (master + states.moments) * (shared if layout.zero else mine + of_experts)
    if workload.precision == "fp16" and workload.stack == "megatron":
        optimizer += 4.0 * (shared if layout.zero else mine + of_experts)
    own_zero = workload.stack == "gigatrain_deepspeed"
    if own_zero and layout.zero == 1 and local.size == 2:
        gradients += local.size * mine  # BF16_Optimizer sums a backward's own when it has ended
    if workload.offload:
        optimizer = 0.0
        gradients = 0.0 if layout.zero == 3 or (own_zero and layout.zero == 2) else gradients
        weights = 0.0 if own_zero and layout.zero == 3 else weights
    activations = _live(local, rank, work)
    layers = [block for block in blocks if block.name in LAYERS]
    largest = max((block.parameters for block in layers), default=0.0)
    moment = max((block.transient_bytes for block in blocks), default=0.0)
    workspace = max(_loss(local, work), moment + (local.size * largest if layout.zero == 3 and not workload.frozen else 0.0))
    if layout.zero == 3:
        workspace += _gathered(local, blocks, largest)
    buffers = WORKSPACE_BYTES + (4.0 * work.boundary_bytes if layout.pipeline > 1 else 0.0)
    if (
        local.fused_sum and not workload.frozen
    ):  # autograd is handed an empty gradient for each shape of weight, beside the sum that the product wrote to
        buffers += local.size * max((block.parameters - block.expert_parameters for block in layers), default=0.0)
    fork = workload.stack == "megatron" and "deepspeed" in workload.version  # Megatron on DeepSpeed's optimizer and pipeline
    if own_zero:  # its buckets, by engines/deepspeed.py; stage 1 reduces one at a time
        buffers += (1 if layout.zero == 1 else 2) * states.reduced * min(cost.BUCKET_ELEMENTS, mine)
    if workload.stack == "deepspeed" or (fork and layout.zero):
        buffers += (1 if fork else 2) * states.reduced * min(BUCKET_ELEMENTS, mine)  # a second one where reductions overlap
    if fork and layout.zero and workload.precision == "bf16":
        gradients += local.size * mine  # BF16_Optimizer keeps a microbatch's beside their sum
    if fork and layout.pipeline > 1:  # its pipeline keeps what came in and what goes out of each microbatch in flight
        buffers += 2 * work.boundary_bytes * min(workload.accumulation, layout.pipeline - rank)
    groups = sum(size > 1 for size in (layout.tensor, layout.context, layout.pipeline, layout.expert, local.shards, layout.replicate))
    unused = constants.get("memory.unused", EXPANDABLE if workload.stack in EXPANDS or workload.version[:3] in ("25.", "26.") else UNUSED)
    device = constants.get("memory.context_bytes", CONTEXT_BYTES) + groups * constants.get("memory.communicator_bytes", COMMUNICATOR_BYTES)
    return {
        "weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations, "workspace": workspace, "buffers": buffers,
        "slack": unused * (activations + workspace), "device": device,
    }  # fmt: skip


def _own_gradients(local: Local, blocks: Sequence[Block], sums: float, count: float) -> float:
    """gigatrain's engine: a microbatch's gradients beside their sum, as wide as what is trained; `main_grads` spares the layers' matrices, and with `release`
    no more exists than one layer's, or the embedding's."""
    w = local.workload
    wide = (w.states.weights or w.states.master) if w.layout.zero == 3 else float(local.size)
    layers = sum(block.parameters for block in blocks if block.name in LAYERS)
    every = sum(block.parameters for block in blocks) or 1.0
    if "release" in w.lean:
        return (sums + wide * count) * max(block.parameters for block in blocks) / every
    return sums + wide * count * ((every - layers) / every if "main_grads" in w.lean else 1.0)


def _live(local: Local, rank: int, work: Work) -> float:
    """Kept at once by all microbatches between forward and backward: those of the first stages most, as they wait longest."""
    layout, steps = local.workload.layout, local.workload.accumulation
    kept = [sum(block.saved_bytes for block in stage) for stage in work.stages]
    if layout.pipeline == 1:
        return sum(kept)
    units = pipelines.live(layout.schedule, rank, layout.pipeline, layout.stages, steps)
    return units * sum(kept) / len(kept)


def _loss(local: Local, work: Work) -> float:
    """Logits with what the loss makes of them, on the rank that has the head."""
    w = local.workload
    if not any(block.name == "head" for stage in work.stages for block in stage):
        return 0.0
    outputs = -(-w.shape.vocab // local.t)
    each = OLD_LOGIT_BYTES if w.stack == "megatron" and local.unfused else LOGIT_BYTES.get(w.stack, 10.0)
    logits = float(local.tokens * outputs)
    if w.stack == "gigatrain_native":
        each, logits = 2.0, min(logits, CHUNK)
    elif w.chunked_loss:  # Liger: as many chunks as hidden goes into the vocabulary, and the head's gradient in fp32 beside it
        each, logits = 14.0, logits / max(1.0, w.shape.vocab / w.shape.hidden)
    gradient = 0.0 if w.frozen else (local.size + 4.0 * w.chunked_loss) * outputs * w.shape.hidden
    return each * logits + gradient


def held_back(stack: Stack, zero: int, pipeline: int) -> bool:
    """Whether a rank's gradients stay whole until the last backward of a step: torch's pipeline stages hold FSDP's reductions back
    (`backward_maybe_with_nosync` of torch/distributed/pipelining/stage.py), and FSDP sums them unsharded, as wide as they are reduced."""
    return zero == 3 and pipeline > 1 and stack in ("gigatrain_native", "torchtitan")


def _gathered(local: Local, blocks: Sequence[Block], layer: float) -> float:
    """Of ZeRO 3: this layer's weights, the next one's and where they arrive, those of embedding and head, and a gradient on its way; all of a rank's where
    they stay gathered, or where gradients are held back."""
    w, layout, states = local.workload, local.workload.layout, local.workload.states
    every = sum(block.parameters for block in blocks)
    ends = sum(block.parameters for block in blocks if block.name not in LAYERS)
    held = 3 * layer + ends if layout.reshard else every
    beside = 0.0
    if w.stack in ("deepspeed", "gigatrain_deepspeed"):
        held, beside = max(held, min(LIVE_ELEMENTS, every)), ZERO3_BYTES
    sums = 0.0 if w.frozen else every if held_back(w.stack, layout.zero, layout.pipeline) else max(block.parameters for block in blocks)
    return states.gathered * held + states.reduced * sums + beside

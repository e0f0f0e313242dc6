"""Bytes that a plan needs on one rank, from its numbers alone."""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from gigatrain.architectures import Architecture
from gigatrain.config import Engine, Mesh, Optim, Section

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
    a gate; in fp32 each norm's rstd and attention's logsumexp. `lean` keeps no norm output, no normed query or key and no activation. `full` keeps h,
    `selective` the matrix products. References keep more: of a gated activation i, of xIELU 3 i and a mask, of norms and rotation about 4 h and the heads.
    """
    h, i, d = architecture.hidden, architecture.intermediate, architecture.head_dim
    heads, kv = architecture.heads, architecture.kv_heads
    pre, post = architecture.placement != "post", architecture.placement != "pre"
    width, wide = (2 * heads + 2 * kv) * d, 2 if architecture.gated else 1
    if recompute == "full":
        return size * h
    if recompute == "selective":
        return size * (3 * h + width + wide * i)
    normed = {"none": 0, "head": heads + kv, "full": 2}[architecture.qk_norm]
    kept = 2 * h + (2 * h if post else 0) + width + wide * i
    if recompute == "none":
        kept += (2 * h if pre else 0) + i + ((heads + kv) * d if normed else 0)
    if kernels.get("rms_norm") == "reference":
        kept += 4 * h + width
    mask = 0
    if kernels.get(architecture.activation) == "reference":
        kept += {"swiglu": 1, "geglu": 1, "relu2": 0, "xielu": 3}[architecture.activation] * i
        mask = i if architecture.activation == "xielu" else 0
    return size * kept + mask + 4 * (2 * pre + 2 * post + normed + heads)


def optimizer_bytes(architecture: Architecture, precision: Literal["bf16", "fp32"], optim: Optim) -> int:
    """Bytes of master weights beside bf16 weights, and of moments; without the few counters.

    Master weights 4 B per parameter in fp32, corrections of 2 B or 1 B in bf16+16 and bf16+8. AdamW's moments 8 B in fp32, 4 B in bf16, 2 B in int8
    with 8 B of scales per begun block of 128 of each of its groups, decayed or not. Muon, for the layers' matrices: fp32 master weights and 4 B.
    """
    matrices, embeddings = architecture.matrix_parameters(), architecture.vocab * architecture.hidden * (1 if architecture.tied else 2)
    muon = matrices if optim.name == "muon" else 0
    decayed = matrices - muon + (embeddings if optim.decay_embeddings else 0)
    groups = (decayed, architecture.parameters() - muon - decayed)
    master = {"fp32": 4, "bf16+16": 2, "bf16+8": 1}[optim.master] if precision == "bf16" else 0
    moments = {"fp32": 8, "bf16": 4, "int8": 2}[optim.moments]
    scales = sum(8 * -(-count // 128) for count in groups) if optim.moments == "int8" else 0
    return (master + moments) * sum(groups) + scales + (8 if precision == "bf16" else 4) * muon


def muon_workspace(architecture: Architecture) -> int:
    """Bytes of the largest batch of equal matrices that Muon orthogonalises at once: at most 2 GiB, but one matrix at least (optim/muon.py)."""
    h, i, layers = architecture.hidden, architecture.intermediate, architecture.layers
    q, kv = architecture.heads * architecture.head_dim, architecture.kv_heads * architecture.head_dim
    counts: Counter[tuple[int, int]] = Counter()
    for shape, count in (((q, h), 1), ((kv, h), 2), ((h, q), 1), ((i, h), 2 if architecture.gated else 1), ((h, i), 1)):
        counts[shape] += count * layers
    one = {(r, c): 2 * (3 * r * c + 5 * min(r, c) ** 2) for r, c in counts}
    return max(one[shape] * min(count, max(1, (1 << 31) // one[shape])) for shape, count in counts.items())


def memory(
    architecture: Architecture,
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
    mesh: Mesh = Mesh(shard=1),
    engine: Engine = Engine(),
) -> Memory:
    """Memory of the fullest rank.

    Per parameter: fp32 keeps 4 B of weights; bf16 keeps 2 B, and the optimizer what `optimizer_bytes` says. Gradients are summed in fp32, or, where
    master weights are narrow and a step has one microbatch, moved in bf16; one microbatch's own gradients exist beside the sum.

    Activations: `saved_bytes` per token and layer, and one whole layer's where layers are recomputed. `blocked` attention also keeps its softmax
    weights, half a square of tokens per head, and `reference` the scores and weights of the whole square. A mask of documents or windows is a square
    of tokens per sample.

    Workspace: the loss holds one chunk of logits (2^21 on a CPU, 2^29 on a GPU), 2 B each where the kernel is fused and else 14, and the head's gradient
    in fp32 and rounded; Muon's update holds what `muon_workspace` says.
    """
    size, muon = 2 if precision == "bf16" else 4, optim.name == "muon"
    parameters, hidden, tokens = architecture.parameters(), architecture.hidden, microbatch * sequence
    square = microbatch * architecture.heads * sequence * sequence
    scores = {"sdpa": 0, "blocked": square * size // 2, "reference": square * (size + 4)}[kernels["attention"]]
    whole = tokens * saved_bytes(architecture, size, "none", kernels) + scores
    kept = tokens * saved_bytes(architecture, size, recompute, kernels) + (scores if recompute in ("none", "lean") else 0)
    masks = microbatch * sequence * sequence * (1 + size) if documents or architecture.window else 0
    chunk = min(1 << 29 if device == "cuda" else 1 << 21, tokens * architecture.vocab)
    per_logit = 2 if kernels["linear_cross_entropy"] == "fused" else 14
    narrow = parameters - architecture.matrix_parameters() * muon if optim.master != "fp32" and accumulation == 1 else 0
    return Memory(
        weights=size * parameters,
        gradients=(4 + size) * parameters - 2 * narrow,
        optimizer=optimizer_bytes(architecture, precision, optim),
        activations=architecture.layers * kept + (whole if recompute in ("selective", "full") else 0) + masks + 4 * tokens * hidden * size,
        workspace=per_logit * chunk + (4 + size) * architecture.vocab * hidden + (muon_workspace(architecture) if muon else 0),
    )

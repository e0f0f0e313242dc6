"""Bytes that a plan needs on one rank, from its numbers alone."""

from collections.abc import Mapping
from typing import Literal

from gigatrain.architectures import Architecture
from gigatrain.config import Section

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


def memory(
    architecture: Architecture,
    *,
    device: Literal["cpu", "cuda"],
    precision: Literal["bf16", "fp32"],
    microbatch: int,
    sequence: int,
    recompute: Recompute,
    muon: bool,
    kernels: Mapping[str, str],
    documents: bool,
) -> Memory:
    """Memory of one rank without sharding.

    Per parameter: fp32 keeps 4 B of weights; bf16 keeps 2 B and 4 B of master. Gradients are summed in fp32, and one microbatch's own
    gradients exist beside the sum. AdamW keeps 8 B of moments, Muon 4 B for the layers' matrices.

    Activations: `saved_bytes` per token and layer, and one whole layer's where layers are recomputed. `blocked` attention also keeps its softmax
    weights, half a square of tokens per head, and `reference` the scores and weights of the whole square. A mask of documents or windows is a square
    of tokens per sample.

    Workspace: the loss holds one chunk of logits (2^21 on a CPU, 2^28 on a GPU) as 10 B each and the head's gradient in fp32 twice; Muon's
    update holds four fp32 copies of what it moves.
    """
    size, wide = (2, 6) if precision == "bf16" else (4, 4)
    parameters, hidden, tokens = architecture.parameters(), architecture.hidden, microbatch * sequence
    square = microbatch * architecture.heads * sequence * sequence
    scores = {"sdpa": 0, "blocked": square * size // 2, "reference": square * (size + 4)}[kernels["attention"]]
    whole = tokens * saved_bytes(architecture, size, "none", kernels) + scores
    kept = tokens * saved_bytes(architecture, size, recompute, kernels) + (scores if recompute in ("none", "lean") else 0)
    masks = microbatch * sequence * sequence * (1 + size) if documents or architecture.window else 0
    embeddings = architecture.vocab * hidden * (1 if architecture.tied else 2)
    matrices = parameters - embeddings
    chunk = min(1 << 28 if device == "cuda" else 1 << 21, tokens * architecture.vocab)
    return Memory(
        weights=size * parameters,
        gradients=(4 + size) * parameters,
        optimizer=(wide - size) * parameters + (8 * parameters if not muon else 8 * embeddings + 4 * matrices),
        activations=architecture.layers * kept + (whole if recompute in ("selective", "full") else 0) + masks + 4 * tokens * hidden * size,
        workspace=10 * chunk + 8 * architecture.vocab * hidden + (16 * matrices if muon else 0),
    )

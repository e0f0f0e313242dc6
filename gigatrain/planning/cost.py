"""Bytes that a plan needs on one rank, from its numbers alone."""

from typing import Literal

from gigatrain.architectures import Architecture
from gigatrain.config import Section


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


def memory(
    architecture: Architecture,
    *,
    device: Literal["cpu", "cuda"],
    precision: Literal["bf16", "fp32"],
    microbatch: int,
    sequence: int,
    recompute: Literal["none", "selective", "full"],
    muon: bool,
    attention: str,
    documents: bool,
) -> Memory:
    """Memory of one rank without sharding.

    Per parameter: fp32 keeps 4 B of weights; bf16 keeps 2 B and 4 B of master. Gradients are summed in fp32, and one microbatch's own
    gradients exist beside the sum. AdamW keeps 8 B of moments, Muon 4 B for the layers' matrices.

    Activations per token and layer, in elements: the residual stream and its norms 8 h, queries, keys, values and attention's output
    (2 heads + 2 kv_heads) d_head twice (before and after the rotation), gate, up and their product 3 i; `selective` keeps the matrix
    products, `full` one h and one layer's work. `blocked` attention also keeps its softmax weights, half a square of tokens per head, and
    `reference` the scores and weights of the whole square. A mask of documents or windows is a square of tokens per sample.

    Workspace: the loss holds one chunk of logits (2^21 on a CPU, 2^28 on a GPU) as 10 B each and the head's gradient in fp32 twice; Muon's
    update holds four fp32 copies of what it moves.
    """
    size, wide = (2, 6) if precision == "bf16" else (4, 4)
    parameters, hidden, tokens = architecture.parameters(), architecture.hidden, microbatch * sequence
    width = (2 * architecture.heads + 2 * architecture.kv_heads) * architecture.head_dim
    products = width + 2 * hidden + 2 * architecture.intermediate
    work = 8 * hidden + 2 * width + 3 * architecture.intermediate
    square = microbatch * architecture.heads * sequence * sequence
    scores = {"sdpa": 0, "blocked": square * size // 2, "reference": square * (size + 4)}[attention]
    full_layer = tokens * work * size + scores
    kept = {"none": full_layer, "selective": tokens * (products + hidden) * size, "full": tokens * hidden * size}[recompute]
    masks = microbatch * sequence * sequence * (1 + size) if documents or architecture.window else 0
    embeddings = architecture.vocab * hidden * (1 if architecture.tied else 2)
    matrices = parameters - embeddings
    chunk = min(1 << 28 if device == "cuda" else 1 << 21, tokens * architecture.vocab)
    return Memory(
        weights=size * parameters,
        gradients=(4 + size) * parameters,
        optimizer=(wide - size) * parameters + (8 * parameters if not muon else 8 * embeddings + 4 * matrices),
        activations=architecture.layers * kept + (full_layer if recompute != "none" else 0) + masks + 4 * tokens * hidden * size,
        workspace=10 * chunk + 8 * architecture.vocab * hidden + (16 * matrices if muon else 0),
    )

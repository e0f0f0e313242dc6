"""Bytes that a plan needs on one rank, from its numbers alone."""

from typing import Literal

from gigatrain.architectures import Architecture
from gigatrain.config import Section


class Memory(Section):
    """GiB-scale facts of one rank, in bytes; `activations` is an estimate, the rest is exact."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(
    architecture: Architecture,
    *,
    precision: Literal["bf16", "fp32"],
    microbatch: int,
    sequence: int,
    recompute: Literal["none", "selective", "full"],
    muon: bool,
) -> Memory:
    """Memory of one rank without sharding.

    Per parameter: fp32 keeps 4 B of weights; bf16 keeps 2 B and 4 B of master. Gradients are summed in fp32, and in bf16 one
    microbatch's own gradients (2 B) exist beside the sum. AdamW keeps 8 B of moments, Muon 4 B for the layers' matrices (counted as all
    but the embeddings). Activations per token and layer, in elements: the residual stream and its norms 8 h, queries, keys, values and
    attention's output (2 heads + 2 kv_heads) d_head twice (before and after the rotation), gate, up and their product 3 i; `selective`
    keeps the matrix products alone, `full` keeps one h. The loss works on chunks and is bounded by 64 MiB.
    """
    parameters = architecture.parameters()
    half = precision == "bf16"
    size = 2 if half else 4
    layers, hidden = architecture.layers, architecture.hidden
    attention = (2 * architecture.heads + 2 * architecture.kv_heads) * architecture.head_dim
    products = attention + 2 * hidden + 2 * architecture.intermediate
    per_layer = {"none": 8 * hidden + 2 * attention + 3 * architecture.intermediate, "selective": products + hidden, "full": hidden}[
        recompute
    ]
    working = 8 * hidden + 2 * attention + 3 * architecture.intermediate if recompute == "full" else 0
    embeddings = architecture.vocab * hidden * (1 if architecture.tied else 2)
    moments = 8 * parameters if not muon else 8 * embeddings + 4 * (parameters - embeddings)
    return Memory(
        weights=size * parameters,
        gradients=(4 + (2 if half else 4)) * parameters,
        optimizer=(4 * parameters if half else 0) + moments,
        activations=microbatch * sequence * (layers * per_layer + working + 4 * hidden) * size + (64 << 20),
    )

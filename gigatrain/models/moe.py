"""The feed-forward block of a layer with experts: a router, and the experts that it chooses for each token. Formulas: kernels/router.py, kernels/moe.py.

Legend of shapes: b batch, t tokens, d hidden channels, k experts of a token.
"""

import torch
from torch import Tensor, nn

from gigatrain.architectures import Architecture
from gigatrain.kernels.ops import Ops
from gigatrain.kernels.router import Router
from gigatrain.models.recompute import Remade


class Experts(nn.Module):
    """The weights of all experts of a layer, gate above up, or of this rank's share of them.

    A module of its own, since experts are sharded over other ranks than the rest of a layer: all that reads their weights happens within its forward.
    """

    def __init__(self, arch: Architecture, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = nn.Parameter(torch.empty(arch.experts, 2 * arch.expert_width, arch.hidden))
        self.down_proj = nn.Parameter(torch.empty(arch.experts, arch.hidden, arch.expert_width))

    def forward(self, x_btd: Tensor, weights_btk: Tensor, chosen_btk: Tensor) -> Tensor:
        return self.ops.moe(x_btd, weights_btk, chosen_btk, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Router and experts of one layer; tokens are routed one by one, wherever they stand."""

    def __init__(self, arch: Architecture, ops: Ops) -> None:
        super().__init__()
        assert arch.activation == "swiglu"
        assert arch.experts_per_token is not None
        self.ops, self.numbers = ops, Router(arch.experts_per_token, renormalise=arch.renormalise)
        self.gate = nn.Linear(arch.hidden, arch.experts, bias=False)
        self.experts = Experts(arch, ops)

    def forward(self, x_btd: Tensor, again: Remade | None = None) -> Tensor:
        """`again` is for blocks that can drop more than their input's norm; experts keep what they make."""
        routed = self.ops.router(x_btd, self.gate.weight, self.numbers)
        return self.experts(x_btd, routed.weights_nk, routed.chosen_nk)

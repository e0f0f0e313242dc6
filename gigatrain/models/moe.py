"""The feed-forward block of a layer with experts: a router, and the experts that it chooses for each token. Formulas: kernels/router.py, kernels/moe.py.

Legend of shapes: b batch, t tokens, d hidden channels, e experts, k experts of a token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gigatrain.architectures import Architecture
from gigatrain.kernels.ops import Ops
from gigatrain.kernels.router import Routed, Router, balance_loss
from gigatrain.models.recompute import Remade

CORRECTION = "e_score_correction_bias"  # transformers' name


class Balance(NamedTuple):
    """What a router saw of the tokens of a call: how often each expert was chosen (int64), the sums of the tokens' shares and of their squared
    log-sum-exp (fp32 or fp64, with gradients)."""

    counts_e: Tensor
    shares_e: Tensor
    squares: Tensor


def router_of(arch: Architecture, *, watched: bool = False) -> Router:
    """The router's numbers, as kernels/router.py takes them."""
    assert arch.experts_per_token is not None
    latent = arch.kv_rank is not None  # DeepSeek's code and what follows it
    return Router(
        arch.experts_per_token,
        {"softmax": "softmax", "sigmoid": "sigmoid", "chosen": "softmax_after"}[arch.scoring],  # type: ignore[arg-type]
        renormalise=arch.renormalise,
        epsilon=1e-20 if latent else 0.0,
        groups=arch.groups,
        groups_kept=arch.groups_per_token,
        scale=arch.routed_scale,
        wide=arch.scoring == "sigmoid",
        losses=watched,
    )


class Gate(nn.Module):
    """The router's weights, and, if it has one, the bias that corrects its choice: fp32 whatever the rest is, and moved by no gradient."""

    def __init__(self, arch: Architecture, *, watched: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(arch.experts, arch.hidden))
        self.bias = nn.Parameter(torch.empty(arch.experts)) if arch.router_bias else None
        self.corrected = arch.correction_bias
        if arch.correction_bias:
            self.register_buffer(CORRECTION, torch.zeros(arch.experts, dtype=torch.float32))
        self.visits: Tensor | None  # how often each expert was visited in training since somebody zeroed it
        self.register_buffer("visits", torch.zeros(arch.experts, dtype=torch.int64) if watched else None, persistent=False)

    @property
    def correction(self) -> Tensor | None:
        """The correction bias [e]."""
        return getattr(self, CORRECTION) if self.corrected else None

    def count(self, seen: Balance) -> None:
        """Add the visits of a call."""
        assert self.visits is not None
        self.visits += seen.counts_e

    def place(self, device: torch.device) -> None:
        """Give the buffers storage on `device`: zeros."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, torch.zeros_like(buffer, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to(bfloat16)` would round the correction, whose steps of 1e-3 are below bf16's at 0.5."""
        before = self.correction
        super()._apply(fn, recurse)
        after = self.correction
        if before is not None and after is not None and after.dtype.itemsize < before.dtype.itemsize:
            setattr(self, CORRECTION, torch.empty_like(before, device=after.device) if before.is_meta else before.to(after.device))
        return self


class Experts(nn.Module):
    """The weights of all experts of a layer, gate above up, or of this rank's share of them.

    A module of its own, since experts are sharded over other ranks than the rest of a layer: all that reads their weights happens within its forward.
    """

    def __init__(self, arch: Architecture, ops: Ops) -> None:
        super().__init__()
        self.ops, self.biased = ops, arch.expert_bias
        self.gate_up_proj = nn.Parameter(torch.empty(arch.experts, 2 * arch.expert_width, arch.hidden))
        self.down_proj = nn.Parameter(torch.empty(arch.experts, arch.hidden, arch.expert_width))
        if arch.expert_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(arch.experts, 2 * arch.expert_width))
            self.down_proj_bias = nn.Parameter(torch.empty(arch.experts, arch.hidden))
        self.options: dict[str, Any] = {} if arch.activation == "swiglu" else {"activation": arch.activation}

    def forward(self, x_btd: Tensor, weights_btk: Tensor, chosen_btk: Tensor) -> Tensor:
        options = dict(self.options)
        if self.biased:
            options |= {"gate_up_bias_ef": self.gate_up_proj_bias, "down_bias_ed": self.down_proj_bias}
        return self.ops.moe(x_btd, weights_btk, chosen_btk, self.gate_up_proj, self.down_proj, **options)


class MoE(nn.Module):
    """Router and experts of one layer; tokens are routed one by one, wherever they stand. `shared` is the block that every token visits, if there is one."""

    def __init__(self, arch: Architecture, ops: Ops, shared: nn.Module | None = None, *, watched: bool = False) -> None:
        super().__init__()
        self.ops, self.numbers, self.watched = ops, router_of(arch, watched=watched), watched
        self.gate = Gate(arch, watched=watched)
        self.experts = Experts(arch, ops)
        self.shared_experts = shared

    def forward(self, x_btd: Tensor, again: Remade | None = None) -> Any:
        """y_btd; if `watched`, `(y_btd, Balance)`. `again` is for what can drop more than its input's norm; routed experts keep what they make."""
        routed: Routed = self.ops.router(x_btd, self.gate.weight, self.numbers, self.gate.correction, self.gate.bias)
        y_btd = self.experts(x_btd, routed.weights_nk, routed.chosen_nk)
        if self.shared_experts is not None:
            y_btd = y_btd + self.shared_experts(x_btd, again)
        if not self.watched:
            return y_btd
        assert routed.shares_be is not None
        assert routed.squares_b is not None
        return y_btd, Balance(routed.counts_be.sum(0), routed.shares_be.sum(0), routed.squares_b.sum(0))


def balance(ops: Ops, arch: Architecture, seen: Sequence[Balance], aux: float, z: float) -> Tensor:
    """`aux` times the loss of balance over all layers, of whose tokens one rank or several saw a part, and `z` times the mean squared log-sum-exp."""
    counts_le, shares_le, squares = (torch.stack([getattr(one, name) for one in seen]) for name in Balance._fields)
    counts_le, shares_le, squares = ops.together(counts_le.to(shares_le.dtype)), ops.together(shares_le), ops.together(squares)
    rows = counts_le[0].sum() / (arch.experts_per_token or 1)  # tokens of a layer, as the ranks together have them
    return aux * balance_loss(counts_le / rows, shares_le / rows, 1) + z * squares.sum() / (rows * len(seen))

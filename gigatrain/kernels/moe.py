"""A mixture of experts: every token visits the k feed-forward blocks of E that its router scores highest (arXiv:1701.06538, arXiv:2101.03961).

    p_ne = softmax(x_nd . w_ed)                     weights_nk, chosen_nk = the k largest of p_ne, where wanted divided by their sum
    slot s = n k + j is token n's visit to its j-th expert; order_m: the slots, sorted by expert, equal ones by slot; counts_e: slots of each expert
    x_md = x_nd[order_m // k]                       y_md = (silu(x gate_e^T) * (x up_e^T)) down_e^T, with each row's own expert e
    y_nd = sum_j weights_nj y_(slot n k + j)        in fp32, rounded once

Legend: n tokens, in one dim or several, d hidden channels, e experts, k visits of a token, m = n k rows, i channels of an expert; gate_up_efd has
f = 2 i rows per expert, gate above up, down_edi. Nothing is dropped, whatever the counts.

The steps are functions of their own, since experts may be on other ranks than their tokens (parallel/expert.py): `route`, `sort`, `gather`, `experts`,
`combine`. `order_m` may be the beginning of a longer order, and `experts` may be given more rows than the counts say: what it makes of those is undefined.
Counts and order stay on the device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import fp8_experts, launch

# (tokens, experts, visits, hidden, width, kind, dtype)
CASES = [
    (tokens, experts, visits, hidden, width, kind, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, experts, visits, hidden, width, kind in (
        *((5, 4, 2, 16, 24, "spread"), (33, 8, 3, 24, 16, "spread"), (33, 5, 1, 16, 8, "one"), (40, 16, 2, 8, 8, "few")),
        *((1, 4, 4, 8, 16, "spread"), (0, 4, 2, 16, 8, "spread")),
    )
]
SIZES = [
    (8192, experts, visits, hidden, width, "spread", torch.bfloat16)
    for experts, visits, hidden, width in ((128, 8, 2048, 768), (8, 2, 4096, 14336))
]

Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def route(x_nd: Tensor, weight_ed: Tensor, visits: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """`(weights_nk, chosen_nk)`: the router's choice, in fp32 (or fp64) and int64."""
    logits_ne = F.linear(x_nd, weight_ed)
    scores_ne = logits_ne.softmax(-1, dtype=torch.promote_types(logits_ne.dtype, torch.float32))
    weights_nk, chosen_nk = scores_ne.topk(visits, -1)
    return weights_nk / weights_nk.sum(-1, keepdim=True) if renormalise else weights_nk, chosen_nk


def sort(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`(order_m, counts_e)` of a stable sort by key; keys from `count` on come last and are not counted."""
    ordered, order_m = keys.flatten().sort(stable=True)
    ends_e = torch.searchsorted(ordered, torch.arange(count, dtype=ordered.dtype, device=ordered.device), right=True)
    return order_m, ends_e.diff(prepend=ends_e.new_zeros(1))


class _Gather(torch.autograd.Function):
    """Not `index_select`, whose backward adds a token's k gradients with atomics, in any order, each time rounded to the tensor's dtype."""

    @staticmethod
    def forward(x_nd: Tensor, order_m: Tensor, visits: int) -> Tensor:
        return x_nd.flatten(0, -2).index_select(0, order_m // visits)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x_nd, order_m, ctx.visits = inputs
        ctx.shape = x_nd.shape
        ctx.save_for_backward(order_m)

    @staticmethod
    def backward(ctx: Any, dx_md: Tensor) -> Any:
        return spread(dx_md, ctx.saved_tensors[0], *ctx.shape[:-1], ctx.visits).sum(-2), None, None


def gather(x_nd: Tensor, order_m: Tensor, visits: int) -> Tensor:
    """x_md, the row of each slot's token."""
    return _Gather.apply(x_nd, order_m, visits)  # type: ignore[return-value]


class _Spread(torch.autograd.Function):
    """Not `index_copy` alone, which keeps the rows for its backward to know their shape."""

    @staticmethod
    def forward(y_md: Tensor, order_m: Tensor, slots: int) -> Tensor:
        return y_md.new_zeros(slots, y_md.shape[1]).index_copy_(0, order_m, y_md)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dy_sd: Tensor) -> Any:
        return dy_sd.index_select(0, ctx.saved_tensors[0]), None, None


def spread(y_md: Tensor, order_m: Tensor, *slots: int) -> Tensor:
    """y_nkd: the rows at their slots (n tokens, k visits), 0 in slots that `order_m` leaves out."""
    return _Spread.apply(y_md, order_m, math.prod(slots)).view(*slots, y_md.shape[1])  # type: ignore[attr-defined]


def combine(y_md: Tensor, order_m: Tensor, weights_nk: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y_nd, each token's weighted sum over the slots in `order_m`, summed in the weights' dtype; rounded to `dtype`, default the rows' own."""
    y_nkd = spread(y_md, order_m, *weights_nk.shape)
    return (weights_nk.unsqueeze(-1) * y_nkd).sum(-2).to(dtype or y_md.dtype)


def _one(x_md: Tensor, gate_up_fd: Tensor, down_di: Tensor) -> Tensor:
    gate, up = F.linear(x_md, gate_up_fd).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down_di)


def _countable(counts_e: Tensor) -> bool:
    """Whether reading counts waits for no one: on a CPU, and neither traced nor without values."""
    return type(counts_e) is Tensor and counts_e.device.type == "cpu" and not torch.compiler.is_compiling()


def experts_reference(x_md: Tensor, counts_e: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> Tensor:
    """Each expert on its rows in plain torch; where counts cannot be read without waiting, each expert on all rows, E / k times the work."""
    pairs = list(zip(gate_up_efd, down_edi, strict=True))
    if _countable(counts_e):
        counts: list[int] = counts_e.tolist()
        *parts_md, rest_md = x_md.split([*counts, x_md.shape[0] - sum(counts)])
        return torch.cat([*(_one(part, *pair) for part, pair in zip(parts_md, pairs, strict=True)), torch.zeros_like(rest_md)])
    row_m1 = torch.arange(x_md.shape[0], device=x_md.device)[:, None]
    y_md, ends_e = torch.zeros_like(x_md), counts_e.cumsum(0)
    for e, pair in enumerate(pairs):
        y_md = torch.where((row_m1 >= ends_e[e] - counts_e[e]) & (row_m1 < ends_e[e]), _one(x_md, *pair), y_md)
    return y_md


def supports(x_md: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> str | None:
    """Why torch's grouped product cannot take these tensors; None: it can."""
    if x_md.dtype not in launch.FLOATS:
        return f"torch's grouped product takes bf16, fp16 and fp32, not {x_md.dtype}"
    hidden, width = down_edi.shape[1:]
    if (hidden * x_md.itemsize) % 16 or (width * x_md.itemsize) % 16:
        return f"rows of {hidden} and {width} elements of {x_md.dtype} are not multiples of 16 bytes"
    return None


def experts_grouped(x_md: Tensor, counts_e: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> Tensor:
    """As the reference by torch's grouped products, which read the counts on the device. Raises KernelError where `supports` says no.

    On a CPU torch's grouped product is itself a loop over the experts, and what it does not take (fp64, odd sizes) is the reference's loop.
    """
    if why := supports(x_md, gate_up_efd, down_edi):
        if x_md.device.type == "cpu":
            return experts_reference(x_md, counts_e, gate_up_efd, down_edi)
        raise KernelError(f'moe: {why}; set kernels.moe = "reference" and kernels.experts = "reference"')
    ends_e = counts_e.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x_md.contiguous(), gate_up_efd.contiguous().transpose(1, 2), offs=ends_e).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * up, down_edi.contiguous().transpose(1, 2), offs=ends_e)


def _block(experts: Experts, x_nd: Tensor, weights_nk: Tensor, chosen_nk: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> Tensor:
    order_m, counts_e = sort(chosen_nk, gate_up_efd.shape[0])
    return combine(experts(gather(x_nd, order_m, chosen_nk.shape[-1]), counts_e, gate_up_efd, down_edi), order_m, weights_nk)


def reference(x_nd: Tensor, weights_nk: Tensor, chosen_nk: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> Tensor:
    """y_nd of tokens whose experts are chosen, in plain torch."""
    return _block(experts_reference, x_nd, weights_nk, chosen_nk, gate_up_efd, down_edi)


def grouped(x_nd: Tensor, weights_nk: Tensor, chosen_nk: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> Tensor:
    """As `reference`, by torch's grouped products; without a host read on a GPU."""
    return _block(experts_grouped, x_nd, weights_nk, chosen_nk, gate_up_efd, down_edi)


def _drawn(case: Any, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, experts, visits, hidden, width, kind, dtype = case
    x = torch.randn(tokens, hidden, dtype=dtype, device=device)
    gate_up, down = (torch.randn(experts, *shape, dtype=dtype, device=device) * 0.3 for shape in ((2 * width, hidden), (hidden, width)))
    scores = torch.randn(tokens, experts, device=device)
    if kind == "one":
        scores[:, experts // 2] += 100.0
    elif kind == "few":  # a third of them at most
        scores[:, experts // 3 :] -= 100.0
    weights, chosen = scores.softmax(-1).topk(visits, -1)
    return x, weights, chosen, gate_up, down


def _sample(case: Any, device: str) -> launch.Sample:
    x, weights, chosen, gate_up, down = _drawn(case, device)
    return [x, weights, gate_up, down], lambda f, x, weights, gate_up, down: f(x, weights, chosen, gate_up, down)


def _sample_experts(case: Any, device: str) -> launch.Sample:
    x, _, chosen, gate_up, down = _drawn(case, device)
    order, counts = sort(chosen, gate_up.shape[0])
    return [gather(x, order, chosen.shape[1]), gate_up, down], lambda f, x, gate_up, down: f(x, counts, gate_up, down)


def _traffic(case: Any) -> launch.Traffic:
    tokens, experts, visits, hidden, width, kind, dtype = case
    visited = {"one": min(experts, visits), "few": max(visits, experts // 3)}.get(kind, experts)
    rows, weights = tokens * hidden * dtype.itemsize, 3 * visited * hidden * width * dtype.itemsize
    flops = 6.0 * tokens * visits * hidden * width
    return launch.Traffic(2 * rows + weights, 3 * rows + 2 * weights, flops, 2 * flops)


NARROW = {"moe": {"fp8_rowwise": functools.partial(_block, fp8_experts.experts)}, "experts": {"fp8_rowwise": fp8_experts.experts}}
OPERATIONS = {
    "moe": launch.Operation({"reference": reference, "grouped": grouped}, CASES, SIZES, _sample, _traffic, narrow=NARROW["moe"]),
    "experts": launch.Operation(
        {"reference": experts_reference, "grouped": experts_grouped}, CASES, SIZES, _sample_experts, _traffic, narrow=NARROW["experts"]
    ),
}

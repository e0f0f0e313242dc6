"""A mixture of experts behind its router (router.py): every token visits k feed-forward blocks of E (arXiv:1701.06538, arXiv:2101.03961).

    slot s = n k + j is token n's visit to its j-th expert; order_m: the slots, sorted by expert, equal ones by slot; counts_e: slots of each expert
    x_md = x_nd[order_m // k]                       g_mi, u_mi = x gate_e^T, x up_e^T, with each row's own expert e, and its biases where given
    h_mi = silu(g) * u                              "swiglu"
    h_mi = (u + 1) * g * sigmoid(1.702 g)           "clamped_swiglu" (gpt-oss), with g at most 7 and u within -7 and 7
    y_md = h_mi down_e^T (+ bias_e)                 y_nd = sum_j weights_nj y_(slot n k + j), in fp32, rounded once

Legend: n tokens, in one dim or several, d hidden channels, e experts, k visits of a token, m = n k rows, i channels of an expert; gate_up_efd has
f = 2 i rows per expert, gate above up, down_edi. Nothing is dropped, whatever the counts.

The steps are functions of their own, since experts may be on other ranks than their tokens (parallel/expert.py): `sort`, `gather`, `experts`,
`combine`. `order_m` may be the beginning of a longer order, and `experts` may be given more rows than the counts say: what it makes of those is undefined.
Counts and order stay on the device.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import launch

# (tokens, experts, visits, hidden, width, how tokens are spread over experts, activation, whether there are biases, dtype)
CASES = [
    (tokens, experts, visits, hidden, width, kind, activation, biased, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, experts, visits, hidden, width, kind, activation, biased in (
        (5, 4, 2, 16, 24, "spread", "swiglu", False),
        (33, 8, 3, 24, 16, "spread", "clamped_swiglu", True),
        (33, 5, 1, 16, 8, "one", "swiglu", True),
        (40, 16, 2, 8, 8, "few", "swiglu", False),
        (1, 4, 4, 8, 16, "spread", "clamped_swiglu", False),
        (0, 4, 2, 16, 8, "spread", "swiglu", True),
    )
]
# Qwen3-30B-A3B, Mixtral-8x7B, gpt-oss-120b
SIZES = [
    (8192, experts, visits, hidden, width, "spread", activation, biased, torch.bfloat16)
    for experts, visits, hidden, width, activation, biased in (
        (128, 8, 2048, 768, "swiglu", False),
        (8, 2, 4096, 14336, "swiglu", False),
        (128, 4, 2880, 2880, "clamped_swiglu", True),
    )
]

Experts = Callable[..., Tensor]
Activation = Literal["swiglu", "clamped_swiglu"]
_LIMIT, _STEEP = 7.0, 1.702  # of gpt-oss's activation


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


def activated(gate_mi: Tensor, up_mi: Tensor, activation: Activation) -> Tensor:
    """h_mi of a gate and its values, in plain torch."""
    if activation == "swiglu":
        return F.silu(gate_mi) * up_mi
    gate_mi, up_mi = gate_mi.clamp(max=_LIMIT), up_mi.clamp(-_LIMIT, _LIMIT)
    return (up_mi + 1) * (gate_mi * torch.sigmoid(_STEEP * gate_mi))


def _one(
    x_md: Tensor, activation: Activation, gate_up_fd: Tensor, down_di: Tensor, gate_up_bias_f: Tensor | None, down_bias_d: Tensor | None
) -> Tensor:
    gate, up = F.linear(x_md, gate_up_fd, gate_up_bias_f).chunk(2, -1)
    return F.linear(activated(gate, up, activation), down_di, down_bias_d)


def _countable(counts_e: Tensor) -> bool:
    """Whether reading counts waits for no one: on a CPU, and neither traced nor without values."""
    return type(counts_e) is Tensor and counts_e.device.type == "cpu" and not torch.compiler.is_compiling()


def experts_reference(
    x_md: Tensor,
    counts_e: Tensor,
    gate_up_efd: Tensor,
    down_edi: Tensor,
    *,
    gate_up_bias_ef: Tensor | None = None,
    down_bias_ed: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """Each expert on its rows in plain torch; where counts cannot be read without waiting, each expert on all rows, E / k times the work."""
    none = [None] * gate_up_efd.shape[0]
    biases = (none if b is None else b for b in (gate_up_bias_ef, down_bias_ed))
    weights = list(zip(gate_up_efd, down_edi, *biases, strict=True))
    if _countable(counts_e):
        counts: list[int] = counts_e.tolist()
        *parts_md, rest_md = x_md.split([*counts, x_md.shape[0] - sum(counts)])
        parts = (_one(part, activation, *each) for part, each in zip(parts_md, weights, strict=True))
        return torch.cat([*parts, torch.zeros_like(rest_md)])
    row_m1 = torch.arange(x_md.shape[0], device=x_md.device)[:, None]
    y_md, ends_e = torch.zeros_like(x_md), counts_e.cumsum(0)
    for e, each in enumerate(weights):
        y_md = torch.where((row_m1 >= ends_e[e] - counts_e[e]) & (row_m1 < ends_e[e]), _one(x_md, activation, *each), y_md)
    return y_md


def supports(x_md: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> str | None:
    """Why torch's grouped product cannot take these tensors; None: it can."""
    if x_md.dtype not in launch.FLOATS:
        return f"torch's grouped product takes bf16, fp16 and fp32, not {x_md.dtype}"
    hidden, width = down_edi.shape[1:]
    if (hidden * x_md.itemsize) % 16 or (width * x_md.itemsize) % 16:
        return f"rows of {hidden} and {width} elements of {x_md.dtype} are not multiples of 16 bytes"
    return None


class _Biased(torch.autograd.Function):
    """Rows plus their expert's bias. Its gradient is a grouped product with ones: summed in fp32 and in a fixed order, as `index_select`'s is not."""

    @staticmethod
    def forward(y_mf: Tensor, bias_ef: Tensor, ends_e: Tensor) -> Tensor:
        row_m = torch.arange(y_mf.shape[0], dtype=ends_e.dtype, device=y_mf.device)
        expert_m = torch.searchsorted(ends_e, row_m, right=True).clamp_(max=bias_ef.shape[0] - 1)
        return y_mf + bias_ef.index_select(0, expert_m)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, dy_mf: Tensor) -> Any:
        ones_m8 = dy_mf.new_ones(dy_mf.shape[0], 16 // dy_mf.itemsize)  # rows of 16 bytes, the narrowest that it takes
        return dy_mf, F.grouped_mm(dy_mf.contiguous().t(), ones_m8, offs=ctx.saved_tensors[0])[..., 0], None


def _product(x_md: Tensor, weight_efd: Tensor, bias_ef: Tensor | None, ends_e: Tensor) -> Tensor:
    y_mf = F.grouped_mm(x_md.contiguous(), weight_efd.contiguous().transpose(1, 2), offs=ends_e)
    return y_mf if bias_ef is None else _Biased.apply(y_mf, bias_ef, ends_e)  # type: ignore[return-value]


def experts_grouped(
    x_md: Tensor,
    counts_e: Tensor,
    gate_up_efd: Tensor,
    down_edi: Tensor,
    *,
    gate_up_bias_ef: Tensor | None = None,
    down_bias_ed: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """As the reference by torch's grouped products, which read the counts on the device. Raises KernelError where `supports` says no.

    On a CPU torch's grouped product is itself a loop over the experts, and what it does not take (fp64, odd sizes) is the reference's loop.
    """
    if why := supports(x_md, gate_up_efd, down_edi):
        if x_md.device.type == "cpu":
            biases = {"gate_up_bias_ef": gate_up_bias_ef, "down_bias_ed": down_bias_ed}
            return experts_reference(x_md, counts_e, gate_up_efd, down_edi, **biases, activation=activation)
        raise KernelError(f'moe: {why}; set kernels.moe = "reference" and kernels.experts = "reference"')
    ends_e = counts_e.cumsum(0).to(torch.int32)
    gate, up = _product(x_md, gate_up_efd, gate_up_bias_ef, ends_e).chunk(2, -1)
    return _product(activated(gate, up, activation), down_edi, down_bias_ed, ends_e)


def _block(
    experts: Experts, x_nd: Tensor, weights_nk: Tensor, chosen_nk: Tensor, gate_up_efd: Tensor, down_edi: Tensor, **rest: Any
) -> Tensor:
    order_m, counts_e = sort(chosen_nk, gate_up_efd.shape[0])
    return combine(experts(gather(x_nd, order_m, chosen_nk.shape[-1]), counts_e, gate_up_efd, down_edi, **rest), order_m, weights_nk)


def reference(
    x_nd: Tensor,
    weights_nk: Tensor,
    chosen_nk: Tensor,
    gate_up_efd: Tensor,
    down_edi: Tensor,
    *,
    gate_up_bias_ef: Tensor | None = None,
    down_bias_ed: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """y_nd of tokens whose experts are chosen, in plain torch."""
    rest = {"gate_up_bias_ef": gate_up_bias_ef, "down_bias_ed": down_bias_ed, "activation": activation}
    return _block(experts_reference, x_nd, weights_nk, chosen_nk, gate_up_efd, down_edi, **rest)


def grouped(
    x_nd: Tensor,
    weights_nk: Tensor,
    chosen_nk: Tensor,
    gate_up_efd: Tensor,
    down_edi: Tensor,
    *,
    gate_up_bias_ef: Tensor | None = None,
    down_bias_ed: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """As `reference`, by torch's grouped products; without a host read on a GPU."""
    rest = {"gate_up_bias_ef": gate_up_bias_ef, "down_bias_ed": down_bias_ed, "activation": activation}
    return _block(experts_grouped, x_nd, weights_nk, chosen_nk, gate_up_efd, down_edi, **rest)


def _drawn(case: Any, device: str) -> tuple[list[Tensor], Tensor, Callable[..., dict[str, Any]]]:
    """x, weights, gate_up, down and biases if there are; the choice; and the keywords of a call with given biases."""
    tokens, experts, visits, hidden, width, kind, activation, biased, dtype = case
    x = torch.randn(tokens, hidden, dtype=dtype, device=device)
    # The clamped activation clamps 1 in 7 of these.
    size = 0.3 if activation == "swiglu" else 4.0 / hidden**0.5
    gate_up, down = (torch.randn(experts, *shape, dtype=dtype, device=device) * size for shape in ((2 * width, hidden), (hidden, width)))
    scores = torch.randn(tokens, experts, device=device)
    if kind == "one":
        scores[:, experts // 2] += 100.0
    elif kind == "few":  # a third of them at most
        scores[:, experts // 3 :] -= 100.0
    weights, chosen = scores.softmax(-1).topk(visits, -1)
    biases = [torch.randn(experts, count, dtype=dtype, device=device) for count in (2 * width, hidden)] if biased else []

    def keywords(*biases: Tensor) -> dict[str, Any]:
        return dict(zip(("gate_up_bias_ef", "down_bias_ed"), biases, strict=False)) | {"activation": activation}

    return [x, weights, gate_up, down, *biases], chosen, keywords


def _sample(case: Any, device: str) -> launch.Sample:
    tensors, chosen, keywords = _drawn(case, device)

    def call(f: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        return f(x, weights, chosen, gate_up, down, **keywords(*biases))

    return tensors, call


def _sample_experts(case: Any, device: str) -> launch.Sample:
    (x, _, gate_up, down, *biases), chosen, keywords = _drawn(case, device)
    order, counts = sort(chosen, gate_up.shape[0])

    def call(f: Any, x: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        return f(x, counts, gate_up, down, **keywords(*biases))

    return [gather(x, order, chosen.shape[1]), gate_up, down, *biases], call


def _traffic(case: Any) -> launch.Traffic:
    tokens, experts, visits, hidden, width, kind, _, _, dtype = case
    visited = {"one": min(experts, visits), "few": max(visits, experts // 3)}.get(kind, experts)
    rows, weights = tokens * hidden * dtype.itemsize, 3 * visited * hidden * width * dtype.itemsize
    flops = 6.0 * tokens * visits * hidden * width
    return launch.Traffic(2 * rows + weights, 3 * rows + 2 * weights, flops, 2 * flops)


OPERATIONS = {
    "moe": launch.Operation({"reference": reference, "grouped": grouped}, CASES, SIZES, _sample, _traffic),
    "experts": launch.Operation({"reference": experts_reference, "grouped": experts_grouped}, CASES, SIZES, _sample_experts, _traffic),
}

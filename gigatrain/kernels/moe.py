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

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import expert_sort, fp8_experts, launch
from gigatrain.kernels import grouped as rows

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
sort = expert_sort.reference
Activation = Literal["swiglu", "clamped_swiglu"]
_LIMIT, _STEEP = 7.0, 1.702  # of gpt-oss's activation


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


def reads_counts(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why torch's grouped product on this NVIDIA GPU would read the counts on the host and loop over the experts; None: it does not (torch 2.9 to 2.13)."""
    if dtype == torch.bfloat16 and capability[0] in (9, 10):
        return None
    return (
        f"torch's grouped product reads the counts on the host but in bf16 on compute capability 9 or 10, not in {dtype} on "
        f"{'.'.join(map(str, capability))}"
    )


def supports(x_md: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> str | None:
    """Why torch's grouped product cannot take these tensors, or not without waiting; None: it can."""
    if x_md.dtype not in launch.FLOATS:
        return f"torch's grouped product takes bf16, fp16 and fp32, not {x_md.dtype}"
    hidden, width = down_edi.shape[1:]
    if (hidden * x_md.itemsize) % 16 or (width * x_md.itemsize) % 16:
        return f"rows of {hidden} and {width} elements of {x_md.dtype} are not multiples of 16 bytes"
    if x_md.is_cuda and torch.version.hip is None:
        return reads_counts(x_md.dtype, torch.cuda.get_device_capability(x_md.device))
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
        raise KernelError(f'moe: {why}; set kernels.moe = "fused" and kernels.experts = "fused", or "reference"')
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


# Fused: the gather within the first product's loads, the activation within its end, and the backward of the activation within the end of the product
# before it. Glued: torch's grouped products, with one Triton launch for everything between two of them. Both keep x, the choice, and g and u (2 f bytes a
# row in bf16); h is made again where dh is, y never: dweights_s = <dy_n, y_s> = <dy_n down, h_s> (arXiv:2512.14080). Kernels and floor: grouped.py.
SPACE = rows.SPACE


def _mm(a: Tensor, b: Tensor, ends_e: Tensor) -> Tensor:
    """torch's grouped product of a_mp and b_epq, or of a_pm and b_mq over each expert's m."""
    shape = (a.shape[0], b.shape[2]) if b.ndim == 3 else (ends_e.shape[0], a.shape[0], b.shape[1])
    if launch.recording() or 0 in a.shape:
        return a.new_zeros(shape)
    return F.grouped_mm(a, b, offs=ends_e)


def _rows(
    x: Tensor,
    order: Tensor | None,
    visits: int,
    ends: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    clamped: bool,
    glued: bool,
) -> tuple[Tensor, Tensor]:
    """`(gu_mf, y_md)` of rows in their experts' order, or of the tokens of such rows."""
    gate_up, down, gate_up_bias, down_bias = weights
    count, hidden = (x if order is None else order).shape[0], x.shape[1]
    at = rows.tiles(ends, count, hidden)
    if not glued:
        gu, h = rows.gate_up(x, order, visits, at, gate_up, gate_up_bias, count, clamped)
        return gu, rows.product(h, at, down, True, down_bias, hidden)
    gu = _mm(x if order is None else rows.rows_of(x, order, visits), gate_up.mT, ends)
    y = _mm(rows.activate(gu, at, gate_up_bias, hidden, clamped), down.mT, ends)
    if down_bias is not None:
        rows.add_bias(y, at, down_bias, hidden)
    return gu, y


def _rows_backward(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    visits: int,
    ends: Tensor,
    matrices: tuple[Tensor, Tensor],
    biased: tuple[bool, bool],
    gu: Tensor,
    weights: Tensor | None,
    clamped: bool,
    glued: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(dx_md, dgate_up, ddown, dgate_up_bias, ddown_bias, parts_pm)`; what has no bias gets an empty gradient."""
    (gate_up, down), hidden = matrices, x.shape[1]
    at = rows.tiles(ends, gu.shape[0], hidden)
    if glued:
        dy_md = dy if order is None else rows.rows_of(dy, order, visits)
        dgu, h, parts = rows.activate_backward(_mm(dy_md, down, ends), gu, order, at, weights, hidden, clamped)
        ddown = rows.zero_unvisited(_mm(dy_md.t(), h, ends), ends)
        del dy_md, h
        x_md = x if order is None else rows.rows_of(x, order, visits)
        dgate_up = rows.zero_unvisited(_mm(dgu.t(), x_md, ends), ends)
        dx = _mm(dgu, gate_up, ends)
    else:
        dgu, h, parts = rows.gated_backward(dy, order, visits, at, down, gu, weights, clamped)
        ddown = rows.weight_gradient(dy, h, order, visits, ends, "a", hidden)
        del h
        dgate_up = rows.weight_gradient(dgu, x, order, visits, ends, "b", hidden)
        dx = rows.product(dgu, at, gate_up, False, None, hidden)
    dgate_up_bias = rows.bias_gradient(dgu, None, None, 1, ends) if biased[0] else x.new_empty(0)
    ddown_bias = rows.bias_gradient(dy, weights, order, visits, ends) if biased[1] else x.new_empty(0)
    return dx, dgate_up, ddown, dgate_up_bias, ddown_bias, parts


def _whole(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _run(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    clamped: bool,
    glued: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    visits = chosen.shape[-1]
    order, place, _, ends = expert_sort.run(chosen, gate_up.shape[0])
    x_nd = x.reshape(-1, x.shape[-1]).contiguous()
    gu, y_md = _rows(x_nd, order, visits, ends, _whole(gate_up, down, gate_up_bias, down_bias), clamped, glued)
    y = rows.combine(y_md, place, weights.contiguous(), visits)
    return y.view(x.shape), gu, order, place, ends


def _run_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gu: Tensor,
    order: Tensor,
    place: Tensor,
    ends: Tensor,
    clamped: bool,
    glued: bool,
) -> tuple[Tensor, ...]:
    visits = chosen.shape[-1]
    x_nd, dy_nd = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, dy))
    biased = gate_up_bias is not None, down_bias is not None
    dx_md, *gradients, parts = _rows_backward(
        dy_nd, x_nd, order, visits, ends, _whole(gate_up, down), biased, gu, weights.contiguous(), clamped, glued
    )
    dx = rows.combine(dx_md, place, None, visits).view(x.shape)
    dweights = rows.visit_gradient(parts, place, chosen.contiguous(), dy_nd, None if down_bias is None else down_bias.contiguous(), visits)
    return dx, dweights.view(weights.shape).to(weights.dtype), *gradients


_WEIGHTS = "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias"


def _fake_gradients(x: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    return (
        gate_up.new_empty(gate_up.shape),
        down.new_empty(down.shape),
        *(x.new_empty(0) if b is None else b.new_empty(b.shape) for b in biases),
    )


_moe = launch.operator(
    f"moe(Tensor x, Tensor weights, Tensor chosen, {_WEIGHTS}, bool clamped, bool glued) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    lambda x, weights, chosen, gate_up, *_: (
        x.new_empty(x.shape),
        x.new_empty(chosen.numel(), gate_up.shape[1]),
        chosen.new_empty(chosen.numel()),
        chosen.new_empty(chosen.numel()),
        chosen.new_empty(gate_up.shape[0], dtype=torch.int32),
    ),
)
_moe_backward = launch.operator(
    f"moe_backward(Tensor dy, Tensor x, Tensor weights, Tensor chosen, {_WEIGHTS}, Tensor gu, Tensor order, Tensor place, Tensor ends, bool clamped, "
    "bool glued) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    lambda dy, x, weights, chosen, gate_up, down, gate_up_bias, down_bias, *_: (
        x.new_empty(x.shape), weights.new_empty(weights.shape), *_fake_gradients(x, gate_up, down, gate_up_bias, down_bias)
    ),
)  # fmt: skip


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.clamped, ctx.glued = inputs
    _, gu, order, place, ends = output
    ctx.save_for_backward(*tensors, gu, order, place, ends)
    ctx.mark_non_differentiable(gu, order, place, ends)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None, *_: None) -> Any:
    if dy is None:
        return (None,) * 9
    tensors = ctx.saved_tensors
    dx, dweights, *rest = _moe_backward(dy, *tensors, ctx.clamped, ctx.glued)
    biases = (None if given is None else found for given, found in zip(tensors[5:7], rest[2:], strict=True))
    return dx, dweights, None, *rest[:2], *biases, None, None


_call = launch.differentiable(_moe, _save, _grads)


def _run_experts(
    x: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    clamped: bool,
    glued: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ends = counts.cumsum(0).to(torch.int32)
    gu, y = _rows(x.contiguous(), None, 1, ends, _whole(gate_up, down, gate_up_bias, down_bias), clamped, glued)
    return y, gu, ends


def _run_experts_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gu: Tensor,
    ends: Tensor,
    clamped: bool,
    glued: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    biased = gate_up_bias is not None, down_bias is not None
    return _rows_backward(dy.contiguous(), x.contiguous(), None, 1, ends, _whole(gate_up, down), biased, gu, None, clamped, glued)[:5]


_experts = launch.operator(
    f"experts(Tensor x, Tensor counts, {_WEIGHTS}, bool clamped, bool glued) -> (Tensor, Tensor, Tensor)",
    _run_experts,
    lambda x, counts, gate_up, *_: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], gate_up.shape[1]),
        counts.new_empty(counts.shape, dtype=torch.int32),
    ),
)
_experts_backward = launch.operator(
    f"experts_backward(Tensor dy, Tensor x, {_WEIGHTS}, Tensor gu, Tensor ends, bool clamped, bool glued) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_experts_backward,
    lambda dy, x, gate_up, down, gate_up_bias, down_bias, *_: (
        x.new_empty(x.shape), *_fake_gradients(x, gate_up, down, gate_up_bias, down_bias)
    ),
)  # fmt: skip


def _save_experts(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, *weights, ctx.clamped, ctx.glued = inputs
    _, gu, ends = output
    ctx.save_for_backward(x, *weights, gu, ends)
    ctx.mark_non_differentiable(gu, ends)
    ctx.set_materialize_grads(False)


def _experts_grads(ctx: Any, dy: Tensor | None, *_: None) -> Any:
    if dy is None:
        return (None,) * 8
    tensors = ctx.saved_tensors
    dx, dgate_up, ddown, *rest = _experts_backward(dy, *tensors, ctx.clamped, ctx.glued)
    biases = (None if given is None else found for given, found in zip(tensors[3:5], rest, strict=True))
    return dx, None, dgate_up, ddown, *biases, None, None


_call_experts = launch.differentiable(_experts, _save_experts, _experts_grads)


def supports_fused(x: Tensor, gate_up_efd: Tensor, down_edi: Tensor, *biases: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors; None: they can."""
    if why := launch.missing(x):
        return why
    given = [gate_up_efd, down_edi, *(b for b in biases if b is not None)]
    if x.dtype not in launch.FLOATS or any(t.dtype != x.dtype or t.device != x.device for t in given):
        found = ", ".join(str(t.dtype) for t in (x, *given))
        return f"rows, matrices and biases must share a device and one of bf16, fp16, fp32, not {found}"
    experts, hidden, width = down_edi.shape
    if x.shape[-1] != hidden or gate_up_efd.shape != (experts, 2 * width, hidden):
        return f"rows of {x.shape[-1]} and matrices {tuple(gate_up_efd.shape)} do not fit {tuple(down_edi.shape)}"
    if experts > expert_sort.LIMIT:
        return f"at most {expert_sort.LIMIT} experts, not {experts}"
    return None


def _refused(why: str | None, op: str, instead: str) -> None:
    if why:
        raise KernelError(f'{op}: {why}; set kernels.{op} = "{instead}"')


def fused(
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
    """As `reference`, in Triton: 7 launches each way, 2 more for the gradients of biases. Raises KernelError where `supports_fused` says no."""
    biases = gate_up_bias_ef, down_bias_ed
    _refused(supports_fused(x_nd, gate_up_efd, down_edi, *biases), "moe", "reference")
    return _call(x_nd, weights_nk, chosen_nk, gate_up_efd, down_edi, *biases, activation == "clamped_swiglu", False)[0]


def glued(
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
    """As `reference`, by torch's grouped products with Triton between them. Raises KernelError where `supports` or `supports_fused` says no."""
    biases = gate_up_bias_ef, down_bias_ed
    why = supports_fused(x_nd, gate_up_efd, down_edi, *biases) or supports(x_nd, gate_up_efd, down_edi)
    _refused(why, "moe", "fused")
    return _call(x_nd, weights_nk, chosen_nk, gate_up_efd, down_edi, *biases, activation == "clamped_swiglu", True)[0]


def experts_fused(
    x_md: Tensor,
    counts_e: Tensor,
    gate_up_efd: Tensor,
    down_edi: Tensor,
    *,
    gate_up_bias_ef: Tensor | None = None,
    down_bias_ed: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """As the reference, in Triton. Raises KernelError where `supports_fused` says no."""
    biases = gate_up_bias_ef, down_bias_ed
    _refused(supports_fused(x_md, gate_up_efd, down_edi, *biases), "experts", "reference")
    return _call_experts(x_md, counts_e, gate_up_efd, down_edi, *biases, activation == "clamped_swiglu", False)[0]


def experts_glued(
    x_md: Tensor,
    counts_e: Tensor,
    gate_up_efd: Tensor,
    down_edi: Tensor,
    *,
    gate_up_bias_ef: Tensor | None = None,
    down_bias_ed: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """As the reference, by torch's grouped products with Triton between them. Raises KernelError where `supports` or `supports_fused` says no."""
    biases = gate_up_bias_ef, down_bias_ed
    why = supports_fused(x_md, gate_up_efd, down_edi, *biases) or supports(x_md, gate_up_efd, down_edi)
    _refused(why, "experts", "fused")
    return _call_experts(x_md, counts_e, gate_up_efd, down_edi, *biases, activation == "clamped_swiglu", True)[0]


def _drawn(case: Any, device: str) -> tuple[list[Tensor], Tensor, Callable[..., dict[str, Any]]]:
    """x, weights, gate_up, down and biases if there are; the choice; and the keywords of a call with given biases."""
    tokens, experts, visits, hidden, width, kind, activation, biased, dtype = case
    x = torch.randn(tokens, hidden, dtype=dtype, device=device)
    shapes = [(experts, *shape) for shape in ((2 * width, hidden), (hidden, width))]
    if launch.recording():  # values decide nothing, and 3 billion numbers take half a minute to draw
        gate_up, down = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    else:
        gate_up, down = (torch.randn(shape, dtype=dtype, device=device) * 0.3 for shape in shapes)
    scores = torch.randn(tokens, experts, device=device)
    if kind == "one":
        scores[:, experts // 2] += 100.0
    elif kind == "few":  # a third of them at most
        scores[:, experts // 3 :] -= 100.0
    weights, chosen = scores.softmax(-1).topk(visits, -1)
    biases = [torch.randn(experts, count, dtype=dtype, device=device) for count in (2 * width, hidden)] if biased else []

    if activation == "clamped_swiglu" and not launch.recording():
        # g and u are multiples of 1/4, exact in every dtype, so that no rounding moves one over a limit; 1 in 10 is clamped
        x, gate_up = ((t * factor).round() / 2 for t, factor in ((x, 2.0), (gate_up, 27.0 / hidden**0.5)))
        biases = [(b * 4).round() / 4 for b in biases]

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


_VERSIONS = {"reference": reference, "grouped": grouped, "glued": glued, "fused": fused}
_EXPERTS = {"reference": experts_reference, "grouped": experts_grouped, "glued": experts_glued, "fused": experts_fused}
NARROW = {"moe": {"fp8_rowwise": functools.partial(_block, fp8_experts.experts)}, "experts": {"fp8_rowwise": fp8_experts.experts}}
OPERATIONS = {
    "moe": launch.Operation(_VERSIONS, CASES, SIZES, _sample, _traffic, narrow=NARROW["moe"]),
    "experts": launch.Operation(_EXPERTS, CASES, SIZES, _sample_experts, _traffic, narrow=NARROW["experts"]),
}

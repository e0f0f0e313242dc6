"""xIELU, the activation of Apertus, with two trained scalars per layer (arXiv:2411.13010).

    ap = softplus(p)        an = beta + softplus(n)
    x > 0:  ap * x ** 2 + beta * x
    x <= 0: an * f + beta * x        f = expm1(min(x, eps)) - x

Legend: x_ni any shape; p_1, n_1 the raw scalars; beta 0.5 and eps -1e-6 are fixed in all released models. The backward:
    x > 0:  dx = dy * (2 * ap * x + beta)                                dp = sigmoid(p) * sum of dy * x ** 2
    x <= 0: dx = dy * (an * (exp(x) if x <= eps else 0) - an + beta)     dn = sigmoid(n) * sum of dy * f
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import elementwise, launch
from gigatrain.kernels.elementwise import tile
from gigatrain.kernels.launch import tl, triton

BETA, EPS = 0.5, -1e-6
# (rows, shape of a row, dtype)
CASES = [
    (rows, shape, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, shape in ((4, (64,)), (3, (7, 33)), (31, (130,)), (33, (1,)), (1, (7,)), (1, (1,)), (0, (8,)))
]
SIZES = [(8192, (21504,), torch.bfloat16)]


def reference(x_ni: Tensor, p_1: Tensor, n_1: Tensor) -> Tensor:
    """xIELU in plain torch, in the inputs' dtype."""
    ap, an = F.softplus(p_1), BETA + F.softplus(n_1)
    return torch.where(x_ni > 0, ap * x_ni * x_ni, (torch.expm1(x_ni.clamp(max=EPS)) - x_ni) * an) + BETA * x_ni


# Fused. Floor, in bytes per element of bf16: 4 forward (reads 1, writes 1), 6 backward (reads 2, writes 1). Saves x and the two scalars.
SPACE = {
    "xielu.forward": elementwise.SPACE,
    "xielu.backward": [
        {"elements": elements, "warps": warps, "programs": programs}
        for elements, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
        for programs in (1, 2, 4, 8)
        if warps * programs <= 64
    ],
}


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to a few units in the last place also where the result is small: log(1 + e) = log(w) * e / (w - 1) with w = 1 + e rounded."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    return tl.where(x > 0.0, x, 0.0) + tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _expm1(x, EXACT: tl.constexpr):
    """exp(x) - 1 for x <= 0; near 0 by its series, for the difference loses all digits of a small x.

    Its error is 1e-7 of the result if EXACT, else up to 4e-6, a hundredth of a rounding to fp16. That is for 16 bits, where an H200 has time for 27
    instructions per element until it waits for them and not for memory: the forward takes 25, the long series would take 8 more.
    """
    far = tl.exp(x) - 1.0
    if EXACT:
        series = 1.0 / 39916800.0 + x * (1.0 / 479001600.0)
        series = 1.0 / 3628800.0 + x * series
        series = 1.0 / 362880.0 + x * series
        series = 1.0 / 40320.0 + x * series
        series = 1.0 / 5040.0 + x * series
        series = 1.0 / 720.0 + x * series
        series = 1.0 / 120.0 + x * series
        series = 1.0 / 24.0 + x * series
        near = x > -1.0
    else:
        series = 1.0 / 24.0
        near = x > -0.0625
    series = 0.5 + x * (1.0 / 6.0 + x * series)
    return tl.where(near, x + x * x * series, far)


@triton.jit
def _forward(X, Y, x_stride, rows, columns, across, P, N, beta, eps, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column, live = tile(tl.program_id(0), rows, columns, across, HEIGHT, WIDTH)
    ap, an = _softplus(tl.load(P).to(tl.float32)), beta + _softplus(tl.load(N).to(tl.float32))
    x = tl.load(X + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    less = _expm1(tl.minimum(x, eps), X.dtype.element_ty == tl.float32)
    y = tl.where(x > 0.0, (ap * x + beta) * x, an * (less - x) + beta * x)
    tl.store(Y + row * columns + column, y.to(Y.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    DY, X, DX, P, N, PARTS, dy_stride, x_stride, rows, columns, across, tiles, beta, eps,
    SCALARS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    p, n = tl.load(P).to(tl.float32), tl.load(N).to(tl.float32)
    ap, an = _softplus(p), beta + _softplus(n)
    dp = tl.zeros([HEIGHT, WIDTH], tl.float32)
    dn = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column, live = tile(index, rows, columns, across, HEIGHT, WIDTH)
        dy = tl.load(DY + row * dy_stride + column, mask=live, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
        less = _expm1(tl.where(x > eps, eps, x), X.dtype.element_ty == tl.float32)  # tl.minimum would lose NaN
        slope = tl.where(x > 0.0, 2.0 * ap * x, an * tl.where(x > eps, -1.0, less)) + beta
        tl.store(DX + row * columns + column, (dy * slope).to(DX.dtype.element_ty), mask=live)
        if SCALARS:
            dp += tl.where(x > 0.0, dy * x, 0.0) * x
            dn += tl.where(x > 0.0, 0.0, dy) * (less - x)
    if SCALARS:
        part = PARTS + tl.program_id(0) * 2
        tl.store(part, tl.sigmoid(p) * tl.sum(tl.sum(dp, 1), 0))
        tl.store(part + 1, tl.sigmoid(n) * tl.sum(tl.sum(dn, 1), 0))


def _run_backward(dy: Tensor, x: Tensor, p: Tensor, n: Tensor, scalars: bool) -> tuple[Tensor, Tensor]:
    """`(dx, [dp, dn])`; the second is empty if `scalars` is False."""
    tuned = launch.configuration(x, "xielu.backward", elementwise.width_of(x))
    (dy2, x2), across, tiles, height, width = elementwise.tiling(tuned["elements"], dy, x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = min(tiles, launch.processors(x) * tuned["programs"])
    parts = torch.empty(programs if scalars else 0, 2, dtype=torch.float32, device=x.device)
    launch.launch(
        _backward, (programs,), dy2, x2, dx, p, n, parts, dy2.stride(0), x2.stride(0), *x2.shape, across, tiles, BETA, EPS,
        SCALARS=scalars, HEIGHT=height, WIDTH=width, warps=tuned["warps"],
    )  # fmt: skip
    return dx, launch.column_sum(parts, p.dtype) if scalars else p.new_empty(0)


_xielu = launch.operator(
    "xielu(Tensor x, Tensor p, Tensor n) -> Tensor",
    lambda x, p, n: elementwise.run(_forward, "xielu.forward", (x,), 1, p, n, BETA, EPS)[0],
    lambda x, p, n: x.new_empty(x.shape),
)
_xielu_backward = launch.operator(
    "xielu_backward(Tensor dy, Tensor x, Tensor p, Tensor n, bool scalars) -> (Tensor, Tensor)",
    _run_backward,
    lambda dy, x, p, n, scalars: (x.new_empty(x.shape), p.new_empty(2 if scalars else 0)),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        return None, None, None
    x, p, n = ctx.saved_tensors
    scalars = any(ctx.needs_input_grad[1:])
    dx, both = _xielu_backward(dy, x, p, n, scalars)
    return (dx, both[0].view(p.shape), both[1].view(n.shape)) if scalars else (dx, None, None)


_call = launch.differentiable(_xielu, _save, _grads)


def supports(x_ni: Tensor, p_1: Tensor, n_1: Tensor) -> str | None:
    """Why the fused kernels cannot take these tensors; None: they can."""
    if why := elementwise.supports("x", x_ni):
        return why
    if {(s.dtype, s.device, s.numel()) for s in (p_1, n_1)} != {(x_ni.dtype, x_ni.device, 1)}:
        return f"p and n must be one number of {x_ni.dtype} on {x_ni.device}, not {p_1.dtype} {tuple(p_1.shape)} and {n_1.dtype} {tuple(n_1.shape)}"
    return None


def fused(x_ni: Tensor, p_1: Tensor, n_1: Tensor) -> Tensor:
    """As `reference`, rounded once, in one Triton launch forward and two backward; keeps x. Raises KernelError where `supports` says no."""
    if why := supports(x_ni, p_1, n_1):
        raise KernelError(f'xielu: {why}; set kernels.xielu = "reference"')
    return _call(x_ni, p_1, n_1)


def xielu(x_ni: Tensor, p_1: Tensor, n_1: Tensor) -> Tensor:
    """`fused` on a GPU, `reference` on a CPU."""
    return (fused if x_ni.is_cuda else reference)(x_ni, p_1, n_1)


def _sample(case: Any, device: str) -> launch.Sample:
    rows, shape, dtype = case
    scalars = [torch.tensor([value], dtype=dtype, device=device) for value in (0.3, -0.7)]
    return [torch.randn(rows, *shape, dtype=dtype, device=device) * 3, *scalars], lambda f, x, p, n: f(x, p, n)


def _traffic(case: Any) -> launch.Traffic:
    rows, shape, dtype = case
    tensor = math.prod((rows, *shape)) * dtype.itemsize
    return launch.Traffic(2 * tensor, 3 * tensor)


OPERATIONS = {"xielu": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic)}

"""RMS norm, alone and after a residual sum (arXiv:1910.07467).

    rstd = 1 / sqrt(mean(x ** 2) + eps)        n = x * rstd        all in fp32 (fp64 for fp64 inputs)
    llama: round(n) * w        olmo: round(n * w)        gemma: round(n * (1 + w))

Legend: x_nd any leading shape n, channels d last; w_d. The backward, with g = dy * w (or 1 + w) and m(.) the mean over d:
    dx = rstd * (g - n * m(g * n))        dw = sum over n of dy * n
"""

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

Style = Literal["llama", "olmo", "gemma"]
STYLES: tuple[Style, ...] = ("llama", "olmo", "gemma")
# (rows, shape of a row, style, scale of x, dtype)
CASES = [
    (rows, shape, style, scale, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for style, scale in (("llama", 1.0), ("olmo", 0.22), ("gemma", 1.0))
    for rows, shape in ((32, (4, 64)), (3, (7, 5, 33)), (1, (1,)), (33, (2, 192)), (0, (4, 16)), (31, (129,)))
]
SIZES = [(8192, (channels,), "llama", 1.0, torch.bfloat16) for channels in (1024, 2048, 4096, 5120, 8192, 16384)] + [
    (8192 * 32, (128,), "llama", 1.0, torch.bfloat16)
]


def reference(x_nd: Tensor, w_d: Tensor, eps: float, style: Style) -> Tensor:
    """RMS norm over the last dim in plain torch; returns x's shape and dtype. Raises ValueError for an unknown style."""
    wide = torch.promote_types(x_nd.dtype, torch.float32)
    x = x_nd.to(wide)
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    match style:
        case "llama":
            return w_d * n.to(x_nd.dtype)
        case "olmo":
            return (w_d.to(wide) * n).to(x_nd.dtype)
        case "gemma":
            return (n * (1.0 + w_d.to(wide))).to(x_nd.dtype)
    raise ValueError(f"style {style!r} is none of llama, olmo, gemma")


def add_reference(x_nd: Tensor, residual_nd: Tensor, w_d: Tensor, eps: float, style: Style, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`(h, norm(h))` with h = residual + scale * x, rounded once to the inputs' dtype."""
    h = torch.add(residual_nd, x_nd, alpha=scale)
    return h, reference(h, w_d, eps, style)


def _normed(x: Tensor, w: Tensor, eps: float, style: Style) -> tuple[Tensor, Tensor]:
    """`(y, rstd)`; rounds once whatever the style, which is nearer to the exact value than llama's two roundings."""
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.to(wide, copy=True)
    rstd = torch.linalg.vector_norm(n, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return n.mul_(rstd).mul_(_gain(w, style, wide)).to(x.dtype), rstd


def _gain(w: Tensor, style: Style, wide: torch.dtype) -> Tensor:
    return 1.0 + w.to(wide) if style == "gemma" else w.to(wide)


def _grads(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, style: Style) -> tuple[Tensor, Tensor]:
    """`(dx, dw)`, dx in fp32 (fp64 for fp64 inputs)."""
    gain = _gain(w, style, rstd.dtype)
    n = x.to(rstd.dtype, copy=True).mul_(rstd)
    g = dy.to(rstd.dtype, copy=True)
    both = g * n
    dw = both.flatten(0, -2).sum(0).to(w.dtype)
    mean = (both @ gain).div_(x.shape[-1]).unsqueeze(-1)  # of g * gain * n
    return g.mul_(gain).addcmul_(n, mean, value=-1.0).mul_(rstd), dw


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, style: Style) -> Tensor:
        y, rstd = _normed(x, w, eps, style)
        ctx.save_for_backward(x, w, rstd)
        ctx.style = style
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w, rstd = ctx.saved_tensors
        dx, dw = _grads(dy, x, w, rstd, ctx.style)
        return dx.to(x.dtype), dw, None, None


class _AddLean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, w: Tensor, eps: float, style: Style, scale: float) -> Any:
        h = torch.add(residual, x, alpha=scale)
        y, rstd = _normed(h, w, eps, style)
        ctx.save_for_backward(h, w, rstd)
        ctx.style, ctx.scale = style, scale
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dy: Tensor) -> Any:
        h, w, rstd = ctx.saved_tensors
        dx, dw = _grads(dy, h, w, rstd, ctx.style)
        total = dx.add_(dh).to(h.dtype)  # summed before it is rounded
        return total if ctx.scale == 1.0 else total * ctx.scale, total, dw, None, None, None


def lean(x_nd: Tensor, w_d: Tensor, eps: float, style: Style) -> Tensor:
    """As `reference` with the backward written out: keeps x and rstd only, and passes over memory a third as often."""
    return _Lean.apply(x_nd, w_d, eps, style)  # type: ignore[return-value]


def add_lean(x_nd: Tensor, residual_nd: Tensor, w_d: Tensor, eps: float, style: Style, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """As `add_reference` with the backward written out: keeps h and rstd only."""
    return _AddLean.apply(x_nd, residual_nd, w_d, eps, style, scale)  # type: ignore[return-value]


# Fused. Floor, in bytes per element of bf16: norm 4 forward, 6 backward; with the sum 8 and 8. Per row also 4 B of rstd, and the weight once.
WIDEST = 32768  # channels that one program holds in registers; above 16,384 the backward spills (422 accesses a row of 32,768 on sm_90)
PIPELINED_BYTES = 48 << 10  # of shared memory for turns loaded ahead: every GPU that Triton knows has as much, MI300X 64 KiB, RTX 4090 99
# What a tuner tries; sizes in the tables are channels.
SPACE = {
    "rms_norm.forward": [{"rows": rows, "warps": warps} for rows in (1, 2, 4, 16, 32) for warps in (4, 8, 16)],
    "rms_norm.backward": [
        {"rows": rows, "warps": warps, "programs": programs, "pipeline": pipeline}
        for rows in (1, 2, 4, 8, 16)
        for warps in (4, 8, 16)
        for programs in (1, 2, 4)
        for pipeline in (1, 2, 3)
    ],
}


@triton.jit
def _forward(
    X, RESIDUAL, W, H, Y, RSTD, rows, columns, x_stride, residual_stride, eps, scale,
    STYLE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None]
    live = (row < rows) & (column < columns)
    x = tl.load(X + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(RESIDUAL + row * residual_stride + column, mask=live, other=0.0).to(tl.float32)
        h = (residual + scale * x).to(H.dtype.element_ty)
        tl.store(H + row * columns + column, h, mask=live)
        x = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / columns + eps)
    tl.store(RSTD + row, rstd, mask=row < rows)
    w = tl.load(W + column, mask=column < columns, other=0.0).to(tl.float32)
    n = x * rstd
    if STYLE == "llama":
        n = n.to(Y.dtype.element_ty).to(tl.float32)
    if STYLE == "gemma":
        w += 1.0
    tl.store(Y + row * columns + column, (n * w).to(Y.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    DY, DH, X, W, RSTD, DX, SCALED, PARTS, rows, columns, dy_stride, dh_stride, x_stride, scale,
    STYLE: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PIPELINE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None]
    gain = tl.load(W + column, mask=column < columns, other=0.0).to(tl.float32)
    if STYLE == "gemma":
        gain += 1.0
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    # Of a wide row the weight is read again for each (from L2, a third of the row's traffic): held, it would spill.
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=PIPELINE):  # type: ignore[misc]
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = (row < rows) & (column < columns)
        dy = tl.load(DY + row * dy_stride + column, mask=live, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        n = tl.load(X + row * x_stride + column, mask=live, other=0.0).to(tl.float32) * rstd
        if WEIGHT:
            dw += dy * n
        if BLOCK > 8192:
            gain = tl.load(W + column, mask=column < columns, other=0.0).to(tl.float32)
            if STYLE == "gemma":
                gain += 1.0
        g = dy * gain
        dx = rstd * (g - n * (tl.sum(g * n, 1, keep_dims=True) / columns))
        if ADD:
            dx += tl.load(DH + row * dh_stride + column, mask=live, other=0.0).to(tl.float32)
        tl.store(DX + row * columns + column, dx.to(DX.dtype.element_ty), mask=live)
        if SCALE:
            tl.store(SCALED + row * columns + column, (dx * scale).to(DX.dtype.element_ty), mask=live)
    if WEIGHT:
        part = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, BLOCK)
        tl.store(PARTS + part, tl.sum(dw, 0), mask=tl.arange(0, BLOCK) < columns)


def _run_forward(x: Tensor, residual: Tensor | None, w: Tensor, eps: float, style: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    x2, r2 = launch.rows(x), None if residual is None else launch.rows(residual)
    rows, columns = x2.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = y if r2 is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    tuned = launch.configuration(x, "rms_norm.forward", columns)
    width, height = launch.block(columns), tuned["rows"]
    launch.launch(
        _forward, (-(-rows // height),), x2, r2, w.contiguous(), h, y, rstd, rows, columns, x2.stride(0), 0 if r2 is None else r2.stride(0),
        eps, scale, STYLE=style, ADD=r2 is not None, ROWS=height, BLOCK=width, warps=tuned["warps"],
    )  # fmt: skip
    return h, y, rstd


def _run_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, w: Tensor, rstd: Tensor, style: str, scale: float, weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy2, dh2, x2 = launch.rows(dy), None if dh is None else launch.rows(dh), launch.rows(x)
    rows, columns = x2.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scaled = x.new_empty(0) if scale == 1.0 else torch.empty_like(dx)
    tuned, width = launch.configuration(x, "rms_norm.backward", columns), launch.block(columns)
    ahead = (
        tuned["rows"] * width * x.element_size() * (2 if dh2 is None else 3)
    )  # bytes of one turn, held in shared memory while the next is loaded
    pipeline = min(tuned["pipeline"], 1 + PIPELINED_BYTES // ahead)
    programs = min(-(-rows // tuned["rows"]), launch.processors(x) * tuned["programs"])
    parts = torch.empty(programs if weight else 0, columns, dtype=torch.float32, device=x.device)
    launch.launch(
        _backward, (programs,), dy2, dh2, x2, w.contiguous(), rstd, dx, scaled, parts, rows, columns, dy2.stride(0),
        0 if dh2 is None else dh2.stride(0), x2.stride(0), scale, STYLE=style, ADD=dh2 is not None, SCALE=scale != 1.0, WEIGHT=weight,
        ROWS=tuned["rows"], BLOCK=width, PIPELINE=pipeline, warps=tuned["warps"],
    )  # fmt: skip
    return dx, scaled, launch.column_sum(parts, w.dtype) if weight else w.new_empty(0)


def _like_backward(dy: Tensor, dh: Tensor | None, x: Tensor, w: Tensor, rstd: Tensor, style: str, scale: float, weight: bool) -> Any:
    dx = x.new_empty(x.shape)
    return dx, x.new_empty(0) if scale == 1.0 else torch.empty_like(dx), w.new_empty(w.shape if weight else 0)


_norm = launch.operator(
    "rms_norm(Tensor x, Tensor w, float eps, str style) -> (Tensor, Tensor)",
    lambda x, w, eps, style: _run_forward(x, None, w, eps, style, 1.0)[1:],
    lambda x, w, eps, style: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
_add_norm = launch.operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor w, float eps, str style, float scale) -> (Tensor, Tensor, Tensor)",
    _run_forward,
    lambda x, residual, w, eps, style, scale: (*(x.new_empty(x.shape) for _ in range(2)), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
_norm_backward = launch.operator(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor x, Tensor w, Tensor rstd, str style, float scale, bool weight) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _like_backward,
)


def _save_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, w, _, ctx.style = inputs
    ctx.save_for_backward(x, w, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_grads(ctx: Any, dy: Tensor | None, _: Any) -> Any:
    if dy is None:
        return None, None, None, None
    x, w, rstd = ctx.saved_tensors
    weight = ctx.needs_input_grad[1]
    dx, _, dw = _norm_backward(dy, None, x, w, rstd, ctx.style, 1.0, weight)
    return dx, dw if weight else None, None, None


def _save_add_norm(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, w, _, ctx.style, ctx.scale = inputs
    h, _, rstd = output
    ctx.save_for_backward(h, w, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_norm_grads(ctx: Any, dh: Tensor | None, dy: Tensor | None, _: Any) -> Any:
    if dy is None:
        return None if dh is None else dh * ctx.scale, dh, None, None, None, None
    h, w, rstd = ctx.saved_tensors
    weight = ctx.needs_input_grad[2]
    total, scaled, dw = _norm_backward(dy, dh, h, w, rstd, ctx.style, ctx.scale, weight)
    return total if ctx.scale == 1.0 else scaled, total, dw if weight else None, None, None, None


_norm_call = launch.differentiable(_norm, _save_norm, _norm_grads)
_add_norm_call = launch.differentiable(_add_norm, _save_add_norm, _add_norm_grads)


def supports(x_nd: Tensor, w_d: Tensor, residual_nd: Tensor | None = None) -> str | None:
    """Why the fused kernels cannot take these tensors; None: they can."""
    if why := launch.missing(x_nd):
        return why
    if x_nd.dtype not in launch.FLOATS or w_d.dtype != x_nd.dtype or (residual_nd is not None and residual_nd.dtype != x_nd.dtype):
        return f"x, residual and weight must share one of bf16, fp16, fp32, not {x_nd.dtype} and {w_d.dtype}"
    if w_d.shape != x_nd.shape[-1:] or (residual_nd is not None and residual_nd.shape != x_nd.shape):
        return f"x {tuple(x_nd.shape)}, its residual and weight {tuple(w_d.shape)} do not fit"
    return None if 0 < w_d.shape[0] <= WIDEST else f"{w_d.shape[0]} channels are not between 1 and {WIDEST}"


def fused(x_nd: Tensor, w_d: Tensor, eps: float, style: Style) -> Tensor:
    """As `reference` in one Triton launch forward and two backward; keeps x and rstd. Raises KernelError where `supports` says no."""
    if why := supports(x_nd, w_d):
        raise KernelError(f'rms_norm: {why}; set kernels.rms_norm = "lean"')
    return _norm_call(x_nd, w_d, eps, style)[0]


def add_fused(x_nd: Tensor, residual_nd: Tensor, w_d: Tensor, eps: float, style: Style, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """As `add_reference` in one Triton launch forward and two backward; keeps h and rstd. Raises KernelError where `supports` says no."""
    if why := supports(x_nd, w_d, residual_nd):
        raise KernelError(f'add_rms_norm: {why}; set kernels.add_rms_norm = "lean"')
    return _add_norm_call(x_nd, residual_nd, w_d, eps, style, scale)[:2]


def rms_norm(x_nd: Tensor, w_d: Tensor, eps: float = 1e-6, style: Style = "llama") -> Tensor:
    """`fused` on a GPU, `lean` on a CPU."""
    return (fused if x_nd.is_cuda else lean)(x_nd, w_d, eps, style)


def add_rms_norm(
    x_nd: Tensor, residual_nd: Tensor, w_d: Tensor, eps: float = 1e-6, style: Style = "llama", scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`add_fused` on a GPU, `add_lean` on a CPU."""
    return (add_fused if x_nd.is_cuda else add_lean)(x_nd, residual_nd, w_d, eps, style, scale)


def _sample(case: Any, device: str, *, add: bool) -> launch.Sample:
    rows, shape, style, scale, dtype = case
    x = torch.randn(rows, *shape, dtype=dtype, device=device) * 2
    w = torch.randn(shape[-1], dtype=dtype, device=device)
    if add:
        return [x, torch.randn_like(x), w], lambda f, x, r, w: f(x, r, w, 1e-5, style, scale)
    return [x, w], lambda f, x, w: f(x, w, 1e-5, style)


def _traffic(case: Any, *, add: bool) -> launch.Traffic:
    rows, shape, *_, scale, dtype = case
    tensor = math.prod((rows, *shape)) * dtype.itemsize
    return launch.Traffic((4 if add else 2) * tensor, (4 if add else 3) * tensor + (tensor if add and scale != 1.0 else 0))


OPERATIONS = {
    "rms_norm": launch.Operation(
        {"reference": reference, "lean": lean, "fused": fused},
        CASES,
        SIZES,
        functools.partial(_sample, add=False),
        functools.partial(_traffic, add=False),
    ),
    "add_rms_norm": launch.Operation(
        {"reference": add_reference, "lean": add_lean, "fused": add_fused},
        CASES,
        SIZES,
        functools.partial(_sample, add=True),
        functools.partial(_traffic, add=True),
    ),
}

"""RMS norm, alone and after a residual sum (arXiv:1910.07467).

    rstd = 1 / sqrt(mean(x ** 2) + eps)        n = x * rstd        all in fp32 (fp64 for fp64 inputs)
    llama: round(n) * w        olmo: round(n * w)        gemma: round(n * (1 + w))

Legend: x_nd any leading shape n, channels d last; w_d. The backward, with g = dy * w (or 1 + w) and m(.) the mean over d:
    dx = rstd * (g - n * m(g * n))        dw = sum over n of dy * n
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Style = Literal["llama", "olmo", "gemma"]
# (leading shape, channels, dtype)
CASES = [
    (shape, channels, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape, channels in (((4, 32), 64), ((3, 7, 5), 33), ((1,), 1), ((2, 129), 192), ((0, 4), 16))
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


rms_norm = lean
add_rms_norm = add_lean

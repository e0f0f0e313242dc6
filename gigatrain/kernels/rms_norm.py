"""RMS norm, alone and after a residual sum (arXiv:1910.07467).

    rstd = 1 / sqrt(mean(x ** 2) + eps)        n = x * rstd        all in fp32 (fp64 for fp64 inputs)
    llama: round(n) * w        olmo: round(n * w)        gemma: round(n * (1 + w))

Legend: x_nd any leading shape n, channels d last; w_d. The backward, with g = dy * w (or 1 + w) and m(.) the mean over d:
    dx = rstd * (g - n * m(g * n))        dw = sum over n of dy * n
"""

from typing import Literal

import torch
from torch import Tensor

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


rms_norm = reference
add_rms_norm = add_reference

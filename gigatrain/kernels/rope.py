"""Rotary position embedding of queries and keys (arXiv:2104.09864).

    (a, b) -> (a cos - b sin, b cos + a sin)        for each pair of channels
    halves: a, b are channels i and i + r of the first 2r; interleaved: channels 2i and 2i + 1. Channels beyond 2r pass through (partial rotation).

Legend: q_bthd, k_btkd: batch, tokens, query or key heads, channels; cos_btr, sin_btr: r channel pairs, b may be 1. If cos and sin are wider than q (fp32
for bf16) the rotation is computed in their dtype and rounded once. The backward turns by the opposite angle.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# (batch, tokens, heads, kv_heads, head_dim, rotary channels, interleaved, dtype)
CASES = [
    (b, t, h, k, d, r, interleaved, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for interleaved in (False, True)
    for b, t, h, k, d, r in ((2, 8, 4, 2, 16, 16), (1, 7, 3, 1, 6, 6), (3, 5, 2, 2, 12, 8), (2, 1, 1, 1, 2, 2))
]


def turn(x_bthd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool) -> Tensor:
    """Rotates one of the two."""
    r = cos_btr.shape[-1]
    cos, sin = cos_btr.unsqueeze(2), sin_btr.unsqueeze(2)
    if interleaved:
        a, b = x_bthd[..., 0 : 2 * r : 2], x_bthd[..., 1 : 2 * r : 2]
    else:
        a, b = x_bthd[..., :r], x_bthd[..., r : 2 * r]
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    out = out.to(x_bthd.dtype)
    return out if 2 * r == x_bthd.shape[-1] else torch.cat((out, x_bthd[..., 2 * r :]), -1)


def reference(q_bthd: Tensor, k_btkd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotated `(q, k)` in plain torch, same shapes and dtypes."""
    return turn(q_bthd, cos_btr, sin_btr, interleaved), turn(k_btkd, cos_btr, sin_btr, interleaved)


def _turned(x_bthd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool, sign: float) -> Tensor:
    """`turn` by the angle, or by its opposite for `sign` -1, written where it belongs instead of being put together."""
    wide = torch.promote_types(x_bthd.dtype, cos_btr.dtype)
    r = cos_btr.shape[-1]
    first, second = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if interleaved else (slice(0, r), slice(r, 2 * r))
    x = x_bthd.to(wide)
    out = torch.empty_like(x)
    a, b = x[..., first], x[..., second]
    cos, sin = cos_btr.unsqueeze(2), sin_btr.unsqueeze(2)
    torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin, value=sign)
    if 2 * r < x.shape[-1]:
        out[..., 2 * r :] = x[..., 2 * r :]
    return out.to(x_bthd.dtype)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(q, cos, sin, interleaved, 1.0), _turned(k, cos, sin, interleaved, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(dq, cos, sin, ctx.interleaved, -1.0), _turned(dk, cos, sin, ctx.interleaved, -1.0), None, None, None


def lean(q_bthd: Tensor, k_btkd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """As `reference` with the backward written out: keeps cos and sin only."""
    return _Lean.apply(q_bthd, k_btkd, cos_btr, sin_btr, interleaved)  # type: ignore[return-value]


rope = lean

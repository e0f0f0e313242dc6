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

from gigatrain.kernels import launch

# (tokens, batch, heads, kv_heads, head_dim, rotary channels, interleaved, rows of cos and sin: 1 or batch, cos and sin in fp32, dtype)
CASES = [
    (t, b, h, k, d, r, interleaved, rows, wide, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for interleaved in (False, True)
    for t, b, h, k, d, r in ((8, 2, 4, 2, 16, 16), (7, 1, 3, 1, 6, 6), (5, 3, 2, 2, 12, 8), (1, 2, 1, 1, 2, 2))
    for rows, wide in ((1, False), (b, False), (b, True))
]
SIZES = [(8192, 1, 32, 8, 128, 128, False, 1, False, torch.bfloat16), (8192, 1, 32, 8, 64, 64, False, 1, False, torch.bfloat16)]


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


def angles(rows: int, tokens: int, pairs: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Random cos_btr and sin_btr, for samples."""
    angle = torch.randn(rows, tokens, pairs, dtype=torch.float64, device=device) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _sample(case: Any, device: str) -> launch.Sample:
    t, b, h, k, d, r, interleaved, rows, wide, dtype = case
    cos, sin = angles(rows, t, r // 2, torch.promote_types(dtype, torch.float32) if wide else dtype, device)

    def call(f: Any, q: Tensor, key: Tensor) -> Any:
        exact = q.dtype == torch.float64
        return f(q, key, cos.double() if exact else cos, sin.double() if exact else sin, interleaved)

    return [torch.randn(b, t, heads, d, dtype=dtype, device=device) for heads in (h, k)], call


def _traffic(case: Any) -> launch.Traffic:
    t, b, h, k, d, r, _, rows, wide, dtype = case
    moved = 2 * b * t * (h + k) * d * dtype.itemsize + rows * t * r * (4 if wide else dtype.itemsize)
    return launch.Traffic(moved, moved)


OPERATIONS = {"rope": launch.Operation({"reference": reference, "lean": lean}, CASES, SIZES, _sample, _traffic)}

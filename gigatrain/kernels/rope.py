"""Rotary position embedding of queries and keys (arXiv:2104.09864).

    (a, b) -> (a cos - b sin, b cos + a sin)        for each pair of channels
    halves: a, b are channels i and i + r of the first 2r; interleaved: channels 2i and 2i + 1. Channels beyond 2r pass through (partial rotation).

Legend: q_bthd, k_btkd: batch, tokens, query or key heads, channels; cos_btr, sin_btr: r channel pairs, b may be 1. If cos and sin are wider than q (fp32
for bf16) the rotation is computed in their dtype and rounded once. The backward turns by the opposite angle.
"""

import torch
from torch import Tensor

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


rope = reference

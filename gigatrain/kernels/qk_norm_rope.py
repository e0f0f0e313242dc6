"""RMS norm of each query and key head, then rotary embedding: `rms_norm` over head channels followed by `rope`.

Legend: q_bthd, k_btkd, qw_d, kw_d, cos_btr, sin_btr as in rms_norm.py and rope.py; cos and sin None: no rotation (layers without positions).
"""

import torch
from torch import Tensor

from gigatrain.kernels import rms_norm, rope
from gigatrain.kernels.rms_norm import Style

# (batch, tokens, heads, kv_heads, head_dim, dtype)
CASES = [
    (b, t, h, k, d, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for b, t, h, k, d in ((2, 8, 4, 2, 16), (1, 7, 3, 1, 6), (2, 1, 2, 2, 2))
]


def reference(
    q_bthd: Tensor,
    k_btkd: Tensor,
    qw_d: Tensor,
    kw_d: Tensor,
    cos_btr: Tensor | None,
    sin_btr: Tensor | None,
    eps: float,
    style: Style,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normed and rotated `(q, k)` in plain torch, same shapes and dtypes."""
    q, k = rms_norm.reference(q_bthd, qw_d, eps, style), rms_norm.reference(k_btkd, kw_d, eps, style)
    return (q, k) if cos_btr is None or sin_btr is None else rope.reference(q, k, cos_btr, sin_btr, interleaved)


def lean(
    q_bthd: Tensor,
    k_btkd: Tensor,
    qw_d: Tensor,
    kw_d: Tensor,
    cos_btr: Tensor | None,
    sin_btr: Tensor | None,
    eps: float,
    style: Style,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `reference`, from the lean versions of its two parts."""
    q, k = rms_norm.lean(q_bthd, qw_d, eps, style), rms_norm.lean(k_btkd, kw_d, eps, style)
    return (q, k) if cos_btr is None or sin_btr is None else rope.lean(q, k, cos_btr, sin_btr, interleaved)


qk_norm_rope = lean

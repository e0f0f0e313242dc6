"""RMS norm of each query and key head, then rotary embedding: `rms_norm` over head channels followed by `rope`.

Legend: q_bthd, k_btkd, qw_d, kw_d, cos_btr, sin_btr as in rms_norm.py and rope.py; cos and sin None: no rotation (layers without positions).
"""

from typing import Any

import torch
from torch import Tensor

from gigatrain.kernels import launch, rms_norm, rope
from gigatrain.kernels.rms_norm import Style

# (tokens, batch, heads, kv_heads, head_dim, turned, dtype)
CASES = [
    (t, b, h, k, d, turned, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for t, b, h, k, d in ((8, 2, 4, 2, 16), (7, 1, 3, 1, 6), (1, 2, 2, 2, 2))
    for turned in (True, False)
]
SIZES = [(8192, 1, 32, 8, 128, True, torch.bfloat16), (8192, 1, 16, 8, 256, True, torch.bfloat16)]


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


def _sample(case: Any, device: str) -> launch.Sample:
    t, b, h, k, d, turned, dtype = case
    cos, sin = rope.angles(b, t, d // 2, dtype, device) if turned else (None, None)

    def call(f: Any, *xs: Tensor) -> Any:
        exact = xs[0].dtype == torch.float64 and cos is not None
        return f(*xs, cos.double() if exact else cos, sin.double() if exact else sin, 1e-6, "llama")  # type: ignore[union-attr]

    tensors = [torch.randn(b, t, heads, d, dtype=dtype, device=device) for heads in (h, k)]
    return [*tensors, *(torch.randn(d, dtype=dtype, device=device) for _ in range(2))], call


def _traffic(case: Any) -> launch.Traffic:
    t, b, h, k, d, turned, dtype = case
    tensor, table = b * t * (h + k) * d * dtype.itemsize, b * t * d * dtype.itemsize if turned else 0
    return launch.Traffic(2 * tensor + table, 3 * tensor + table)


OPERATIONS = {"qk_norm_rope": launch.Operation({"reference": reference, "lean": lean}, CASES, SIZES, _sample, _traffic)}

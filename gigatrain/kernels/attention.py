"""Causal attention with grouped heads, documents, windows and soft-caps.

    s = scale * q . k        s = c * tanh(s / c) if softcap        out = softmax(s over the visible keys) v
    key j is visible to query i if j <= i, i - j < window, and both are of one document

Legend: q_bthd, k_btkd, v_btkd: batch, tokens, query or key heads, channels; h is a multiple of k, query head i reads key head i // (h / k). Softmax in
fp32 (fp64 for fp64 inputs). Layout [b, t, h, d] is that of the projections' outputs, so nothing is copied on the way in or out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# (batch, tokens, heads, kv_heads, head_dim, window, documents, softcap, dtype)
CASES = [
    (*shape, window, documents, softcap, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ((2, 16, 4, 2, 8), (1, 33, 3, 1, 6), (2, 1, 2, 2, 4))
    for window, documents, softcap in ((None, False, None), (5, False, None), (None, True, None), (4, True, None), (None, False, 2.0), (3, True, 5.0))
]


@dataclass(frozen=True)
class Mask:
    """Who sees whom, built once per microbatch and window: `visible_btt` is None where plain causality says it all."""

    documents_bt: Tensor | None = None
    window: int | None = None
    visible_btt: Tensor | None = None  # bool [b or 1, 1, t, t]
    bias_btt: Tensor | None = None  # the same as 0 and -inf, in the dtype of the queries


def mask(documents_bt: Tensor | None, window: int | None, tokens: int, dtype: torch.dtype, device: torch.device) -> Mask:
    """The mask for samples of `tokens` tokens; `documents_bt` gives each token's document index in its row, None: one document."""
    window = None if window is None or window >= tokens else window
    if documents_bt is None and window is None:
        return Mask()
    at_t = torch.arange(tokens, device=device)
    distance_tt = at_t[:, None] - at_t[None, :]
    visible = distance_tt >= 0
    if window is not None:
        visible = visible & (distance_tt < window)
    visible = visible[None]
    if documents_bt is not None:
        visible = visible & (documents_bt[:, :, None] == documents_bt[:, None, :])
    visible = visible[:, None]
    bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    return Mask(documents_bt, window, visible, bias)


def reference(q_bthd: Tensor, k_btkd: Tensor, v_btkd: Tensor, mask: Mask, *, scale: float, softcap: float | None = None) -> Tensor:
    """Attention in plain torch, every score in memory; returns [b, t, h, d] in q's dtype."""
    b, t, h, d = q_bthd.shape
    k = k_btkd.shape[2]
    q_bkgtd = q_bthd.transpose(1, 2).reshape(b, k, h // k, t, d)
    scores = torch.matmul(q_bkgtd, k_btkd.transpose(1, 2)[:, :, None].transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(t, t, dtype=torch.bool, device=q_bthd.device).tril() if mask.visible_btt is None else mask.visible_btt[:, :, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q_bthd.dtype, torch.float32)).to(q_bthd.dtype)
    return torch.matmul(weights, v_btkd.transpose(1, 2)[:, :, None]).reshape(b, h, t, d).transpose(1, 2)


def sdpa(q_bthd: Tensor, k_btkd: Tensor, v_btkd: Tensor, mask: Mask, *, scale: float, softcap: float | None = None) -> Tensor:
    """Attention by `F.scaled_dot_product_attention`, which keeps no scores; with a soft-cap, which it lacks, `reference`."""
    if softcap is not None:
        return reference(q_bthd, k_btkd, v_btkd, mask, scale=scale, softcap=softcap)
    out_bhtd = F.scaled_dot_product_attention(
        q_bthd.transpose(1, 2),
        k_btkd.transpose(1, 2),
        v_btkd.transpose(1, 2),
        attn_mask=mask.bias_btt,
        is_causal=mask.bias_btt is None,
        scale=scale,
        enable_gqa=q_bthd.shape[2] != k_btkd.shape[2],
    )
    return out_bhtd.transpose(1, 2)


attention = sdpa

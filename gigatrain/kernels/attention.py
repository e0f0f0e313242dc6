"""Causal attention with grouped heads, documents, windows and soft-caps.

    s = scale * q . k        s = c * tanh(s / c) if softcap        out = softmax(s over the visible keys, and the head's sink if it has one) v
    key j is visible to query i if j <= i, i - j < window, and both are of one document

Legend: q_bthd, k_btkd, v_btke: batch, tokens, query or key heads, channels (e of values, mostly d too); sinks_h: a logit per query head that takes
weight and gives no value (gpt-oss); h is a multiple of k, query head i reads key head i // (h / k).
Softmax in fp32 (fp64 for fp64 inputs). Layout [b, t, h, d] is that of the projections' outputs, so nothing is copied on the way in or out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gigatrain.kernels import launch

# (batch, tokens, heads, kv_heads, head_dim, window, documents, softcap, dtype)
CASES = [
    (*shape, window, documents, softcap, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ((2, 16, 4, 2, 8), (1, 33, 3, 1, 6), (2, 1, 2, 2, 4))
    for window, documents, softcap in (
        (None, False, None),
        (5, False, None),
        (None, True, None),
        (4, True, None),
        (None, False, 2.0),
        (3, True, 5.0),
    )
]
SIZES = [(1, 8192, 32, 8, 128, None, False, None, torch.bfloat16), (4, 2048, 32, 8, 64, None, False, None, torch.bfloat16)]


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


def reference(
    q_bthd: Tensor,
    k_btkd: Tensor,
    v_btke: Tensor,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_h: Tensor | None = None,
) -> Tensor:
    """Attention in plain torch, every score in memory; returns [b, t, h, e] in q's dtype, where values may have other channels than keys."""
    b, t, h, d = q_bthd.shape
    k = k_btkd.shape[2]
    q_bkgtd = q_bthd.transpose(1, 2).reshape(b, k, h // k, t, d)
    scores = torch.matmul(q_bkgtd, k_btkd.transpose(1, 2)[:, :, None].transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(t, t, dtype=torch.bool, device=q_bthd.device).tril() if mask.visible_btt is None else mask.visible_btt[:, :, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks_h is not None:
        scores = torch.cat((scores, sinks_h.to(scores.dtype).view(1, k, h // k, 1, 1).expand(b, -1, -1, t, 1)), -1)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q_bthd.dtype, torch.float32)).to(q_bthd.dtype)
    return torch.matmul(weights[..., :t], v_btke.transpose(1, 2)[:, :, None]).reshape(b, h, t, -1).transpose(1, 2)


def sdpa(
    q_bthd: Tensor, k_btkd: Tensor, v_btkd: Tensor, mask: Mask, *, scale: float, softcap: float | None = None, sinks_h: Tensor | None = None
) -> Tensor:
    """Attention by `F.scaled_dot_product_attention`, which keeps no scores; with a soft-cap or sinks, which it lacks, `reference`."""
    if softcap is not None or sinks_h is not None:
        return reference(q_bthd, k_btkd, v_btkd, mask, scale=scale, softcap=softcap, sinks_h=sinks_h)
    # On a GPU a bias leaves torch the memory-efficient kernel, which cannot share key heads, or plain math, which keeps every score.
    return _fused(q_bthd, k_btkd, v_btkd, mask.bias_btt, scale, repeat=q_bthd.is_cuda and mask.bias_btt is not None)


def _fused(q_bthd: Tensor, k_btkd: Tensor, v_btkd: Tensor, bias_btt: Tensor | None, scale: float, *, repeat: bool) -> Tensor:
    """torch's attention with shared key heads; `repeat` copies each for every query head that reads it, for kernels that cannot share."""
    if repeat and (shared := q_bthd.shape[2] // k_btkd.shape[2]) > 1:
        k_btkd, v_btkd = (x.repeat_interleave(shared, 2) for x in (k_btkd, v_btkd))
    out_bhtd = F.scaled_dot_product_attention(
        q_bthd.transpose(1, 2),
        k_btkd.transpose(1, 2),
        v_btkd.transpose(1, 2),
        attn_mask=bias_btt,
        is_causal=bias_btt is None,
        scale=scale,
        enable_gqa=q_bthd.shape[2] != k_btkd.shape[2],
    )
    return out_bhtd.transpose(1, 2)


_BLOCK = 128  # queries of one step of `blocked`


class _Blocked(torch.autograd.Function):
    """Scores of a block of queries against the keys that any of them sees; the weights are kept for the backward.

    Rows are sorted by (batch, key head), then (token, query head of the group), so that a group shares each product with its key head.
    """

    @staticmethod
    def forward(ctx: Any, q_bthd: Tensor, k_btkd: Tensor, v_btkd: Tensor, mask: Mask, scale: float, cap: float | None) -> Tensor:
        b, t, h, d = q_bthd.shape
        heads = k_btkd.shape[2]
        g, n = h // heads, b * heads
        q = q_bthd.unflatten(2, (heads, g)).permute(0, 2, 1, 3, 4).reshape(n, t * g, d)
        k, v = (x.transpose(1, 2).reshape(n, t, d) for x in (k_btkd, v_btkd))
        future = torch.full((min(_BLOCK, t),) * 2, float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        out = torch.empty_like(q)
        weights, slopes = [], []
        for first, last, low in _blocks(t, mask.window):
            rows = slice(first * g, last * g)
            s = torch.bmm(q[:, rows], k[:, low:last].transpose(1, 2)).mul_(scale)
            if cap is not None:
                s = s.div_(cap).tanh_()
                slopes.append(1.0 - s * s)
                s.mul_(cap)
            grouped = s.view(b, heads, last - first, g, last - low)
            if mask.bias_btt is None:
                grouped[..., first - low :].add_(future[: last - first, None, : last - first])
            else:
                grouped.add_(mask.bias_btt[:, :, first:last, None, low:last])
            p = torch.softmax(s, -1)  # inside in fp32, rounded once
            weights.append(p)
            torch.bmm(p, v[:, low:last], out=out[:, rows])
        ctx.save_for_backward(q, k, v, *weights, *slopes)
        ctx.numbers = (b, t, heads, g, mask.window, scale)
        return out.view(b, heads, t, g, d).permute(0, 2, 1, 3, 4).reshape(b, t, h, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bthd: Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        b, t, heads, g, window, scale = ctx.numbers
        n, d = b * heads, q.shape[-1]
        grad = grad_bthd.unflatten(2, (heads, g)).permute(0, 2, 1, 3, 4).reshape(n, t * g, d)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(n, t, d, dtype=wide, device=q.device) for _ in range(2))  # sums over blocks
        blocks = _blocks(t, window)
        slopes = kept[len(blocks) :] or [None] * len(blocks)
        for (first, last, low), p, slope in zip(blocks, kept, slopes, strict=False):
            rows = slice(first * g, last * g)
            dv[:, low:last] += torch.bmm(p.transpose(1, 2), grad[:, rows])
            ds = torch.bmm(grad[:, rows], v[:, low:last].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data.default(ds, p, -1, p.dtype)
            if slope is not None:
                ds = ds * slope
            torch.bmm(ds, k[:, low:last], out=dq[:, rows])
            dk[:, low:last] += torch.bmm(ds.transpose(1, 2), q[:, rows])
        dq = dq.mul_(scale).view(b, heads, t, g, d).permute(0, 2, 1, 3, 4).reshape(b, t, heads * g, d)
        dk, dv = (x.to(q.dtype).view(b, heads, t, d).transpose(1, 2) for x in (dk.mul_(scale), dv))
        return dq, dk, dv, None, None, None


def _blocks(tokens: int, window: int | None) -> list[tuple[int, int, int]]:
    """`(first, last, low)`: queries first..last - 1 see keys from `low` on."""
    firsts = range(0, tokens, _BLOCK)
    return [(i, min(i + _BLOCK, tokens), 0 if window is None else max(0, i - window + 1)) for i in firsts]


def blocked(
    q_bthd: Tensor, k_btkd: Tensor, v_btkd: Tensor, mask: Mask, *, scale: float, softcap: float | None = None, sinks_h: Tensor | None = None
) -> Tensor:
    """Attention by batched products over blocks of queries, soft-cap included: the fastest on CPUs in bf16.

    Forward and backward on one EPYC core, [b, t, h, k, d] bf16: [8, 256, 4, 2, 32] 11 ms, `sdpa` 28; [4, 1024, 8, 4, 64] 161, `sdpa` 307;
    in fp32 the two are equal within a fifth. Keeps batch * heads * tokens ** 2 / 2 weights for the backward, so it is for samples of up to
    some 2000 tokens.
    """
    if sinks_h is not None or v_btkd.shape[-1] != q_bthd.shape[-1]:
        return reference(q_bthd, k_btkd, v_btkd, mask, scale=scale, softcap=softcap, sinks_h=sinks_h)
    return _Blocked.apply(q_bthd, k_btkd, v_btkd, mask, scale, softcap)  # type: ignore[return-value]


attention = sdpa


def _sample(case: Any, device: str) -> launch.Sample:
    b, t, h, k, d, window, documents, softcap, dtype = case
    rows = torch.randint(0, 3, (b, t), device=device).sort(-1).values.int() if documents else None

    def call(f: Any, *qkv: Tensor) -> Any:
        return f(*qkv, mask(rows, window, t, qkv[0].dtype, qkv[0].device), scale=d**-0.5, softcap=softcap)

    return [torch.randn(b, t, heads, d, dtype=dtype, device=device) for heads in (h, k, k)], call


def _traffic(case: Any) -> launch.Traffic:
    """Of causal attention over whole samples: half the square, two products forward and five backward."""
    b, t, h, k, d, *_, dtype = case
    product, inputs = b * h * t * t * d, b * t * d * (2 * h + 2 * k) * dtype.itemsize
    return launch.Traffic(inputs, 2 * inputs, 2 * product, 5 * product)


OPERATIONS = {
    "attention": launch.Operation({"reference": reference, "sdpa": sdpa, "blocked": blocked}, CASES, SIZES, _sample, _traffic),
}

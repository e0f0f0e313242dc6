"""Causal attention with grouped heads, documents, windows and soft-caps.

    s = scale * q . k        s = c * tanh(s / c) if softcap        out = softmax(s over the visible keys, and the head's sink if it has one) v
    key j is visible to query i if j <= i, i - j < window, and both are of one document

Legend: q_bthd, k_btkd, v_btke: batch, tokens, query or key heads, channels (e of values, mostly d too); sinks_h: a logit per query head that takes
weight and gives no value (gpt-oss); h is a multiple of k, query head i reads key head i // (h / k).
Softmax in fp32 (fp64 for fp64 inputs). Layout [b, t, h, d] is that of the projections' outputs, so nothing is copied on the way in or out.
"""

import functools
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gigatrain.kernels import attention_fused, attention_torch, launch
from gigatrain.kernels.attention_fused import fused
from gigatrain.kernels.attention_mask import Mask, bias, mask, visible
from gigatrain.kernels.attention_torch import cudnn, fa3, fa4, flash, flex, varlen

__all__ = ["Mask", "attention", "blocked", "cudnn", "fa3", "fa4", "flash", "flex", "fused", "mask", "reference", "sdpa", "varlen"]

# (batch, tokens, heads, kv_heads, head_dim, value_dim, window, documents, softcap, sinks, dtype)
CASES = [
    *(
        (b, t, h, k, d, d, window, documents, softcap, False, dtype)
        for dtype, (b, t, h, k, d), (window, documents, softcap) in product(
            (torch.float32, torch.bfloat16),
            ((2, 16, 2, 1, 8), (1, 33, 3, 1, 6), (2, 1, 2, 2, 4)),
            ((None, False, None), (5, False, None), (None, True, None), (4, True, None), (None, False, 2.0), (3, True, 5.0)),
        )
    ),
    *(
        (1, 19, 4, 2, d, e, *rest, dtype)
        for dtype, (d, e, *rest) in product(
            (torch.float32, torch.bfloat16),
            (
                (12, 8, None, False, None, False),
                (24, 40, 6, True, 3.0, True),
                (16, 16, None, False, None, True),
                (8, 8, 3, True, None, True),
            ),
        )
    ),
]
SIZES = [
    (1, 8192, 32, 8, 128, 128, None, False, None, False, torch.bfloat16),  # Llama-3-8B
    (1, 8192, 32, 8, 128, 128, None, True, None, False, torch.bfloat16),  # packed
    (4, 2048, 32, 8, 64, 64, None, False, None, False, torch.bfloat16),  # Llama-3.2-1B
    (1, 8192, 64, 8, 64, 64, 128, True, None, True, torch.bfloat16),  # gpt-oss, every other layer
    (1, 8192, 16, 8, 256, 256, 4096, True, 50.0, False, torch.bfloat16),  # Gemma 2 9B
    (1, 4096, 16, 16, 192, 128, None, True, None, False, torch.bfloat16),  # DeepSeek-V3, of 128 heads those of one rank in 8
]
SPACE = attention_fused.SPACE


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
    scores = scores.masked_fill(~visible(mask, t, q_bthd.device)[:, :, None], float("-inf"))
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
    hidden = bias(mask, q_bthd.shape[1], q_bthd.dtype, q_bthd.device)
    return _fused(q_bthd, k_btkd, v_btkd, hidden, scale, repeat=q_bthd.is_cuda and hidden is not None)


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
    def forward(
        ctx: Any, q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, sinks_h: Tensor | None, mask: Mask, scale: float, cap: float | None
    ) -> Tensor:
        b, t, h, d = q_bthd.shape
        heads, e = k_btkd.shape[2], v_btke.shape[3]
        g, n = h // heads, b * heads
        q = q_bthd.unflatten(2, (heads, g)).permute(0, 2, 1, 3, 4).reshape(n, t * g, d)
        k, v = (x.transpose(1, 2).reshape(n, t, -1) for x in (k_btkd, v_btke))
        hidden = bias(mask, t, q.dtype, q.device)
        future = torch.full((min(_BLOCK, t),) * 2, float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        out = q.new_empty(n, t * g, e)
        weights, slopes, lost = [], [], []
        for first, last, low in _blocks(t, mask.window):
            rows = slice(first * g, last * g)
            s = torch.bmm(q[:, rows], k[:, low:last].transpose(1, 2)).mul_(scale)
            if cap is not None:
                s = s.div_(cap).tanh_()
                slopes.append(1.0 - s * s)
                s.mul_(cap)
            grouped = s.view(b, heads, last - first, g, last - low)
            if hidden is None:
                grouped[..., first - low :].add_(future[: last - first, None, : last - first])
            else:
                grouped.add_(hidden[:, :, first:last, None, low:last])
            if sinks_h is None:
                p = torch.softmax(s, -1)  # inside in fp32, rounded once
            else:
                sinks = sinks_h.to(s.dtype).view(heads, 1, g).expand(b, -1, last - first, -1).reshape(n, -1, 1)
                p, sunk = torch.softmax(torch.cat((s, sinks), -1), -1).split((last - low, 1), -1)
                lost.append(sunk)
            weights.append(p)
            torch.bmm(p, v[:, low:last], out=out[:, rows])
        ctx.save_for_backward(q, k, v, *weights, *slopes, *lost)
        ctx.numbers = (b, t, heads, g, mask.window, scale, cap is not None, None if sinks_h is None else sinks_h.dtype)
        return out.view(b, heads, t, g, e).permute(0, 2, 1, 3, 4).reshape(b, t, h, e)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bthe: Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        b, t, heads, g, window, scale, capped, sinks = ctx.numbers
        n, d, e = b * heads, q.shape[-1], v.shape[-1]
        grad = grad_bthe.unflatten(2, (heads, g)).permute(0, 2, 1, 3, 4).reshape(n, t * g, e)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(n, t, x.shape[-1], dtype=wide, device=q.device) for x in (k, v))  # sums over blocks
        dsinks = None if sinks is None else torch.zeros(heads, g, dtype=wide, device=q.device)
        blocks = _blocks(t, window)
        empty = [None] * len(blocks)
        slopes = kept[len(blocks) : 2 * len(blocks)] if capped else empty
        lost = kept[-len(blocks) :] if sinks is not None else empty
        for (first, last, low), p, slope, sunk in zip(blocks, kept, slopes, lost, strict=False):
            rows = slice(first * g, last * g)
            dv[:, low:last] += torch.bmm(p.transpose(1, 2), grad[:, rows])
            dp = torch.bmm(grad[:, rows], v[:, low:last].transpose(1, 2))
            if dsinks is not None and sunk is not None:
                given = (dp.to(wide) * p).sum(-1, keepdim=True) * sunk
                dsinks -= given.view(b, heads, last - first, g).sum((0, 2))
            ds = torch.ops.aten._softmax_backward_data.default(dp, p.contiguous(), -1, p.dtype)  # a sink's own gradient of p is 0
            if slope is not None:
                ds = ds * slope
            torch.bmm(ds, k[:, low:last], out=dq[:, rows])
            dk[:, low:last] += torch.bmm(ds.transpose(1, 2), q[:, rows])
        dq = dq.mul_(scale).view(b, heads, t, g, d).permute(0, 2, 1, 3, 4).reshape(b, t, heads * g, d)
        dk, dv = (x.to(q.dtype).view(b, heads, t, -1).transpose(1, 2) for x in (dk.mul_(scale), dv))
        return dq, dk, dv, None if dsinks is None else dsinks.flatten().to(sinks), None, None, None


def _blocks(tokens: int, window: int | None) -> list[tuple[int, int, int]]:
    """`(first, last, low)`: queries first..last - 1 see keys from `low` on."""
    firsts = range(0, tokens, _BLOCK)
    return [(i, min(i + _BLOCK, tokens), 0 if window is None else max(0, i - window + 1)) for i in firsts]


def blocked(
    q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, mask: Mask, *, scale: float, softcap: float | None = None, sinks_h: Tensor | None = None
) -> Tensor:
    """Attention by batched products over blocks of queries, soft-cap and sinks included: the fastest on CPUs in bf16.

    Forward and backward on one EPYC core, [b, t, h, k, d] bf16: [8, 256, 4, 2, 32] 11 ms, `sdpa` 28; [4, 1024, 8, 4, 64] 161, `sdpa` 307;
    in fp32 the two are equal within a fifth. Keeps batch * heads * tokens ** 2 / 2 weights for the backward, so it is for samples of up to
    some 2000 tokens.
    """
    return _Blocked.apply(q_bthd, k_btkd, v_btke, sinks_h, mask, scale, softcap)  # type: ignore[return-value]


def attention(
    q_bthd: Tensor,
    k_btkd: Tensor,
    v_btke: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_h: Tensor | None = None,
) -> Tensor:
    """`fused` on a GPU, `blocked` on a CPU; by default causal, and scaled by 1 / sqrt(d). A run's version is chosen in its plan: planning/attention.py."""
    options: dict[str, Any] = {"scale": q_bthd.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap, "sinks_h": sinks_h}
    return (fused if q_bthd.is_cuda else blocked)(q_bthd, k_btkd, v_btke, mask or Mask(), **options)


VERSIONS = {
    "reference": reference,
    "sdpa": sdpa,
    "blocked": blocked,
    "fused": fused,
    "cudnn": cudnn,
    "flash": flash,
    "fa3": fa3,
    "fa4": fa4,
    "varlen": varlen,
    "flex": flex,
}
# What makes the masks that each reads: the parts are made once per microbatch and window, and no version makes one that it does not read.
MASKS: Mapping[str, Callable[..., Mask]] = {
    "reference": functools.partial(mask, parts=("visible",)),
    "sdpa": functools.partial(mask, parts=("bias",)),
    "blocked": functools.partial(mask, parts=("bias",)),
    "fused": functools.partial(mask, parts=("bounds",)),
    "cudnn": functools.partial(mask, parts=()),
    "flash": functools.partial(mask, parts=()),
    "fa3": functools.partial(mask, parts=("sequences",)),
    "fa4": functools.partial(mask, parts=("sequences",)),
    "varlen": functools.partial(mask, parts=("sequences",)),
    "flex": functools.partial(mask, parts=("tiles",)),
}


def supports(
    version: str,
    q_bthd: Tensor,
    k_btkd: Tensor,
    v_btke: Tensor,
    mask: Mask,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    sinks_h: Tensor | None = None,
) -> str | None:
    """Why a version cannot take these; None: it can."""
    if version == "fused":
        return attention_fused.supports(q_bthd, k_btkd, v_btke, scale, sinks_h)
    if version in attention_torch.LIMITS:
        return attention_torch.supports(version, q_bthd, k_btkd, v_btke, mask, softcap=softcap, sinks_h=sinks_h)
    if version == "sdpa" and (softcap is not None or sinks_h is not None):
        return "torch's fused attention has no soft-caps and no sinks"
    return None


def _sample(case: Any, device: str) -> launch.Sample:
    b, t, h, k, d, e, window, documents, softcap, sinks, dtype = case
    rows = None
    if documents:  # eight or so a row, where there is room for so many
        rows = torch.randint(0, min(8, 3 + t // 64), (b, t), device=device).sort(-1).values.int()
    tensors = [torch.randn(b, t, heads, width, dtype=dtype, device=device) for heads, width in ((h, d), (k, d), (k, e))]
    if sinks:
        tensors.append(torch.randn(h, dtype=dtype, device=device))
    made: dict[Any, Mask] = {}  # once per version, as a microbatch makes it once for all its layers

    def call(f: Any, *given: Tensor) -> Any:
        q = given[0]
        name = next((name for name, version in VERSIONS.items() if version is f), None)
        key = (name, q.dtype, q.device)
        if key not in made:
            made[key] = MASKS.get(name or "", mask)(
                rows, window, t, q.dtype, q.device
            )  # a stranger, such as a compiled reference, gets every square
        return f(*given[:3], made[key], scale=d**-0.5, softcap=softcap, sinks_h=given[3] if sinks else None)

    return tensors, call


def pairs(tokens: int, window: int | None) -> int:
    """Visible pairs of a causal sample of one document."""
    reach = min(tokens, window or tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def _traffic(case: Any) -> launch.Traffic:
    """Of causal attention over whole samples, documents not deducted: two products forward and five backward of each visible pair."""
    b, t, h, k, d, e, window, *_, dtype = case
    count, inputs = 2 * b * h * pairs(t, window), b * t * (h + k) * (d + e) * dtype.itemsize
    return launch.Traffic(inputs, 2 * inputs, count * (d + e), count * (3 * d + 2 * e))


OPERATIONS = {"attention": launch.Operation(VERSIONS, CASES, SIZES, _sample, _traffic)}

"""The head's product, soft-cap and cross entropy in one, summed over the tokens that have a label.

    l = scale * h w^T        l = c * tanh(l / c) if softcap        lse = log sum exp l
    loss_sum = sum of (lse - l[label]) + z_loss * lse ** 2        ce_sum = sum of lse - l[label]

Legend: hidden_nh tokens by channels; weight_vh vocabulary by channels; labels_n int64, `ignore` = no label. Sums are fp32 scalars (fp64 for fp64
inputs); the products run in the inputs' dtype. The backward, with p = softmax(l) and t = onehot(label):
    dl = p - t + 2 * z_loss * lse * p        times (1 - (l / c) ** 2) if softcap        times scale        dh = dl w        dw = dl^T h
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gigatrain.kernels import launch

IGNORE = -100
# (tokens, channels, vocabulary, softcap, scale, z_loss, dtype)
CASES = [
    (*shape, softcap, scale, z_loss, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ((64, 32, 96), (33, 17, 31), (1, 8, 3))
    for softcap, scale, z_loss in ((None, 1.0, 0.0), (5.0, 1.0, 0.0), (None, 0.125, 1e-2), (3.0, 0.5, 1e-3))
]


SIZES = [(8192, 4096, 128256, None, 1.0, 0.0, torch.bfloat16), (8192, 2048, 128256, None, 1.0, 0.0, torch.bfloat16)]


def reference(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    ignore: int = IGNORE,
) -> tuple[Tensor, Tensor]:
    """`(loss_sum, ce_sum)` in plain torch, every logit in memory; ce_sum carries no gradient. No labels at all: 0 and zero gradients."""
    logits = F.linear(hidden_nh, weight_vh)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ce = F.cross_entropy(logits, labels_n, ignore_index=ignore, reduction="sum")
    if not z_loss:
        return ce, ce.detach()
    lse = torch.logsumexp(logits, -1)
    return ce + z_loss * torch.where(labels_n != ignore, lse, 0.0).square().sum(), ce.detach()


# Logits of one chunk: 8 MB in fp32 stay in a CPU's cache, and a GPU wants products of some thousand tokens. Forward and backward of 2048 x 192 x 4096
# in bf16 on one EPYC core, CPU time: 2**18 138 ms, 2**20 90, 2**21 83, 2**22 101, 2**23 (all at once) 130, reference 204; in fp32 151, reference 274.
# Never fewer than 64 tokens, or the products starve.
_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}


class _Chunked(torch.autograd.Function):
    """Both sums, and in the same pass the gradients for a unit gradient of the loss, chunk by chunk of tokens."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, labels: Tensor, cap: float | None, scale: float, z: float, ignore: int, grad: bool) -> Any:
        n, v = h.shape[0], w.shape[0]
        wide = torch.promote_types(h.dtype, torch.float32)
        chunk = max(64, min(n, _ELEMENTS.get(h.device.type, 1 << 28) // v))
        narrow = h.new_empty(min(chunk, n), v)  # logits, then their gradient, in the dtype of the products
        broad = narrow if wide == h.dtype else torch.empty(narrow.shape, dtype=wide, device=h.device)
        want_h, want_w = grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1]
        dh = torch.empty_like(h) if want_h else None
        dw = torch.zeros(w.shape, dtype=wide, device=h.device) if want_w else None
        losses, ces = h.new_zeros(2, dtype=wide).unbind()
        for at in range(0, n, chunk):
            h_c, label = h[at : at + chunk], labels[at : at + chunk]
            g, p = narrow[: h_c.shape[0]], broad[: h_c.shape[0]]
            torch.mm(h_c, w.t(), out=g)
            if p is not g:
                p.copy_(g)
            if cap is not None:
                t = p.mul_(scale / cap).tanh_().clone()
                p.mul_(cap)
            elif scale != 1.0:
                p.mul_(scale)
            valid = label != ignore
            at_label = torch.where(valid, label, 0)[:, None]
            top, own = p.amax(-1), p.gather(1, at_label)[:, 0]
            torch.softmax(p, -1, out=p)
            # The largest probability is at least 1 / v, so its logarithm is exact where that of the label's would underflow.
            log_top = p.amax(-1).log_()
            ce = torch.where(valid, (top - own) - log_top, 0.0)
            ces = ces + ce.sum()
            losses = losses + ce.sum()
            if z:
                lse = torch.where(valid, top - log_top, 0.0)
                losses = losses + z * lse.square().sum()
            if not (want_h or want_w):
                continue
            own_p = p.gather(1, at_label)
            if z:
                growth = lse.mul(2.0 * z).add_(1.0)[:, None]
                own_p = own_p * growth
                p.mul_(growth)
            own_p = own_p - 1.0  # in fp32: in bf16, p - 1 of a sure prediction would be 0
            if cap is not None:
                p.addcmul_(p * t, t, value=-1.0)
                own_p = own_p * (1.0 - t.gather(1, at_label).square())
            if g is not p:
                g.copy_(p)
            g.scatter_(1, at_label, own_p.to(g.dtype))
            # Tokens without a label are silenced where rows are short: in h and dh rather than in the gradient of the logits.
            mask = valid[:, None]
            if dw is not None:
                h_c = h_c * mask
                if wide == h.dtype:
                    dw.addmm_(g.t(), h_c)
                else:
                    dw += g.t() @ h_c
            if dh is not None:
                torch.mm(g, w, out=dh[at : at + chunk])
                dh[at : at + chunk].mul_(mask)
        ctx.save_for_backward(dh, dw)
        ctx.scale, ctx.dtype = scale, w.dtype
        ctx.mark_non_differentiable(ces)
        return losses, ces

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        dh, dw = ctx.saved_tensors
        grad = grad * ctx.scale
        return None if dh is None else dh * grad.to(dh.dtype), None if dw is None else (dw * grad).to(ctx.dtype), *(None,) * 6


def chunked(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    ignore: int = IGNORE,
) -> tuple[Tensor, Tensor]:
    """As `reference`, with the logits of one chunk in memory instead of all; the weight's gradient is summed in fp32 over the chunks.

    Gradients are made in the forward pass, so a backward costs one multiplication, and there is no second derivative.
    """
    return _Chunked.apply(hidden_nh, weight_vh, labels_n, softcap, scale, z_loss, ignore, torch.is_grad_enabled())  # type: ignore[return-value]


linear_cross_entropy = chunked


def _sample(case: Any, device: str) -> launch.Sample:
    n, h, v, softcap, scale, z_loss, dtype = case
    labels = torch.randint(0, v, (n,), device=device)
    if n > 1:
        labels[:: max(1, n // 5)] = IGNORE

    def call(f: Any, x: Tensor, w: Tensor) -> Any:
        return f(x, w, labels, softcap=softcap, scale=scale, z_loss=z_loss)

    return [torch.randn(n, h, dtype=dtype, device=device), torch.randn(v, h, dtype=dtype, device=device) * 0.5], call


def _traffic(case: Any) -> launch.Traffic:
    n, h, v, *_, dtype = case
    return launch.Traffic((n * h + v * h) * dtype.itemsize, (n * h + v * h) * dtype.itemsize, 2.0 * n * h * v, 4.0 * n * h * v)


OPERATIONS = {"linear_cross_entropy": launch.Operation({"reference": reference, "chunked": chunked}, CASES, SIZES, _sample, _traffic)}

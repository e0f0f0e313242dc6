"""The head's product, the cross entropy of its logits, and their divergence from a teacher's top k, without ever holding all logits of either.

    s = softcapped(scale * h w^T)        q = softmax(s / T)        p_1 .. p_k, p_rest: the teacher's at temperature T, rest: all tokens but the k together
    kl = sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)        q_rest = sum of q over all tokens but the k
    loss = sum over the tokens that have a label of (1 - weight) * ce + weight * T^2 * kl

T and T^2: Hinton et al., arXiv:1503.02531. kl is the forward divergence of the two distributions once the rest is one outcome, hence at most that of the
whole vocabulary, equal to it for k = vocabulary, and 0 only where the k agree; a top k that is renormalised, without the rest, is not (arXiv:2503.16870).
    d kl / d (s / T)_j = q_j - p_j of the k        q_j - p_rest * q_j / q_rest of the others        d ce / d s = softmax(s) - onehot

Legend: hidden_nh tokens by channels; weight_vh vocabulary by channels; labels_n int64, -100 = no label; ids_nk int64, the teacher's k; logprobs_nc fp32, c =
k + 1: of the k, and of the rest last (-inf where k is the vocabulary). Sums are fp32 (fp64 for fp64 inputs); the products run in the inputs' dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gigatrain.kernels.linear_cross_entropy import tokens_per_chunk


def _capped(x: Tensor, softcap: float | None, scale: float) -> Tensor:
    x = x * scale if scale != 1.0 else x
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def reference(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    ids_nk: Tensor,
    logprobs_nc: Tensor,
    *,
    weight: float,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, ce, kl)` summed over the labels, in plain torch with every logit in memory; only the first carries a gradient."""
    logits = F.linear(hidden_nh, weight_vh)
    s = _capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap, scale)
    there = labels_n >= 0
    ce = F.cross_entropy(s, labels_n.clamp(min=0), reduction="none")[there].sum()
    logq = (s / temperature).log_softmax(1)
    rest = logq.scatter(1, ids_nk, -torch.inf).logsumexp(1, keepdim=True) if ids_nk.shape[1] < s.shape[1] else logq[:, :1].detach() * 0
    logq = torch.cat([logq.gather(1, ids_nk), rest], 1)
    logp = logprobs_nc.to(s.dtype)
    p = logp.exp()
    kl = torch.where(p > 0, p * (torch.where(p > 0, logp, 0.0) - logq), 0.0).sum(1)[there].sum()
    return (1 - weight) * ce + weight * temperature**2 * kl, ce.detach(), kl.detach()


class _Distilled(torch.autograd.Function):
    """Chunk by chunk: loss, cross entropy, divergence, and in the same pass the gradients for a unit gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, weight: float, t: float, softcap: float | None, scale: float
    ) -> Any:  # fmt: skip
        n, v, k = h.shape[0], w.shape[0], ids.shape[1]
        wide = torch.promote_types(h.dtype, torch.float32)
        chunk = tokens_per_chunk(h.device.type, n, v)
        makes = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dh = torch.empty_like(h) if makes[0] else None
        dw = torch.zeros(w.shape, dtype=wide, device=w.device) if makes[1] else None
        sums = torch.zeros(2, dtype=wide, device=h.device)
        for at in range(0, n, chunk):
            c = slice(at, at + chunk)
            x = torch.mm(h[c], w.t()).to(wide)
            s = _capped(x, softcap, scale)
            there = (labels[c] >= 0)[:, None]
            label = labels[c].clamp(min=0)[:, None]
            q = torch.softmax(s, 1)  # of the cross entropy
            sums[0] += torch.where(there, s.logsumexp(1, keepdim=True) - s.gather(1, label), 0.0).sum()
            grad = q.scatter_add(1, label, torch.full_like(label, -1, dtype=wide)).mul_(1 - weight)
            tempered = s / t
            chosen = tempered.gather(1, ids[c])
            lse = tempered.logsumexp(1, keepdim=True)
            logp = logprobs[c].to(wide)
            p = logp.exp()
            logp = torch.where(p > 0, logp, 0.0)
            kl = (torch.where(p[:, :k] > 0, p[:, :k] * (logp[:, :k] - chosen + lse), 0.0)).sum(1, keepdim=True)
            qs = torch.exp(tempered - lse)
            total = p.sum(1, keepdim=True)
            if k < v:
                lse_rest = tempered.scatter(1, ids[c], -torch.inf).logsumexp(1, keepdim=True)
                kl += p[:, k:] * (logp[:, k:] - lse_rest + lse)
                # All tokens as if they were of the rest, q_j total - p_rest q_j / q_rest; then the k, of which that may be infinite: q_j total - p_j.
                g = qs * total - p[:, k:] * torch.exp(tempered - lse_rest)
                g.scatter_(1, ids[c], qs.gather(1, ids[c]) * total - p[:, :k])
            else:
                g = (qs * total).scatter_add(1, ids[c], -p[:, :k])
            sums[1] += torch.where(there, kl, 0.0).sum()
            grad += g.mul_(weight * t)
            grad.mul_(there)
            if softcap is not None:
                grad.mul_(1 - (s / softcap).square())
            narrow = grad.mul_(scale).to(h.dtype)
            if dh is not None:
                torch.mm(narrow, w, out=dh[c])
            if dw is not None:
                dw += torch.mm(narrow.t(), h[c]).to(wide)
        ctx.save_for_backward(dh, None if dw is None else dw.to(w.dtype))
        ce, kl = sums.unbind()
        ctx.mark_non_differentiable(ce, kl)
        ctx.set_materialize_grads(False)
        return (1 - weight) * ce + weight * t * t * kl, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * 9
        return *(None if one is None else (one * grad).to(one.dtype) for one in ctx.saved_tensors), *(None,) * 7


def chunked(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    ids_nk: Tensor,
    logprobs_nc: Tensor,
    *,
    weight: float,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, with the logits of one chunk of tokens in memory. Gradients are made in the forward pass; there is no second derivative."""
    return _Distilled.apply(hidden_nh, weight_vh, labels_n, ids_nk, logprobs_nc, weight, temperature, softcap, scale)  # type: ignore[return-value]


@torch.no_grad()
def top(
    hidden_nh: Tensor, weight_vh: Tensor, k: int, *, temperature: float = 1.0, softcap: float | None = None, scale: float = 1.0, vocab: int | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A teacher's `(ids_nk int32, logprobs_nc fp32)` at a temperature, likeliest first, the rest last; chunk by chunk. Ids are below `vocab`, if given."""
    n, v = hidden_nh.shape[0], weight_vh.shape[0]
    wide = torch.promote_types(hidden_nh.dtype, torch.float32)
    ids = torch.empty(n, k, dtype=torch.int32, device=hidden_nh.device)
    found = torch.empty(n, k + 1, dtype=torch.float32 if wide == torch.float32 else wide, device=hidden_nh.device)
    chunk = tokens_per_chunk(hidden_nh.device.type, n, v)
    for at in range(0, n, chunk):
        c = slice(at, at + chunk)
        s = _capped(torch.mm(hidden_nh[c], weight_vh.t()).to(wide), softcap, scale) / temperature
        lse = s.logsumexp(1, keepdim=True)
        values, at_k = s[:, :vocab].topk(k, 1)
        ids[c] = at_k.int()
        found[c, :k] = values - lse
        found[c, k:] = s.scatter(1, at_k, -torch.inf).logsumexp(1, keepdim=True) - lse if k < v else -torch.inf
    return ids, found

"""The router of a mixture of experts: which k of E experts a token visits, with what weights, and what the losses of balance need (arXiv:2101.03961).

    l_ne = x_nd . w_ed (+ the logits' bias_e)                 scores_ne = softmax(l_ne) or sigmoid(l_ne), in fp32
    kept groups of n: the `groups_kept` of `groups` neighbours of E / groups experts with the largest sum of their two highest scores_ne + bias_e
    chosen_nk = the k largest of scores_ne + bias_e in kept groups, the highest first, equal ones by number
    weights_nk = scale * scores_n[chosen], where wanted divided by their sum + epsilon; for "softmax_after" scale * softmax(l_n[chosen])
    p_ne = softmax(l_ne), of sigmoids scores_ne / sum_e scores_ne         lse_n = log sum_e exp(l_ne)

    counts_e = tokens that chose e        shares_e = sum_n p_ne        squares = sum_n lse_n^2        each of the tokens of one sequence

`bias_e` (arXiv:2408.15664) moves the choice and no weight. Without it and groups the choice is by the logits, which order as the scores do and are not
equal where those are rounded to 1. transformers' formulas: mixtral, qwen3_moe, olmoe, deepseek_v3, mistral4, gpt_oss.

Legend: n tokens of one sequence, b sequences (all dims before the tokens'), d hidden channels, e experts, k visits of a token, l layers.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.kernels import launch


@dataclass(frozen=True)
class Router:
    """The numbers of a router; formulas at the top of the file.

    `wide`: the logits are a product in fp32 (deepseek_v3); else in the tokens' dtype. `losses`: the sums that balance_loss and z_loss need are made.
    """

    visits: int
    scores: Literal["softmax", "sigmoid", "softmax_after"] = "softmax"
    renormalise: bool = False
    epsilon: float = 0.0
    groups: int = 1
    groups_kept: int = 1
    scale: float = 1.0
    wide: bool = False
    losses: bool = False


class Routed(NamedTuple):
    """What a router says of its tokens: choice and counts in int64, the rest in fp32 (or fp64), with gradients; the last two None without `losses`."""

    weights_nk: Tensor
    chosen_nk: Tensor
    counts_be: Tensor
    shares_be: Tensor | None = None
    squares_b: Tensor | None = None


# (tokens, sequences, experts, numbers, what is given of "bias" and "logits", dtype)
CASES = [
    (tokens, sequences, experts, numbers, given, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, sequences, experts, numbers, given in (
        (5, (), 4, Router(2), ""),
        (33, (2,), 12, Router(3, renormalise=True, losses=True), ""),
        (31, (), 16, Router(4, "sigmoid", True, 1e-20, 4, 2, 2.5, True, True), "bias"),
        (33, (1,), 24, Router(4, "softmax", True, 1e-20, 3, 2, 1.5), ""),
        (9, (2, 2), 8, Router(3, "softmax_after", losses=True), "logits"),
        (33, (), 20, Router(16, "sigmoid", scale=0.5, losses=True), "bias logits"),
        (3, (), 1, Router(1), ""),
        (1, (2,), 5, Router(5, renormalise=True), ""),
        (0, (2,), 6, Router(2, renormalise=True, losses=True), ""),
    )
]
# Qwen3-30B-A3B, Mixtral-8x7B, DeepSeek-V3, gpt-oss-120b
SIZES = [
    (8192, (), experts, numbers, given, torch.bfloat16)
    for experts, numbers, given in (
        (128, Router(8, renormalise=True, losses=True), ""),
        (8, Router(2, renormalise=True, losses=True), ""),
        (256, Router(8, "sigmoid", True, 1e-20, 8, 4, 2.5, True), "bias"),
        (128, Router(4, "softmax_after"), "logits"),
    )
]
_HIDDEN = 64  # channels of a case's tokens


def logits(x_nd: Tensor, weight_ed: Tensor, wide: bool, logits_bias_e: Tensor | None = None) -> Tensor:
    """l_ne in fp32 (or fp64): a product in the tokens' dtype, or in fp32 where `wide`."""
    dtype = torch.promote_types(x_nd.dtype, torch.float32)
    if not wide:
        return F.linear(x_nd, weight_ed, logits_bias_e).to(dtype)
    return F.linear(x_nd.to(dtype), weight_ed.to(dtype), None if logits_bias_e is None else logits_bias_e.to(dtype))


def _kept(keys_ne: Tensor, numbers: Router) -> Tensor:
    """Whether each expert of each token is of a kept group."""
    keys_nge = keys_ne.unflatten(-1, (numbers.groups, -1))
    best_ng = keys_nge.topk(min(2, keys_nge.shape[-1]), -1).values.sum(-1)
    groups_ng = best_ng.sort(stable=True, dim=-1, descending=True).indices[..., : numbers.groups_kept]
    kept_ng = torch.zeros_like(best_ng, dtype=torch.bool).scatter_(-1, groups_ng, True)
    return kept_ng.unsqueeze(-1).expand_as(keys_nge).flatten(-2)


def reference(
    x_nd: Tensor, weight_ed: Tensor, numbers: Router, bias_e: Tensor | None = None, logits_bias_e: Tensor | None = None
) -> Routed:
    """The choice of every token and the sums of every sequence, in plain torch. Where x has dims before its tokens', so have the sums."""
    logits_ne = logits(x_nd, weight_ed, numbers.wide, logits_bias_e)
    scores_ne = logits_ne.sigmoid() if numbers.scores == "sigmoid" else logits_ne.softmax(-1)
    keys_ne = (logits_ne if bias_e is None else scores_ne + bias_e).detach()
    if numbers.groups > 1:
        kept_ne = _kept(keys_ne if bias_e is not None else scores_ne.detach(), numbers)
        keys_ne = keys_ne.masked_fill(~kept_ne, float("-inf"))
    chosen_nk = keys_ne.sort(stable=True, dim=-1, descending=True).indices[..., : numbers.visits].contiguous()
    weights_nk = (logits_ne if numbers.scores == "softmax_after" else scores_ne).gather(-1, chosen_nk)
    if numbers.scores == "softmax_after":
        weights_nk = weights_nk.softmax(-1)
    elif numbers.renormalise:
        weights_nk = weights_nk / (weights_nk.sum(-1, keepdim=True) + numbers.epsilon)
    counts_be = torch.zeros_like(logits_ne, dtype=torch.int64).scatter_(-1, chosen_nk, 1).sum(-2)
    routed = Routed(weights_nk * numbers.scale, chosen_nk, counts_be)
    if not numbers.losses:
        return routed
    shares_ne = scores_ne / scores_ne.sum(-1, keepdim=True) if numbers.scores == "sigmoid" else scores_ne
    return routed._replace(shares_be=shares_ne.sum(-2), squares_b=logits_ne.logsumexp(-1).square().sum(-1))


def balance_loss(counts_le: Tensor, shares_le: Tensor, tokens: int) -> Tensor:
    """E sum_e (sum_l counts_le / R) (sum_l shares_le / R) with R = l `tokens`: the auxiliary loss of arXiv:2101.03961 as transformers counts it.

    It is k where experts are visited alike; rows of several sequences or layers are summed first, so that layers share their balance.
    """
    counts_e, shares_e = counts_le.flatten(0, -2).sum(0), shares_le.flatten(0, -2).sum(0)
    rows = max(1, tokens * counts_le.shape[0])
    return counts_le.shape[-1] * ((counts_e / rows) * (shares_e / rows)).sum()


def sequence_balance_loss(counts_be: Tensor, shares_be: Tensor, tokens: int, visits: int) -> Tensor:
    """The mean over sequences of sum_e (E counts_be / (k t)) (shares_be / t), t = `tokens` of a sequence: DeepSeek-V3's (arXiv:2412.19437, 17-20)."""
    experts = counts_be.shape[-1]
    return ((counts_be * (experts / max(1, visits * tokens))) * (shares_be / max(1, tokens))).sum(-1).mean()


def z_loss(squares: Tensor, rows: int) -> Tensor:
    """The mean over `rows` (tokens, of all layers whose sums are given) of lse_n^2, which keeps logits small (arXiv:2202.08906, 5)."""
    return squares.sum() / max(1, rows)


def bias_update(counts_e: Tensor, bias_e: Tensor, rate: float) -> Tensor:
    """bias_e + rate * sign(mean - counts_e), after a step in which `counts_e` of all ranks' tokens visited each expert (arXiv:2408.15664, 1)."""
    counts = counts_e.to(torch.float64 if bias_e.dtype == torch.float64 else torch.float32)
    return bias_e + rate * (counts.mean(-1, keepdim=True) - counts).sign().to(bias_e.dtype)


def _sample(case: Any, device: str) -> launch.Sample:
    tokens, sequences, experts, numbers, given, dtype = case
    # A token sees one channel, and a channel's weights are distinct: the logits are exact in every dtype, so that no rounding moves a choice.
    x = torch.zeros(*sequences, tokens, _HIDDEN, device=device)
    x.scatter_(-1, torch.randint(_HIDDEN, (*sequences, tokens, 1), device=device), 2.0)
    steps = torch.rand(_HIDDEN, experts, device=device).argsort(-1).to(torch.float32) - experts / 2
    weight = steps.t() * (4.0 / max(16, experts))
    bias = torch.randn(experts, device=device) * 0.1 if "bias" in given.split() else None
    logits_bias = [(torch.randint(-8, 8, (experts,), device=device) / 64).to(dtype)] if "logits" in given else []

    def call(f: Any, x: Tensor, weight: Tensor, logits_bias: Tensor | None = None) -> Any:
        return tuple(out for out in f(x, weight, numbers, bias, logits_bias) if out is not None)

    return [x.to(dtype), weight.to(dtype), *logits_bias], call


def _traffic(case: Any) -> launch.Traffic:
    """Of all but the product, whose bytes and FLOPs are the caller's: logits in, weights and choice out; gradients of the weights in, of the logits out."""
    tokens, sequences, experts, numbers, _, _ = case
    rows = tokens
    for count in sequences:
        rows *= count
    return launch.Traffic(rows * (4 * experts + 12 * numbers.visits), rows * (8 * experts + 12 * numbers.visits))


OPERATIONS = {"router": launch.Operation({"reference": reference}, CASES, SIZES, _sample, _traffic)}

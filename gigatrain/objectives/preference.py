"""Losses of answers that somebody preferred, on log-probabilities that are never taken from whole logits (kernels/linear_cross_entropy.py).

    s = log p(answer | prompt), summed over its tokens; m = s / tokens; r = s - s_reference; c the preferred answer of a pair, j the refused; L = log sigmoid
    dpo     - (1 - e) L(b d) - e L(- b d),  d = r_c - r_j                              arXiv:2305.18290; e: eq. 3 of the conservative form in its repository
            (- (1 - e) L(b d) + e L(- b d)) / (1 - 2 e)  with `robust`                 arXiv:2403.00409
    ipo     (r_c / tokens_c - r_j / tokens_j - 1 / (2 b))^2                            arXiv:2310.12036, by the mean over tokens as its authors advise
    simpo   as dpo of  b (m_c - m_j) - g  in place of  b d                             arXiv:2405.14734
    orpo    nll_c - b L(log odds_c - log odds_j),  odds = p / (1 - p), p = exp(m)      arXiv:2403.07691
    kto     w (1 - sigmoid(b (r - z)))  of a good answer, w (1 - sigmoid(b (z - r))) of another, z = max(0, mean of r over foreign answers)     arXiv:2402.01306

With `nll` n, dpo, ipo and simpo add - n m_c (arXiv:2407.21783, 4.1.4; arXiv:2404.19733, eq. 1).
Rewards are b r (orpo: b m, simpo: b m). A row of a microbatch holds pairs end to end: document 2 k is the preferred answer of its k-th pair behind its
prompt, document 2 k + 1 the refused one, so that both are always in one microbatch. Of kto a row holds one answer.

`given` of a microbatch (legend: b rows, t tokens, p pairs of a row, s the two answers of a pair, or the answer and the foreign answer of kto):
    there_bp          1 where a row has such a pair, 0 where it is filled up
    reference_bps     what the reference says (dpo, ipo, kto), where it was computed before; else it is the model itself without its adapters
    answer_bt         of labels, those of the answer; absent: all are. orpo's nll is of all labels of the preferred row, its odds of the answer's
    good_bp           kto: 1 for a good answer
    foreign_tokens_bt, foreign_labels_bt    kto: the row's prompt with another row's answer, in the form of tokens and labels
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.config import Objective
from gigatrain.data.loader import Microbatch
from gigatrain.models import adapters

CERTAIN = -1e-7  # odds of a probability of 1 are infinite: the largest mean log-probability that has a gradient


def log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean)."""
    mean = mean.clamp(max=CERTAIN)
    return mean - torch.log(-torch.expm1(mean))


def losses(
    objective: Objective, sums_ps: Tensor, counts_ps: Tensor, reference_ps: Tensor | None, nll_p: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(loss_p, rewards_ps)` of pairs, of which s is the preferred and the refused answer; counts are tokens, 1 at least."""
    loss_p, rewards_ps = _compared(objective, sums_ps, counts_ps, reference_ps, nll_p)
    return (loss_p - objective.nll * (sums_ps / counts_ps)[..., 0] if objective.nll else loss_p), rewards_ps


def _compared(
    objective: Objective, sums_ps: Tensor, counts_ps: Tensor, reference_ps: Tensor | None, nll_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, e = objective.strength, objective.label_smoothing
    means_ps = sums_ps / counts_ps
    if objective.kind in ("orpo", "simpo"):
        rewards = b * means_ps
    else:
        assert reference_ps is not None, "the plan sees to a reference"
        rewards = b * (sums_ps - reference_ps)
    if objective.kind == "ipo":
        chosen, refused = (rewards / b / counts_ps).unbind(-1)
        return (chosen - refused - 1 / (2 * b)) ** 2, rewards
    if objective.kind == "orpo":
        assert nll_p is not None
        chosen, refused = log_odds(means_ps).unbind(-1)
        return nll_p - b * F.logsigmoid(chosen - refused), rewards
    lead = rewards[..., 0] - rewards[..., 1] - (objective.margin if objective.kind == "simpo" else 0.0)
    right, wrong = F.logsigmoid(lead), F.logsigmoid(-lead)
    if objective.robust:
        return (e * wrong - (1 - e) * right) / (1 - 2 * e), rewards
    return -(1 - e) * right - e * wrong if e else -right, rewards


def of_answers(objective: Objective, sums_p: Tensor, reference_p: Tensor, good_p: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
    """`(loss_p, rewards_p)` of kto; good 1 or 0, `kl` 0-d without a gradient."""
    lead_p = sums_p - reference_p
    sign_p = 2 * good_p - 1
    weight_p = torch.where(good_p > 0, objective.desirable, objective.undesirable)
    return weight_p * (1 - torch.sigmoid(objective.strength * sign_p * (lead_p - kl))), objective.strength * lead_p


def by_document(values_bt: Tensor, documents_bt: Tensor | None, count: int) -> Tensor:
    """Sums [b, count] over each document of a row; in one order, whatever the device."""
    if documents_bt is None:
        return F.pad(values_bt.sum(1, keepdim=True), (0, count - 1))
    mine_bct = documents_bt[:, None] == torch.arange(count, device=values_bt.device)[:, None]
    return (values_bt[:, None] * mine_bct).sum(-1)


def compute(
    objective: Objective, model: Any, part: Microbatch, positions: Tensor | None, *, known: Tensor | None = None, **terms: Any
) -> tuple[Tensor, Tensor]:
    """`(loss_sum, reported)` over the pairs of a microbatch: reported is the loss and FIGURES' sums (figures.py), fp64. `known` is kto's z."""
    assert part.given is not None, "rows of pairs say what they are"
    sides = 1 if objective.kind == "kto" else 2
    there_bp = part.given["there_bp"]
    run = functools.partial(model.logprobs, part.tokens, part.labels, positions, part.documents, **terms)
    logprobs_bt = run()
    counted_bt = part.labels >= 0
    answers_bt = part.given.get("answer_bt")
    mine_bt = counted_bt if answers_bt is None else counted_bt & answers_bt.bool()
    split = functools.partial(by_document, documents_bt=part.documents, count=sides * there_bp.shape[1])
    sums_bps, counts_bps = (
        split(x).unflatten(1, (-1, sides)) for x in (torch.where(mine_bt, logprobs_bt, 0.0), mine_bt.to(logprobs_bt.dtype))
    )
    counts_bps = counts_bps.clamp(min=1)
    there = there_bp > 0
    reference_bps = part.given.get("reference_bps")
    if objective.reference == "adapter":
        with torch.no_grad(), adapters.disabled(model):
            reference_bps = split(torch.where(mine_bt, run(), 0.0)).unflatten(1, (-1, sides))
    extra: list[Tensor] = []
    if objective.kind == "kto":
        assert reference_bps is not None
        assert known is not None
        good_bp = part.given["good_bp"]
        loss_bp, rewards_bp = of_answers(objective, sums_bps[..., 0], reference_bps[..., 0], good_bp, known)
        rewards_bps = torch.stack([rewards_bp * good_bp, rewards_bp * (1 - good_bp)], -1)
        logs_bps = torch.stack([sums_bps[..., 0] * good_bp, sums_bps[..., 0] * (1 - good_bp)], -1)
        right_bp = (rewards_bp > objective.strength * known) == (good_bp > 0)
        extra = [(good_bp * there).sum(), known * there.sum()]
    else:
        nll_bp = None
        if objective.kind == "orpo":
            whole, tokens = (split(x).unflatten(1, (-1, 2))[..., 0] for x in (logprobs_bt, counted_bt.to(logprobs_bt.dtype)))
            nll_bp = -whole / tokens.clamp(min=1)
            extra = [torch.where(there, nll_bp, 0.0).sum()]
        loss_bp, rewards_bps = losses(objective, sums_bps, counts_bps, reference_bps, nll_bp)
        logs_bps = sums_bps / counts_bps if objective.kind in ("orpo", "simpo") else sums_bps
        right_bp = rewards_bps[..., 0] > rewards_bps[..., 1]
    loss = torch.where(there, loss_bp, 0.0).sum()
    sums = [torch.where(there, x, 0.0).sum() for x in (*rewards_bps.unbind(-1), *logs_bps.unbind(-1), right_bp.to(loss.dtype))]
    return loss, torch.stack([x.detach().double() for x in (loss, mine_bt.sum(), *sums, *extra)])


@torch.no_grad()
def answers(logprobs: Callable[[Microbatch], Tensor], part: Microbatch, form: str) -> Tensor:
    """Sums [b, p, 2] of the log-probabilities of both answers of each pair, or of an answer and its foreign one: what is kept of a reference."""
    assert part.given is not None
    most = part.given["there_bp"].shape[1]
    if form == "single":
        foreign = Microbatch(part.given["foreign_tokens_bt"], part.given["foreign_labels_bt"], part.positions, None)
        mine = replace(part, documents=None)
        return torch.stack([logprobs(one).sum(1) for one in (mine, foreign)], 1)[:, None]
    found_bt = logprobs(part)
    if (mine_bt := part.given.get("answer_bt")) is not None:
        found_bt = torch.where(mine_bt, found_bt, 0.0)
    return by_document(found_bt, part.documents, 2 * most).unflatten(1, (most, 2))


@torch.no_grad()
def foreign(objective: Objective, model: Any, part: Microbatch) -> Tensor:
    """Of kto, `(sum of r over the foreign answers of a microbatch, their count)`, fp64: over a step its z is made of both."""
    assert part.given is not None
    there_b = part.given["there_bp"][:, 0]

    def sums() -> Tensor:
        assert part.given is not None
        return model.logprobs(part.given["foreign_tokens_bt"], part.given["foreign_labels_bt"]).sum(1)

    training = model.training
    model.eval()  # no adapter drops anything here
    if objective.reference == "adapter":
        with adapters.disabled(model):
            reference_b = sums()
    else:
        reference_b = part.given["reference_bps"][:, 0, 1]
    lead_b = sums() - reference_b
    model.train(training)
    return torch.stack([torch.where(there_b > 0, lead_b, 0.0).sum().double(), there_b.sum().double()])

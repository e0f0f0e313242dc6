"""Losses of pairs against their formulas in plain torch on whole logits in fp64, and what must not change them: fillers, cuts, neighbours in a row."""

import math

import numpy as np
import pytest
import torch
from pairsof import EOS, FAST, VOCAB, document, logprobs, loss, microbatch, pairs
from pydantic import ValidationError
from torch.nn.functional import log_softmax, logsigmoid

from gigatrain import objectives
from gigatrain.architectures import Architecture
from gigatrain.config import Objective
from gigatrain.data.loader import Microbatch
from gigatrain.data.pack import Sample
from gigatrain.data.pairs import lay, room
from gigatrain.models.decoder import Decoder
from gigatrain.objectives import figures, preference

KINDS = [
    Objective(kind="dpo"),
    Objective(kind="dpo", beta=0.3, label_smoothing=0.2),
    Objective(kind="dpo", label_smoothing=0.2, robust=True),
    Objective(kind="ipo", beta=0.2),
    Objective(kind="simpo", margin=0.7),
    Objective(kind="simpo", label_smoothing=0.1),
    Objective(kind="orpo", beta=0.4),
    Objective(kind="kto", beta=0.5, desirable=1.3, undesirable=0.7),
    Objective(kind="dpo", nll=0.2),
    Objective(kind="simpo", nll=1.0),
]
IDS = ["dpo", "conservative", "robust", "ipo", "simpo", "smoothed", "orpo", "kto", "dpo and nll", "simpo and nll"]


def model(seed=0, dtype=torch.float64):
    arch = Architecture.model_validate(
        {"family": "llama", "vocab": VOCAB, "hidden": 24, "layers": 2, "heads": 3, "intermediate": 40, "head_dim": 8, "kv_heads": 1}
    )
    found = Decoder(arch, FAST).to(dtype)
    found.init_weights(0.3, False, seed)
    return found


def of_ids(found, prompt, answer):
    """Log-probabilities of every token but the first, by all logits of one document alone; and how many of them are the answer's."""
    ids = torch.tensor([prompt + answer])
    return log_softmax(found.logits(ids)[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0], len(answer)


def formula(objective, policy, reference, examples):
    """The mean loss of examples, each alone and on whole logits."""
    b, e, kind, total = objective.strength, objective.label_smoothing, objective.kind, 0.0
    sums = {}
    for number, one in enumerate(examples):
        for side in ("chosen", "rejected"):
            (p, n), (q, _) = of_ids(policy, one["prompt_ids"], one[f"{side}_ids"]), of_ids(reference, one["prompt_ids"], one[f"{side}_ids"])
            sums[number, side] = (p[-n:].sum(), q[-n:].sum().detach(), n, p.mean())
    foreign = []
    for one, other in zip(examples, examples[-1:] + examples[:-1], strict=True):
        (p, n), (q, _) = of_ids(policy, one["prompt_ids"], other["chosen_ids"]), of_ids(reference, one["prompt_ids"], other["chosen_ids"])
        foreign.append((p[-n:].sum() - q[-n:].sum()).detach())
    z = torch.stack(foreign).mean().clamp(min=0)
    for number, one in enumerate(examples):
        (c, rc, nc, nll), (j, rj, nj, _) = sums[number, "chosen"], sums[number, "rejected"]
        total = total - objective.nll * c / nc
        if kind == "dpo":
            d = b * ((c - rc) - (j - rj))
            hit, miss = -logsigmoid(d), -logsigmoid(-d)
            total = total + (((1 - e) * hit - e * miss) / (1 - 2 * e) if objective.robust else (1 - e) * hit + e * miss)
        elif kind == "ipo":
            total = total + ((c - rc) / nc - (j - rj) / nj - 1 / (2 * b)) ** 2
        elif kind == "simpo":
            d = b * (c / nc - j / nj) - objective.margin
            total = total + (1 - e) * -logsigmoid(d) + e * -logsigmoid(-d)
        elif kind == "orpo":
            c, j = c / nc, j / nj
            total = total - nll - b * logsigmoid((c - torch.log(1 - c.exp())) - (j - torch.log(1 - j.exp())))
        elif one["label"]:
            total = total + objective.desirable * (1 - torch.sigmoid(b * (c - rc - z)))
        else:
            total = total + objective.undesirable * (1 - torch.sigmoid(b * (z - (c - rc))))
    return total / len(examples)


def with_reference(objective, reference, examples):
    part = microbatch(objective.kind, examples)
    return microbatch(objective.kind, examples, logprobs(reference, part)) if objective.refers else part


def gradients(found, value):
    return torch.autograd.grad(value, list(found.parameters()))


@pytest.mark.parametrize("objective", KINDS, ids=IDS)
def test_losses_and_gradients_are_their_formulas(objective):
    policy, reference, examples = model(1), model(2), pairs(7, seed=3)
    part = with_reference(objective, reference, examples)
    found, reported, _ = loss(objective, policy, part)
    wanted = formula(objective, policy, reference, examples)
    torch.testing.assert_close(found, wanted, rtol=3e-7, atol=3e-7)  # kto's z is kept in fp32
    for mine, theirs in zip(gradients(policy, found), gradients(policy, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=3e-7)
    assert reported.dtype == torch.float64
    assert float(reported[0]) == pytest.approx(7 * float(found))
    assert len(reported) == 1 + figures.count(objective)
    answers = ["chosen_ids"] if objective.kind == "kto" else ["chosen_ids", "rejected_ids"]
    assert int(reported[1]) == sum(len(one[side]) for one in examples for side in answers)


@pytest.mark.parametrize("objective", KINDS, ids=IDS)
def test_a_step_is_the_same_however_it_is_cut_and_filled(objective):
    """Microbatches, rows that only fill, and what lies behind a pair: none of them changes the loss or its gradient."""
    policy, reference, examples = model(1), model(2), pairs(6, seed=5)
    whole = with_reference(objective, reference, examples)
    assert whole.given is not None
    found, reported, known = loss(objective, policy, whole)
    wanted = gradients(policy, found)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        documents = None if whole.documents is None else whole.documents[rows]
        cut = [torch.cat([one[rows], torch.zeros_like(one[:1])]) for one in (whole.tokens, whole.labels, whole.positions)]
        cut[1][-1] = -100
        given = {name: torch.cat([one[rows], torch.zeros_like(one[:1])]) for name, one in whole.given.items()}
        if "foreign_labels_bt" in given:
            given["foreign_labels_bt"][-1] = -100
        documents = None if documents is None else torch.cat([documents, torch.zeros_like(documents[:1])])
        parts.append(Microbatch(cut[0], cut[1], cut[2], documents, given))
    terms = {}
    if known is not None:
        again = objectives.known(torch.stack([objectives.ahead(objective, policy, part) for part in parts]).sum(0))
        torch.testing.assert_close(again, known, rtol=1e-6, atol=0)
        terms = {"known": again}
    targets = sum(objectives.targets(objective, part) for part in parts)
    assert targets == 6
    made = [objectives.compute(objective, policy, part, part.positions, **terms) for part in parts]
    torch.testing.assert_close(sum(one for one, _ in made) / targets, found, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sum(one for _, one in made), reported, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients(policy, sum(one for one, _ in made) / targets), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_a_row_may_hold_several_pairs():
    """Documents 2 k and 2 k + 1 are those of pair k; a row with fewer pairs is filled."""
    policy, examples, length = model(1), pairs(3, seed=7, lengths=(2, 6)), 96
    apart = loss(Objective(kind="simpo"), policy, microbatch("simpo", examples))[0]
    rows = []
    for mine in (examples[:2], examples[2:]):
        sample = Sample(*(np.empty(length, kind) for kind in (np.int64, np.int64, np.int64, np.int32)))
        documents = [document(one["prompt_ids"], one[f"{side}_ids"]) for one in mine for side in ("chosen", "rejected")]
        assert room([len(ids) for ids, _ in documents]) <= length
        lay(documents, sample, EOS)
        rows.append(sample)
    tokens, labels, positions, segments = (
        torch.from_numpy(np.stack([getattr(one, name) for one in rows])) for name in ("tokens", "labels", "positions", "documents")
    )
    part = Microbatch(tokens, labels, positions, segments, {"there_bp": torch.tensor([[1.0, 1.0], [1.0, 0.0]])})
    torch.testing.assert_close(loss(Objective(kind="simpo"), policy, part)[0], apart, rtol=1e-9, atol=0)


def test_a_certain_answer_has_finite_odds():
    certain = torch.tensor([0.0, -1e-12, -0.1], requires_grad=True)
    odds = preference.log_odds(certain)
    odds.sum().backward()
    assert torch.isfinite(odds).all()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()
    assert float(odds[2]) == pytest.approx(-0.1 - math.log(1 - math.exp(-0.1)), rel=1e-5)


def test_figures_are_means_over_what_they_are_of():
    said = figures.said(Objective(kind="kto"), [40, 6.0, -3.0, -30.0, -20.0, 4, 3, 0.5], 5.0)
    assert said == {
        "reward_chosen": 2.0, "reward_rejected": -1.5, "margin": 3.5, "accuracy": 0.8, "logprob_chosen": -10.0, "logprob_rejected": -10.0, "kl": 0.1,
    }  # fmt: skip
    assert figures.said(Objective(kind="kto"), [40, 6.0, 0.0, -30.0, 0.0, 4, 5, 0.5], 5.0)["margin"] is None
    assert figures.said(Objective(), [], 5.0) == {}


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"kind": "orpo", "reference": "start"}, "orpo has none"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "not of ipo"),
        ({"kind": "dpo", "robust": True}, "above 0"),
        ({"kind": "dpo", "label_smoothing": 0.5}, "less than 0.5"),
        ({"kind": "kto", "margin": 0.7}, "`margin` is of simpo; kto has none"),
        ({"kind": "dpo", "desirable": 2.0}, "`desirable` is of kto; dpo has none"),
        ({"kind": "simpo", "undesirable": 2.0}, "`undesirable` is of kto; simpo has none"),
        ({"beta": 0.1}, "`beta` is of dpo, ipo, orpo, simpo, kto; language has none"),
        ({"kind": "distil", "teacher": "x", "beta": 0.1}, "`beta` is of dpo.*; distil has none"),
        ({"kind": "dpo", "top_k": 4}, "`top_k` is of distil; dpo has none"),
    ],
)
def test_numbers_of_another_objective_are_refused(numbers, says):
    with pytest.raises(ValidationError, match=says):
        Objective(**numbers)

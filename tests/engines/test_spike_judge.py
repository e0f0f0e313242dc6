"""Which steps are refused, which are held, and that a step taken back leaves nothing behind."""

import math
import random
import statistics

import pytest
import torch

from gigatrain.engines.judge import APPLIED, FAR, FLOOR, HELD, LOSS, NORM, NOT_FINITE, REFUSED, Judge

WINDOW, SIGMA = 16, 6.0


def fed(judge, loss, norm):
    """One step's fate; its verdict says the same before the update as the count after it."""
    finite = torch.isfinite(torch.tensor([loss, norm])).all()
    skip = judge.verdict(*(torch.tensor(x, dtype=torch.float64) for x in (loss, norm)), (~finite).float(), torch.tensor(loss))
    judge.count()
    assert (judge.fate.item() == APPLIED) == (skip.item() == 0)
    return judge.fate.item()


def made(seed=0, steps=WINDOW, **options):
    judge, drawn = Judge(WINDOW, SIGMA, torch.device("cpu"), **options), random.Random(seed)
    healthy = [(3 + drawn.gauss(0, 0.1), math.exp(drawn.gauss(0, 0.2))) for _ in range(steps)]
    assert [fed(judge, *one) for one in healthy] == [APPLIED] * steps
    return judge, healthy


@pytest.mark.parametrize("column", [0, 1])
def test_the_limit_is_mean_and_deviations_of_the_window(column):
    judge, healthy = made(steps=3 * WINDOW)
    past = [one[column] for one in healthy[-WINDOW:]]
    past = [math.log(one) for one in past] if column else past
    limit = statistics.mean(past) + SIGMA * statistics.stdev(past)
    if column:
        limit = math.exp(
            max(limit, min(statistics.mean(past) + SIGMA * (max(past) - statistics.mean(past)) / 2, max(past) + math.log(FAR)))
        )
    assert judge.limits()[column].item() == pytest.approx(limit, rel=1e-12)
    below, above = list(healthy[-1]), list(healthy[-1])
    below[column], above[column] = limit * (1 - 1e-9), limit * (1 + 1e-9)
    assert fed(judge, *above) == REFUSED
    assert judge.limits()[column].item() == pytest.approx(limit, rel=1e-12)  # it did not enter the window
    assert fed(judge, *below) == APPLIED
    assert judge.refused(1)[0].why == (LOSS, NORM)[column]
    assert judge.spikes.item() == 1
    assert judge.bad.tolist() == [1, 0, 1, 3 * WINDOW]


def test_nothing_is_judged_before_the_window_is_full_and_nothing_below_the_mean():
    judge, _ = made(steps=WINDOW - 1)
    assert fed(judge, 1e9, 1e9) == APPLIED
    judge, _ = made()
    assert fed(judge, 1e-9, 1e-9) == APPLIED
    judge = Judge(WINDOW, 0, torch.device("cpu"))
    assert {fed(judge, 10.0**step, 1.0) for step in range(2 * WINDOW)} == {APPLIED}
    assert fed(judge, float("inf"), 1.0) == REFUSED


def test_a_tail_as_healthy_runs_have_it_is_none_and_ten_times_the_usual_norm_is():
    """Student's t with 4 degrees of freedom, as logarithms of norms at tiny batches: 6 deviations of a normal distribution refuse some, this rule none."""
    drawn, plain, refused = random.Random(1), 0, 0
    judge = Judge(128, SIGMA, torch.device("cpu"))
    for _ in range(3000):
        chi = sum(drawn.gauss(0, 1) ** 2 for _ in range(4))
        norm = math.exp(0.15 * drawn.gauss(0, 1) / math.sqrt(chi / 4))
        past = judge.past[1].log()
        plain += bool((past > -math.inf).all()) and math.log(norm) > past.mean() + SIGMA * past.std()
        refused += fed(judge, 3.0, norm) != APPLIED
    assert (plain > 0, refused) == (True, 0)
    assert fed(judge, 3.0, 10.0) == REFUSED
    narrow = Judge(128, SIGMA, torch.device("cpu"))
    for _ in range(500):
        assert fed(narrow, 3.0, math.exp(drawn.gauss(0, 0.05))) == APPLIED
    assert 1.3 < narrow.limits()[1].item() < 1.7
    assert fed(narrow, 3.0, 2.0) == REFUSED


def test_losses_that_are_alike_have_no_spikes_in_their_last_digits():
    judge = Judge(WINDOW, SIGMA, torch.device("cpu"))
    for _ in range(WINDOW):
        fed(judge, 2.0, 1.0)
    assert fed(judge, 2.0 * (1 + 0.9 * SIGMA * FLOOR), 1.0) == APPLIED
    assert fed(judge, 2.0 * (1 + 2 * SIGMA * FLOOR), 1.0) == REFUSED


def test_steps_behind_a_refused_one_are_held_until_the_host_has_looked():
    judge, healthy = made()
    judge.hold()
    fates = [fed(judge, *one) for one in ((float("nan"), 1.0), (99.0, 1.0), healthy[0], (float("nan"), 1.0), healthy[1])]
    assert fates == [REFUSED, REFUSED, HELD, HELD, HELD]  # the last NaN comes again
    assert judge.waits.tolist() == [2, 3]
    assert judge.updates.item() == WINDOW + 2
    assert [(one.step, one.why) for one in judge.refused(2)] == [(WINDOW, NOT_FINITE), (WINDOW + 1, LOSS)]
    judge.open()
    assert [fed(judge, *one) for one in (healthy[0], (float("nan"), 1.0), healthy[1])] == [APPLIED, REFUSED, HELD]
    assert judge.bad.tolist() == [3, 1, 2, WINDOW]


def test_a_step_that_is_taken_back_never_happened():
    judge, healthy = made()
    other, _ = made()
    for one in (judge, other):
        one.hold()
        fed(one, float("nan"), 1.0)
        fed(one, float("inf"), 1.0)
        one.open()
        fed(one, *healthy[0])
    fed(judge, 99.0, 1.0)
    fed(judge, float("nan"), 1.0)
    fed(judge, float("nan"), 1.0)
    fed(judge, *healthy[1])
    judge.take_back(3, 3, 1)
    judge.open()
    for one in (judge, other):
        fed(one, *healthy[1])
        fed(one, float("nan"), 1.0)
    for name in ("bad", "updates", "spikes", "past", "_rest", "_limits"):
        assert torch.equal(getattr(judge, name), getattr(other, name)), name
    assert judge.refused(1) == other.refused(1) or judge.refused(1)[0].step == other.refused(1)[0].step


def test_a_step_made_again_moves_nothing():
    judge, healthy = made()
    judge.hold()
    fed(judge, float("nan"), 1.0)
    before = {
        name: value.clone()
        for name, value in vars(judge).items()
        if isinstance(value, torch.Tensor) and name not in ("_good", "_finite", "fate")
    }
    with judge.again(WINDOW):
        assert judge.updates.item() == WINDOW
        assert fed(judge, *healthy[0]) == HELD
        assert judge.numbers[:2].tolist() == list(healthy[0])
    for name, value in before.items():
        assert torch.equal(torch.nan_to_num(value.double(), -1), torch.nan_to_num(getattr(judge, name).double(), -1)), name


def test_a_resume_judges_as_the_run_would_have():
    judge, healthy = made(steps=WINDOW + 5)
    other = Judge(WINDOW, SIGMA, torch.device("cpu"))
    ours, theirs = ({**one.counts(writes=True), **one.window(writes=True)["numerics"]} for one in (judge, other))
    for name, piece in theirs.items():
        piece.tensor.copy_(ours[name].tensor)
    other.restored()
    for one in (*healthy[:3], (99.0, 1.0), healthy[4]):
        assert fed(judge, *one) == fed(other, *one)
    assert torch.equal(judge.past, other.past)

"""Windows: what is summed, what is left out, and what a resume keeps."""

import json
from array import array

import pytest
import torch

from gigatrain import load
from gigatrain.observe.metrics import Clock, Metrics, Update, percentile, versions
from gigatrain.planning.plan import plan


@pytest.fixture
def opened(tiny, tmp_path):
    chosen = plan(load.recipe(tiny), load.site("laptop"))
    shown = []

    def make(step=0):
        return Metrics(chosen, tmp_path, torch.device("cpu"), step=step, show=shown.append)

    return make, tmp_path / "metrics.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def update(nats, targets, norm):
    return Update(*(torch.tensor(float(number)) for number in (nats, targets, norm)))


BAD = torch.tensor([0, 0, 0, -1])


def test_a_window_is_the_mean_over_targets_not_over_steps(opened):
    make, path = opened
    with make() as metrics:
        metrics.add(update(30.0, 10, 2.0))
        metrics.add(update(900.0, 90, 6.0))
        metrics.report(2, 0.5, BAD)
        metrics.add(update(5.0, 5, 1.0))
        metrics.report(3, 1.0, BAD)
    first, second = lines(path)
    assert (first["loss"], first["grad_norm"], first["grad_norm_max"], first["lr"]) == (9.3, 4.0, 6.0, 0.0015)
    assert (second["loss"], second["grad_norm_max"], second["tokens"]) == (1.0, 1.0, 105)


def test_a_refused_step_is_left_out_and_a_window_of_them_has_no_loss(opened):
    make, path = opened
    with make() as metrics:
        metrics.add(update(float("nan"), 10, float("nan")))
        metrics.add(update(20.0, 10, 1.0))
        metrics.report(2, 1.0, BAD)
        metrics.add(update(20.0, 10, float("inf")))
        assert metrics.report(3, 1.0, torch.tensor([2, 1, 1, 0])) == [2, 1, 1, 0]
    first, second = lines(path)
    assert (first["loss"], first["grad_norm"]) == (2.0, 1.0)
    assert (second["loss"], second["grad_norm"], second["bad_steps"]) == (None, None, 2)


def test_a_resume_forgets_later_windows_and_half_lines(opened):
    make, path = opened
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    with make(step=4) as metrics:
        metrics.write({"step": 5})
    assert [line["step"] for line in lines(path)] == [2, 4, 5]


def test_an_open_window_survives_a_resume(opened):
    make, path = opened
    with make() as metrics:
        metrics.add(update(30.1, 10, 2.0))
        state = json.loads(json.dumps(metrics.state()))
        metrics.add(update(10.2, 10, 3.0))
        metrics.report(2, 1.0, BAD)
    undisturbed = lines(path)
    with make() as metrics:
        metrics.load(state)
        metrics.add(update(10.2, 10, 3.0))
        metrics.report(2, 1.0, BAD)
    timings = {"tokens_per_s", "step_s"}
    assert [{k: v for k, v in line.items() if k not in timings} for line in lines(path)] == [
        {k: v for k, v in line.items() if k not in timings} for line in undisturbed
    ]
    assert undisturbed[0]["loss"] == pytest.approx(2.015)


def test_percentiles_are_values_that_occurred():
    values = array("d", [0.4, 0.1, 0.3, 0.2])
    assert [percentile(values, share) for share in (0.0, 0.25, 0.5, 0.99, 1.0)] == [0.1, 0.1, 0.2, 0.4, 0.4]
    assert percentile(array("d"), 0.5) is None


def test_the_clock_leaves_out_what_is_not_a_step_and_forgets_no_step(monkeypatch):
    now = iter([0.0, 1.0, 2.0, 100.0, 103.0, 200.0, 300.0, 305.0])
    monkeypatch.setattr("gigatrain.observe.metrics.time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))  # 0
    clock.mark()  # 1
    clock.mark()  # 2
    clock.restart()  # a save took until 100
    clock.mark()  # 103
    assert clock.take_s() == [1.0, 1.0, 3.0]  # restarts at 200
    clock.restart()  # a validation took until 300
    clock.mark()
    assert clock.take_s.__self__.stretches[-1] == [300.0, 305.0]


def test_versions_name_packages_and_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "hidden-value")
    found = versions()
    assert {"python", "torch", "gigatrain"} <= set(found)
    assert "hidden-value" not in json.dumps(found)

"""A real run held against what its plan.json expects: undisturbed it drifts nowhere; where its loader is slowed, that is named everywhere."""

import io
import json
import time

import pytest
from rich.console import Console

from gigatrain import load, loop
from gigatrain.data.loader import Batches
from gigatrain.observe import beside
from gigatrain.observe.display import Display
from gigatrain.observe.prometheus import exposition
from gigatrain.observe.report.collect import collect
from gigatrain.observe.report.page import page
from gigatrain.observe.watch import Reader, lines
from gigatrain.planning.expected import Expected, Range
from gigatrain.planning.plan import plan

EXPECTED = Expected(  # far wider than a busy machine is slow, far narrower than the disturbance
    step_s=Range(low=0.0, mid=0.05, high=0.2),
    phases={"gemm": 0.04, "optimizer": 0.01},
    goodput=Range(low=0.5, mid=0.9, high=1.0),
    assumed=("a tuple, which JSON has as a list",),
)
SETTINGS = ["train.steps=16", "report.every=2", "validation.every=0", "checkpoint.every=1000", "export=false"]


def trained(tiny, folder):
    chosen = plan(load.recipe(tiny, SETTINGS), load.site("laptop"))
    before, chosen = chosen, chosen.model_copy(update={"expected": EXPECTED})
    assert chosen.identity == before.identity  # a resume may expect something else
    shown = io.StringIO()
    summary = loop.train(chosen, folder, display=Display(Console(file=shown, width=400)))
    assert beside.expected_of(json.loads((folder / "plan.json").read_text())) == EXPECTED
    return summary, shown.getvalue()


def test_undisturbed_it_drifts_nowhere(tiny, tmp_path):
    summary, shown = trained(tiny, tmp_path / "run")
    assert summary is not None
    assert summary["drift"] == []
    assert "DRIFT" not in shown
    seen = Reader(tmp_path / "run").seen()
    assert seen["drift"] == []
    assert any(title == "plan" for title, _, _ in lines(seen))
    value = collect(tmp_path / "run")
    assert value["plan"]["drifts"] == []
    assert {row["what"] for row in value["plan"]["rows"]} >= {"step", "goodput", "of a step: compute", "of a step: data"}
    html = page([value])
    assert "none drifted" in html
    assert "0.0 ms to 200.0 ms" in html


def test_a_slow_loader_is_named(tiny, tmp_path, monkeypatch):
    real, count = Batches.__next__, [0]

    def slowed(self):
        count[0] += 1
        if count[0] > 8:
            time.sleep(0.3)
        return real(self)

    monkeypatch.setattr(Batches, "__next__", slowed)
    summary, shown = trained(tiny, tmp_path / "run")
    assert summary is not None
    (words,) = summary["drift"]
    assert words in shown
    assert "the loader: the device waits for data" in words
    (one,) = Reader(tmp_path / "run").seen()["drift"]
    assert (one["what"], one["since"], one["lasts"]) == ("step", 10, True)
    assert one["ratio"] == pytest.approx(one["seen"] / 0.05)
    assert ("DRIFT", words, "bold yellow") in lines(Reader(tmp_path / "run").seen())
    assert 'gigatrain_drift_ratio{run="run",what="step"}' in exposition(Reader(tmp_path / "run").seen())
    html = page([collect(tmp_path / "run")])
    assert "the loader: the device waits for data" in html
    assert "drift +" in html


def test_a_plan_that_expects_nothing_or_is_of_another_version(tmp_path):
    assert beside.expected_of({}) is None
    assert beside.expected_of({"expected": Expected().model_dump(mode="json")}) is None
    assert beside.expected_of({"expected": {"speed_of_light": 3e8}}) is None
    assert beside.expected_of({"expected": {"step_s": {"low": "x"}}}) is None
    assert beside.windows([{"step": True}, {"loss": 1}]) == []
    assert beside.traced(tmp_path) == {}

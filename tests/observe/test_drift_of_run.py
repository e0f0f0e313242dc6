"""A real run held against what its plan.json expects: undisturbed it drifts nowhere; where its loader is slowed, that is named everywhere."""

import io
import json
import time

import pytest
from reported import lines as lines_of
from reported import made
from rich.console import Console

from gigatrain import load, loop
from gigatrain.data.loader import Batches
from gigatrain.observe import beside
from gigatrain.observe.display import Display
from gigatrain.observe.prometheus import exposition
from gigatrain.observe.reader import Reader
from gigatrain.observe.report.collect import collect
from gigatrain.observe.report.page import page
from gigatrain.observe.watch import lines
from gigatrain.planning.expected import Expected, Range
from gigatrain.planning.plan import plan

EXPECTED = Expected(  # far wider than a busy machine is slow, far narrower than the disturbance
    step_s=Range(low=0.0, mid=0.05, high=0.2),
    phases={"gemm": 0.04, "optimizer": 0.01},
    goodput=Range(low=0.5, mid=0.9, high=1.0),
    assumed=("a tuple, which JSON has as a list",),
)
SETTINGS = ["train.steps=14", "report.every=2", "validation.every=0", "checkpoint.every=1000", "export=false"]


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
            time.sleep(0.25)
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


def test_a_folder_with_joules_restarts_and_a_slow_rank(tmp_path):
    folder = made(tmp_path / "run")
    expected = Expected(
        step_s=Range(low=1.9, mid=2.0, high=2.1),
        watts={"device": Range(low=17_000, mid=18_000, high=19_000), "facility": Range(low=20_000, mid=24_000, high=50_000)},
        memory_bytes=Range(low=40 * 2**30, mid=50 * 2**30, high=52 * 2**30),
        goodput=Range(low=0.9, mid=0.95, high=0.97),
        lost={"checkpoint": 0.01},
    )
    plan_json = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan_json | {"expected": expected.model_dump(mode="json")}))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"peak_bytes": 55 * 2**30}))
    value = collect(folder)
    by_name = {one["what"]: one for one in value["plan"]["drifts"]}
    assert set(by_name) == {"watts, device", "memory of a rank", "goodput"}  # 505 W x 32, and 48 s of 2,700 before the first step
    assert by_name["watts, device"]["seen"] == pytest.approx(505 * 32, rel=0.03)
    assert "less than planned at the planned speed" in by_name["watts, device"]["cause"]
    assert "stopped takes" in by_name["goodput"]["cause"]
    rows = {row["what"]: row for row in value["plan"]["rows"]}
    assert rows["watts, facility"]["drifted"] is False
    assert rows["step"]["actual"]["value"] == pytest.approx(2.0, rel=0.02)
    assert (rows["memory of a rank"]["low"], rows["memory of a rank"]["drifted"]) == (40 * 2**30, True)
    assert len([row for row in value["plan"]["rows"] if row["what"] == "memory of a rank"]) == 1
    html = page([value])
    assert "activations or workspace are larger than planned" in html
    assert [one["what"] for one in Reader(folder).seen()["drift"]] == ["memory of a rank", "watts, device", "goodput"]

    for rank, factor in ((1, 1.0), (2, 1.6)):  # ranks that record, one of them slow, on a node that its log names
        rows_ = [{"step": at, "start": at, "phases": {"data": 0.002, "forward": 0.6 * factor}} for at in range(40)]
        (folder / "trace" / f"rank-{rank:05d}.jsonl").write_text(lines_of(rows_))
        logs = folder / "logs" / "attempt-000"
        logs.mkdir(exist_ok=True)
        mark = f"[gigatrain] rank {rank} of 32 on node{rank}, pid 7, begins 2026-09-21T13:33:20+00:00\n"
        (logs / f"rank-{rank:05d}.log").write_text(mark)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    slow = [row | {"step_s": row["step_s"] * (1.5 if row["step"] > 1000 else 1.0)} if "step_s" in row else row for row in metrics]
    (folder / "metrics.jsonl").write_text(lines_of(slow))
    (one,) = [one for one in Reader(folder).seen()["drift"] if one["what"] == "step"]
    assert one["since"] == 1010
    assert "a straggler: rank 2 on node2 takes 1.6 times" in one["cause"]

"""A run that moved: each leg's steps, speed, share of kept time and joules, by its own site; and the run's as their sum."""

import datetime
import json

import pytest
import reported
from reported import BEGAN_S, STEP_TOKENS

from gigatrain.observe import watch
from gigatrain.observe.reader import Reader
from gigatrain.observe.report.collect import collect
from gigatrain.observe.report.page import page
from gigatrain.power.account import account
from gigatrain.site import UNKNOWN

WEST, EAST = (reported.WATTS.model_copy(update={"site": name, "pue": reported.figure(pue), "price_eur_mwh": reported.figure(price)})
              for name, pue, price in (("west", 1.1, 40), ("east", 1.5, 120)))  # fmt: skip


def leg(step, began_s, site, **more):
    began = datetime.datetime.fromtimestamp(began_s, datetime.UTC).isoformat(timespec="milliseconds")
    shown = {"engine": "native", "ranks": 32, "mesh": {"shard": 32}, "precision": "bf16", "device": "cuda", "states": "fp32", "changed": []}
    return {"step": step, "began": began, "site": site} | shown | more


@pytest.fixture
def moved(tmp_path):
    """Killed after step 700 in the west, and taken up at 680 in the east."""
    folder = reported.made(tmp_path / "run")
    events = [json.loads(line) for line in (folder / "logs" / "progress.jsonl").read_text().splitlines()]
    second = next(event["time_s"] for event in events if event["process"] == "b")
    record = json.loads((folder / "run.json").read_text())
    legs = [
        leg(0, BEGAN_S + 1, "west"),
        leg(680, second + 20, "east", engine="deepspeed zero=2", changed=["engine.name: native -> deepspeed"]),
    ]
    (folder / "run.json").write_text(json.dumps(record | {"legs": legs}))
    for name, watts in (("plan-0.json", WEST), ("plan-1.json", EAST), ("plan.json", EAST)):
        (folder / name).write_text(json.dumps(reported.plan(1200, watts)))
    return folder


def test_joules_go_through_the_site_on_which_they_were_drawn(moved):
    found = account(moved)
    west, east = found["legs"]
    assert [one["site"] for one in (west, east)] == ["west", "east"]
    for one, pue, price in ((west, 1.1, 40), (east, 1.5, 120)):
        assert one["joules"]["facility"] == pytest.approx(one["joules"]["it"] * pue)
        assert one["eur"] == pytest.approx(one["joules"]["facility"] * price / 3.6e9)
    for name, joules in found["joules"].items():
        assert joules == pytest.approx(west["joules"][name] + east["joules"][name]), name
    assert found["eur"] == pytest.approx(west["eur"] + east["eur"])
    assert found["wall_s"] == pytest.approx(west["seconds"] + east["seconds"], abs=2e-3)
    alone = json.loads((moved / "run.json").read_text()) | {"legs": []}
    (moved / "run.json").write_text(json.dumps(alone))
    assert account(moved)["joules"]["it"] == pytest.approx(found["joules"]["it"])  # the nodes are the same, the PUE is not
    assert account(moved)["joules"]["facility"] == pytest.approx(found["joules"]["it"] * 1.5)


def test_what_one_leg_does_not_know_the_run_does_not(moved):
    unknown = WEST.model_copy(update={"pue": UNKNOWN})
    (moved / "plan-0.json").write_text(json.dumps(reported.plan(1200, unknown)))
    found = account(moved)
    assert found["joules"]["facility"] is None
    assert found["unknown"]["facility"] == "leg 1 (west): the PUE of site west is unknown (power.pue)"
    assert found["legs"][1]["joules"]["facility"] > 0
    assert found["headline"]["boundary"] == "it"


def test_the_report_shows_both_legs(moved):
    value = collect(moved)
    west, east = value["legs"]
    assert [(one["step"], one["until"]) for one in (west, east)] == [(0, 680), (680, 1200)]
    assert [one["tokens"]["value"] for one in (west, east)] == [680 * STEP_TOKENS, 520 * STEP_TOKENS]
    assert west["tokens_per_s"]["value"] == pytest.approx(STEP_TOKENS / 2, rel=0.03)
    assert east["stood_s"] == pytest.approx(170, abs=1)
    assert 0.5 < west["goodput"]["value"] < 0.95
    assert west["wall_s"]["value"] + east["wall_s"]["value"] + east["stood_s"] == pytest.approx(value["goodput"]["wall_s"], abs=0.01)
    whole = value["goodput"]["share"] * value["goodput"]["wall_s"]  # what the second leg did again, the first did not keep
    assert sum(one["goodput"]["value"] * one["wall_s"]["value"] for one in (west, east)) == pytest.approx(whole, rel=1e-6)
    assert west["kwh"]["value"] == pytest.approx(account(moved)["legs"][0]["joules"]["facility"] / 3.6e6)
    text = page([value])
    assert "1. west, native, 32 ranks (shard 32), bf16" in text
    assert "2. east, deepspeed zero=2, 32 ranks (shard 32), bf16" in text
    assert "engine.name: native -&gt; deepspeed" in text
    said = {title: words for title, words, _ in watch.lines(Reader(moved).seen())}
    assert said["leg 1"].startswith("west, native, 32 ranks (shard 32), bf16: steps 0 to 680, 26")
    assert "kWh (facility)" in said["leg 2"]


def test_without_meters_a_leg_says_not_measured(moved):
    (moved / "energy.jsonl").unlink()
    west, east = collect(moved)["legs"]
    for one in (west, east):
        assert one["watts"]["value"] is None
        assert one["watts"]["unknown"].startswith("not measured")
    assert "watts not measured" in {title: text for title, text, _ in watch.lines(Reader(moved).seen())}["leg 1"]


@pytest.mark.parametrize(
    "legs", [3, "x", [3], [{}], [{"began": "never", "step": -1, "mesh": 3, "changed": 4}], [{"began": 1}, {"began": 0, "step": 1e300}]]
)
def test_a_record_that_is_damaged_costs_no_report(moved, legs):
    record = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(record | {"legs": legs}))
    page([collect(moved)])
    watch.lines(Reader(moved).seen())

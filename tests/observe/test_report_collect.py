"""What a report says of a run: each number against the files that it came from, and nothing of what they do not say."""

import json
import math
import random
import shutil
import sys
import types
from typing import Any

import pytest
from reported import BEGAN_S, EACH, NODES, STEP_TOKENS, WATTS, figure, made, plan

from gigatrain.errors import RunError
from gigatrain.observe.goodput import CLASSES
from gigatrain.observe.report import steps
from gigatrain.observe.report.collect import collect, planned_watts
from gigatrain.observe.report.thinning import POINTS, thinned
from gigatrain.planning.watts import Watts
from gigatrain.power.reading import BOUNDARIES
from gigatrain.site import UNKNOWN


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("collected") / "run", energy=False)


@pytest.fixture(scope="module")
def value(run):
    return collect(run)


def figures(value, path=""):
    """Every figure within a value, with where it is."""
    if isinstance(value, dict):
        if "value" in value and path.split(".")[-1] != "sources":
            yield path, value
        for name, one in value.items():
            yield from figures(one, f"{path}.{name}")
    elif isinstance(value, list):
        for one in value:
            yield from figures(one, path)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_headline_is_of_the_files(run, value):
    said = value["headline"]
    windows = [row for row in rows(run / "metrics.jsonl") if "tokens" in row]
    trained = sum(row["step_s"] for row in windows)
    speed = sum(row["tokens_per_s"] * row["step_s"] for row in windows) / trained
    assert value["run"]["state"] == "finished"
    assert said["loss"]["value"] == windows[-1]["loss"]
    assert said["val_loss"]["value"] == rows(run / "metrics.jsonl")[-1]["val_loss"]
    assert said["tokens"]["value"] == 1200 * STEP_TOKENS
    assert said["tokens_per_s"]["value"] == pytest.approx(speed)
    assert said["mfu"]["value"] == pytest.approx(5.1e10 * speed / (NODES * EACH * 989e12), rel=0.01)
    assert said["wall_s"]["value"] == pytest.approx(rows(run / "logs" / "progress.jsonl")[-1]["time_s"] - BEGAN_S, abs=1e-2)


def test_every_second_is_in_one_class_and_they_add_up(value):
    found = value["goodput"]
    assert tuple(found["seconds"]) == CLASSES
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"], abs=0.01)
    assert found["seconds"]["redone"] == pytest.approx(2 * 20.0, rel=0.05)  # two windows of ten steps at 2 s
    assert found["seconds"]["stopped"] == pytest.approx(170)
    (restart,) = value["restarts"]
    assert restart["step"] == 680
    assert restart["why"].startswith("left no word: killed")


def test_steps_and_phases_are_of_the_trace(run, value):
    within = sorted(sum(row["phases"].values()) for row in rows(run / "trace" / "rank-00000.jsonl"))
    found = value["step_s"]
    assert found["steps"] == len(within) == sum(found["histogram"]["counts"]) + found["histogram"]["longer"]
    for share in (50, 90, 99):
        assert found[f"p{share}"] == pytest.approx(within[round(share / 100 * len(within)) - 1])
    assert sum(value["phases"]["shares"].values()) == pytest.approx(1)
    assert value["phases"]["exposed_communication"]["value"] == pytest.approx(0.06, abs=1e-3)


def test_saves_validations_and_profiled_steps_are_no_step_time(tmp_path):
    folder = made(tmp_path / "run", windows=4, killed=None, energy=False)
    parts = {"forward": 1.0, "backward": 2.0}
    kept = [{"step": 0, "phases": parts}, {"step": 1, "phases": parts | {"validation": 50.0, "checkpoint": 9.0}}]
    (folder / "trace" / "rank-00000.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (*kept, {"step": 2, "phases": {"forward": 99.0}, "profiled": True}))
    )
    (folder / "trace" / "rank-00007.jsonl").write_text(json.dumps({"step": 0, "phases": {"forward": 5.0}}) + "\n")
    value = collect(folder)
    assert value["step_s"]["longest"] == 3.0
    assert [(one["rank"], one["p50"]) for one in value["step_s"]["ranks"]] == [(0, 3.0), (7, 5.0)]
    assert value["phases"]["seconds"] == {"forward": 2.0, "backward": 4.0, "validation": 50.0, "checkpoint": 9.0}


def test_what_is_unknown_has_a_reason_and_is_never_nothing(run, value, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text("{}")
    older = tmp_path / "older"
    shutil.copytree(run, older)
    for name in ("summary.json", "trace/rank-00000.jsonl", "launch/site.json"):
        (older / name).unlink()
    for one in (value, *map(collect, (empty, begun, older))):
        for path, found in figures(one):
            assert found["value"] is not None or found["unknown"], path
        assert json.loads(json.dumps(one, allow_nan=False)) == one
    bare = collect(empty)
    assert bare["run"]["state"] == "not begun"
    assert bare["goodput"]["unknown"]
    assert bare["step_s"]["unknown"] == "the run has no trace/"
    assert [text.split(":")[0] for text in bare["missing"]] == [
        "plan.json",
        "metrics.jsonl",
        "logs/progress.jsonl",
        "trace",
        "energy.jsonl",
        "summary.json",
    ]
    assert "no energy.jsonl" in value["headline"]["tokens_per_s_mw"]["unknown"]
    assert collect(older)["versions"] == {}


@pytest.mark.parametrize(
    "name", ["plan.json", "run.json", "summary.json", "metrics.jsonl", "logs/progress.jsonl", "trace/rank-00000.jsonl"]
)
@pytest.mark.parametrize("how", ["half", "words", "numbers"])
def test_files_that_are_half_written_or_nonsense(run, tmp_path, name, how):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / name
    text = path.read_text()
    if how == "half":
        path.write_text(text[: len(text) // 2])
    elif how == "words":
        path.write_text(
            '[1, 2]\n"x"\nnull\n{"step": "one", "tokens": [], "phases": 3, "time_s": "now", "event": 4, "watts": 7, "memory": "much"}\n\x00\xff{{{\n'
        )
    else:
        path.write_text(
            '{"step": 1e999, "tokens": NaN, "loss": -Infinity, "tokens_per_s": 1e400, "step_s": true, "steps": -Infinity, "time_s": NaN, "event": "report"}\n'
        )
    value = collect(folder)
    json.dumps(value, allow_nan=False)
    for where, found in figures(value):
        assert found["value"] is not None or found["unknown"], where


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError):
            collect(folder)


def test_thinned_keeps_extremes_ends_and_gaps():
    drawn = random.Random(0)
    points: list[Any] = [(float(at), 5 + drawn.random()) for at in range(100_000)]
    points[54_321], points[77_777], points[12_345] = (54_321.0, 900.0), (77_777.0, -900.0), (12_345.0, None)
    kept = thinned(points)
    assert len(kept) <= POINTS + POINTS // 2
    assert [54_321.0, 900.0] in kept
    assert [77_777.0, -900.0] in kept
    assert [12_345.0, None] in kept
    assert kept[0] == list(points[0])
    assert kept[-1] == list(points[-1])
    places: list[Any] = [x for x, _ in kept]
    assert places == sorted(places)
    assert thinned(points[:POINTS]) == [list(point) for point in points[:POINTS]]


def test_planned_watts_by_hand():
    found = planned_watts(WATTS)
    node = NODES * 6850
    it = (node + NODES * EACH * 116) * 1.03
    assert {name: found[name]["value"] for name in BOUNDARIES} == pytest.approx(
        {"device": NODES * EACH * 700, "node": node, "it": it, "facility": it * 1.2}
    )
    assert "MLPerf" in found["node"]["note"]
    told = planned_watts(WATTS.model_copy(update={"pue": UNKNOWN, "facility_watts": figure(11_000)}))
    assert told["facility"]["value"] == NODES * 11_000  # by the site's own total
    lacks = planned_watts(WATTS.model_copy(update={"pue": UNKNOWN}))
    assert lacks["facility"] == {"value": None, "unknown": "not planned: pue of test unknown"}
    assert all(one["unknown"].startswith("not planned") for one in planned_watts(Watts()).values())


def test_drift_is_marked_where_it_is_one(tmp_path):
    def drifted(value):
        return {row["what"] for row in value["plan"]["rows"] if row["drifted"]}

    whole = made(tmp_path / "whole", windows=10, killed=None, energy=False)
    assert drifted(collect(whole)) == set()
    (whole / "plan.json").write_text(json.dumps(plan(90)))
    assert drifted(collect(whole)) == {"steps", "tokens"}  # 100 of 90
    half = made(tmp_path / "half", windows=10, killed=None, energy=False, finished=False)
    (half / "plan.json").write_text(json.dumps(plan(1000)))
    assert drifted(collect(half)) == set()  # it goes on
    summary = json.loads((whole / "summary.json").read_text())
    (whole / "summary.json").write_text(json.dumps(summary | {"peak_bytes": 60 << 30}))
    assert "memory of a rank" in drifted(collect(whole))


def accounted(monkeypatch, folder, value):
    """As if the account of `folder` were `value`; its own values are tested where it is."""
    (folder / "energy.jsonl").write_text("{}\n")
    module: Any = types.ModuleType("gigatrain.power.account")
    module.account = lambda run: value
    monkeypatch.setitem(sys.modules, "gigatrain.power.account", module)


def windows(count, seconds=60.0):
    return [
        {
            "time_s": BEGAN_S + 100 + seconds * (at + 1) + (500 if at >= count // 2 else 0), "step": at, "seconds": seconds,
            "watts": {"device": 100.0 + at % 7, "node": 200.0 + at % 7, "it": 300.0, "facility": 9000.0 if at == count // 3 else 400.0},
            "tokens_per_s_mw": {"device": 4.0, "node": 3.0, "it": 2.0, "facility": 1.0},
        }
        for at in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [4, 5000])
def test_windows_keep_their_gaps_and_their_spikes(monkeypatch, tmp_path, count):
    folder = made(tmp_path / "run", windows=10, killed=None, energy=False)
    accounted(monkeypatch, folder, {"windows": windows(count), "headline": {"boundary": "facility", "tokens_per_s_mw": 1.0}})
    found = collect(folder)["watts"]
    assert found["gaps"] == 1
    assert found["t_s"].count(None) == 1
    assert max(one for one in found["watts"]["facility"] if one is not None) == 9000.0
    assert len(found["t_s"]) <= 2 * POINTS
    known = [one for one in found["t_s"] if one is not None]
    assert known == sorted(known)
    assert len({len(series) for series in (found["t_s"], *found["watts"].values(), *found["tokens_per_s_mw"].values())}) == 1


def test_an_account_that_knows_nothing(monkeypatch, tmp_path):
    folder = made(tmp_path / "run", windows=10, killed=None, energy=False)
    nothing = dict.fromkeys(BOUNDARIES)
    why = dict.fromkeys(BOUNDARIES, "no meter answered")
    accounted(
        monkeypatch,
        folder,
        {
            "windows": [],
            "watts": nothing,
            "joules": nothing,
            "provenance": nothing,
            "unknown": why,
            "eur": None,
            "phases": None,
            "sources": None,
        }
        | {"headline": {"boundary": None, "tokens_per_s_mw": None, "why": "no boundary is known: no meter answered"}},
    )
    value = collect(folder)
    for name in ("tokens_per_s_mw", "mwh", "eur", "kg_co2e"):
        assert value["headline"][name]["unknown"]
    assert "no meter answered" in value["headline"]["tokens_per_s_mw"]["unknown"]


def test_joules_of_the_summary_where_the_rows_are_gone(tmp_path):
    folder = made(tmp_path / "run", windows=10, killed=None, energy=False)
    summary = json.loads((folder / "summary.json").read_text())
    energy = {"joules": {"device": 7.2e6}, "headline": {"boundary": "device", "tokens_per_s_mw": 5.0, "low": 4.0, "high": 6.0}}
    (folder / "summary.json").write_text(json.dumps(summary | {"energy": energy}))
    value = collect(folder)
    assert value["headline"]["mwh"]["value"] == pytest.approx(0.002)
    assert (value["headline"]["tokens_per_s_mw"]["low"], value["headline"]["tokens_per_s_mw"]["high"]) == (4.0, 6.0)
    assert value["watts"]["windows"] == 0


def test_the_real_account_of_a_whole_run(tmp_path):
    folder = made(tmp_path / "run")
    value = collect(folder)
    speed = value["headline"]["tokens_per_s_mw"]
    assert speed["boundary"] == "facility"
    assert speed["low"] < speed["value"] < speed["high"]
    assert value["headline"]["mwh"]["value"] == pytest.approx(value["energy"]["joules"]["facility"] / 3.6e9)
    assert speed["value"] == pytest.approx(1e6 * 1200 * STEP_TOKENS / value["energy"]["joules"]["facility"], rel=1e-6)
    assert math.fsum(speed["provenance"].values()) == pytest.approx(1)
    assert value["headline"]["eur"]["value"] == pytest.approx(value["headline"]["mwh"]["value"] * 90)
    assert value["watts"]["gaps"] == 1  # between the process that was killed and the next
    mean = [one for one in value["watts"]["watts"]["node"] if one is not None]
    assert min(mean) < value["energy"]["watts"]["node"] < max(mean)
    assert {row["what"] for row in value["plan"]["rows"]} >= {"mean draw, node", "mean draw, facility", "budget, facility"}
    assert "windows" not in value["energy"]


def test_a_long_trace_is_read_from_its_end(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    monkeypatch.setattr(steps, "TRACE_BYTES", 20_000)
    assert 50 < collect(folder)["step_s"]["steps"] < 200

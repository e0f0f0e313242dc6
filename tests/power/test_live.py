"""What a run draws now, row by row, in the terminal, as JSON and for Prometheus."""

import json

import pytest

from gigatrain.observe import prometheus
from gigatrain.observe.legs import si
from gigatrain.observe.reader import Reader
from gigatrain.observe.watch import lines
from gigatrain.planning.watts import Watts
from gigatrain.power.live import Live
from gigatrain.power.reading import FIELDS, Taken
from gigatrain.site import Figure

NOW = 1_790_000_000.0


def figure(value):
    return Figure(value=value, basis="declared", source="a test")


WATTS = Watts(
    site="here", accelerators=8, per_node=4, fabric_watts=figure(100.0), storage_watts=figure(0.0), pue=figure(1.25)
)  # as in test_account.py: 4,000 W of accelerators are 8,000 W of the facility


def row(number, event="window", *, seconds=5.0, watts=500.0, process="a", **more):
    """Two nodes of four accelerators; 100 tokens a row."""
    ms, device_mj = round(seconds * 1e3), round(watts * 8 * seconds * 1e3)
    taken = Taken(
        nodes=2,
        ms=2 * ms,
        devices=8,
        device_ms=8 * ms,
        device_measured_mj=device_mj,
        node_measured_mj=device_mj,
        node_estimated_mj=round(1600 * seconds * 1e3),
        power_capped_ms=2 * ms,
        reasons_ms=8 * ms,
    )
    said = dict(zip(FIELDS, taken.ints(), strict=True))
    head = {"time_s": NOW + 5 * number, "event": event, "process": process, "step": number, "tokens": 100 * number}
    return head | {"taken": said} | more


def test_the_newest_ten_seconds():
    live = Live()
    live.add([row(0, "begin", seconds=0), row(0, "steps", watts=100.0), row(1, watts=100.0), row(2), row(3)])
    seen = live.seen(WATTS)
    assert seen["watts"] == {"device": 4000, "node": 5600, "it": 6400, "facility": 8000}
    assert seen["boundary"] == "facility"
    assert seen["tokens_per_s_mw"]["facility"] == pytest.approx(200 / 80_000 * 1e6)
    assert seen["joules_per_token"]["device"] == pytest.approx(200)
    assert seen["capped_share"] == pytest.approx(0.25)
    assert seen["joules"]["device"] == pytest.approx(8 * (100 * 10 + 500 * 10))
    assert seen["why"] == ""
    live.add([row(4, watts=700.0), row(5, watts=700.0)])
    assert live.seen(WATTS)["watts"]["device"] == 5600
    live.add([row(5, "begin", seconds=0, process="b"), row(5, "steps", process="b", watts=200.0)])
    assert live.seen(WATTS)["watts"]["device"] == 1600  # a new process does not inherit the old one's watts
    assert live.seen(WATTS)["tokens_per_s_mw"]["device"] in (0, None)


def test_changes_that_the_grid_sees():
    live = Live()
    bins = [[179000000, 2, 99, 99], [179000001, 2, 10_000_000, 20_000_000], [179000002, 2, 10_000_000, 60_000_000], [179000003, 1, 0, 0]]
    live.add([row(0), row(1, bins=bins), row(2, bins=[[1], "x", [179000005, 2, 0, 0]])])
    assert live.seen(WATTS)["ramp_watts"] == pytest.approx(4000 * 1.25)  # of bins that both nodes closed, next to each other, not the first


def test_nothing_known_and_rows_that_are_none():
    live = Live()
    assert live.seen(None)["watts"] is None
    live.add([{}, {"time_s": NOW}, {"time_s": NOW, "process": "a", "taken": {"nodes": 1, "ms": 5000, "node_unknown_ms": 5000}}])
    seen = live.seen({"pue": 3})
    assert seen["watts"] is None
    assert "nobody knows what the nodes drew" in seen["why"]
    json.dumps(seen, allow_nan=False)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "run.json").write_text('{"id": "x", "name": "made"}')
    (folder / "plan.json").write_text(json.dumps({"name": "made", "steps": 100, "watts": WATTS.model_dump(mode="json")}))
    (folder / "logs" / "progress.jsonl").write_text(json.dumps({"time_s": NOW + 15, "event": "report", "process": "a", "step": 3}) + "\n")
    with (folder / "energy.jsonl").open("w") as file:
        for one in (row(0, "begin", seconds=0), row(1), row(2), row(3, orders={"why": "price above 100 EUR/MWh", "period_s": 2})):
            file.write(json.dumps(one) + "\n")
        file.write('{"half')
    return folder


def test_in_the_terminal(run):
    reader = Reader(run, now=lambda: NOW + 16)
    said = {title: text for title, text, _ in lines(reader.seen())}
    assert said["power"] == "devices 4 kW, nodes 5.6 kW, IT 6.4 kW, facility 8 kW; accelerators at their limit 25 % of the time"
    assert said["provenance"] == "accelerators 50 % measured, rest of the nodes 20 % estimated, fabric 10 % declared, cooling 20 % declared"
    assert said["efficiency"] == "2,500 tokens/s/MW at the facility, 400 J a token, over the last window"
    assert said["orders"] == "price above 100 EUR/MWh"
    with (run / "energy.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row(4, watts=1000.0, seconds=20.0)) + "\n")
    seen = reader.seen()
    assert seen["power_watts"]["device"] == 8000  # read on from where it stood
    assert seen["energy_joules"]["device"] == 8 * (500 * 15 + 1000 * 20)


def test_for_prometheus(run):
    text = prometheus.exposition(Reader(run, now=lambda: NOW + 16).seen())
    for line in (
        'power_watts{run="run",boundary="facility"} 8000.0',
        'tokens_per_second_per_megawatt{run="run",boundary="facility"} 2500.0',
        'energy_joules_total{run="run",boundary="device"} 60000.0',
        'power_capped_ratio{run="run"} 0.25',
        'power_measured_ratio{run="run"} 0.5',
    ):
        assert f"gigatrain_{line}\n" in text


def test_a_run_that_is_over_draws_nothing(run):
    headline = {"boundary": "facility", "tokens_per_s_mw": 2400.0, "joules": 1.5e9}
    (run / "summary.json").write_text(json.dumps({"wall_s": 15.0, "energy": {"headline": headline}}))
    seen = Reader(run, now=lambda: NOW + 16).seen()
    assert seen["state"] == "finished"
    assert seen["power_watts"] is None
    said = {title: text for title, text, _ in lines(seen)}
    assert said["power"] == "it has ended"
    assert said["energy"] == "2,400 tokens/s/MW at the facility over the whole run, 1.5 GJ"
    assert "power_watts{" not in prometheus.exposition(seen)


def test_why_nothing_is_measured(run):
    (run / "energy.jsonl").unlink()
    said = {title: text for title, text, _ in lines(Reader(run).seen())}
    assert said["power"] == "not measured"
    (run / "plan.json").write_text(json.dumps({"steps": 100, "power": {"measure": False}}))
    assert "power.measure is false" in Reader(run).seen()["power_why"]


def test_numbers_before_units():
    assert [si(value) for value in (0, 0.002, 0.5, 12, 1234, 999_900, 5.6e6, 8e9, 2e13)] == [
        "0 ", "2 m", "500 m", "12 ", "1.23 k", "1000 k", "5.6 M", "8 G", "20 T",
    ]  # fmt: skip

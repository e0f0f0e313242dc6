"""From rows to tokens/s/MW: published figures reproduced, every kind of run a folder can hold, and what nobody knows stays unknown."""

import dataclasses
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import pytest

from gigatrain.errors import RunError
from gigatrain.planning.watts import Watts
from gigatrain.power.account import account, boundaries, unknown
from gigatrain.power.boundary import SURE, Boundary
from gigatrain.power.reading import FIELDS, Taken
from gigatrain.site import Basis, Figure

NOW = 1_790_000_000.0


def figure(value, basis: Basis = "declared", source="a test"):
    return Figure(value=value, basis=basis, source=source)


def known(**changed):
    """Two nodes of four accelerators."""
    figures = {
        "fabric_watts": figure(100.0),
        "storage_watts": figure(0.0),
        "pue": figure(1.25),
        "accelerators": 8,
        "per_node": 4,
        "site": "here",
    }
    return Watts(**(figures | changed))


def seen(seconds, device=500.0, rest=800.0, nodes=2, each=4, **more):
    """What meters of `nodes` nodes say of so many seconds at so many watts each."""
    device_mj, ms = round(device * each * nodes * seconds * 1e3), round(seconds * 1e3)
    made = Taken(
        nodes=nodes,
        ms=ms * nodes,
        devices=each * nodes,
        device_ms=ms * nodes * each,
        device_measured_mj=device_mj,
        node_measured_mj=device_mj,
        node_estimated_mj=round(rest * nodes * seconds * 1e3),
        counter_mj=device_mj,
        integral_mj=round(device_mj * 1.01),
    )
    return dataclasses.replace(made, **more)


def all_of(taken, watts, seconds=10.0) -> dict[str, Boundary]:
    """Those that are known."""
    return {name: one for name, one in boundaries(taken, watts, seconds).items() if one is not None}


def at(name, taken, watts, seconds=10.0) -> Boundary:
    return all_of(taken, watts, seconds)[name]


class Folder:
    """A run's folder, written as the loop writes it."""

    def __init__(self, path, watts=None, **plan):
        self.path, self.now = path / "run", NOW
        (self.path / "logs").mkdir(parents=True)
        (self.path / "launch").mkdir()
        plan = {"watts": (watts or known()).model_dump(mode="json"), "flops_per_token": 6e9, "tokens_per_step": 100} | plan
        (self.path / "plan.json").write_text(json.dumps(plan))
        self.attempt, self.process = 0, "a"

    def line(self, name, row):
        with (self.path / name).open("a") as file:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")

    def energy(self, event, taken, step=0, tokens=None, after=None, **more):
        self.now += taken.ms / max(1, taken.nodes) / 1e3 if after is None else after
        row = {"time_s": self.now, "event": event, "attempt": self.attempt, "process": self.process, "step": step}
        row |= {"tokens": step * 100 if tokens is None else tokens, "taken": dict(zip(FIELDS, taken.ints(), strict=True))}
        self.line("energy.jsonl", row | more)

    def progress(self, event, **more):
        self.line("logs/progress.jsonl", {"time_s": self.now, "event": event, "attempt": self.attempt, "process": self.process} | more)

    def history(self, event, **more):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(self.now))
        self.line("launch/history.jsonl", {"time": stamp, "event": event, "attempt": self.attempt} | more)

    def starts(self, process, attempt=0, step=0, seconds=10.0):
        self.process, self.attempt = process, attempt
        self.progress("start")
        self.energy("begin", Taken(nodes=2), step)
        self.energy("steps", seen(seconds, 200.0), step)
        self.progress("steps", step=step)

    def window(self, step, seconds=20.0, event="window", **more):
        self.energy(event, more.pop("taken", None) or seen(seconds), step, **more)
        if event == "window":
            self.progress("report", step=step, tokens=step * 100, seconds={"training": seconds})


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def per_joule(found):
    return {name: value and value / 1e6 for name, value in found["tokens_per_s_mw"].items()}


# ---- Published figures: MLPerf Training's power logs ----


def published(tmp_path, *, nodes, seconds, node_watts, tokens, fabric=116.0, pue=None, parameters=175e9, windows=10):
    """A run's folder from the mean watts of its nodes at their sockets, and the tokens that it read."""
    watts = Watts(
        accelerators=nodes * 8,
        per_node=8,
        fabric_watts=figure(fabric, "declared", "SMC: 59,570 W of switches at most for 512 GPUs"),
        fabric_nameplate=True,
        storage_watts=figure(0.0, "declared", "left out, as MLPerf does"),
        pue=figure(pue) if pue else Figure(basis="unknown"),
    )
    folder = Folder(tmp_path, watts, architecture={"products": parameters})
    folder.progress("start")
    folder.energy("begin", Taken(nodes=nodes))
    folder.energy("steps", Taken(nodes=nodes))
    for number in range(windows):
        ms = round(seconds * 1e3 / windows)
        taken = Taken(
            nodes=nodes, ms=ms * nodes, devices=nodes * 8, device_unknown_ms=ms * nodes * 8, node_measured_mj=round(node_watts * ms * nodes)
        )
        folder.energy("window", taken, step=number + 1, tokens=round(tokens * (number + 1) / windows))
    return account(folder.path)


# mlcommons/training_results_v4.0 at 6fe954378e, smc-ac-power/results/64xSMC-H100-SXM-80GB/gpt3, run 9825376616_2: mean of node_*.txt between run_start and
# run_stop, whose distance is `seconds`; 288 steps of 2,048 samples of 2,048 tokens.
GPT3 = {"nodes": 64, "seconds": 3412.67, "node_watts": 6847.7, "tokens": 288 * 2048 * 2048}


def test_gpt3_of_mlperf_at_the_node_and_it(tmp_path):
    found = published(tmp_path, **GPT3)
    rate = per_joule(found)
    assert round(rate["node"], 3) == 0.808
    assert round(rate["it"], 3) == 0.711
    assert rate["device"] is rate["facility"] is None
    assert found["joules"]["node"] / 3.6e6 == pytest.approx(415.22, rel=1e-3)  # kWh, by total_power.txt beside the logs
    assert round(found["tokens"] / found["wall_s"] / 512) == 691
    assert round(found["watts"]["it"] / 512) == 972
    assert round(found["flop6n_per_joule"]["node"] / 1e12, 3) == 0.848
    assert round(found["flop6n_per_joule"]["it"] / 1e12, 3) == 0.747
    assert found["kwh_per_gtoken"]["node"] == pytest.approx(277.8 / 0.8077, rel=1e-3)
    assert found["mix"]["it"] == "nodes 88 % measured, fabric 12 % nameplate"
    assert found["headline"]["boundary"] == "it"
    assert "PUE" in found["headline"]["why"]
    assert "nobody knows" in found["unknown"]["device"]


@pytest.mark.parametrize(("pue", "rate"), [(1.1, 0.647), (1.2, 0.593)])
def test_gpt3_of_mlperf_at_the_facility(tmp_path, pue, rate):
    found = published(tmp_path, **GPT3, pue=pue)
    assert round(per_joule(found)["facility"], 3) == rate
    assert found["headline"]["boundary"] == "facility"
    low, high = found["headline"]["low"] / 1e6, found["headline"]["high"] / 1e6
    assert low < rate < high
    assert (high - low) / rate < 0.21


def test_the_example_by_hand_says_what_the_account_says(tmp_path):
    page = (Path(__file__).parents[2] / "POWER.md").read_text()
    for pue, boundary, begins in (
        (1.1, "node", "| node:"),
        (1.1, "it", "| IT:"),
        (1.1, "facility", "| facility at PUE 1.1"),
        (1.2, "facility", "| facility at PUE 1.2"),
    ):
        found = published(tmp_path / f"{pue}{boundary}", **GPT3, pue=pue)
        line = next(line for line in page.splitlines() if line.startswith(begins))
        watts, joules, rate = (found[key][boundary] for key in ("watts", "joules", "tokens_per_joule"))
        said = f"{watts:,.0f} | {joules / 1e9:.4f}e9", f"**{rate:.3f}**", f"{found['kwh_per_gtoken'][boundary]:.0f} kWh"
        assert all(words in line for words in (*said, f"{found['flop6n_per_joule'][boundary] / 1e12:.3f} TFLOP/J")), (said, line)
    for number in ("1,207,959,552", "6,847.7", "3,412.67"):
        assert number in page


@pytest.mark.parametrize(
    ("seconds", "watts", "kwh"),
    [
        (1687.079, 7163.9, 3.36),  # v4.0 SMC, one node of 8 x H100, run 4961918558_5
        (655.94, 9589.0, 1.75),  # v5.0 Lenovo SR780a V3, one node of 8 x B200, result_5
    ],
)
def test_kilowatt_hours_of_llama_2_70b_lora(tmp_path, seconds, watts, kwh):
    found = published(tmp_path, nodes=1, seconds=seconds, node_watts=watts, tokens=1000)
    assert round(found["joules"]["node"] / 3.6e6, 2) == kwh


def test_a_recorded_log_of_one_node():
    """The trace that other tests replay: its integral, against the mean of the same run's 64 nodes over the whole run, and their spread."""
    lines = (Path(__file__).parent / "traces" / "mlperf-gpt3-node.csv").read_text().splitlines()
    rows = [tuple(map(float, line.split(","))) for line in lines if line[0].isdigit()]
    joules = sum((after - before) * (one + two) / 2 for (before, one), (after, two) in pairwise(rows))
    mean = joules / rows[-1][0]
    assert mean == pytest.approx(6847.7, rel=0.01)
    assert 6761.6 < mean < 6940.3
    taken = Taken(
        nodes=1, ms=round(rows[-1][0] * 1e3), devices=8, device_unknown_ms=round(8e3 * rows[-1][0]), node_measured_mj=round(joules * 1e3)
    )
    assert at("node", taken, known(accelerators=8, per_node=8), rows[-1][0]).watts == pytest.approx(mean)


# ---- Boundaries ----


def test_four_boundaries_by_hand():
    found = all_of(seen(10), known())
    # 8 x 500 W; 2 x 800 W more; 8 x 100 W of fabric; a quarter of it all for cooling
    assert {name: one.watts for name, one in found.items()} == {"device": 4000, "node": 5600, "it": 6400, "facility": 8000}
    assert (
        found["facility"].words
        == "accelerators 50 % measured, rest of the nodes 20 % estimated, fabric 10 % declared, cooling 20 % declared"
    )
    assert sum(found["facility"].shares.values()) == pytest.approx(1)
    assert found["it"].shares["measured"] == pytest.approx(4000 / 6400)
    low, high = found["facility"].low / 10, found["facility"].high / 10
    assert low == pytest.approx((4000 * 0.95 + 1600 * 0.5 + 800 * 0.8) * (1 + 0.25 * 0.8))
    assert high == pytest.approx((4000 * 1.05 + 1600 * 1.5 + 800 * 1.2) * (1 + 0.25 * 1.2))


def test_a_meter_that_disagrees_with_itself_widens_the_bounds():
    taken = seen(10)
    taken.integral_mj = round(taken.counter_mj * 0.8)
    one = at("device", taken, known())
    assert (one.low, one.high) == (pytest.approx(0.8 * one.joules), pytest.approx(1.2 * one.joules))


def test_storage_by_share_or_by_accelerator():
    by_share = at("it", seen(10), known(storage_watts=Figure(basis="unknown"), storage_share=figure(0.03, "assumed")))
    assert by_share.watts == pytest.approx(6400 * 1.03)
    assert by_share.layers["storage"] == {"estimated": pytest.approx(64000 * 0.03)}
    by_watts = at("it", seen(10), known(storage_watts=figure(20.0), storage_share=figure(0.03, "assumed")))
    assert by_watts.watts == pytest.approx(6400 + 160)


def test_what_is_unknown_is_no_zero():
    nothing = Figure(basis="unknown")
    cases = [
        (seen(10), known(fabric_watts=nothing), {"device", "node"}, "it", "power.fabric_watts of site here is unknown"),
        (seen(10), known(storage_watts=nothing), {"device", "node"}, "it", "power.storage_watts"),
        (seen(10), known(pue=nothing), {"device", "node", "it"}, "facility", "power.pue"),
        (Taken(), known(), set(), "device", "no meter told anything"),
        (seen(10, device_unknown_ms=1000), known(), {"node", "it", "facility"}, "device", "for 1.2 % of the time"),
        (seen(10, node_unknown_ms=20_000), known(), {"device"}, "node", "power.node_watts"),
        (seen(10, nodes=1), known(), set(), "device", "for 50.0 % of"),  # one of two nodes did not answer
        (seen(10, node_measured_mj=30_000_000, node_estimated_mj=0), known(), {"device"}, "node", "not of the whole node"),
    ]
    for taken, watts, expected, name, text in cases:
        found, why = boundaries(taken, watts, 10.0), unknown(taken, watts, 10.0)
        assert {key for key, one in found.items() if one} == expected
        assert set(why) == set(found) - expected
        assert text in why[name]


def test_a_little_that_nobody_saw_is_estimated():
    taken = seen(9.95, device_unknown_ms=400, node_unknown_ms=100)
    taken.ms = 20_000
    found = all_of(taken, known())
    assert found["device"].watts == pytest.approx(4000)
    assert found["device"].parts["measured"] == 39_800
    assert found["device"].parts["estimated"] == pytest.approx(200)
    assert found["node"].watts == pytest.approx(5600, rel=1e-3)


def test_a_node_without_accelerators():
    taken = Taken(nodes=1, ms=10_000, node_measured_mj=700_000, cpu_mj=700_000)
    found = all_of(taken, known(accelerators=0, per_node=0, fabric_watts=figure(0.0), pue=figure(1.0)))
    assert {name: one.watts for name, one in found.items()} == {"node": 70, "it": 70, "facility": 70}
    assert found["facility"].words == "nodes 100 % measured"
    assert "by accelerator" in unknown(taken, known(accelerators=0), 10.0)["it"]


def test_a_node_meter_and_accelerators_by_nameplate():
    taken = seen(10, device_measured_mj=0, device_nameplate_mj=56_000_000, node_measured_mj=56_000_000, node_estimated_mj=0)
    found = all_of(taken, known())
    assert found["node"].shares["measured"] == 1
    assert found["device"].shares["nameplate"] == 1
    assert found["device"].low == pytest.approx(SURE["nameplate"][0] * 56_000)


# ---- Runs ----


def test_a_whole_run(folder):
    folder.starts("a")
    folder.window(10, phases={"training": 50.0, "checkpoint": 4.0}, bins=[[179000002, 2, 40_000_000, 56_000_000]])
    folder.window(20, phases={"training": 52.0}, bins=[[179000003, 2, 20_000_000, 36_000_000], [179000004, 1, 1, 1], [179000006, 2, 1, 1]])
    folder.energy("end", seen(2.0, 300.0), 20, meters={"device": "NVML"})
    folder.progress("end", why="finished")
    found = account(folder.path)
    assert (found["tokens"], found["wall_s"], found["queued_s"]) == (2000, 52.0, 0.0)
    device = 8 * (10 * 200 + 40 * 500 + 2 * 300)
    node = device + 52 * 1600
    assert found["joules"] == pytest.approx({"device": device, "node": node, "it": node + 52 * 800, "facility": (node + 52 * 800) * 1.25})
    assert found["tokens_per_s_mw"]["facility"] == pytest.approx(2000 / found["joules"]["facility"] * 1e6)
    assert found["tokens_per_s_mw"]["facility"] == pytest.approx(2000 / 52 / (found["watts"]["facility"] / 1e6))  # tokens/s over MW
    assert found["model_flop_per_joule"]["device"] == pytest.approx(2000 * 6e9 / device)
    assert found["flop6n_per_joule"]["device"] is None  # no architecture
    assert found["phases"] == {"training": 102.0, "checkpoint": 4.0}
    assert found["disagreement"] == pytest.approx(0.01, rel=1e-3)
    assert found["held"]["seconds"] == found["held"]["joules"] == 0
    assert found["ramp"] == {"max_watts_per_10s": pytest.approx(2500), "at_s": 1790000030, "boundary": "facility"}
    assert [(one["event"], one["step"], one["seconds"], one["tokens"]) for one in found["windows"]] == [
        ("starting", 0, 10, 0),
        ("steps", 10, 20, 1000),
        ("steps", 20, 22, 1000),
    ]
    assert sum(one["seconds"] for one in found["windows"]) == found["wall_s"]
    assert found["windows"][1]["tokens_per_s_mw"]["facility"] == pytest.approx(1000 / (8000 * 20) * 1e6)
    assert found["meters"] == {"device": "NVML"}
    assert (found["eur"], found["kg_co2e"]) == (None, None)
    json.dumps(found, allow_nan=False)


def test_steps_that_a_restart_did_again_were_drawn_and_do_not_count(folder):
    folder.starts("a")
    folder.window(10)
    folder.window(20)
    folder.history("judged", verdict="again")
    folder.now += 30
    folder.attempt = 1
    folder.history("started")
    folder.starts("b", 1, step=10)
    folder.window(20)
    folder.energy("end", Taken(nodes=2), 20)
    folder.progress("end", why="finished")
    found = account(folder.path)
    assert found["tokens"] == 2000
    assert found["wall_s"] == 50 + 30 + 30
    assert found["held"]["seconds"] == 30
    assert found["held"]["joules"] == pytest.approx(30 * 8000)  # at the last window's watts
    assert "same job" in found["held"]["why"]
    device = 8 * (20 * 200 + 60 * 500 + 30 * 500)
    assert found["joules"]["device"] == pytest.approx(device)
    assert found["provenance"]["device"]["estimated"] == pytest.approx(8 * 30 * 500 / device)
    assert [one["event"] for one in found["windows"]] == ["starting", "steps", "steps", "held", "starting", "steps"]
    assert sum(one["seconds"] for one in found["windows"]) == found["wall_s"]
    assert [(one["tokens"], one["redone"]) for one in found["windows"]] == [(0, 0), (1000, 0), (0, 1000), (0, 0), (0, 0), (1000, 0)]


def test_queued_time_is_no_time_of_the_run(folder):
    folder.starts("a")
    folder.window(10)
    folder.now += 4
    folder.history("judged", verdict="requeue")
    folder.now += 3600
    folder.attempt = 1
    folder.history("started")
    folder.now += 6
    folder.starts("b", 1, step=10)
    folder.window(20)
    found = account(folder.path)
    assert found["queued_s"] == pytest.approx(3600, abs=1)
    assert found["held"]["seconds"] == pytest.approx(10, abs=1)
    assert found["wall_s"] == pytest.approx(70, abs=1)


def test_a_person_who_resumes_held_no_nodes(folder):
    folder.starts("a")
    folder.window(10)
    folder.energy("end", seen(1.0), 10)
    folder.progress("end", why="SIGTERM")
    folder.now += 5000
    folder.starts("b", step=10)
    folder.window(20)
    found = account(folder.path)
    assert (found["queued_s"], found["wall_s"], found["held"]["seconds"]) == (5000, 61, 0)


def test_joules_of_a_killed_process_come_from_the_next_ones_meter(folder):
    """As power/meter.py tells them: in the first row of the next process, with the devices' and the time that they took."""
    folder.starts("a")
    folder.window(10)
    folder.now += 100
    folder.process = "b"
    folder.progress("start")
    folder.energy("begin", Taken(), 10)
    left, own = seen(6), seen(10, 200.0)
    both = Taken.of([one + two for one, two in zip(left.ints(), own.ints(), strict=True)])
    both.nodes, both.devices, both.recovered_mj = 2, 8, left.node_measured_mj + left.node_estimated_mj
    folder.energy("steps", both, 10, after=10)
    folder.progress("steps", step=10)
    folder.window(20)
    found = account(folder.path)
    assert found["held"]["seconds"] == 6
    assert found["held"]["joules"] == pytest.approx(6 * 8000, rel=0.02)
    assert found["queued_s"] == 94
    assert found["wall_s"] == 10 + 20 + 6 + 10 + 20
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * 46))
    assert found["joules"]["node"] == pytest.approx(8 * (200 * 20 + 500 * 46) + 1600 * 66)
    assert found["provenance"]["device"]["measured"] == 1
    assert [(one["event"], one["seconds"]) for one in found["windows"]] == [
        ("starting", 10), ("steps", 20), ("held", 6), ("starting", 10), ("steps", 20),
    ]  # fmt: skip


def test_what_meters_saw_while_a_job_held_its_nodes_is_measured(folder):
    folder.starts("a")
    folder.window(10)
    folder.history("judged", verdict="again")
    folder.now += 40
    folder.process, folder.attempt = "b", 1
    folder.progress("start")
    folder.energy("begin", Taken(), 10)
    held, own = seen(40, 90.0), seen(10, 200.0)
    both = Taken.of([one + two for one, two in zip(held.ints(), own.ints(), strict=True)])
    both.nodes, both.devices, both.recovered_mj = 2, 8, held.node_measured_mj + held.node_estimated_mj
    folder.energy("steps", both, 10, after=10)
    folder.window(20)
    found = account(folder.path)
    assert (found["queued_s"], found["held"]["seconds"], found["wall_s"]) == (0, 40, 100)
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * 40 + 90 * 40))
    assert found["provenance"]["device"]["measured"] == 1  # idle watts, and not a rule's


def found_by_the_next(folder, left, *, process="b", attempt=0, own=10.0, step=10):
    """The next process begins now, with what its meters found of those before it in its first row."""
    folder.process, folder.attempt = process, attempt
    folder.progress("start")
    folder.energy("begin", Taken(), step)
    both = Taken.of([one + two for one, two in zip(left.ints(), seen(own, 200.0).ints(), strict=True)])
    both.nodes, both.devices, both.recovered_mj = 2, 8, left.node_measured_mj + left.node_estimated_mj
    folder.energy("steps", both, step, after=own)
    folder.progress("steps", step=step)


@pytest.mark.parametrize("said_s", [9, 60])
def test_a_killed_process_whose_words_are_newer_than_its_last_row_is_counted_once(folder, said_s):
    folder.starts("a")
    folder.window(10)
    folder.now += said_s
    folder.progress("report", step=15, tokens=1500)
    folder.now += 100
    found_by_the_next(folder, seen(said_s + 2))
    folder.window(20)
    found = account(folder.path)
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * (40 + said_s + 2)))
    assert found["wall_s"] == pytest.approx(10 + 20 + said_s + 2 + 10 + 20)
    assert (found["held"]["seconds"], found["queued_s"]) == (said_s + 2, 98)
    assert found["provenance"]["device"]["measured"] == 1
    assert sum(one["seconds"] for one in found["windows"]) == pytest.approx(found["wall_s"])


def test_what_was_not_found_of_a_killed_process_is_by_rule_until_its_last_word(folder):
    """Its file was as old as 8 s."""
    folder.starts("a")
    folder.window(10)
    folder.now += 9
    folder.progress("report", step=15, tokens=1500)
    folder.now += 100
    found_by_the_next(folder, seen(3))
    found = account(folder.path)
    assert found["held"]["seconds"] == 9
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * 29))
    assert found["provenance"]["device"]["estimated"] == pytest.approx(8 * 500 * 6 / found["joules"]["device"])
    assert "lived on" in found["held"]["why"]


@pytest.mark.parametrize("queued_s", [0, 3600])
def test_words_after_the_last_row_and_a_job_that_holds_its_nodes(folder, queued_s):
    folder.starts("a")
    folder.window(10)
    folder.now += 60
    folder.progress("report", step=15, tokens=1500)
    folder.now += 2
    folder.history("judged", verdict="requeue" if queued_s else "again")
    folder.now += queued_s
    folder.attempt = 1
    folder.history("started")
    folder.now += 38
    found_by_the_next(folder, seen(62) if queued_s else seen(100, 300.0), attempt=1)
    folder.window(20)
    found = account(folder.path)
    assert found["wall_s"] == pytest.approx(160, abs=1)
    assert found["held"]["seconds"] == pytest.approx(100, abs=1)
    assert found["queued_s"] == pytest.approx(queued_s, abs=1)
    drawn = 500 * 100 if queued_s else 300 * 100  # by rule from when the new job starts; by meters
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * 40 + drawn), rel=0.01)


def test_a_person_who_resumes_in_the_same_allocation_held_its_nodes(folder):
    """Two hours in which meters counted: their joules and their seconds, also at the fabric; the others' last half a second is in the last row's time."""
    folder.starts("a")
    folder.window(10)
    folder.energy("end", seen(0.5, nodes=1), 10, after=0.5)
    folder.progress("end", why="SIGTERM")
    folder.now += 7200
    idle, last = seen(7200, 90.0, rest=300.0), seen(0.5, nodes=1)
    left = Taken.of([one + two for one, two in zip(idle.ints(), last.ints(), strict=True)])
    found_by_the_next(folder, left)
    folder.window(20)
    found = account(folder.path)
    assert found["wall_s"] == pytest.approx(10 + 20 + 0.5 + 7200 + 10 + 20)
    assert (found["queued_s"], found["held"]["seconds"]) == (0, 7200)
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * 40.5 + 90 * 7200))
    assert found["joules"]["it"] - found["joules"]["node"] == pytest.approx(800 * found["wall_s"])
    assert found["watts"]["device"] < 8 * 100
    assert found["provenance"]["device"]["measured"] == 1


def test_a_clock_that_was_set_back_leaves_no_joules_without_their_time(folder):
    folder.starts("a")
    folder.window(10)
    folder.now -= 3600
    found_by_the_next(folder, seen(6))
    found = account(folder.path)
    assert (found["wall_s"], found["queued_s"], found["held"]["seconds"]) == (46, 0, 6)


def test_what_was_found_of_some_of_the_others_leaves_the_rest_alike(folder):
    folder.starts("a")
    folder.window(10)
    folder.energy("end", seen(4, nodes=1), 10)
    folder.progress("end", why="SIGTERM")
    folder.now += 500
    found_by_the_next(folder, seen(2, nodes=1))  # a file as old as two seconds
    found = account(folder.path)
    assert found["wall_s"] == 44
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * 24))
    assert found["provenance"]["device"]["estimated"] == pytest.approx(4 * 500 * 2 / found["joules"]["device"])


@pytest.mark.parametrize("same_job", [False, True])
def test_what_two_killed_processes_left_is_found_by_the_third_and_counted_once(folder, same_job):
    """The second died in its start, before a row had what it had itself found."""
    folder.starts("a")
    folder.window(10)
    folder.now += 9
    folder.progress("report", step=15, tokens=1500)
    if same_job:
        folder.history("judged", verdict="again")
    folder.now += 30
    folder.process, folder.attempt = "b", int(same_job)
    folder.progress("start")
    folder.energy("begin", Taken(), 10)
    folder.now += 7
    folder.progress("report", step=None)
    if same_job:
        folder.history("judged", verdict="again")
    folder.now += 20
    found_by_the_next(folder, seen(9 + 30 + 7 + 20 if same_job else 10 + 7), process="c", attempt=2 * same_job)
    folder.window(20)
    found = account(folder.path)
    left_s = 66 if same_job else 17
    assert found["wall_s"] == pytest.approx(60 + left_s)
    assert found["queued_s"] == pytest.approx(0 if same_job else 66 - 17)
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * (40 + left_s)))
    assert found["provenance"]["device"]["measured"] == 1


@pytest.mark.parametrize(("rows", "words", "expected_s"), [(120, False, 2400), (120, True, 2400), (1, False, 20), (0, False, 0)])
def test_rows_that_were_not_written_are_time_of_which_nobody_knows(folder, rows, words, expected_s):
    """As on a disk that was full: of the whole their time counts, up to 1 % of it is scaled up, and beyond that the boundaries are unknown."""
    folder.starts("a")
    for number in range(1, 181):
        if 30 <= number < 30 + rows:
            folder.now += 20
            if words:
                folder.progress("report", step=10 * number, tokens=1000 * number)
        else:
            folder.window(10 * number)
    found = account(folder.path)
    assert found["wall_s"] == 3610
    assert sum(one["seconds"] for one in found["windows"]) == pytest.approx(3610)
    device = 8 * (200 * 10 + 500 * 3600)
    if rows <= 1:
        assert found["joules"]["device"] == pytest.approx(device, rel=1e-4)
        assert found["provenance"]["device"]["estimated"] == pytest.approx(expected_s / 3610, rel=0.01)
    else:
        assert found["joules"] == dict.fromkeys(found["joules"])
        assert "66.5 %" in found["unknown"]["device"]
        assert found["headline"]["tokens_per_s_mw"] is None
    assert [f"lacks rows for {expected_s:,} s of process a" in note for note in found["notes"]] == [True] * bool(rows)


def test_a_clock_that_was_set_is_no_row_that_was_lost(folder):
    folder.starts("a")
    for number in range(1, 21):
        folder.now += 3600 if number == 10 else -7200 if number == 15 else 0
        folder.window(10 * number)
    found = account(folder.path)
    assert found["wall_s"] == pytest.approx(410, abs=10)
    assert found["joules"]["device"] == pytest.approx(8 * (2000 + 500 * 400), rel=0.03)
    assert found["notes"] == []


def test_a_meter_that_is_late_loses_no_time(folder):
    """Seconds that one row lacks and a later one has."""
    folder.starts("a")
    for number, seconds in enumerate([20, 12, 20, 28, 20, 11, 29, 20, 12], 1):
        folder.window(10 * number, seconds, after=20.0)
    found = account(folder.path)
    assert found["wall_s"] == pytest.approx(10 + 180)
    assert found["joules"]["device"] == pytest.approx(8 * (2000 + 500 * 180))
    assert found["notes"] == []


def test_the_last_row_is_of_one_node(folder):
    """Others drew what it did; unless their next process finds it, then nothing is added twice."""
    folder.starts("a")
    folder.window(10)
    folder.energy("end", seen(4, nodes=1), 10)
    folder.progress("end", why="SIGTERM")
    alone = account(folder.path)
    assert alone["wall_s"] == 34
    assert alone["joules"]["device"] == 8 * (200 * 10 + 500 * 24)
    assert alone["provenance"]["device"]["estimated"] == pytest.approx(4 * 500 * 4 / alone["joules"]["device"])
    folder.now += 500
    folder.process = "b"
    folder.progress("start")
    folder.energy("begin", Taken(), 10)
    left, own = seen(4, nodes=1), seen(10, 200.0)
    both = Taken.of([one + two for one, two in zip(left.ints(), own.ints(), strict=True)])
    both.nodes, both.devices, both.recovered_mj = 2, 8, left.node_measured_mj + left.node_estimated_mj
    folder.energy("steps", both, 10, after=10)
    found = account(folder.path)
    assert (found["wall_s"], found["queued_s"]) == (44, 500)
    assert found["joules"]["device"] == pytest.approx(8 * (200 * 20 + 500 * 24))
    assert found["provenance"]["device"]["estimated"] == 0


def test_meters_that_answer_late_or_fall_silent(folder):
    folder.progress("start")
    folder.energy("begin", Taken(), 0, after=0.2)
    folder.energy("steps", Taken(), 0, after=3.0)  # nobody was asked before the first report
    folder.energy("window", seen(23.2), 10, after=20.0)
    assert account(folder.path)["wall_s"] == pytest.approx(23.2)
    assert account(folder.path)["joules"]["device"] == pytest.approx(8 * 500 * 23.2)
    folder.energy("window", seen(19.7), 20, after=20.0)  # a meter has news a moment later than the report
    assert account(folder.path)["wall_s"] == pytest.approx(43.0)
    assert account(folder.path)["provenance"]["device"]["estimated"] == pytest.approx(0.1 / 43.0, rel=1e-3)
    folder.energy("window", Taken(), 30, after=20.0)
    found = account(folder.path)
    assert found["wall_s"] == pytest.approx(63.0)
    assert "31.7 %" in found["unknown"]["device"]
    folder.energy("window", Taken(), 35, after=4.0)
    folder.energy("end", Taken(), 35, after=3.0)
    assert account(folder.path)["wall_s"] == pytest.approx(70.0)


def test_a_last_row_that_no_meter_answered_is_late_and_not_unknown(folder):
    folder.starts("a", seconds=2.0)
    folder.energy("end", Taken(devices=8), 0, after=0.5)
    found = account(folder.path)
    assert found["wall_s"] == pytest.approx(2.5)
    assert found["joules"]["device"] == pytest.approx(8 * 200 * 2.5)
    assert found["provenance"]["device"]["estimated"] == pytest.approx(0.2)


def test_a_killed_process_without_a_word_lived_half_a_window_more(folder):
    folder.starts("a")
    folder.window(10)
    folder.now += 100
    folder.starts("b", step=10)
    folder.window(20)
    found = account(folder.path)
    assert (found["held"]["seconds"], found["queued_s"]) == (10, 90)
    assert "half a window" in found["held"]["why"]


def test_a_process_without_meters_leaves_its_time_unknown(folder):
    folder.starts("a")
    folder.window(10)
    folder.process = "b"
    folder.progress("start")
    folder.now += 50
    folder.progress("report", step=20, tokens=2000)
    found = account(folder.path)
    assert found["tokens"] == 2000
    assert found["wall_s"] == 80
    assert found["joules"]["device"] is None
    assert "62.5 %" in found["unknown"]["device"]
    assert found["headline"]["boundary"] is None


def test_a_node_that_does_not_answer_makes_its_time_unknown(folder):
    folder.starts("a")
    folder.window(10, seconds=40.0)
    folder.window(20, taken=seen(20, nodes=1))
    found = account(folder.path)
    assert found["joules"]["device"] is None
    assert "14.3 %" in found["unknown"]["device"]  # half of 20 s of 70 s


def test_a_schedule_prices_each_window_by_its_time(folder):
    @dataclasses.dataclass
    class Now:
        price_eur_mwh: float | None
        carbon_g_kwh: float | None
        until_s: float | None

    class Prices:
        def at(self, time_s):
            hour = math.floor((time_s - NOW) / 20)
            return Now([100.0, 50.0][hour % 2], None, NOW + 20 * (hour + 1))

    folder = Folder(folder.path, known(carbon_g_kwh=figure(40.0), price_eur_mwh=figure(500.0)))
    folder.energy("begin", Taken(nodes=2))
    folder.window(10)
    folder.window(20)
    found = account(folder.path, schedule=Prices())
    joules = 8000 * 20
    assert found["eur"] == pytest.approx(joules * (100 + 50) / 3.6e9)
    assert found["kg_co2e"] == pytest.approx(2 * joules / 3.6e6 * 0.040)  # the schedule has none: the site's
    assert found["eur_per_gtoken"] == pytest.approx(found["eur"] / 2000 * 1e9)
    plain = account(folder.path)
    assert plain["eur"] == pytest.approx(2 * joules * 500 / 3.6e9)
    assert {"price_eur_mwh", "carbon_g_kwh", "fabric_watts", "pue"} <= {one["what"] for one in found["sources"]}


def test_folders_in_whatever_state(folder, tmp_path):
    with pytest.raises(RunError, match="is no folder"):
        account(tmp_path / "nowhere")
    empty = account(folder.path)
    assert empty["tokens"] is None
    assert empty["wall_s"] == 0
    assert set(empty["unknown"]) == {"device", "node", "it", "facility"}
    assert "no rows" in empty["headline"]["why"]
    folder.starts("a")
    folder.window(10)
    folder.line("energy.jsonl", '{"time_s": 1790000')
    folder.line("energy.jsonl", '[1, 2]\nnull\n{"time_s": "x"}')
    folder.energy("window", seen(20), 20, tokens=-5, taken_of="nobody", bins=[[1], None, "x", [1, 2, 3, "4"]], phases=[1], meters=3)
    folder.line(
        "energy.jsonl",
        {"time_s": folder.now, "process": None, "event": 7, "step": "x", "taken": {"nodes": True, "ms": -1, "device_measured_mj": 1e400}},
    )
    folder.line("logs/progress.jsonl", '{"time_s": 1, "event"')
    folder.now -= 1e6  # a clock that was set back
    folder.window(30)
    folder.history("judged", verdict=3)
    folder.line("launch/history.jsonl", '{"event": "judged", "attempt": 0, "time": 5}\n{"eve')
    found = account(folder.path)
    assert found["tokens"] == 3000
    assert found["wall_s"] == pytest.approx(70)
    json.dumps(found, allow_nan=False)
    (folder.path / "plan.json").write_text('{"watts": {"pue": 3}}')
    assert "cannot be read" in account(folder.path)["notes"][0]
    (folder.path / "plan.json").write_bytes(b"\xff{")
    assert "does not say" in account(folder.path)["notes"][0]


def test_a_run_whose_progress_alone_is_known(folder):
    folder.progress("start")
    folder.progress("steps", step=0)
    folder.now += 30
    folder.progress("report", step=10, tokens=990)
    found = account(folder.path)
    assert (found["tokens"], found["wall_s"]) == (990, 30)
    assert found["unknown"]["device"].startswith("not measured")
    (folder.path / "logs" / "progress.jsonl").unlink()
    (folder.path / "metrics.jsonl").write_text('{"step": 10, "tokens": 990}\n{"step": 10, "val_loss": 3.0}\n')
    assert account(folder.path)["tokens"] == 990


def test_what_came_later_is_left_out(folder):
    folder.starts("a")
    folder.window(10)
    at = folder.now
    folder.window(20)
    found = account(folder.path, until=at)
    assert (found["tokens"], found["wall_s"]) == (1000, 30)


def test_a_resume_from_between_two_reports(folder):
    folder.starts("a")
    folder.window(10)
    folder.window(20)
    folder.progress("end", why="SIGTERM")
    folder.starts("b", step=15)
    found = account(folder.path)
    assert found["tokens"] == 1500
    folder.line("energy.jsonl", "")
    assert account(folder.path)["tokens"] == 1500


def test_a_long_run(folder):
    """Linear, and windows stay few."""
    folder.starts("a")
    said = dict(zip(FIELDS, seen(10).ints(), strict=True))
    with (folder.path / "energy.jsonl").open("a") as file:
        for number in range(1, 5001):
            row = {
                "time_s": folder.now + 10 * number,
                "event": "window",
                "process": "a",
                "step": number,
                "tokens": 100 * number,
                "taken": said,
            }
            file.write(json.dumps(row) + "\n")
    found = account(folder.path)
    assert found["tokens"] == 500_000
    assert len(found["windows"]) <= 2001
    assert sum(one["tokens"] for one in found["windows"]) == 500_000

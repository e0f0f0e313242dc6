"""Energy within a run: each meter read once whoever asks, sums that are the tree's truth, rows that survive restarts, figures only of what is known."""

import json
import os
import platform
import subprocess
import time
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from commands import training
from distributed import together
from rapl import Rapl
from rich.console import Console

from gigatrain import config, load, loop
from gigatrain.errors import PowerError
from gigatrain.observe import energy, trace
from gigatrain.observe.display import Display, drawn
from gigatrain.observe.energy import Energy, _share, _split, _steepest
from gigatrain.observe.health import Health
from gigatrain.observe.logs import Log, Progress
from gigatrain.observe.report.collect import collect
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan
from gigatrain.planning.watts import Watts
from gigatrain.power import account
from gigatrain.power.reading import Taken
from gigatrain.site import Figure


def rows(folder):
    return [json.loads(line) for line in (folder / "energy.jsonl").read_text().splitlines()]


def millijoules(found, name="device_measured_mj"):
    return sum(row["taken"][name] for row in found)


def trained(tiny, folder, *overrides, start: Any = "auto"):
    chosen = plan(load.recipe(tiny, ["export=false", "report.trackers=[]", *overrides]), load.site("laptop"))
    return loop.train(chosen, folder, start=start, display=Display(Console(file=open(os.devnull, "w"))))


def test_a_run_counts_what_the_meter_counted_from_its_first_second_to_its_last(tiny, tmp_path):
    with Rapl(tmp_path / "sys", watts=50) as tree:
        before = tree.joules()
        summary = trained(tiny, tmp_path / "run", f"power.sysfs={tmp_path}/sys")
        most = tree.joules() - before
    found = rows(tmp_path / "run")
    assert [row["event"] for row in found] == ["begin", "steps", "window", "end"]
    assert 0.9 * most <= millijoules(found) / 1e3 <= 1.02 * most
    assert "package" in json.dumps(found[0]["meters"])
    assert summary is not None
    told = summary["energy"]
    later = {name: one for name, one in account.account(tmp_path / "run").items() if name != "windows"}
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(later))  # what is written at the end is what a report finds
    assert collect(tmp_path / "run")["summary_differs"] == ""
    assert told["joules"]["device"] == pytest.approx(millijoules(found) / 1e3, rel=0.02)  # what the first look missed is scaled up
    assert told["watts"]["device"] == pytest.approx(50, rel=0.1)
    assert told["tokens_per_joule"]["device"] == pytest.approx(summary["tokens"] / told["joules"]["device"])
    assert told["joules"]["facility"] is None
    assert told["unknown"]["facility"]
    assert set(told["phases"]) >= {"starting", "checkpoint", "validation"}
    assert sum(told["phases"].values()) == pytest.approx(told["joules"]["device"], rel=0.1)


@pytest.mark.long
def test_two_ranks_on_one_machine_read_its_meter_once(tiny, tmp_path):
    with Rapl(tmp_path / "sys", watts=50, packages=2) as tree:
        ended = subprocess.run(
            training(tiny, tmp_path / "run", "train.nproc=2", f"power.sysfs={tmp_path}/sys", "report.trackers=[]"),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        most = 2 * tree.joules()
    assert ended.returncode == 0, ended.stderr
    found = rows(tmp_path / "run")
    assert {row["taken"]["nodes"] for row in found if row["event"] == "window"} == {1}
    assert 0.2 * most < millijoules(found) / 1e3 <= most


def test_rows_of_a_process_that_was_undone_stay(tiny, tmp_path):
    with Rapl(tmp_path / "sys"):
        trained(tiny, tmp_path / "run", f"power.sysfs={tmp_path}/sys", "train.steps=6")
        with (tmp_path / "run" / "energy.jsonl").open("ab") as file:
            file.write(b'{"half": ')
        before = (tmp_path / "run" / "energy.jsonl").read_bytes()
        trained(tiny, tmp_path / "run", f"power.sysfs={tmp_path}/sys", "train.steps=6", start="resume")  # only looks
        assert (tmp_path / "run" / "energy.jsonl").read_bytes() == before
    lines = before.splitlines()
    assert lines[-1] == b'{"half": '


def test_nothing_to_read_is_no_zero(tiny, tmp_path):
    (tmp_path / "sys").mkdir()
    summary = trained(tiny, tmp_path / "run", f"power.sysfs={tmp_path}/sys")
    assert summary is not None
    assert set(summary["energy"]["joules"].values()) == {None}
    assert all(summary["energy"]["unknown"].values())
    assert not any("watts" in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def test_measuring_can_be_switched_off(tiny, tmp_path):
    summary = trained(tiny, tmp_path / "run", "power.measure=false")
    assert not (tmp_path / "run" / "energy.jsonl").exists()
    assert summary is not None
    assert set(summary["energy"]["joules"].values()) == {None}


def test_a_meter_that_the_recipe_names_and_that_is_not_there_stops_the_run(tiny, tmp_path):
    (tmp_path / "sys").mkdir()
    with pytest.raises(PowerError, match="pm_counters"):
        trained(tiny, tmp_path / "run", f"power.sysfs={tmp_path}/sys", "power.node=pm_counters")


def hosts(rank, names):
    platform.node = lambda: names[rank]
    mesh = Mesh(config.Mesh(shard=len(names)), rank)
    found = _share(mesh, 0, 0)
    heard = Health(None, mesh).agree([rank, 1 << 40])  # type: ignore[arg-type]
    return found, heard


def test_one_rank_a_host_leads_and_one_a_machine_reads_it():
    found = together(4, hosts, ("left", "left", "right", "right"))
    assert [one for one, _ in found] == [
        ([], None, True, True, 2, 1),
        ([], None, False, False, 2, 1),
        ([], None, False, True, 2, 1),
        ([], None, False, False, 2, 1),
    ]
    assert all(heard == [6, 4 << 40] for _, heard in found)


def of_hosts(rank, recipe, folder, sysfs, hosts, machines):
    """A whole run, each rank on a host of its own, which may be another machine's."""
    platform.node = lambda: hosts[rank]
    energy._boot = lambda: machines[rank]
    overrides = ["export=false", "report.trackers=[]", "train.steps=6", f"power.sysfs={sysfs}"]
    chosen = plan(load.recipe(recipe, overrides), load.site("laptop"), len(hosts))
    return loop.train(chosen, folder, display=Display(Console(file=open(os.devnull, "w"))))


@pytest.mark.parametrize(("machines", "count"), [(("one", "two"), 2), (("one", "one"), 1)])
def test_a_run_on_two_hosts_sums_their_machines(tiny, tmp_path, machines, count):
    """Two machines, which here have the same tree, draw twice; two containers of one machine draw once."""
    with Rapl(tmp_path / "sys", 50):
        first, _ = together(2, of_hosts, tiny, tmp_path / "run", tmp_path / "sys", ("left", "right"), machines)
    found = rows(tmp_path / "run")
    assert [row["event"] for row in found] == ["begin", "steps", "window", "end"]
    assert {row["taken"]["nodes"] for row in found[1:3]} == {count}
    steps = sum(row["taken"]["device_measured_mj"] for row in found[1:3]) / sum(row["taken"]["ms"] for row in found[1:3])
    assert steps == pytest.approx(50, rel=0.1)  # milliwatts over milliseconds of machines
    assert first["energy"]["watts"]["device"] == pytest.approx(50 * count, rel=0.1)


def test_a_row_that_cannot_be_written_is_in_the_next(tiny, tmp_path):
    said = []
    with Rapl(tmp_path / "sys", 50):
        chosen = plan(load.recipe(tiny, [f"power.sysfs={tmp_path}/sys"]), load.site("laptop"))
        (tmp_path / "run").mkdir()
        progress = Progress(Log(tmp_path / "run"), tmp_path / "run")
        with energy.Energy(chosen, alone(), tmp_path / "run", "r", progress=progress, say=said.append) as measured:
            time.sleep(1.5)
            (tmp_path / "run" / "energy.jsonl").rename(tmp_path / "run" / "kept")
            (tmp_path / "run" / "energy.jsonl").mkdir()
            measured.meet(measured.numbers())
            measured.report(2, 100, trace.OFF, must=True)
            (tmp_path / "run" / "energy.jsonl").rmdir()
            time.sleep(1.5)
            measured.meet(measured.numbers())
            measured.report(4, 200, trace.OFF, must=True)
    assert "it is in the next row" in said[0]
    window = rows(tmp_path / "run")[0]
    assert (window["event"], window["step"]) == ("window", 4)
    assert window["taken"]["device_measured_mj"] == pytest.approx(50 * window["taken"]["ms"], rel=0.05)
    assert window["taken"]["ms"] > 2000


def test_a_clock_that_was_set_forward_costs_no_memory(tiny, tmp_path, monkeypatch):
    (tmp_path / "sys").mkdir()
    chosen = plan(load.recipe(tiny, [f"power.sysfs={tmp_path}/sys"]), load.site("laptop"))
    with energy.Energy(chosen, alone(), tmp_path, "r", progress=Progress(Log(tmp_path), tmp_path), say=print) as measured:
        later = time.time() + 10 * 365 * 86400
        monkeypatch.setattr(time, "time", lambda: later)
        for _ in range(3):
            assert len(measured.numbers()) < 1000
            measured.meet(measured.numbers())
        assert len(measured._waiting) < 100
        assert measured._next == int(later) // 10


def test_a_driver_that_fails_in_its_own_way_costs_the_figures_and_not_the_run(tiny, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("counter_resolution")

    monkeypatch.setattr(energy.meter, "opened", broken)
    summary = trained(tiny, tmp_path / "run", "train.steps=4")
    assert summary is not None
    assert set(summary["energy"]["joules"].values()) == {None}


def uuids(rank, numbers):
    return _share(Mesh(config.Mesh(shard=len(numbers)), rank), numbers[rank], 0)[0]


def test_four_ranks_on_two_gpus_are_two_devices():
    first, second = (1 << 127) + 7, (0xFFFF_FFFF << 60) + 8  # halves of 64 bits with their sign bit set
    found = together(4, uuids, (first, first, second, second))
    assert found == [[str(uuid.UUID(int=first)), str(uuid.UUID(int=second))], [], [], []]


def test_joules_of_training_follow_the_seconds_of_its_phases():
    split = _split({"training": 100.0, "checkpoint": 7.0}, {"forward": 2.0, "backward": 4.0, "optimizer": 2.0, "reduce": 1.5, "data": 0.5})
    assert split == {"checkpoint": 7.0, "compute": pytest.approx(80.0), "communication": pytest.approx(15.0), "data": pytest.approx(5.0)}
    assert _split({"training": 5.0}, {}) == {"training": 5.0}


def test_the_steepest_change_is_of_neighbouring_ten_seconds_that_all_nodes_closed():
    bins = [
        (7, 2, 0, 1_000_000),
        (8, 2, 0, 1_500_000),
        (10, 2, 0, 9_000_000),
        (11, 1, 0, 1_000_000),
        (12, 2, 0, 2_000_000),
        (13, 2, 0, 1_200_000),
    ]
    assert _steepest(bins, 2) == -80.0
    assert _steepest(bins[:2], 2) == 50.0
    assert _steepest(bins[1:4], 2) is None


def test_the_line_says_the_widest_boundary_that_is_known():
    assert drawn({"loss": 1.0}) == ""
    assert drawn({"device_watts": 5600.0, "node_watts": 6850.0, "tokens_per_s_mw": 808_000.0}) == "  6,850 W node  0.808 Mtok/s/MW"


def test_signals_still_agree_beside_the_numbers(tiny):
    health = Health(plan(load.recipe(tiny), load.site("laptop")), alone())
    assert health.agree([1, 2, 3]) == [1, 2, 3]
    assert not health.wants_out


@pytest.mark.parametrize(
    ("taken", "wide", "means"),
    [
        (
            {"device_ms": 20_000, "device_measured_mj": 4_000_000, "node_unknown_ms": 20_000, "device_unknown_ms": 0},
            "device",
            (200.0, 100.0),
        ),
        ({"device_ms": 20_000, "device_measured_mj": 4_000_000, "node_measured_mj": 8_000_000}, "facility", (550.0, 220.0)),
        ({"device_unknown_ms": 20_000, "node_unknown_ms": 20_000}, None, ()),
    ],
)
def test_ten_second_means_are_of_the_widest_boundary_that_is_known(taken, wide, means):
    energy = Energy.__new__(Energy)
    figure = {name: Figure(value=value, basis="declared", source="a test") for name, value in (("pue", 1.1), ("zero", 0.0))}
    watts = Watts(accelerators=1, per_node=1, fabric_watts=figure["zero"], storage_watts=figure["zero"], pue=figure["pue"])
    energy.nodes, energy.devices, energy.plan = 1, 0, SimpleNamespace(watts=watts)  # type: ignore[assignment]
    closed = [(7, 1, 2_000_000, 5_000_000), (8, 0, 9_000_000, 9_000_000), (9, 1, 1_000_000, 2_000_000)]  # one that not all have closed
    energy._since = Taken(nodes=1, ms=20_000, devices=1, bins=closed, **taken)
    energy._look()
    assert energy.latest.boundary == wide
    assert energy.latest.bins == tuple((at, pytest.approx(mean)) for at, mean in zip((70.0, 90.0), means, strict=False))
    assert energy.latest.peak_watts == (pytest.approx(means[0]) if means else None)

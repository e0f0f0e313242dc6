"""A budget within a run: steps wait, a schedule pauses, saves are staggered, and the numbers of the run are those of one that nobody slowed."""

import datetime
import json
import os
import subprocess
import sys
import time

import pytest
from rapl import Rapl
from rich.console import Console

from gigatrain import load, loop
from gigatrain.errors import PowerError
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan
from gigatrain.power.control import stagger


def trained(tiny, folder, *overrides):
    chosen = plan(load.recipe(tiny, ["export=false", "report.trackers=[]", *overrides]), load.site("laptop"))
    return loop.train(chosen, folder, display=Display(Console(file=open(os.devnull, "w"))))


def rows(folder):
    return [json.loads(line) for line in (folder / "energy.jsonl").read_text().splitlines()]


def stamp(seconds):
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def test_a_schedule_pauses_the_run_and_changes_none_of_its_numbers(tiny, tmp_path):
    free = trained(tiny, tmp_path / "free", "power.measure=false")
    until = time.time() + 7
    (tmp_path / "prices.csv").write_text(f"time,price_eur_mwh\n{stamp(until - 3600)},300\n{stamp(until)},20\n{stamp(until + 3600)},20\n")
    with Rapl(tmp_path / "sys", 50, platform=True):
        slowed = trained(
            tiny, tmp_path / "run", f"power.sysfs={tmp_path}/sys", f"power.schedule={tmp_path}/prices.csv", "power.follow=price",
            "power.slow_above=100", "power.slow_to=0",
        )  # fmt: skip
    assert time.time() >= until
    assert free is not None
    assert slowed is not None
    assert slowed["weights_sha256"] == free["weights_sha256"]
    found = rows(tmp_path / "run")
    cost = found[-1]["orders"]["cost"]
    assert cost["paused_s"] > 0
    assert slowed["energy"]["joules"]["facility"] == pytest.approx(slowed["energy"]["joules"]["node"])
    assert slowed["energy"]["phases"]["paced"] > 0.8 * 50 * cost["paused_s"]


def test_runs_of_a_site_save_at_steps_of_their_own(tiny, tmp_path):
    plain = trained(tiny, tmp_path / "plain", "power.measure=false", "checkpoint.keep=100")
    staggered = trained(tiny, tmp_path / "run", "power.measure=false", "power.stagger=true", "checkpoint.keep=100")
    assert plain is not None
    assert staggered is not None
    assert staggered["weights_sha256"] == plain["weights_sha256"]
    shift = stagger(json.loads((tmp_path / "run" / "run.json").read_text())["id"], 3)
    saved = [int(path.name.removeprefix("step-")) for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))]
    assert saved == [0, *(step for step in range(1, 12) if (step + shift) % 3 == 0), 12]


def test_a_schedule_that_cannot_be_read_stops_the_run_before_it_begins(tiny, tmp_path):
    with pytest.raises(PowerError, match=r"prices\.csv"):
        trained(tiny, tmp_path / "run", f"power.schedule={tmp_path}/prices.csv", "power.follow=price", "power.slow_above=100")


@pytest.mark.long
def test_two_ranks_are_kept_under_a_budget_that_full_speed_would_break(tmp_path):
    """A machine that draws 20 W and 60 more for each busy core, by what the two ranks really use; the budget is what one and a half would draw less."""
    ranks: list[int] = []
    last = [time.monotonic(), 0.0, 20.0]

    def watts() -> float:
        now = time.monotonic()
        if now - last[0] >= 0.2:
            used = sum(seconds(pid) for pid in ranks)
            last[:] = [now, used, 20.0 + 60.0 * min(2.0, max(0.0, used - last[1]) / (now - last[0]))]
        return last[2]

    means, budget = [], 80.0
    with Rapl(tmp_path / "sys", watts, platform=True) as tree:
        command = [
            sys.executable, "-m", "gigatrain", "train", "quickstart", "--run", str(tmp_path / "run"),
            *(word for override in (
                "train.steps=200", "train.nproc=2", "train.batch=4", "report.every=4", "report.trackers=[]", "export=false", "validation.max_samples=8",
                f"power.sysfs={tmp_path}/sys", f"power.megawatts={budget / 1e6}", f"data.folder={tmp_path}/data",
            ) for word in ("--set", override)),
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            ranks[:] = children(process.pid)
            before, began = tree.joules(), time.monotonic()
            time.sleep(5)
            means.append((tree.joules() - before) / (time.monotonic() - began))
    assert process.returncode == 0
    orders = [row["orders"] for row in rows(tmp_path / "run") if "orders" in row]
    assert any(one["share"] < 0.9 for one in orders)
    told = [
        row["taken"]["node_measured_mj"] / row["taken"]["ms"]
        for row in rows(tmp_path / "run")
        if row["event"] == "window" and row["taken"]["ms"] > 9000
    ]
    assert len(told) >= 3
    assert sorted(told)[len(told) // 2] <= budget
    assert sum(one > 1.1 * budget for one in told) <= len(told) // 4  # neighbours of this machine come and go


def stat(pid: int) -> list[str]:
    """Of /proc/PID/stat what follows the name; nothing of a process that is gone."""
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    except OSError:
        return []


def seconds(pid: int) -> float:
    said = stat(pid)
    return (int(said[11]) + int(said[12])) / os.sysconf("SC_CLK_TCK") if said else 0.0


def children(pid: int) -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and stat(int(name))[1:2] == [str(pid)]]

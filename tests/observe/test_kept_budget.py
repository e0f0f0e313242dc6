"""A budget within a run: steps wait, a schedule pauses, saves are staggered, and the numbers of the run are those of one that nobody slowed."""

import datetime
import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rapl import Rapl
from rich.console import Console

from gigatrain import load, loop
from gigatrain.config import Power
from gigatrain.errors import REQUEUE, PowerError
from gigatrain.observe.budget import Budget
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan
from gigatrain.planning.watts import Watts
from gigatrain.power.control import Governor, stagger
from gigatrain.power.pace import Orders, Pace
from gigatrain.power.reading import Seen
from gigatrain.site import Figure


def trained(tiny, folder, *overrides, site=None, shown=None):
    chosen = plan(load.recipe(tiny, ["export=false", "report.trackers=[]", *overrides]), site or load.site("laptop"))
    return loop.train(chosen, folder, display=Display(Console(file=shown or open(os.devnull, "w"), width=400)))


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


def test_a_budget_that_nothing_can_be_held_against_is_refused_before_the_first_step(tiny, tmp_path):
    blind = f"power.sysfs={tmp_path}/nothing"
    with pytest.raises(
        PowerError, match=r"power\.megawatts cannot be kept: nothing measures what the run draws.*leave the budget out"
    ) as refused:
        trained(tiny, tmp_path / "run", blind, "power.megawatts=0.001")
    assert refused.value.shared
    assert {row["step"] for row in rows(tmp_path / "run")} == {0}
    (tmp_path / "limits.csv").write_text("time,megawatts\n00:00,0\n")
    with pytest.raises(PowerError, match=r"nothing was begun: the schedule allows 0 W; give .*limits\.csv a row that allows more"):
        trained(tiny, tmp_path / "never", blind, f"power.schedule={tmp_path}/limits.csv")


def test_what_a_budget_is_held_against_is_shown_once(tiny, tmp_path):
    """A processor's meter and no more: what the machine draws beside it, nobody knows."""
    shown = io.StringIO()
    with Rapl(tmp_path / "sys", 50):
        trained(tiny, tmp_path / "run", f"power.sysfs={tmp_path}/sys", "power.megawatts=1", shown=shown)
    found = [line for line in shown.getvalue().splitlines() if "POWER" in line]
    assert found == ["POWER power.megawatts is held against the devices only: what the facility draws beyond is unknown"]


def test_a_ramp_of_the_site_that_is_not_kept_is_shown(tiny, tmp_path):
    shown, site = io.StringIO(), load.site("laptop")
    power = site.power.model_copy(update={"ramp_watts_min": Figure(value=1e3, basis="declared", source="a test")})
    trained(tiny, tmp_path / "run", "power.measure=false", site=site.model_copy(update={"power": power}), shown=shown)
    said = [line for line in shown.getvalue().splitlines() if "POWER" in line]
    assert said == ["POWER power.measure is false, so the site's own ramp and limit are not kept"]


def test_what_is_told_is_told_when_it_begins_and_when_it_ends():
    def ordered(*notices):
        return Orders(notices=tuple(notices))

    silent, paused = ("silent", "nothing is measured"), ("paused", "paused until noon")
    said, orders = (
        [],
        iter([ordered(), ordered(silent), ordered(silent), ordered(paused), ordered(("paused", "paused until one")), ordered()]),
    )
    budget = Budget.__new__(Budget)
    budget.orders, budget.pace, budget.governor = None, Pace(), Governor(Power(megawatts=1.0), Watts(), began_s=0.0)
    budget.governor.decide = lambda seen: next(orders)  # type: ignore[method-assign]
    budget.energy = SimpleNamespace(path="", say=said.append, obey=lambda share: None, orders={})  # type: ignore[assignment]
    for _ in range(6):
        budget._follow(Seen(0.0, None))
    assert said == [
        "POWER nothing is measured",
        "POWER paused until noon",
        "POWER it is measured again",
        "POWER paused until one",
        "POWER the pause is over: steps go on",
    ]


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

    means, budget = [], 80.0  # of ten seconds each, by the counter itself, whatever the run says of it
    with Rapl(tmp_path / "sys", watts, platform=True) as tree:
        command = [
            sys.executable, "-m", "gigatrain", "train", "quickstart", "--run", str(tmp_path / "run"),
            *(word for override in (
                "train.steps=100000", "train.nproc=2", "train.batch=4", "report.every=4", "report.trackers=[]", "export=false", "validation.max_samples=8",
                f"power.sysfs={tmp_path}/sys", f"power.megawatts={budget / 1e6}", f"data.folder={tmp_path}/data",
            ) for word in ("--set", override)),
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if len(means) == 5:  # so many of any machine, however slow its steps are
                process.send_signal(signal.SIGTERM)
            ranks[:] = children(process.pid)
            before, began = tree.joules(), time.monotonic()
            while process.poll() is None and time.monotonic() < began + 10:
                time.sleep(0.5)
                ranks[:] = children(process.pid)
            stepped = (tmp_path / "run" / "energy.jsonl").is_file() and any(
                row["step"] for row in rows(tmp_path / "run") if row["event"] == "window"
            )
            if process.poll() is None and stepped and len(means) < 5:  # a start is not paced, nor is the last save
                means.append((tree.joules() - before) / (time.monotonic() - began))
    assert process.returncode == REQUEUE
    orders = [row["orders"] for row in rows(tmp_path / "run") if "orders" in row]
    assert any(one["share"] < 0.9 for one in orders)
    told = [
        row["taken"]["node_measured_mj"] / row["taken"]["ms"]
        for row in rows(tmp_path / "run")
        if row["event"] == "window" and row["taken"]["ms"] > 9000
    ]
    assert len(means) == 5
    assert sorted(means)[len(means) // 2] <= budget
    assert sum(one > 1.1 * budget for one in means) <= len(means) // 4  # neighbours of this machine come and go
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

"""Every second of a run has one class, and they add up to its wall-clock: of rows made by hand, and of a run that was killed and resumed."""

import json

import pytest

from gigatrain.observe.goodput import CLASSES, classes, goodput_of, sessions_of
from gigatrain.observe.reader import Reader
from gigatrain.observe.tail import Tail


def row(time_s, event, process="a", **more):
    return {"time_s": time_s, "event": event, "attempt": 0, "ranks": 1, "process": process} | more


ROWS = [
    row(100.0, "start"),
    row(104.0, "steps", step=0, seconds={"compile": 1.0, "checkpoint": 0.5}),
    row(110.0, "report", step=10, seconds={"training": 5.0, "data": 0.5, "compile": 0.25}),
    row(116.0, "report", step=20, seconds={"training": 5.0, "checkpoint": 0.75}),
    row(130.0, "start", "b"),
    row(133.0, "steps", "b", step=15, seconds={"restore": 1.25}),
    row(139.0, "report", "b", step=25, seconds={"training": 5.5, "paced": 0.25}),
    row(140.0, "end", "b", why="finished"),
]


def test_every_class_of_a_run_made_by_hand():
    found = classes(ROWS)
    assert tuple(found) == CLASSES
    assert found == pytest.approx(
        {
            "training": 5.0 + 2.5 + 5.5,  # of the second window's ten steps the resume took five back
            "redone": 2.5,
            "data": 0.5,
            "compile": 1.25,
            "validation": 0.0,
            "checkpoint": 1.25,
            "restore": 1.25,
            "paced": 0.25,
            "starting": 4.0 - 1.5 + 3.0 - 1.25,
            "stopped": 14.0,
            "other": 40.0 - 13.0 - 2.5 - 0.5 - 1.25 - 1.25 - 1.25 - 0.25 - 4.25 - 14.0,
        }
    )
    assert sum(found.values()) == pytest.approx(40.0, rel=1e-3)


@pytest.mark.parametrize("cut", range(1, len(ROWS) + 1))
def test_they_add_up_wherever_a_kill_cuts_the_file(cut):
    rows = ROWS[:cut]
    wall_s = rows[-1]["time_s"] - rows[0]["time_s"]
    assert sum(classes(rows).values()) == pytest.approx(wall_s, rel=1e-3)
    assert sum(classes(rows, rows[-1]["time_s"] + 7).values()) == pytest.approx(wall_s + 7, rel=1e-3)
    assert min(classes(rows).values()) >= 0


def test_what_a_killed_process_did_after_its_last_report_is_stopped_whoever_tells_its_end():
    killed = row(118.5, "end", why="rank 1 of 4 was ended by SIGKILL", killed=True)
    failed = row(117.5, "end", why="RuntimeError", seconds={"data": 0.5})
    assert classes([*ROWS[:4], killed, *ROWS[4:]]) == pytest.approx(classes(ROWS))  # as where nobody tells it
    found = classes([*ROWS[:4], failed, killed, *ROWS[4:]])
    assert (found["stopped"], found["data"]) == pytest.approx((13.5, 1.0))
    alone = classes([row(100.0, "start"), row(103.0, "end", why="rank 0 was ended before its first step", killed=True), *ROWS[4:]])
    assert (alone["starting"], alone["stopped"]) == pytest.approx((3.0 + 3.0 - 1.25, 27.0))


@pytest.mark.parametrize("set_s", [-3600, 3600])
def test_they_add_up_where_a_clock_was_set(set_s):
    rows = [one | {"time_s": one["time_s"] + set_s * (index > 2)} for index, one in enumerate(ROWS)]
    found = goodput_of(sessions_of(rows).all, None)
    assert found is not None
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"], rel=1e-3, abs=0.02)


@pytest.mark.long
def test_of_a_run_that_was_killed_and_resumed(tiny, tmp_path):
    """A real run, ended by SIGKILL at its ninth step and resumed: restored, redone and stopped are all seen, and all adds up."""
    import signal
    import subprocess
    import time

    from commands import training

    folder = tmp_path / "run"
    sets = ("checkpoint.every=5", "report.every=1", "train.steps=300", "validation.every=0", "checkpoint.background=false")
    progress = folder / "logs" / "progress.jsonl"

    def reported():
        rows = Tail(progress).rows()[0]
        return max((one["step"] for one in rows if one["event"] == "report"), default=0)

    with subprocess.Popen([*training(tiny, folder, *sets), "--continue"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        end = time.monotonic() + 120
        while reported() < 8 and time.monotonic() < end:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
    with subprocess.Popen([*training(tiny, folder, *sets), "--continue"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        assert run.wait(120) == 0
    rows = Tail(progress).rows()[0]
    found, wall_s = classes(rows), rows[-1]["time_s"] - rows[0]["time_s"]
    assert len({one["process"] for one in rows}) == 2
    assert sum(found.values()) == pytest.approx(wall_s, rel=1e-3)
    assert all(found[name] > 0 for name in ("training", "data", "checkpoint", "restore", "starting", "stopped"))
    assert Reader(folder).seen()["goodput"]["seconds"] == found  # watch and report read the same function
    assert json.loads((folder / "summary.json").read_text())["steps"] == 300

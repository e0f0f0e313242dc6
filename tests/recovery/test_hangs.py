"""Ranks that hang, each in its own way, are named and ended, and the run is the undisturbed one; a supervisor that is killed leaves nothing."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import plants
import pytest
from commands import training

SETS = ("train.nproc=2", "train.batch=8", "validation.every=0", "train.deterministic=true", "recovery.hang_floor_s=2")


def weights(folder):
    return json.loads((folder / "summary.json").read_text())["weights_sha256"]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = subprocess.run(training(tiny, folder, *SETS, "train.steps=40"), capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "no progress" not in ended.stderr
    return weights(folder)


def until(process, folder, step):
    end = time.monotonic() + 120
    while not (folder / "checkpoints" / f"step-{step:08}" / "COMMITTED").exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def ranks_of(parent):
    """Their processes, by rank, of ranks that a standby has forked."""
    found = {}
    for pid in subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout.split():
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name.startswith("gigatrain:"):
            found[int(name.partition(":")[2])] = int(pid)
    return found


def carrying(mark):
    """Processes with this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append((int(path.parent.name), (path.parent / "cmdline").read_bytes().replace(b"\0", b" ")[:200]))
        except OSError:
            continue
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "words"),
    [("stop", "its process is stopped"), ("lock", "holds Python's lock"), ("loop", "the others are further, and wait for it; it computes")],
)
def test_a_rank_that_hangs_is_named_and_the_run_is_the_undisturbed_one(tiny, whole, tmp_path, kind, words):
    folder = tmp_path / "run"
    environment = dict(os.environ) if kind == "stop" else plants.planted(tmp_path, kind, 1, 20)
    process = subprocess.Popen(
        training(tiny, folder, *SETS, "train.steps=40"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if kind == "stop":
        until(process, folder, 9)
        os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    found = re.search(rf"rank 1 made no progress at step (\d+): (.*) \(in (\w+), for ([\d.]+) s on {os.uname().nodename}; limit ", said)
    assert found is not None, said
    assert words in found[2]
    assert float(found[4]) < 4 * 2 + 30
    if kind != "stop":
        assert (found[1], found[3]) == ("20", "data")
    assert "restarted from step" in said
    assert weights(folder) == whole


@pytest.mark.long
def test_a_command_that_is_killed_leaves_nothing_running_and_resumes_at_once(tiny, whole, tmp_path):
    folder, mark = tmp_path / "run", f"TEST_OF={tmp_path}"
    command = training(tiny, folder, *SETS, "train.steps=40")
    environment = os.environ | {"TEST_OF": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(process, folder, 6)
    assert len(carrying(mark)) > 3
    os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
    process.kill()
    again = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # without the mark
    process.wait(30)
    end = time.monotonic() + 20
    while left := carrying(mark):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert weights(folder) == whole


@pytest.mark.long
def test_restarts_that_gain_nothing_end_with_the_cause_on_one_screen(tiny, tmp_path):
    folder = tmp_path / "run"
    environment = plants.planted(tmp_path, "die", 1, 2, once=False)
    ended = subprocess.run(
        training(tiny, folder, *SETS, "recovery.restarts=2", "checkpoint.every=5"),
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ended.returncode == 93, ended.stderr
    assert "rank 1 of 2 was ended by SIGKILL at step 2" in ended.stderr
    assert "not started again: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) < 24
    rows = [json.loads(line) for line in (folder / "logs" / "restarts.jsonl").read_text().splitlines()]
    assert [row["stalled"] for row in rows if row["event"] == "ended"] == [1, 2]


def losses(folder):
    return {row["step"]: row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row}


@pytest.mark.long
def test_a_run_goes_on_without_a_place_that_fails_for_good_and_takes_it_back(tiny, tmp_path):
    sets = ("train.nproc=4", "train.batch=12", "train.steps=40", "validation.every=0", "recovery.shrink=2", "recovery.hang_times=0")
    ended = subprocess.run(training(tiny, tmp_path / "whole", *sets), capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "run"
    environment = plants.planted(tmp_path, "die", 3, 7, once=False)
    process = subprocess.Popen(
        training(tiny, folder, *sets, "checkpoint.every=7"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until(process, folder, 14)  # past the step at which place 3 dies each time
    os.kill(ranks_of(process.pid)[0], signal.SIGKILL)  # the next start has all places again
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "on 3 of 4 ranks" in said
    rows = [json.loads(line) for line in (folder / "logs" / "restarts.jsonl").read_text().splitlines()]
    assert [row["ranks"] for row in rows if row["event"] == "restarted"] == [4, 3, 4]
    mine, its = losses(folder), losses(tmp_path / "whole")
    assert mine.keys() == its.keys()
    for step, loss in its.items():
        assert mine[step] == pytest.approx(loss, rel=1e-6), step

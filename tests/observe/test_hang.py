"""A rank that stands still is told of, with where; one that only takes long, or was stopped for a while, is not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import training

from gigatrain.errors import REQUEUE
from gigatrain.observe import failed, hang, logs


def until(true, limit_s=30.0):
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def log(tmp_path):
    with logs.Log(tmp_path) as log:
        log.own()
        log.pulse.begun = hang.FIRST_STEPS + 1
        log.pulse.step = 41
        yield log


def test_a_rank_without_progress_writes_where_it_stands_and_that_it_goes_on(log, tmp_path):
    log.pulse.mark("backward")
    with hang.Watch(log, 0.3):
        until(log.stuck.exists)
        head, *rest = log.stuck.read_text().splitlines()
        record = json.loads(head)
        assert (record["rank"], record["step"], record["phase"]) == (0, 41, "backward")
        assert record["seconds"] >= 0.3
        assert any("test_hang.py" in line for line in rest)  # where this very thread waits
        assert "no progress for" in str(failed.hung(tmp_path))
        assert "in backward, after step 41" in str(failed.hung(tmp_path))
        log.pulse.mark("reduce")
        until(lambda: not log.stuck.exists())
    assert failed.hung(tmp_path) is None
    kept = log.path.read_text()
    assert "HANG: rank 0 of 1" in kept
    assert "goes on after" in kept


def test_signs_of_life_and_slow_phases_are_no_hangs(log):
    with hang.Watch(log, 0.4):
        for _ in range(30):
            time.sleep(0.03)
            log.pulse.beats += 1  # a validation's batches
        log.pulse.mark("checkpoint")
        time.sleep(0.8)
        assert not log.stuck.exists()


def test_a_hang_is_told_before_a_collective_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    watch = hang.Watch(logs.Log(tmp_path), 300.0)
    assert (watch.limit_s, watch.slow_s) == (300.0, 540.0)
    assert hang.Watch(logs.Log(tmp_path), 900.0).limit_s == 540.0
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert hang.Watch(logs.Log(tmp_path), 300.0).slow_s == 1800.0
    assert hang.Watch(logs.Log(tmp_path), 1e-9).interval_s == hang.SHORTEST_S  # no loop without a pause


def test_a_file_is_touched_while_the_rank_gets_on_or_may_take_long(log, tmp_path, monkeypatch):
    monkeypatch.setattr(hang, "TOUCH_S", 0.0)
    alive = tmp_path / "alive"
    alive.touch()

    def old():
        os.utime(alive, (1000, 1000))
        return alive.stat().st_mtime == 1000

    log.pulse.mark("checkpoint")
    with hang.Watch(log, 0.3, alive):
        assert old()
        until(lambda: alive.stat().st_mtime > 1000)
        log.pulse.mark("backward")
        until(log.stuck.exists)
        assert old()
        time.sleep(0.2)
        assert alive.stat().st_mtime == 1000
        log.pulse.beats += 1
        until(lambda: alive.stat().st_mtime > 1000)


def test_never_is_no_thread(log):
    before = threading.active_count()
    with hang.Watch(log, 0.0):
        assert threading.active_count() == before


def test_python_that_gets_no_turn_still_leaves_its_stacks(tmp_path):
    """A C function that keeps Python's lock: the thread cannot look, and Python's own watchdog writes."""
    program = """
import ctypes, sys
from pathlib import Path
from gigatrain.observe import hang, logs
with logs.Log(Path(sys.argv[1])) as log:
    log.own()
    with hang.Watch(log, 0.4):
        __import__("time").sleep(0.1)
        ctypes.PyDLL(None).usleep(1500000)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    assert "Timeout" in (tmp_path / "logs" / "attempt-000" / "rank-00000.log").read_text()


@pytest.mark.long
def test_of_two_ranks_the_one_that_was_stopped_is_found_by_the_other(tiny, tmp_path):
    folder = tmp_path / "run"
    sets = [
        "train.nproc=2",
        "train.steps=100000",
        "validation.every=0",
        "checkpoint.every=100000",
        "report.hang_s=1",
        "recovery.standby=false",
        "recovery.hang_times=0",
    ]
    command = training(tiny, folder, *sets)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    stopped = None
    try:
        progress = folder / "logs" / "progress.jsonl"
        until(lambda: progress.exists() and progress.read_text().count('"report"') > 20, 120)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
        stopped = next(pid for pid in ranks if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(int(stopped), signal.SIGSTOP)
        until(lambda: failed.hangs(folder), 60)
        said = str(failed.hung(folder))
        assert said.startswith("rank 0: no progress for ")
        assert "rank 1: no report of a hang: at work, stopped, or lost; look there first" in said
        collectives = json.loads((folder / "logs" / "attempt-000" / "errors" / "rank-00000-collectives.json").read_text())
        assert collectives["entries"][-1]["profiling_name"].startswith("gloo:")
        os.kill(int(stopped), signal.SIGCONT)
        until(lambda: not failed.hangs(folder), 60)
        assert not (folder / "logs" / "attempt-000" / "errors" / "rank-00001-hang.txt").exists()
    finally:
        if stopped is not None:
            os.kill(int(stopped), signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == REQUEUE, said

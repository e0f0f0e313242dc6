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

SETS = ("train.nproc=2", "train.batch=8", "validation.every=0", "train.deterministic=true", "recovery.hang_floor_s=3")


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
    assert float(found[4]) < 4 * 3 + 30
    if kind != "stop":
        assert (found[1], found[3]) == ("20", "data")
    assert "restarted from step" in said
    assert weights(folder) == whole

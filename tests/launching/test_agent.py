"""torchrun as a job runs it: signals reach every rank, however many come, and the code is that of the first rank that failed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gigatrain.launching import agent

RANK = """
import os, pathlib, signal, sys, time
here, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
if len(sys.argv) > 2 and rank == "1":
    sys.exit(int(sys.argv[2])) if int(sys.argv[2]) > 0 else os.kill(os.getpid(), -int(sys.argv[2]))
def heard(number, frame):
    (here / f"heard-{rank}").touch()
signal.signal(signal.SIGUSR1, heard)
(here / f"ready-{rank}").touch()
while not (here / f"heard-{rank}").exists():
    time.sleep(0.02)
time.sleep(1)  # saving: a second signal must not cut it short
(here / f"saved-{rank}").touch()
"""


def command(folder, *arguments):
    (folder / "rank.py").write_text(RANK)
    where = (
        "--nnodes=1",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--max-restarts=0",
        "--shutdown-timeout=5",
    )
    return [sys.executable, "-m", "gigatrain.launching.agent", *where, str(folder / "rank.py"), str(folder), *arguments]


def test_signals_reach_every_rank_and_the_agent_waits_for_them(tmp_path):
    process = subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(0.2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert "Traceback" not in said


@pytest.mark.parametrize(("ended", "code"), [(5, 5), (-signal.SIGKILL, 137)])
def test_the_code_is_that_of_the_first_rank_that_failed(tmp_path, ended, code):
    process = subprocess.run(command(tmp_path, str(int(ended))), capture_output=True, text=True, timeout=90, check=False)
    assert process.returncode == code, process.stderr
    assert "rank 1 was the first of this node to fail" in process.stderr
    assert "Traceback" not in process.stderr


def test_children_are_those_that_were_started():
    with subprocess.Popen(["sleep", "20"]) as child:
        assert child.pid in agent.children(os.getpid())
        child.kill()

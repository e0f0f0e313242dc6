"""Ranks that are killed are started again in the same command, and the run is the undisturbed one."""

import json
import os
import signal
import subprocess
import time

import pytest
from commands import training

from gigatrain import run
from gigatrain.recovery import cause, meeting

SETS = ("train.nproc=2", "train.steps=24", "train.batch=8", "validation.every=0", "train.deterministic=true")


def ranks_of(parent):
    found = []
    for pid in subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout.split():
        with open(f"/proc/{pid}/comm") as file:
            if file.read().startswith("gigatrain:"):
                found.append(int(pid))
    return found


def weights(folder):
    return json.loads((folder / "summary.json").read_text())["weights_sha256"]


@pytest.mark.long
def test_a_killed_rank_is_restarted_and_the_weights_are_those_of_the_undisturbed_run(tiny, tmp_path):
    whole = subprocess.run(training(tiny, tmp_path / "whole", *SETS), capture_output=True, text=True, timeout=200, check=False)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "run"
    process = subprocess.Popen(training(tiny, folder, *SETS), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (folder / "checkpoints" / "step-00000003" / "COMMITTED").exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "was ended by SIGKILL" in said
    assert "restarted from step" in said
    assert weights(folder) == weights(tmp_path / "whole")
    rows = [json.loads(line) for line in (folder / "logs" / "restarts.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["ended", "restarted"]
    assert run.identity(folder)["name"] == "tiny"


def test_a_token_that_others_can_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(meeting.TOKEN, raising=False)
    assert meeting.token(tmp_path) is None
    meeting.make_token(tmp_path)
    path = tmp_path / "launch" / "token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(meeting.token(tmp_path) or "") == 32
    path.chmod(0o644)
    with pytest.raises(meeting.RunError, match="chmod 600"):
        meeting.token(tmp_path)


def test_a_socket_listens_on_its_address_alone():
    with meeting.listening("127.0.0.1") as found:
        assert found.getsockname()[0] == "127.0.0.1"
    assert meeting.interface("127.0.0.1") == "lo"


@pytest.mark.parametrize(
    ("resumed", "furthest", "before", "gain"),
    [
        (None, 0, -1, False),  # it died before it was seen to train
        (0, 0, -1, False),  # the first of several that was seen to begin anew
        (7, 0, 5, True),  # from the near tier, beyond the newest committed step
        (7, 7, 5, False),
        (5, 3, 5, False),  # what is committed is counted where it is committed
    ],
)
def test_a_run_that_begins_anew_has_gained_nothing(resumed, furthest, before, gain):
    assert cause.further(resumed, furthest, before) == gain

"""Ranks that are killed are started again in the same command, and the run is the undisturbed one."""

import json
import os
import signal
import subprocess
import time

import pytest
from commands import training

from gigatrain import run
from gigatrain.config import Recovery
from gigatrain.observe import prometheus
from gigatrain.recovery import cause, meeting
from gigatrain.recovery.lookout import Lookout
from gigatrain.recovery.supervisor import Orders, Supervisor, _Attempt

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


def supervisor(folder):
    return Supervisor(Orders(folder, ["train"], 2, "continue", Recovery(standby=False)))


def test_who_scrapes_metrics_is_no_rank(tmp_path, monkeypatch):
    """The ranks' secret is of ranks: the server of a run's metrics takes another, which its user can read."""
    for name in (meeting.TOKEN, "GIGATRAIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (given := supervisor(tmp_path)._environment).items():
        monkeypatch.setenv(name, value)
    said, where = prometheus.token(tmp_path)
    assert where == str(tmp_path / "logs" / "prometheus.token")
    assert said not in given.values()


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("start", 201.0), ("steps", 202.0)], True),
        ([("start", 201.0), ("end", 202.0, "RuntimeError")], True),  # that another is gone: the supervisor knows which
        ([("start", 101.0), ("end", 103.0, "rank 1 was ended by SIGKILL")], False),  # of the attempt before: these ranks came to no word
        ([("start", 201.0), ("end", 202.0, "finished")], False),  # what follows is no part of it
    ],
)
def test_a_death_is_told_of_the_process_that_it_ended(tmp_path, rows, told):
    (tmp_path / "logs").mkdir()
    path, known = tmp_path / "logs" / "progress.jsonl", {"attempt": 0, "ranks": 2, "process": "a"}
    events = [{"event": event, "time_s": time_s} | known | ({"why": why[0]} if why else {}) for event, time_s, *why in rows]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    one = supervisor(tmp_path)
    one._began_s, one._attempt = 50.0, _Attempt(1, 0, 200.0, Lookout(one._board, one._pace, hangs=True))
    one._close_session("rank 0 was ended by SIGKILL")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["event"], row["why"], row["killed"]) for row in found[len(events) :]] == [
        ("end", "rank 0 was ended by SIGKILL", True)
    ] * told


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

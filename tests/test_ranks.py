"""Runs of several processes as a user starts them: the same run, whoever carries it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from matrix import long_but

from gigatrain import run
from gigatrain.errors import REQUEUE

STEPS = ("--set", "train.steps=8", "--set", "train.batch=8", "--set", "export=false", "--set", "optim.lr=1e-4")


def command(recipe, folder, *overrides, more=()):
    sets = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, "-m", "gigatrain", "train", str(recipe), "--run", str(folder), *STEPS, *sets, *more]


def train(recipe, folder, *overrides, more=()):
    return subprocess.run(command(recipe, folder, *overrides, more=more), capture_output=True, text=True, timeout=300, check=False)


def weights(folder):
    found, _ = run.checkpoints(folder).latest()
    return dict(found.tensors("weights"))


def distance(a, b):
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in a)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    ended = train(tiny, folder)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.long
def test_two_processes_make_the_run_of_one_and_another_mesh_goes_on(tiny, alone, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(command(tiny, folder, "train.nproc=2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-00000003" / "COMMITTED").exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # one of many: our starter passes it on, and all ranks leave at the same step
    said, failed = process.communicate(timeout=120)
    assert process.returncode == (0 if (folder / "summary.json").exists() else REQUEUE), failed
    if "finished" not in said and not (folder / "summary.json").exists():
        assert said.count("SIGTERM: saved at step") == 1
    ended = train(tiny, folder, "train.nproc=4", "mesh.tensor=2", more=("--resume",))  # other ranks, and another way to share
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("held-out text") == 1
    assert distance(weights(folder), weights(alone)) < 5e-6
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, alone))
    for key in ("loss", "val_loss"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
    assert (ours["tokens"], ours["steps"]) == (theirs["tokens"], theirs["steps"])
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (folder, alone)]
    assert [row["step"] for row in lines[0]] == [row["step"] for row in lines[1]]
    for mine, its in zip(*lines, strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            if its.get(key) is not None:
                assert mine[key] == pytest.approx(its[key], rel=2e-6), (mine, its)


def children(of):
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(of)], capture_output=True, text=True, check=False).stdout.split()]


def started(recipe, folder):
    """A run of two processes that would take long, at its first checkpoints, and its ranks."""
    process = subprocess.Popen(
        command(recipe, folder, "train.nproc=2", "train.steps=4000", "recovery.restarts=0", "recovery.standby=false"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-00000003" / "COMMITTED").exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process, children(process.pid)


@pytest.mark.parametrize("lost", long_but([1], [0, 1]))
def test_a_killed_rank_is_named_in_a_few_lines_and_the_run_goes_on(tiny, tmp_path, lost):
    folder = tmp_path / "run"
    process, ranks = started(tiny, folder)
    os.kill(ranks[lost], signal.SIGKILL)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 7 or process.returncode == 128 + signal.SIGKILL
    assert f"rank {lost} of 2 was ended by SIGKILL" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 12, said


def test_ranks_leave_with_the_process_that_started_them(tiny, tmp_path):
    """Else they would train on unseen, and hold the folder against `--resume`."""
    folder = tmp_path / "run"
    process, ranks = started(tiny, folder)
    process.kill()
    process.communicate(timeout=90)
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{rank}") for rank in ranks):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"rank 0 of 2 cannot meet the others at None:None \(MASTER_ADDR:MASTER_PORT\)"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "TAKEN"}, "cannot meet the others .* already in use"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK is 'a' and no count"),
        ({"RANK": "0", "WORLD_SIZE": "a"}, "WORLD_SIZE is 'a' and no count"),
    ],
)
def test_ranks_that_cannot_meet_say_why(tiny, tmp_path, environment, said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {name: port if value == "TAKEN" else value for name, value in environment.items()}
        ended = subprocess.run(
            command(tiny, tmp_path / "run"), env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert ended.returncode == 7
    assert "Traceback" not in ended.stderr
    assert re.search(said, ended.stderr), ended.stderr


def test_what_all_ranks_of_a_node_read_alike_is_said_once(tiny, tmp_path):
    for rank in ("0", "1"):
        environment = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        ended = subprocess.run(
            command(tiny, tmp_path / "run", "mesh.shard=4"), env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 4
        assert ended.stderr.count("is 4 ranks, and 2 are there") == (rank == "0")


@pytest.mark.long
def test_zero_works_on_one_process_too(tiny, tmp_path):
    ended = train(tiny, tmp_path / "run", "engine.name=deepspeed", "engine.zero=3", "optim.name=adamw")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.long
def test_a_rank_that_is_killed_takes_the_others_with_it_and_nothing_committed(tiny, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(tiny, folder, "train.nproc=2", "train.steps=4000", "recovery.restarts=0", "recovery.standby=false"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-00000003" / "COMMITTED").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks = children(process.pid)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGKILL or process.returncode > 0
    assert time.monotonic() - began < 60
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
    found, refused = run.checkpoints(folder).latest()
    assert found.step >= 3
    assert all(torch.isfinite(tensor).all() for _, tensor in found.tensors("weights").items())
    assert len(refused) <= 1


def test_a_users_error_is_said_once_and_by_its_own_code(tiny, tmp_path):
    folder = tmp_path / "run"
    ended = train(tiny, folder, "train.nproc=2", "train.batch=7")
    assert ended.returncode == 4
    assert ended.stderr.count("train.batch 7 does not divide by the 2 ranks") == 1
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run.json").write_text("{}")
    ended = train(tiny, tmp_path / "taken", "train.nproc=2")  # found out by rank 0 alone
    assert ended.returncode != 0
    assert ended.stderr.count("already holds a run") == 1
    assert "Traceback" not in ended.stderr


def test_more_processes_than_ranks_are_refused(tiny, tmp_path):
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    ended = subprocess.run(
        command(tiny, tmp_path / "run", "mesh.shard=2"), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 4
    assert "is 2 ranks, and 3 are there" in ended.stderr

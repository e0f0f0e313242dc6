"""Runs of several processes as a user starts them: the same run, whoever carries it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gigatrain import run

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
    assert process.returncode == 0, failed
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


@pytest.mark.long
def test_a_rank_that_is_killed_takes_the_others_with_it_and_nothing_committed(tiny, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(tiny, folder, "train.nproc=2", "train.steps=4000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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

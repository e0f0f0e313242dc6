"""One run on three legs: two processes under FSDP2 at one site, one process at another, ZeRO-2 on two with other microbatches and smaller states."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from commands import training

from gigatrain import run as runs
from gigatrain.launching import hosts
from gigatrain.observe import reader, watch
from gigatrain.observe.report.collect import collect
from gigatrain.observe.report.page import page

SITE = """
name = "{name}"
summary = "A machine of this test."
device = "cpu"
[scheduler]
kind = "none"
[paths]
runs = "{folder}/runs"
cache = "{folder}/cache"
[environment]
OMP_NUM_THREADS = "1"
HF_HUB_OFFLINE = "1"
[power]
pue = {{ value = {pue}, basis = "declared", source = "this test" }}
fabric_watts = {{ value = 0, basis = "declared", source = "this test" }}
storage_watts = {{ value = 0, basis = "declared", source = "this test" }}
"""
STEPS = 600  # more than two processes can do before they are told to leave
SETS = ("report.every=1", "checkpoint.every=50", "train.batch=8")


@pytest.fixture
def sites(tmp_path):
    found = []
    for name, pue in (("north", 1.1), ("south", 1.5)):
        (tmp_path / name).mkdir()
        found.append(tmp_path / name / f"{name}.toml")
        found[-1].write_text(SITE.format(name=name, folder=tmp_path / name, pue=pue))
    return found


@pytest.fixture
def recipe(tiny, tmp_path):
    """The tiny recipe, whose shards lie where each site has its cache."""
    path = tmp_path / "moving.toml"
    path.write_text("\n".join(line for line in tiny.read_text().splitlines() if not line.startswith("folder =")))
    return path


def launched(recipe, site, *more, sets=()):
    given = [part for one in ("export=false", *SETS, f"train.steps={STEPS}", *sets) for part in ("--set", one)]
    command = [sys.executable, "-m", "gigatrain", "launch", str(recipe), "--site", str(site), "--no-preflight", *map(str, more), *given]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def until(true, limit_s=90):
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in found if "tokens" in row}


def left(folder, steps):
    """The job is told to leave once it is `steps` further; the step that it saved."""
    until(lambda: (folder / "metrics.jsonl").is_file() and max(rows(folder), default=0) >= steps)
    assert hosts.tell(folder, signal.SIGUSR1)
    until(lambda: hosts.alive(folder) is None)
    return runs.checkpoints(folder).steps()[-1]


# `gigatrain train`, whose ranks compare what they have taken up with what the checkpoint holds, each its own boxes, and are then told to leave.
COMPARES = """
import os, signal, sys
from pathlib import Path
import torch
from gigatrain import restore, run
resume = restore.resume
def compared(near, engine, batches, this, *more):
    kept = resume(near, engine, batches, this, *more)
    found, same, differ = run.checkpoints(Path(os.environ["TEST_RUN"]))._open(this.step), 0, []
    for group in ("weights", "optimizer"):
        whole = found.tensors(group)
        for name, piece in engine.state()[group].items():
            mine, saved = piece.tensor, piece.place.of(whole[name])
            rounded = float(os.environ["TEST_ROUNDED"]) if group == "optimizer" else 0.0
            if torch.allclose(mine.double(), saved.double(), rtol=rounded, atol=0.0):
                same += 1
            else:
                differ.append(f"{group} {name}")
    said = f"step {this.step}: {same} as saved, others: {differ}"
    Path(os.environ["TEST_RUN"], f"said-{os.environ.get('RANK', '0')}").write_text(said)
    os.kill(os.getpid(), signal.SIGTERM)
    return kept
restore.resume = compared
from gigatrain.cli import main
main()
"""


def taken_up(command, folder, ranks=1, rounded=0.0):
    """What ranks of another plan say of the newest checkpoint once they have it; they leave before their first step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
    processes = []
    for rank in range(ranks):
        place = several | ({"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {})
        environment = {
            **os.environ,
            "TEST_RUN": str(folder),
            "TEST_ROUNDED": str(rounded),
            **{name: str(value) for name, value in place.items()},
        }
        told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        processes.append(subprocess.Popen([sys.executable, "-c", COMPARES, *command[3:]], **told))
    said = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [75] * ranks, said
    return [(folder / f"said-{rank}").read_text() for rank in range(ranks)]


@pytest.mark.long
def test_a_run_goes_over_two_sites_and_three_engines(recipe, sites, tmp_path):
    north, south = sites
    begun = tmp_path / "north" / "runs" / "moving"
    begun.parent.mkdir()
    launched(recipe, north, "--run", begun, sets=("train.nproc=2", "mesh.shard=2"))
    first = left(begun, 10)

    folder = tmp_path / "south" / "runs" / "moving"  # another file system: the folder is copied, shards are not
    folder.parent.mkdir()
    shutil.copytree(begun, folder, ignore=shutil.ignore_patterns(".lock"))
    whole = (f"train.steps={STEPS}", *SETS, f"data.folder={tmp_path}/south/cache/data")
    with pytest.raises(AssertionError, match=r"optim.moments: fp32 -> bf16\n.*add --other-numbers"):
        launched(recipe, south, "--resume", "--run", folder, sets=("optim.moments=bf16",))
    said = launched(recipe, south, "--resume", "--other-numbers", "--run", folder, sets=("optim.moments=bf16",))
    assert "moves    the run comes from north, goes on on south and is a new leg there" in said
    second = left(folder, first + 10)
    said = "".join(path.read_text() for path in (folder / "logs").rglob("*") if path.is_file())
    assert "is not there: built again from the recipe's sources, and compared by its hash" in said
    assert "numbers will differ from an undisturbed run: optim.moments fp32 -> bf16" in said

    again = tmp_path / "again"  # what a process of that leg took up
    shutil.copytree(begun, again, ignore=shutil.ignore_patterns(".lock"))
    one = [*training(recipe, again, *whole, "optim.moments=bf16"), "--site", str(south), "--resume", "--other-numbers"]
    (words,) = taken_up(one, again, rounded=2.0**-8)
    assert re.search(rf"step {first}: \d\d+ as saved, others: \[\]", words), words  # weights bit for bit, moments rounded once

    third = ("train.nproc=2", "engine.name=deepspeed", "engine.zero=2", "train.microbatch=2")
    moved = [*training(recipe, folder, *whole, *third), "--site", str(south), "--resume"]
    shutil.copytree(folder, tmp_path / "third", ignore=shutil.ignore_patterns(".lock"))
    there = [*training(recipe, tmp_path / "third", *whole, *third), "--site", str(south), "--resume", "--other-numbers"]
    for words in taken_up(there, tmp_path / "third", ranks=2):
        assert re.search(rf"step {second}: \d\d+ as saved, others: \[\]", words), words  # by two ranks of ZeRO-2, bit for bit
    last = stopped([*moved, "--other-numbers"], folder, second + 10)

    alone = tmp_path / "alone"  # nobody moves it
    stopped([*training(recipe, alone, *whole), "--site", str(south)], alone, last)
    for (step, row), expected in zip(sorted(rows(folder).items()), sorted(rows(alone).items()), strict=False):
        assert (step, row["tokens"]) == (expected[0], expected[1]["tokens"])
        assert row["loss"] == pytest.approx(expected[1]["loss"], rel=1e-5 if step <= first else 5e-3), step

    legs = collect(folder)["legs"]
    assert [(leg["site"], leg["engine"], leg["ranks"], leg["mesh"]) for leg in legs] == [
        ("north", "native", 2, {"shard": 2}), ("south", "native", 1, {}), ("south", "deepspeed zero=2", 2, {"shard": 2}),
    ]  # fmt: skip
    assert [(leg["step"], leg["until"]) for leg in legs] == [(0, first), (first, second), (second, last)]
    assert sum(leg["tokens"]["value"] for leg in legs) == rows(folder)[last]["tokens"]
    assert all(leg["tokens_per_s"]["value"] > 0 and 0 < leg["goodput"]["value"] < 1 for leg in legs)
    assert all(leg["watts"]["value"] or leg["watts"]["unknown"].startswith("not measured: ") for leg in legs)
    assert "optim.moments: bf16 -> fp32" in legs[2]["changed"]
    text = page([collect(folder)])
    assert "1. north, native, 2 ranks (shard 2), fp32" in text
    seen = reader.Reader(folder).seen()
    said = [text for title, text, _ in watch.lines(seen) if title.startswith("leg ")]
    assert said[0].startswith(f"north, native, 2 ranks (shard 2), fp32: steps 0 to {first}, ")
    assert said[2].startswith(f"south, deepspeed zero=2, 2 ranks (shard 2), fp32: steps {second} to {last}, ")
    print("\n".join(said))


def stopped(command, folder, steps):
    """Trains until `steps` are told of, and leaves; the step that it saved."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: process.poll() is not None or ((folder / "metrics.jsonl").is_file() and max(rows(folder), default=0) >= steps))
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 75, said
    return runs.checkpoints(folder).steps()[-1]

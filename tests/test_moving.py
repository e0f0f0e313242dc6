"""One run on three legs: two processes under FSDP2 at one site, one process at another, ZeRO-2 on two with other microbatches and smaller states."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import training

from gigatrain import run as runs
from gigatrain.launching import hosts
from gigatrain.observe import watch
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


def state(folder, step):
    """Every tensor of a checkpoint, whole."""
    found = runs.checkpoints(folder)._open(step)
    return {(group, name): found.tensors(group)[name] for group in ("weights", "optimizer") for name in found.table[group]}


def taken_up(command, folder, step):
    """What a process of another plan makes of the checkpoint at `step`: told to leave before its first step, it saves what it has taken up."""
    before, path = state(folder, step), folder / "checkpoints" / f"step-{step:08d}"
    old = (path / "manifest.json").stat().st_ino
    starts = (folder / "logs" / "progress.jsonl").read_text().count('"start"')
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: (folder / "logs" / "progress.jsonl").read_text().count('"start"') > starts)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 75, said
    assert runs.checkpoints(folder).steps()[-1] == step, said
    assert (path / "manifest.json").stat().st_ino != old, said  # saved anew, by the other plan
    return before, state(folder, step), said


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
    said = launched(recipe, south, "--resume", "--run", folder)
    assert "moves    the run comes from north, goes on on south and is a new leg there" in said
    second = left(folder, first + 10)
    assert "is not there: built again from the recipe's sources, and compared by its hash" in "".join(
        path.read_text() for path in (folder / "logs").rglob("*") if path.is_file()
    )

    again = tmp_path / "again"
    shutil.copytree(begun, again, ignore=shutil.ignore_patterns(".lock"))
    before, after, _ = taken_up([*training(recipe, again, *whole), "--site", str(south), "--resume"], again, first)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)  # weights and moments of two ranks, bit for bit

    third = ("train.nproc=2", "engine.name=deepspeed", "engine.zero=2", "train.microbatch=2", "optim.moments=bf16")
    moved = [*training(recipe, folder, *whole, *third), "--site", str(south), "--resume"]
    refused = subprocess.run(moved, capture_output=True, text=True, check=False)
    assert (refused.returncode, "optim.moments: fp32 -> bf16" in refused.stderr) == (6, True), refused.stderr
    before, after, words = taken_up([*moved, "--other-numbers"], folder, second)
    assert "numbers will differ from an undisturbed run: optim.moments fp32 -> bf16" in words
    for key, tensor in before.items():  # weights and counts bit for bit, moments rounded once
        assert torch.equal(after[key], tensor.to(after[key].dtype)), key
    last = stopped([*moved, "--other-numbers"], folder, second + 10)

    alone = tmp_path / "alone"  # nobody moves it
    stopped([*training(recipe, alone, *whole), "--site", str(south)], alone, last)
    for (step, row), expected in zip(sorted(rows(folder).items()), sorted(rows(alone).items()), strict=False):
        assert (step, row["tokens"]) == (expected[0], expected[1]["tokens"])
        assert row["loss"] == pytest.approx(expected[1]["loss"], rel=1e-5 if step <= second else 5e-3), step

    legs = collect(folder)["legs"]
    assert [(leg["site"], leg["engine"], leg["ranks"], leg["mesh"]) for leg in legs] == [
        ("north", "native", 2, {"shard": 2}), ("south", "native", 1, {}), ("south", "deepspeed zero=2", 2, {"shard": 2}),
    ]  # fmt: skip
    assert [(leg["step"], leg["until"]) for leg in legs] == [(0, first), (first, second), (second, last)]
    assert sum(leg["tokens"]["value"] for leg in legs) == rows(folder)[last]["tokens"]
    assert all(leg["tokens_per_s"]["value"] > 0 and 0 < leg["goodput"]["value"] < 1 for leg in legs)
    assert all(leg["watts"]["value"] or leg["watts"]["unknown"].startswith("not measured: ") for leg in legs)
    assert "optim.moments: fp32 -> bf16" in legs[2]["changed"]
    text = page([collect(folder)])
    assert "1. north, native, 2 ranks (shard 2), fp32" in text
    seen = watch.Reader(folder).seen()
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

"""One run goes from any engine and mesh to any other: tensors bitwise, counts and data position carried, and the next losses those of going on."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from distributed import together
from test_meshes import BASE, DEEPSEEK, MOE, UNTIED, batch, on

from gigatrain import engines, load
from gigatrain.checkpoint import Checkpoints, fill
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan

SAVED, AFTER = 3, 2  # steps before the save, and behind it


def zero(stage):
    return ("engine.name=deepspeed", f"engine.zero={stage}")


# By name: ranks, and what the recipe says beside the model.
WAYS = {
    "one": (1, ()),
    "fsdp": (2, ()),
    "hsdp": (4, on(replicate=2)),
    "tp": (2, on(tensor=2)),
    "tp x pp": (4, on(tensor=2, pipeline=2)),
    "context": (2, on(context=2)),
    "zbv": (2, on(pipeline=2, schedule="zbv")),
    "zero-1": (2, zero(1)),
    "zero-2": (2, zero(2)),
    "zero-3": (2, zero(3)),
    "ep": (4, on(expert=2)),
    "ep x tp": (4, on(expert=2, tensor=2)),
    "ep x pp": (4, on(expert=2, pipeline=2)),
}
MUON = ("optim.name=muon", "optim.muon_lr=1e-3")
# What a run is, and the ways that can compute it.
RUNS = {
    "tied": ((), ("one", "fsdp", "hsdp", "tp", "tp x pp", "context", "zbv", "zero-1", "zero-2", "zero-3")),
    "untied": (UNTIED, ("one", "fsdp", "tp x pp", "zero-2", "zero-3")),
    "moe": (MOE, ("one", "fsdp", "ep", "ep x tp", "ep x pp", "zero-3")),
    "deepseek": ((*DEEPSEEK,), ("one", "tp", "ep x tp")),
    "muon": (MUON, ("one", "fsdp", "tp", "hsdp")),
}


def gone_through(rank, recipe, overrides, ranks, folder, begins):
    """Steps from the start, saved; or taken up from what is there, saved again under another number, and on. Losses, norms and sample ids of its steps."""
    made = plan(load.recipe(recipe, (*BASE, *overrides)), load.site("laptop"), ranks)
    mesh = Mesh(made.mesh, rank) if ranks > 1 else alone()
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=begins)
    saves = Checkpoints(Path(folder), run="r", plan_sha256=made.meaning, keep=9, mesh=mesh)
    rows = []
    if not begins:
        found, refused = saves.latest()
        assert refused == []
        fill(found, engine.state(), mesh)
        engine.restored()
        saves.save(found.step + 100, engine.state(), {"position": found.state["position"]})  # as it was taken up: compared bit for bit
    start = 0 if begins else found.state["position"]
    for step in range(start, start + (SAVED if begins else AFTER)):
        read = batch(made, step, *mesh.data)
        engine.forward_backward(read)
        update = engine.step(1.0)
        rows.append((update.nats.item() / update.targets.item(), update.grad_norm.item(), update.targets.item(), list(read.positions)))
    if begins:
        saves.save(SAVED, engine.state(), {"position": SAVED})
        for step in range(SAVED, SAVED + AFTER):  # what going on would have given
            engine.forward_backward(read := batch(made, step, *mesh.data))
            update = engine.step(1.0)
            rows.append((update.nats.item() / update.targets.item(), update.grad_norm.item(), update.targets.item(), list(read.positions)))
    return rows[-AFTER:]


def went(recipe, run, way, folder, begins):
    overrides, (ranks, more) = RUNS[run][0], WAYS[way]
    return together(ranks, gone_through, recipe, (*overrides, *more), ranks, str(folder), begins)


def tensors(folder, step):
    saves = Checkpoints(folder, run="r", plan_sha256=saved_by(folder, step), keep=9)
    found = saves._open(step)
    return {(group, name): found.tensors(group)[name] for group in ("weights", "optimizer") for name in found.table[group]}


def saved_by(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())["plan_sha256"]


def check(tiny, tmp_path, run, source, targets):
    """One save, and every way that takes it up."""
    first = tmp_path / "first"
    expected = went(tiny, run, source, first, True)[0]
    for target in targets:
        folder = tmp_path / target.replace(" ", "-")
        folder.mkdir()
        os.symlink(first / "checkpoints", folder / "from")
        (folder / "checkpoints").mkdir()
        for path in first.glob("checkpoints/step-*"):
            os.symlink(path, folder / "checkpoints" / path.name)
        found = went(tiny, run, target, folder, False)
        for rank in found:
            assert [row[3] for row in rank] == [row[3] for row in expected]  # the same global batches
            assert [row[2] for row in rank] == [row[2] for row in expected]
            numbers = [torch.tensor([row[:2] for row in rows], dtype=torch.float64) for rows in (rank, expected)]
            # Muon blows rounding errors in empty directions up to full size: its second step shows them.
            compared = slice(0, 1) if run == "muon" else slice(None)
            torch.testing.assert_close(numbers[0][compared], numbers[1][compared], rtol=1e-6, atol=0)
        before, after = tensors(folder, SAVED), tensors(folder, SAVED + 100)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), f"{source} -> {target}"


DIAGONAL = [
    ("tied", "zero-3", ("tp",)),
    ("moe", "ep x tp", ("one",)),
]


@pytest.mark.parametrize(("run", "source", "targets"), DIAGONAL, ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_a_run_goes_on_elsewhere(tiny, tmp_path, run, source, targets):
    check(tiny, tmp_path, run, source, targets)


ALL = [(run, source, tuple(way for way in ways if way != source)) for run, (_, ways) in RUNS.items() for source in ways]
# In CI every second source of a run goes to the next way, so that each way is saved or taken up; GIGATRAIN_MATRIX=all takes every pair.
NEXT = [(run, ways[at], (ways[(at + 1) % len(ways)],)) for run, (_, ways) in RUNS.items() for at in range(0, len(ways), 2)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("run", "source", "targets"),
    ALL if os.environ.get("GIGATRAIN_MATRIX") == "all" else NEXT,
    ids=lambda value: value if isinstance(value, str) else "+".join(value) if len(value) == 1 else "all",
)
def test_every_way_is_left_and_taken(tiny, tmp_path, run, source, targets):
    check(tiny, tmp_path, run, source, targets)


def test_every_way_can_be_asked_for():
    assert {way for _, ways in RUNS.values() for way in ways} == set(WAYS)
    assert {(run, way) for run, source, targets in ALL for way in (source, *targets)} == {(r, w) for r, (_, ws) in RUNS.items() for w in ws}
    assert len(list(itertools.chain(*(targets for *_, targets in ALL)))) == sum(len(ways) * (len(ways) - 1) for _, ways in RUNS.values())

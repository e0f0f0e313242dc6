"""P6: wherever a save is cut off, and whatever of it had not been synced, the loader finds exactly the checkpoint before or exactly the new one."""

import json
import mmap
import shutil
import sys
from typing import Any

import pytest
import torch
from crashing import held, made, recorded

from gigatrain import config
from gigatrain.checkpoint import Checkpoints, fill, writing
from gigatrain.checkpoint.files import flat, header_of
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Piece, Place


def checkpoints(root):
    return Checkpoints(root, run="r", plan_sha256="p", keep=2)


def pieces(step, rank=0, ranks=1):
    """Rows of a matrix, and on rank 0 a count."""
    place = Place((2 * ranks, 3), (0, 0), (2 * ranks, 3)).cut(0, 2 * rank, 2)
    whole = torch.arange(6.0 * ranks).view(2 * ranks, 3) + step
    found = {"weights": {"w": Piece(place.of(whole), place)}}
    return found | ({"optimizer": {"n": Piece.whole(torch.tensor(step))}} if rank == 0 else {})


def in_one_piece(root, step):
    checkpoints(root).save(step, pieces(step), {"at": step})


def job(root, step, rank, ranks):
    """What background.Writer stages and says, in ordinary memory."""
    saves = Checkpoints(root, run="r", plan_sha256="p", keep=2, mesh=Mesh(config.Mesh(shard=ranks), rank))
    tensors, table = saves.share(pieces(step, rank, ranks))
    memory, files = bytearray(writing.HEAD_BYTES), []
    for file, named in tensors.items():
        data = header_of(named, {"format": "pt"})[0] + b"".join(flat(tensor).numpy().tobytes() for tensor in named.values())
        files.append([file, len(memory), len(data)])
        memory += data
    what = {
        "parent": str(saves.folder), "temporary": f".writing-{step:08d}-t", "final": f"step-{step:08d}", "rank": rank, "ranks": ranks, "files": files,
        "texts": {"state.json": json.dumps({"at": step})} if rank == 0 else {}, "tensors": json.loads(json.dumps(table)), "sync": [],
        "manifest": saves.manifest(step), "need_bytes": 100, "keep": 2, "keep_every": 0,
    }  # fmt: skip
    return what, memoryview(memory)


def in_the_background(root, step, first=0):
    """Two ranks' processes, of which rank `first` is the faster one."""
    jobs = [job(root, step, rank, 2) for rank in (0, 1)]
    waited = []

    def beat(doing):
        if doing == "waits for rank 1" and first == 0 and not waited:
            waited.append(writing.perform(*jobs[1], lambda doing: None))

    if first == 1:
        (root / "checkpoints").mkdir(exist_ok=True)
        writing.perform(*jobs[1], lambda doing: None)
    writing.perform(*jobs[0], beat)
    assert first == 1 or waited


FORMS = {
    "in one piece": in_one_piece,
    "rank 0 first": in_the_background,
    "rank 1 first": lambda root, step: in_the_background(root, step, 1),
}


def loaded(root, form):
    """Step of what the loader finds, its tensors compared with what that step had; and what it refused."""
    found, refused = checkpoints(root).latest()
    ranks = 1 if form == "in one piece" else 2
    live = torch.zeros(2 * ranks, 3)
    count = torch.tensor(-1)
    fill(found, {"weights": {"w": Piece.whole(live)}, "optimizer": {"n": Piece.whole(count)}})
    assert torch.equal(live, torch.arange(6.0 * ranks).view(2 * ranks, 3) + found.step)
    assert int(count) == found.step
    assert found.state == {"at": found.step}
    return found.step, refused


AGAIN = [pytest.param(form, True, marks=[] if form == "in one piece" else pytest.mark.long) for form in FORMS]


@pytest.mark.parametrize(("form", "damaged"), [*((form, False) for form in FORMS), *AGAIN])
def test_every_cut_of_a_save_leaves_the_one_before_or_the_new_one(tmp_path, form, damaged):
    """Two are there and a third is saved, which also drops the oldest; `again`: one of that step is there, damaged, and gives way."""
    root = tmp_path / "run"
    root.mkdir()
    for step in (1, 2, 3) if damaged else (1, 2):
        FORMS[form](root, step)
    if damaged:
        path = next((root / "checkpoints/step-00000003").glob("weights-*"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    disk = recorded(writing, root, lambda: FORMS[form](root, 3))
    assert disk.tree([(operation, "whole") for operation in disk.operations if operation[0] != "sync"]) == held(root), (
        "a call went past the recorder"
    )
    states, steps = 0, []
    for count, tree in disk.cuts():
        again = tmp_path / "cut"
        made(tree, again)
        step, refused = loaded(again, form)
        assert step in (2, 3), f"after {count} operations"
        assert not refused or (damaged and step == 2 and "step-00000003" in refused[0])
        steps.append((count, step))
        states += 1
        shutil.rmtree(again)
    print(f"{form}: {len(disk.operations)} operations, {states} states", file=sys.stderr)
    assert {step for _, step in steps} == {2, 3}
    assert max(count for count, step in steps if step == 2) < len(disk.operations), "at the end the new one is durable"
    assert states > 100


def test_the_recorder_finds_a_save_that_does_not_sync(tmp_path, monkeypatch):
    """Without the syncs of tensor files a cut leaves a marker over torn files: so the enumeration can fail."""
    root = tmp_path / "run"
    root.mkdir()
    in_one_piece(root, 2)
    write_file = writing.write_file

    def careless(path, chunks, beat=lambda: None):
        if "weights" not in path:
            return write_file(path, chunks, beat)
        sync, recorder.fsync = recorder.fsync, lambda descriptor: None
        try:
            return write_file(path, chunks, beat)
        finally:
            recorder.fsync = sync

    monkeypatch.setattr(writing, "write_file", careless)
    holder = []

    def call():
        nonlocal recorder
        recorder = writing.os
        holder.append(recorder)
        in_one_piece(root, 3)

    recorder: Any = None
    disk = recorded(writing, root, call)
    refusals = 0
    for number, (_, tree) in enumerate(disk.cuts()):
        made(tree, tmp_path / str(number))
        refusals += bool(checkpoints(tmp_path / str(number)).latest()[1])
        if refusals:
            break
    assert refusals


def test_memory_of_a_job_is_read_as_the_process_reads_it(tmp_path):
    """`perform` takes any buffer: what these tests give it is what a map of the shared memory is."""
    root = tmp_path / "run"
    root.mkdir()
    (root / "checkpoints").mkdir()
    what, memory = job(root, 1, 0, 1)
    with mmap.mmap(-1, len(memory)) as shared:
        shared[:] = bytes(memory)
        with memoryview(shared) as view:
            writing.perform(what, view, lambda doing: None)
    assert loaded(root, "in one piece") == (1, [])

"""Checkpoints of pieces: saved by some ranks in some boxes, taken up by others in other boxes, bitwise; and what fails on one rank fails on all."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from distributed import together
from torch import distributed

from gigatrain import config
from gigatrain.checkpoint import Checkpoints, fill, weights_sha256
from gigatrain.errors import CheckpointError
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Piece, Place, chunk

SHAPES = {"a": (7, 5), "b": (2, 6), "c": (9, 4), "d": (3,), "e": (4, 3, 5), "steps": (), "none": (0, 3)}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {
        "weights": weights,
        "optimizer": {f"m.{name}": tensor.bfloat16() for name, tensor in weights.items()} | {"updates": torch.tensor(seed)},
        "random": {"cpu": torch.arange(40, dtype=torch.uint8) + seed},
    }


def place(shape):
    return Place(shape, (0,) * len(shape), shape)


def cut(shape, dims, ranks, rank):
    """The box of `rank`: chunks along each of `dims` that the tensor has, the rest of the grid holds copies. Returns it and whether this rank writes."""
    found, writes = place(shape), True
    sizes = {"whole": (), "rows": (ranks,), "columns": (1, ranks), "both": (2, ranks // 2)}[dims]
    at = rank
    for dim, size in enumerate(sizes):
        index, at = at % size, at // size
        if dim < len(shape):
            found = found.cut(dim, *chunk(found.size[dim], index, size))
        else:
            writes = writes and index == 0
    return found, writes if sizes else rank == 0


def pieces(whole, dims, ranks, rank):
    state = {}
    for group, named in whole.items():
        state[group] = {}
        for name, tensor in named.items():
            box, writes = cut(tuple(tensor.shape), dims if group != "random" else "whole", ranks, rank)
            state[group][name] = Piece(box.of(tensor).clone(), box, writes)
    return state


def emptied(state):
    zeros = {"random": torch.zeros_like}
    return {
        group: {name: Piece(zeros.get(group, torch.ones_like)(piece.tensor), piece.place, piece.writes) for name, piece in named.items()}
        for group, named in state.items()
    }


def checkpoints(folder, ranks=1, rank=0, keep=3):
    return Checkpoints(Path(folder), run="r", plan_sha256="p", keep=keep, mesh=Mesh(config.Mesh(shard=ranks), rank) if ranks > 1 else None)


def _save(rank, folder, ranks, dims, steps):
    saves = checkpoints(folder, ranks, rank)
    for step in steps:
        saves.save(step, pieces(tensors(step), dims, ranks, rank), {"at": step})
    return saves.steps()


def _load(rank, folder, ranks, dims):
    """What is wrong with what this rank loads, and what was refused."""
    saves = checkpoints(folder, ranks, rank)
    found, refused = saves.latest()
    state = pieces(tensors(found.step), dims, ranks, rank)
    live = emptied(state)
    fill(found, live, saves.mesh)
    wrong = [
        name for group, named in state.items() for name, piece in named.items() if not torch.equal(piece.tensor, live[group][name].tensor)
    ]
    return found.step, found.state, wrong, refused


def sha256(weights):
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@pytest.mark.parametrize("dims", ["rows", "columns", "both", "whole"])
def test_what_four_ranks_save_any_ranks_take_up_bitwise(tmp_path, dims):
    assert together(4, _save, str(tmp_path), 4, dims, [5]) == [[5]] * 4
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000005" / "manifest.json").read_text())
    assert manifest["ranks"] == 4
    assert (
        len(manifest["tensors"]["weights"]["c"]["pieces"]) == {"rows": 3, "columns": 4, "both": 4, "whole": 1}[dims]
    )  # 9 rows: 3, 3, 3, 0
    assert sorted(name for name in manifest["files"] if name.startswith("random")) == ["random-00000.safetensors"]
    whole = tensors(5)
    found, refused = checkpoints(tmp_path).latest()
    assert refused == []
    for group, named in whole.items():
        read = found.tensors(group)
        assert read.keys() == named.keys()
        assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in named.items())
    assert weights_sha256(found) == sha256(whole["weights"])
    assert _load(0, tmp_path, 1, "whole") == (5, {"at": 5}, [], [])
    for ranks, other in ((2, "columns"), (3, "rows"), (4, "both")):
        assert together(ranks, _load, str(tmp_path), ranks, other) == [(5, {"at": 5}, [], [])] * ranks


def test_one_process_saves_and_three_ranks_take_it_up(tmp_path):
    _save(0, tmp_path, 1, "whole", [2])
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert {path.name for path in folder.glob("*.safetensors")} == {f"{group}-00000.safetensors" for group in tensors(0)}
    assert together(3, _load, str(tmp_path), 3, "columns") == [(2, {"at": 2}, [], [])] * 3


def test_only_the_newest_are_kept_by_many_ranks(tmp_path):
    assert together(2, _save, str(tmp_path), 2, "rows", [1, 2, 3, 4, 4, 5])[0] == [3, 4, 5]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in (3, 4, 5)}


def _stages(rank, folder):
    """Two stages: each rank holds its own names only, and takes up the others'."""
    whole = tensors(3)["weights"]
    saves = checkpoints(folder, 2, rank)
    mine = [name for index, name in enumerate(whole) if index % 2 == rank]
    saves.save(3, {"weights": {name: Piece.whole(whole[name].clone()) for name in mine}}, {})
    found, _ = checkpoints(folder, 2, rank).latest()
    theirs = {"weights": {name: Piece.whole(torch.ones_like(whole[name])) for name in whole if name not in mine}}
    fill(found, theirs, saves.mesh)
    assert all(torch.equal(piece.tensor, whole[name]) for name, piece in theirs["weights"].items())
    try:
        fill(found, {"weights": {name: piece for name, piece in theirs["weights"].items() if name != "c"}}, saves.mesh)
    except CheckpointError as failure:
        return str(failure)


def test_stages_hold_other_names_but_each_name_is_some_ranks(tmp_path):
    said = together(2, _stages, str(tmp_path))
    assert said[0] == said[1]
    assert "weights has other tensors than this run: c (1 in all)" in said[0]


@pytest.mark.parametrize("file", ["weights-00000", "weights-00001", "optimizer-00003"])
def test_damage_to_one_file_is_seen_by_all_ranks(tmp_path, file):
    together(4, _save, str(tmp_path), 4, "columns", [1, 2])
    path = tmp_path / "checkpoints" / "step-00000002" / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    found = together(4, _load, str(tmp_path), 4, "both")
    assert found == [found[0]] * 4
    step, state, wrong, refused = found[0]
    assert (step, state, wrong, len(refused)) == (1, {"at": 1}, [], 1)
    assert f"step-00000002/{file}.safetensors is damaged" in refused[0]


def test_a_missing_piece_is_refused_by_name(tmp_path):
    together(2, _save, str(tmp_path), 2, "rows", [1, 2])
    folder = tmp_path / "checkpoints" / "step-00000002"
    good = json.loads((folder / "manifest.json").read_text())
    for change in ("lost", "twice", "moved"):
        manifest = json.loads(json.dumps(good))
        boxes = manifest["tensors"]["optimizer"]["m.c"]["pieces"]
        if change == "lost":
            del boxes[1]
        elif change == "twice":
            boxes.append(boxes[0])
        else:
            boxes[1]["start"][0] -= 1
        text = json.dumps(manifest)
        (folder / "manifest.json").write_text(text)
        (folder / "COMMITTED").write_text(hashlib.sha256(text.encode()).hexdigest())
        found, refused = checkpoints(tmp_path).latest()
        assert found.step == 1
        assert "the pieces of optimizer m.c leave a gap in [9, 4], or lie one over another or outside" in refused[0]


def test_a_file_that_holds_another_box_than_the_manifest_says_is_not_used(tmp_path):
    together(2, _save, str(tmp_path), 2, "rows", [1])
    folder = tmp_path / "checkpoints" / "step-00000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    first, second = manifest["tensors"]["weights"]["c"]["pieces"]  # 5 and 4 rows
    first["size"], second["start"], second["size"] = [4, 4], [4, 0], [5, 4]
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "COMMITTED").write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(CheckpointError, match=r"weights-0000\d.safetensors holds c as F32 \[\d, 4\], by the manifest it is F32 \[\d, 4\]"):
        _load(0, tmp_path, 1, "whole")


def _gap(rank, folder):
    saves = checkpoints(folder, 2, rank)
    state = pieces(tensors(1), "rows", 2, rank)
    if rank == 1:
        box = state["weights"]["a"]
        state["weights"]["a"] = Piece(box.tensor, box.place, False)
    with pytest.raises(ValueError if rank == 0 else CheckpointError, match="the pieces of weights a leave a gap"):
        saves.save(1, state, {})
    return saves.steps()


def test_pieces_that_leave_a_gap_are_never_committed(tmp_path):
    assert together(2, _gap, str(tmp_path)) == [[], []]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _wrong_type(rank, folder):
    saves = checkpoints(folder, 2, rank)
    found, _ = saves.latest()
    live = emptied(pieces(tensors(1), "rows", 2, rank))
    if rank == 1:
        piece = live["weights"]["a"]
        live["weights"]["a"] = Piece(piece.tensor.double(), piece.place)
    before = live["weights"]["c"].tensor.clone()
    try:
        fill(found, live, saves.mesh)
    except CheckpointError as failure:
        return str(failure), failure.shared, torch.equal(live["weights"]["c"].tensor, before)


def test_what_does_not_fit_on_one_rank_is_refused_on_all_before_anything_is_copied(tmp_path):
    _save(0, tmp_path, 1, "whole", [1])
    said = together(2, _wrong_type, str(tmp_path))
    assert said[0] == said[1]
    text, shared, untouched = said[0]
    assert shared
    assert untouched
    assert "rank 1 of 2" in text
    assert "weights a is torch.float32 (7, 5), this run needs torch.float64 (7, 5)" in text


def _full(rank, folder, count):
    """A save that runs out of space on rank 1 only, as its disk is small; then one that fits."""
    saves = checkpoints(folder, 2, rank)
    saves.save(1, pieces(tensors(1), "rows", 2, rank), {"at": 1})
    saves._check_space = lambda state: None  # type: ignore[method-assign]
    write = saves._write

    def elsewhere(temporary, step, state, extra):
        if rank == 0:
            return write(temporary, step, state, extra)
        os.symlink(Path(folder) / "small" / "weights", temporary / "weights-00001.safetensors")
        return write(temporary, step, state, extra)

    if rank == 1 and (Path(folder) / "small").is_dir():
        saves._write = elsewhere  # type: ignore[method-assign]
    box = Place((count,), (0,), (count,)).cut(0, *chunk(count, rank, 2))
    try:
        saves.save(2, {"weights": {"w": Piece(torch.randn(box.size), box)}}, {})
        said = ""
    except CheckpointError as failure:
        said = str(failure)
    assert distributed.get_world_size() == 2
    left = {path.name for path in saves.folder.iterdir()}
    distributed.barrier()
    saves._write = write  # type: ignore[method-assign]
    saves.save(3, pieces(tensors(3), "rows", 2, rank), {"at": 3})
    return said, left, saves.steps()


def test_a_full_disk_on_any_rank_is_an_error_on_all_and_the_next_save_goes_through(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        found = together(2, _full, str(mount), 1_200_000)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    said, left, steps = found[0]
    assert found[1][0] == said
    assert "step 2 could not be saved" in said
    assert "ENOSPC, No space left on device; earlier ones are untouched" in said
    assert left == {"step-00000001"}
    assert steps == [1, 3]


def _refusing(rank, folder, bad):
    """OSError, or a mistake of ours, in one rank's write."""
    saves = checkpoints(folder, 3, rank)
    write = saves._write

    def failing(*arguments):
        if rank == 2:
            raise bad
        return write(*arguments)

    saves._write = failing  # type: ignore[method-assign]
    try:
        saves.save(1, pieces(tensors(1), "rows", 3, rank), {})
    except (CheckpointError, RuntimeError) as failure:
        said = f"{type(failure).__name__}: {failure}"
    saves._write = write  # type: ignore[method-assign]
    saves.save(2, pieces(tensors(2), "rows", 3, rank), {})
    return said, saves.steps()


@pytest.mark.parametrize("bad", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_what_fails_on_one_rank_fails_on_all_and_none_waits(tmp_path, bad):
    found = together(3, _refusing, str(tmp_path), bad)
    text = "step 1 could not be saved in .*: (ENOSPC, No space left on device|RuntimeError, a bug); earlier ones are untouched"
    assert re.fullmatch("CheckpointError: rank 2 of 3: " + text, found[0][0])
    assert found[0] == found[1]
    assert [steps for _, steps in found] == [[2]] * 3
    assert found[2][0] == (found[0][0] if isinstance(bad, OSError) else "RuntimeError: a bug")


def _too_large(rank, folder):
    saves = checkpoints(folder, 2, rank)
    place = Place((1 << 50,), (0,), (1 << 50,)).cut(0, rank << 49, 1 << 49)
    huge = torch.zeros(1).expand(1 << 49)
    try:
        saves.save(1, {"weights": {"w": Piece(huge, place)}}, {})
    except CheckpointError as failure:
        return str(failure), list(saves.folder.iterdir())


def test_the_space_of_all_ranks_is_counted(tmp_path):
    found = together(2, _too_large, str(tmp_path))
    assert found[0][0] == found[1][0]
    assert f"a checkpoint needs {4 * 2**30 + 1} MiB and" in found[0][0]
    assert found[0][1] == []


def _killed(rank, folder, victim, fatal):
    """Two saves; one rank is killed at the `fatal`-th sync, rename or creation of the second."""
    calls = itertools.count(1)

    def counted(function):
        def wrapper(*arguments, **named):
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return wrapper

    saves = checkpoints(folder, 2, rank, keep=1)
    saves.save(1, pieces(tensors(1), "rows", 2, rank), {"at": 1})
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    if rank == victim:
        for name in ("fsync", "rename", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
    try:
        saves.save(2, pieces(tensors(2), "rows", 2, rank), {"at": 2})
    except RuntimeError:  # gloo: the peer is gone
        time.sleep(60)


@pytest.mark.parametrize(("victim", "fatal"), [(0, 1), (0, 3), (0, 8), (0, 11), (0, 13), (1, 1), (1, 2)])
def test_a_killed_rank_leaves_a_whole_checkpoint(tmp_path, victim, fatal):
    with pytest.raises(AssertionError, match=f"rank {victim} of 2: it died"):
        together(2, _killed, str(tmp_path), victim, fatal)
    found, refused = checkpoints(tmp_path).latest()
    assert refused == []
    assert _load(0, tmp_path, 1, "whole") == (found.step, {"at": found.step}, [], [])
    assert _save(0, tmp_path, 1, "whole", [3])[-1] == 3
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))
